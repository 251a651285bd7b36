"""One person moves the clipped sum by no more than C, noise is everywhere, nothing is left behind: either engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from fedgraft.core.errors import UserError
from fedgraft.privacy.clipping import ENGINES, create_engine, require_exact
from fedgraft.privacy.noise import RandomStream

Case = tuple[str, str, str]
TEXT = "sequence-classification"
BERT = ("bert", TEXT)
LORA = (*BERT, "lora")

both = pytest.mark.parametrize("engine", ["exact", "opacus"])


def _stream(*parts: object) -> RandomStream:
    return RandomStream.seeded_not_private("test", *parts)


# --- sensitivity ---------------------------------------------------------------------------------------------------


def test_one_huge_example_counts_no_more_than_the_bound_head_included(lab: Any, fitting: Case) -> None:
    adapter = lab.double(fitting)
    record = lab.records(*fitting[:2], (7,))
    got = lab.summed(adapter, fitting, [record], 0.7, scale=(1e12,))
    assert float(got.norm()) == pytest.approx(0.7, rel=1e-9)
    if fitting[1] != "causal-lm":
        head = [t for t in adapter.spec.tensors if t.role == "head"]
        at = 0
        squares = {}
        for name, parameter in adapter.trainables().items():
            squares[name] = float(got[at : at + parameter.numel()].square().sum())
            at += parameter.numel()
        # The head's share is inside the bound, and it is not nothing.
        assert sum(squares[t.name] for t in head) > 1e-4 * 0.7**2


@pytest.mark.parametrize("method", ["lora", "dora", "bitfit", "ia3", "ln", "prefix", "prompt"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_neighbours_differ_by_no_more_than_the_bound(lab: Any, family: str, method: str) -> None:
    """Add or remove one crafted record; the rest must not so much as notice."""
    case, clip = (family, "causal-lm" if (family, method) == ("gpt2", "prompt") else TEXT, method), 0.5
    adapter = lab.double(case)
    rest = lab.records(*case[:2], lab.lengths)
    long = lab.records(*case[:2], (40,), seed=1)
    twin = [rest[1]]
    base = lab.summed(adapter, case, [rest], clip)
    crafted = [(long, 1.0), (twin, 1.0), (long, 1e9), (long, -1e9), (twin, 1e-9)]
    if "label" in rest[1]:
        crafted.append(([{**rest[1], "label": (rest[1]["label"] + 1) % 3}], 1.0))
    for extra, scale in crafted:
        for batches in ([[*extra, *rest]], [extra, rest]):
            weights = [scale, *[1.0] * (len(batches[0]) - 1)]
            moved = lab.summed(adapter, case, batches, clip, scale=weights)
            change = float((moved - base).norm())
            assert change <= clip * (1 + 1e-6)
            # A record that is cut to the bound moves the sum by all of it: the bound is not kept by doing nothing.
            if abs(scale) > 1:
                assert change == pytest.approx(clip, rel=1e-6)
    alone = lab.summed(adapter, case, [long], clip, scale=(1e9,))
    assert float(alone.norm()) <= clip * (1 + 1e-6)


@both
def test_the_mean_loss_of_a_batch_is_refused(lab: Any, engine: str) -> None:
    adapter = lab.attach(*LORA)
    batch = lab.batch(*BERT, lab.records(*BERT, lab.lengths))
    with create_engine(engine, adapter.model, adapter.trainables(), 1.0) as made:
        for reduce in (torch.mean, lambda losses: losses[:, None]):
            made.expect(5)
            with pytest.raises(
                UserError, match=r"losses of \d dimensions; under DP there must be one number an example"
            ):
                made.add(reduce(lab.losses(adapter.model, batch)))


@both
def test_losses_that_were_averaged_in_groups_are_refused(lab: Any, engine: str) -> None:
    adapter = lab.attach(*LORA)
    batch = lab.batch(*BERT, lab.records(*BERT, (3, 4, 5, 6)))
    with create_engine(engine, adapter.model, adapter.trainables(), 1.0) as made:
        made.expect(4)
        with pytest.raises(UserError, match="another number of losses than of examples"):
            made.add(lab.losses(adapter.model, batch).reshape(2, 2).mean(1))


@both
def test_a_mean_that_is_told_to_every_example_is_refused(lab: Any, engine: str) -> None:
    """The shape is right, but each loss hangs on all rows."""
    adapter = lab.attach(*LORA)
    lab.shaken(adapter)
    batch = lab.batch(*BERT, lab.records(*BERT, lab.lengths))
    with create_engine(engine, adapter.model, adapter.trainables(), 1.0) as made:
        made.expect(5)
        with pytest.raises(UserError, match="no exact per-sample gradient"):
            made.add(lab.losses(adapter.model, batch).mean().expand(5))


# --- units ---------------------------------------------------------------------------------------------------------


@both
def test_rows_of_one_unit_are_summed_and_then_clipped_once(lab: Any, engine: str) -> None:
    adapter = lab.double(LORA)
    records = lab.records(*BERT, (3, 11, 1, 6, 8, 2))
    units = [7, 2, 7, 5, 2, 7]
    rows = lab.rows(adapter, LORA, records)
    sums = torch.stack([rows[[0, 2, 5]].sum(0), rows[[1, 4]].sum(0), rows[3]])
    clip = float(sums.norm(dim=1).median())
    with create_engine(engine, adapter.model, adapter.trainables(), clip) as made:
        lab.add(made, adapter, LORA, records, units=units)
        assert (made.within, made.over) == (
            int((sums.norm(dim=1) <= clip).sum()),
            int((sums.norm(dim=1) > clip).sum()),
        )
        made.release(0.0, 1.0, _stream())
        lab.close(lab.flat(adapter.trainables()), lab.clipped(sums, clip))
        assert (made.within, made.over) == (0, 0)


@both
def test_a_row_that_is_not_finite_leaves_the_rest_of_its_unit_alone(lab: Any, engine: str) -> None:
    adapter = lab.double(LORA)
    records = lab.records(*BERT, (3, 11, 1, 6))
    rows = lab.rows(adapter, LORA, records)
    nan = float("nan")
    with create_engine(engine, adapter.model, adapter.trainables(), 0.1) as made:
        lab.add(made, adapter, LORA, records, scale=(1.0, nan, 1.0, nan), units=[0, 0, 1, 2])
        # The unit that has no row left counts nowhere.
        assert (made.skipped, made.within, made.over) == (2, 0, 2)
        made.release(0.0, 1.0, _stream())
        lab.close(lab.flat(adapter.trainables()), lab.clipped(rows[[0, 2]], 0.1))


@both
def test_units_within_and_over_the_bound_are_counted_until_the_release(lab: Any, engine: str) -> None:
    adapter = lab.double(LORA)
    records = lab.records(*BERT, lab.lengths)
    norms = lab.rows(adapter, LORA, records).norm(dim=1)
    clip = float(norms.sort().values[1]) * (1 + 1e-9)
    with create_engine(engine, adapter.model, adapter.trainables(), clip) as made:
        for records_of_one in (records[:2], records[2:]):
            lab.add(made, adapter, LORA, records_of_one)
        assert (made.within, made.over) == (2, 3)
        made.release(0.0, 1.0, _stream())
        made.clip = 2 * float(norms.max())
        lab.add(made, adapter, LORA, records)
        assert (made.within, made.over) == (5, 0)


def test_the_bound_may_change_between_steps(lab: Any) -> None:
    adapter = lab.double(LORA)
    records = lab.records(*BERT, lab.lengths)
    with create_engine("exact", adapter.model, adapter.trainables(), 1.0) as made:
        for clip in (1.0, 0.01):
            made.clip = clip
            lab.add(made, adapter, LORA, records)
            made.release(0.0, 1.0, _stream())
            got = lab.flat(adapter.trainables())
            lab.close(got, lab.clipped(lab.rows(adapter, LORA, records), clip))
        made.release(2.0, 10.0, _stream("c"))
        noise = torch.from_numpy(_stream("c").normal(adapter.spec.parameters))
        lab.close(lab.flat(adapter.trainables()), 2.0 * 0.01 * noise / 10.0, relative=1e-12)
        for wrong in (0.0, -1.0, float("nan"), float("inf")):
            with pytest.raises(UserError, match=r"privacy\.clip"):
                made.clip = wrong


# --- noise ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "task"), [("bert", TEXT), ("vit", "image-classification")])
@pytest.mark.parametrize("method", ["lora", "bitfit", "dora"])
def test_noise_of_the_promised_size_is_on_every_coordinate(lab: Any, family: str, task: str, method: str) -> None:
    """Noise alone, many times: per tensor a two-sided chi-square test, the head like every other."""
    adapter = lab.attach(family, task, method)
    sigma, clip, expected, steps = 1.3, 0.5, 20.0, 60
    stream = _stream("noise", family, method)
    draws = []
    with create_engine("exact", adapter.model, adapter.trainables(), clip) as engine:
        for _ in range(steps):
            engine.release(sigma, expected, stream)
            draws.append(lab.flat(adapter.trainables()).double().numpy() * expected / (sigma * clip))
    z = np.stack(draws)
    assert z.shape == (steps, adapter.spec.parameters)
    at, roles = 0, set()
    for tensor in adapter.spec.tensors:
        part = z[:, at : at + tensor.size]
        at += tensor.size
        roles.add(tensor.role)
        total, count = float((part**2).sum()), part.size
        assert 2 * min(stats.chi2.cdf(total, count), stats.chi2.sf(total, count)) > 1e-5, tensor.name
        assert stats.kstest(part.ravel(), "norm").pvalue > 1e-5, tensor.name
    assert "head" in roles
    # Another draw each step and each coordinate; a few collide in float32.
    assert len(np.unique(z)) > 0.99 * z.size
    assert stats.pearsonr(z[:-1].ravel(), z[1:].ravel()).pvalue > 1e-5
    assert stats.pearsonr(z[:, :-1].ravel(), z[:, 1:].ravel()).pvalue > 1e-5


@both
def test_the_release_is_the_sum_plus_the_noise_over_the_expected_batch(lab: Any, engine: str) -> None:
    adapter = lab.double(LORA)
    records = lab.records(*BERT, lab.lengths)
    clean = lab.summed(adapter, LORA, [records], 0.5, engine=engine)
    with create_engine(engine, adapter.model, adapter.trainables(), 0.5) as made:
        lab.add(made, adapter, LORA, records)
        made.release(2.0, 40.0, _stream("a"))
        got = lab.flat(adapter.trainables())
    noise = torch.from_numpy(_stream("a").normal(adapter.spec.parameters))
    # Divided by the expected size: the actual one is a secret.
    lab.close(got, (clean + 2.0 * 0.5 * noise) / 40.0, relative=1e-12)


@both
def test_an_empty_batch_is_a_step_of_noise_alone(lab: Any, engine: str) -> None:
    adapter = lab.double(LORA)
    with create_engine(engine, adapter.model, adapter.trainables(), 0.5) as made:
        made.release(2.0, 10.0, _stream("b"))
        untouched = lab.flat(adapter.trainables())
        made.add(torch.zeros(0, dtype=torch.float64))
        made.release(2.0, 10.0, _stream("b"))
        assert torch.equal(lab.flat(adapter.trainables()), untouched)
    noise = torch.from_numpy(_stream("b").normal(adapter.spec.parameters))
    lab.close(untouched, 2.0 * 0.5 * noise / 10.0, relative=1e-12)


@both
def test_a_release_forgets_what_it_released(lab: Any, engine: str) -> None:
    adapter = lab.double(LORA)
    records = lab.records(*BERT, lab.lengths)
    once = lab.summed(adapter, LORA, [records], 1.0, engine=engine)
    with create_engine(engine, adapter.model, adapter.trainables(), 1.0) as made:
        for _ in range(3):
            lab.add(made, adapter, LORA, records)
            made.release(0.0, 1.0, _stream())
            lab.close(lab.flat(adapter.trainables()), once, relative=1e-12)
            with torch.no_grad():
                # What an optimiser does between releases must not reach the next one.
                for parameter in adapter.trainables().values():
                    parameter.add_(0.0)


@pytest.mark.parametrize(
    ("noise", "expected"), [(-1.0, 10.0), (float("nan"), 10.0), (float("inf"), 10.0), (1.0, 0.0), (1.0, -3.0)]
)
def test_a_release_without_meaning_is_refused(lab: Any, noise: float, expected: float) -> None:
    adapter = lab.attach(*LORA)
    with (
        create_engine("exact", adapter.model, adapter.trainables(), 1.0) as engine,
        pytest.raises(ValueError, match="makes no sense"),
    ):
        engine.release(noise, expected, _stream())


# --- rows that are no numbers --------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_left_out_and_counted(lab: Any, bad: float, engine: str) -> None:
    adapter = lab.double(LORA)
    records = lab.records(*BERT, lab.lengths)
    rows = lab.rows(adapter, LORA, records)
    with create_engine(engine, adapter.model, adapter.trainables(), 1.0) as made:
        lab.add(made, adapter, LORA, records, scale=(1.0, bad, 1.0, 1.0, bad))
        assert made.skipped == 2
        made.release(0.0, 1.0, _stream())
        lab.close(lab.flat(adapter.trainables()), lab.clipped(rows[[0, 2, 3]], 1.0))


def test_a_row_that_is_not_finite_spoils_no_other_in_any_method(lab: Any, fitting: Case) -> None:
    adapter = lab.double(fitting)
    records = lab.records(*fitting[:2], lab.lengths)
    rows = lab.rows(adapter, fitting, records)
    with create_engine("exact", adapter.model, adapter.trainables(), 1.0) as made:
        lab.add(made, adapter, fitting, records, scale=(1.0, float("nan"), 1.0, 1.0, 1.0))
        assert made.skipped == 1
        made.release(0.0, 1.0, _stream())
        lab.close(lab.flat(adapter.trainables()), lab.clipped(rows[[0, 2, 3, 4]], 1.0))


@both
def test_a_gradient_too_large_for_its_norm_is_left_out(lab: Any, engine: str) -> None:
    """In float32 a norm overflows before its entries do; the row must not come through unclipped."""
    adapter = lab.attach(*LORA)
    lab.shaken(adapter)
    batches = [lab.records(*BERT, lab.lengths)]
    got = lab.summed(adapter, LORA, batches, 1.0, scale=(1.0, 1e30, 1.0, 1.0, 1.0), engine=engine)
    assert torch.isfinite(got).all()
    assert float(got.norm()) <= 4.0 * (1 + 1e-6)


@both
def test_a_gradient_of_zero_stays_zero(lab: Any, engine: str) -> None:
    adapter = lab.double(LORA)
    got = lab.summed(adapter, LORA, [lab.records(*BERT, (3, 4))], 1.0, scale=(0.0, 0.0), engine=engine)
    assert torch.equal(got, torch.zeros_like(got))


# --- refusals ------------------------------------------------------------------------------------------------------


def test_every_method_can_be_private_as_its_registry_entry_says(lab: Any, fitting: Case) -> None:
    from fedgraft.methods import create_method

    adapter = lab.attach(*fitting)
    assert create_method(fitting[2]).dp == "exact"
    require_exact(adapter.model, adapter.trainables())


@both
def test_a_trainable_that_is_not_listed_is_refused(lab: Any, engine: str) -> None:
    adapter = lab.attach(*LORA)
    for name in adapter.trainables():
        rest = {n: p for n, p in adapter.trainables().items() if n != name}
        with pytest.raises(UserError, match="it would escape clipping") as refusal:
            require_exact(adapter.model, rest, engine)
        assert name in str(refusal.value)


@both
def test_a_listed_tensor_that_is_frozen_or_foreign_is_refused(lab: Any, engine: str) -> None:
    adapter = lab.attach(*LORA)
    listed = adapter.trainables()
    first = next(iter(listed))
    listed[first].requires_grad_(False)
    with pytest.raises(UserError, match=f"tensor {first} is listed as trained but is frozen"):
        require_exact(adapter.model, listed, engine)
    with pytest.raises(UserError, match="no layer of the model owns it"):
        require_exact(adapter.model, {**adapter.trainables(), "stranger": nn.Parameter(torch.zeros(3))}, engine)
    with pytest.raises(UserError, match="nothing to clip"):
        require_exact(nn.Linear(2, 2).requires_grad_(False), {}, engine)
    twice = {**adapter.trainables(), "again": next(iter(adapter.trainables().values()))}
    with pytest.raises(UserError, match="under two names"):
        require_exact(adapter.model, twice, engine)


@both
def test_a_hook_that_would_see_what_is_not_clipped_is_refused(lab: Any, engine: str) -> None:
    for register in ("register_hook", "register_post_accumulate_grad_hook"):
        adapter = lab.attach(*LORA)
        name, parameter = next(iter(adapter.trainables().items()))
        handle = getattr(parameter, register)(lambda *_: None)
        with pytest.raises(UserError, match=f"tensor {name} has a gradient hook"):
            require_exact(adapter.model, adapter.trainables(), engine)
        handle.remove()
        require_exact(adapter.model, adapter.trainables(), engine)


@both
@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bound_that_is_none_is_refused(lab: Any, clip: float, engine: str) -> None:
    adapter = lab.attach(*LORA)
    with pytest.raises(UserError, match=r"privacy\.clip"):
        create_engine(engine, adapter.model, adapter.trainables(), clip)


def test_an_engine_that_is_none_is_refused_with_those_there_are(lab: Any) -> None:
    adapter = lab.attach(*LORA)
    with pytest.raises(UserError, match=r"privacy\.engine is `ghost`; there are exact, opacus"):
        create_engine("ghost", adapter.model, adapter.trainables(), 1.0)
    with pytest.raises(UserError, match=r"privacy\.engine is `ghost`"):
        require_exact(adapter.model, adapter.trainables(), "ghost")
    assert list(ENGINES) == ["exact", "opacus"]


class _Toy(nn.Module):
    """A linear layer behind something that may mix records."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.between = between
        self.last = nn.Linear(4, 1)
        self.between.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.between(x))[:, 0]


@both
def test_batch_statistics_never_leave_without_noise(engine: str) -> None:
    """A frozen BatchNorm in training mode mixes the records and moves its running mean."""
    model, x = _Toy(nn.BatchNorm1d(4)), torch.randn(6, 4)
    trainables = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with create_engine(engine, model, trainables, 1.0) as made:
        model.eval()
        model.last.train()
        made.expect(6)
        made.add(model(x))
        model.between.train()
        made.expect(6)
        with pytest.raises(UserError, match="layer between keeps statistics of the batch"):
            made.add(model(x))
    model = _Toy(nn.BatchNorm1d(4, track_running_stats=False))
    with pytest.raises(UserError, match=r"layer between \(BatchNorm1d\) normalises over the batch"):
        require_exact(model, {n: p for n, p in model.named_parameters() if p.requires_grad}, engine)


class _Mixed(nn.Module):
    """Sends the rows to a layer in another order and back: right shapes, right sum, wrong rows, like routed experts."""

    def __init__(self) -> None:
        super().__init__()
        self.expert = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.expert(x.flip(0)).flip(0)[:, 0]


class _Behind(nn.Module):
    """Uses a layer's weight once through the layer and once behind its back."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.layer(x) + 2 * x @ self.layer.weight.T)[:, 0]


class _Once(nn.Module):
    """Builds something once for the whole batch, beside a use for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.layer(x) * self.layer(torch.ones(1, 4)))[:, 0]


class _Centred(nn.Module):
    """Takes the mean of the batch off every row."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(4, 3), nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.layer(x))
        return self.last(hidden - hidden.mean(0))[:, 0] ** 2


@both
@pytest.mark.parametrize("kind", [_Mixed, _Behind, _Once, _Centred])
def test_rows_that_are_not_their_examples_own_are_found_on_the_first_batch(kind: type[nn.Module], engine: str) -> None:
    torch.manual_seed(0)
    model = kind()
    parameters = dict(model.named_parameters())
    with create_engine(engine, model, parameters, 1.0) as made:
        made.expect(6)
        with pytest.raises(UserError, match="cannot be trained with privacy") as refusal:
            made.add(model(torch.randn(6, 4)))
    assert any(name in str(refusal.value) for name in parameters)


# --- what is left behind -------------------------------------------------------------------------------------------


def _footprint(model: nn.Module) -> dict[str, tuple[str, ...]]:
    parts: dict[str, Any] = {**dict(model.named_modules()), **dict(model.named_parameters())}
    marks = {name: tuple(sorted(vars(part))) for name, part in parts.items()}
    for name, module in model.named_modules():
        hooks = (module._forward_hooks, module._backward_hooks, module._forward_pre_hooks, module._backward_pre_hooks)
        marks[name] += (str([len(h) for h in hooks]), str(module.training))
    return marks


def _leaves_nothing(lab: Any, case: Case, engine: str) -> None:
    adapter = lab.attach(*case)
    lab.shaken(adapter)
    model, records = adapter.model, lab.records(*case[:2], lab.lengths)
    batch = lab.batch(*case[:2], records)
    before, names = _footprint(model), [n for n, _ in model.named_parameters()]
    with torch.no_grad():
        want = lab.losses(model, batch)
    results = []
    for _ in range(2):
        made = create_engine(engine, model, adapter.trainables(), 1.0)
        for _ in range(2):
            with made:
                lab.add(made, adapter, case, records)
                made.release(1.0, 5.0, _stream("left"))
                results.append(lab.flat(adapter.trainables()))
            assert _footprint(model) == before
            assert all(p.grad is None for p in model.parameters())
    assert [n for n, _ in model.named_parameters()] == names
    assert all(torch.equal(result, results[0]) for result in results)
    with torch.no_grad():
        assert torch.equal(lab.losses(model, batch), want)
    # Plain training still works, and is not hooked.
    lab.losses(model, batch).sum().backward()
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())
    assert all(p.grad is not None for p in adapter.trainables().values())


def test_nothing_is_left_behind(lab: Any, fitting: Case) -> None:
    _leaves_nothing(lab, fitting, "exact")


@pytest.mark.parametrize("method", ["lora", "bitfit", "prefix"])
def test_opacus_leaves_nothing_behind(lab: Any, method: str) -> None:
    _leaves_nothing(lab, (*BERT, method), "opacus")


@both
def test_a_failure_inside_leaves_nothing_behind_and_nothing_in_the_next_sum(lab: Any, engine: str) -> None:
    adapter = lab.double(LORA)
    records = lab.records(*BERT, lab.lengths)
    want, before = lab.summed(adapter, LORA, [records], 1.0, engine=engine), _footprint(adapter.model)
    made = create_engine(engine, adapter.model, adapter.trainables(), 1.0)

    def interrupted() -> None:
        with made:
            lab.add(made, adapter, LORA, records)
            made.expect(5)
            lab.losses(adapter.model, lab.batch(*BERT, records))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert _footprint(adapter.model) == before
    with made:
        lab.add(made, adapter, LORA, records)
        made.release(0.0, 1.0, _stream())
        lab.close(lab.flat(adapter.trainables()), want, relative=1e-12)


@both
def test_evaluation_between_steps_changes_nothing(lab: Any, engine: str) -> None:
    adapter = lab.double(LORA)
    records = lab.records(*BERT, lab.lengths)
    want = lab.summed(adapter, LORA, [records], 1.0, engine=engine)
    with create_engine(engine, adapter.model, adapter.trainables(), 1.0) as made:
        with torch.no_grad():
            lab.losses(adapter.model, lab.batch(*BERT, records[:2]))
        lab.add(made, adapter, LORA, records)
        with torch.no_grad():
            lab.losses(adapter.model, lab.batch(*BERT, records[:1]))
        made.release(0.0, 1.0, _stream())
        lab.close(lab.flat(adapter.trainables()), want, relative=1e-12)


@both
def test_outside_its_context_it_refuses(lab: Any, engine: str) -> None:
    adapter = lab.attach(*LORA)
    made = create_engine(engine, adapter.model, adapter.trainables(), 1.0)
    with pytest.raises(UserError, match=r"got no per-sample gradient|no exact per-sample gradient"):
        lab.add(made, adapter, LORA, lab.records(*BERT, lab.lengths))
