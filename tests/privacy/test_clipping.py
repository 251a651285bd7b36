"""The clipped sum is that of a loop over examples, one person moves it by no more than C, and noise is everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from fedgraft.core.errors import UserError
from fedgraft.methods import AttachedAdapter
from fedgraft.privacy.clipping import ClippedGradients
from fedgraft.privacy.noise import RandomStream

Case = tuple[str, str, str]
TEXT = "sequence-classification"
BERT = ("bert", TEXT)
#: Words a record has: uneven, so that there is padding, and longer than the prefix.
LENGTHS = (3, 11, 1, 6, 8)


def _stream(*parts: object) -> RandomStream:
    return RandomStream.seeded_not_private("test", *parts)


def _flat(adapter: AttachedAdapter) -> torch.Tensor:
    """All gradients of the adapter in one vector."""
    parts = []
    for name, parameter in adapter.trainables().items():
        assert parameter.grad is not None, name
        parts.append(parameter.grad.reshape(-1).clone())
    return torch.cat(parts)


def _double(lab: Any, case: Case, **settings: Any) -> AttachedAdapter:
    """A shaken adapter in float64, so that an error of the rule cannot hide behind rounding."""
    adapter = lab.attach(*case, **settings)
    lab.shaken(adapter)
    adapter.model.double()
    return adapter


def _loop(lab: Any, adapter: AttachedAdapter, case: Case, records: Sequence[Any]) -> torch.Tensor:
    """The naive twin: each record by itself, without padding, hooks or neighbours. Rows are gradients."""
    rows = []
    for record in records:
        adapter.model.zero_grad()
        lab.losses(adapter.model, lab.batch(*case[:2], [record])).sum().backward()
        rows.append(_flat(adapter))
    adapter.model.zero_grad()
    return torch.stack(rows)


def _clipped(rows: torch.Tensor, clip: float) -> torch.Tensor:
    """Sum of rows, each scaled down to norm ``clip``."""
    total = torch.zeros_like(rows[0])
    for row in rows:
        norm = float(row.norm())
        total += row * (clip / norm if norm > clip else 1.0)
    return total


def _sum(
    lab: Any,
    adapter: AttachedAdapter,
    case: Case,
    batches: Sequence[Sequence[Any]],
    clip: float,
    scale: Sequence[float] = (),
) -> torch.Tensor:
    """What the engine adds up over ``batches``; ``scale`` multiplies the losses of the first batch."""
    with ClippedGradients(adapter.model, adapter.trainables(), clip) as engine:
        for index, batch in enumerate(batches):
            losses = lab.losses(adapter.model, lab.batch(*case[:2], batch))
            if scale and index == 0:
                losses = losses * torch.tensor(scale, dtype=losses.dtype)
            engine.add(losses)
        engine.release(0.0, 1.0, _stream())
        return _flat(adapter)


def _close(got: torch.Tensor, want: torch.Tensor, relative: float = 1e-9) -> None:
    assert got.dtype == want.dtype
    assert float((got - want).norm()) <= relative * float(want.norm())


# --- exactness -----------------------------------------------------------------------------------------------------


def test_the_clipped_sum_is_that_of_a_loop_over_examples(lab: Any, exact: Case) -> None:
    adapter = _double(lab, exact)
    records = lab.records(*exact[:2], LENGTHS)
    rows = _loop(lab, adapter, exact, records)
    norms = rows.norm(dim=1)
    clip = float(norms.median())
    # Some are clipped and some are not, or half of the rule would go untested.
    assert (norms > 1.01 * clip).any() and (norms < 0.99 * clip).any()
    _close(_sum(lab, adapter, exact, [records], clip), _clipped(rows, clip))


def test_micro_batches_add_up_to_one_batch(lab: Any, exact: Case) -> None:
    adapter = _double(lab, exact)
    records = lab.records(*exact[:2], LENGTHS)
    rows = _loop(lab, adapter, exact, records)
    clip = float(rows.norm(dim=1).median())
    _close(_sum(lab, adapter, exact, [records[:2], records[2:4], records[4:]], clip), _clipped(rows, clip))


@pytest.mark.parametrize("method", ["lora", "bitfit", "ln"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "vit"])
def test_reentrant_checkpointing_changes_nothing(lab: Any, family: str, method: str) -> None:
    # T5 has no biases: its stand-in is another scale of LoRA.
    method = "rslora" if (family, method) == ("t5", "bitfit") else method
    task = "image-classification" if family == "vit" else TEXT
    case = (family, task, method)
    adapter = _double(lab, case)
    records = lab.records(family, task, LENGTHS)
    rows = _loop(lab, adapter, case, records)
    clip = float(rows.norm(dim=1).median())
    recomputed = _checkpointed(adapter, reentrant=True)
    _close(_sum(lab, adapter, case, [records[:3], records[3:]], clip), _clipped(rows, clip))
    assert recomputed, "no layer was run a second time: checkpointing was not on"


def _checkpointed(adapter: AttachedAdapter, *, reentrant: bool) -> list[nn.Module]:
    """Switch checkpointing on without dropout; the list fills with modules that run under no_grad, to run again."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    model: Any = adapter.model
    # The second run of a layer would find the keys of the first in the cache.
    model.get_base_model().config.use_cache = False
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    first: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
            for inner in module.modules():
                inner.register_forward_hook(lambda m, *_: first.append(m) if not torch.is_grad_enabled() else None)
    return first


def test_other_checkpointing_is_refused_not_wrong(lab: Any) -> None:
    adapter = _double(lab, (*BERT, "lora"))
    _checkpointed(adapter, reentrant=False)
    with pytest.raises(UserError, match=r"lora_A\.default\.weight got no per-sample gradient.*must be reentrant"):
        _sum(lab, adapter, (*BERT, "lora"), [lab.records(*BERT, LENGTHS)], 1.0)


def test_bf16_autocast_keeps_the_bound_in_float32(lab: Any, exact: Case) -> None:
    """Activations are rounded; norms, scales, sums and noise are not, also when `add` runs inside the autocast."""
    adapter = lab.attach(*exact)
    lab.shaken(adapter)
    records = lab.records(*exact[:2], LENGTHS)
    batch = lab.batch(*exact[:2], records)
    rows = _loop(lab, adapter, exact, records)
    clip = 0.1 * float(rows.norm(dim=1).min())
    with ClippedGradients(adapter.model, adapter.trainables(), clip) as engine:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            engine.add(lab.losses(adapter.model, batch))
        engine.release(0.0, 1.0, _stream())
        got = _flat(adapter)
        for row in range(len(records)):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                engine.add(lab.losses(adapter.model, lab.batch(*exact[:2], [records[row]])))
            engine.release(0.0, 1.0, _stream())
            assert float(_flat(adapter).norm()) == pytest.approx(clip, rel=1e-5)
    assert got.dtype == torch.float32
    _close(got, _clipped(rows, clip), relative=0.1)


def test_convolutions_are_exact(lab: Any) -> None:
    case = ("vit", "image-classification", "lora")
    adapter = _double(lab, case, target_modules=("projection", "q_proj"))
    assert any("patch_embeddings.projection" in name for name in adapter.trainables())
    records = lab.records(*case[:2], LENGTHS)
    rows = _loop(lab, adapter, case, records)
    clip = float(rows.norm(dim=1).median())
    _close(_sum(lab, adapter, case, [records], clip), _clipped(rows, clip))


def test_a_frozen_factor_is_left_out_and_the_rest_is_exact(lab: Any) -> None:
    case = (*BERT, "lora")
    adapter = _double(lab, case)
    frozen = {pair.a for pair in adapter.spec.pairs}
    adapter.adopt(adapter.spec.with_policy("freeze", lambda tensor: tensor.name in frozen))
    assert set(adapter.trainables()) == set(adapter.spec.names) - frozen
    records = lab.records(*BERT, LENGTHS)
    rows = _loop(lab, adapter, case, records)
    clip = float(rows.norm(dim=1).median())
    _close(_sum(lab, adapter, case, [records], clip), _clipped(rows, clip))
    assert all(p.grad is None for n, p in adapter.model.named_parameters() if n in frozen)


def test_lora_dropout_is_exact_for_the_masks_that_were_drawn(lab: Any) -> None:
    case = (*BERT, "lora")
    adapter = _double(lab, case, dropout=0.4)
    batch = lab.batch(*BERT, lab.records(*BERT, LENGTHS))
    for name, module in adapter.model.named_modules():
        if ".lora_dropout" in name:
            module.train()
    parameters = list(adapter.trainables().values())
    torch.manual_seed(0)
    losses = lab.losses(adapter.model, batch)
    rows = torch.stack(
        [
            torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters, retain_graph=True)])
            for loss in losses
        ]
    )
    clip = float(rows.norm(dim=1).median())
    torch.manual_seed(0)
    with ClippedGradients(adapter.model, adapter.trainables(), clip) as engine:
        engine.add(lab.losses(adapter.model, batch))
        engine.release(0.0, 1.0, _stream())
        _close(_flat(adapter), _clipped(rows, clip))


def test_a_layer_that_is_used_twice_counts_twice(lab: Any) -> None:
    torch.manual_seed(0)
    shared = nn.Linear(4, 4).double()

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = shared

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.shared(torch.tanh(self.shared(x)))

    model, x = Twice(), torch.randn(5, 4, dtype=torch.float64)
    parameters = dict(model.named_parameters())
    rows = []
    for row in x:
        rows.append(
            torch.cat([g.reshape(-1) for g in torch.autograd.grad(model(row).sum(), list(parameters.values()))])
        )
    clip = float(torch.stack(rows).norm(dim=1).median())
    with ClippedGradients(model, parameters, clip) as engine:
        engine.add(model(x).sum(1))
        engine.release(0.0, 1.0, _stream())
        got = torch.cat([p.grad.reshape(-1) for p in parameters.values() if p.grad is not None])
    _close(got, _clipped(torch.stack(rows), clip))


# --- sensitivity ---------------------------------------------------------------------------------------------------


def test_one_huge_example_counts_no_more_than_the_bound_head_included(lab: Any, exact: Case) -> None:
    adapter = _double(lab, exact)
    record = lab.records(*exact[:2], (7,))
    got = _sum(lab, adapter, exact, [record], 0.7, scale=(1e12,))
    assert float(got.norm()) == pytest.approx(0.7, rel=1e-9)
    if exact[1] != "causal-lm":
        head = [t for t in adapter.spec.tensors if t.role == "head"]
        at = 0
        squares = {}
        for tensor in adapter.spec.tensors:
            squares[tensor.name] = float(got[at : at + tensor.size].square().sum())
            at += tensor.size
        # The head's share is inside the bound, and it is not nothing.
        assert sum(squares[t.name] for t in head) > 1e-4 * 0.7**2


@pytest.mark.parametrize("method", ["lora", "bitfit", "ln", "prefix"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_neighbours_differ_by_no_more_than_the_bound(lab: Any, family: str, method: str) -> None:
    """Add or remove one crafted record; the rest must not so much as notice."""
    case, clip = (family, TEXT, method), 0.5
    adapter = _double(lab, case)
    rest = lab.records(family, TEXT, LENGTHS)
    long = lab.records(family, TEXT, (40,), seed=1)
    twin = [rest[1]]
    opposite = [{**rest[1], "label": (rest[1]["label"] + 1) % 3}]
    base = _sum(lab, adapter, case, [rest], clip)
    for extra, scale in ((long, 1.0), (twin, 1.0), (opposite, 1.0), (long, 1e9), (long, -1e9), (twin, 1e-9)):
        for batches in ([[*extra, *rest]], [extra, rest]):
            weights = [scale, *[1.0] * (len(batches[0]) - 1)]
            moved = _sum(lab, adapter, case, batches, clip, scale=weights)
            change = float((moved - base).norm())
            assert change <= clip * (1 + 1e-6)
            # A record that is cut to the bound moves the sum by all of it: the bound is not kept by doing nothing.
            if abs(scale) > 1:
                assert change == pytest.approx(clip, rel=1e-6)
    alone = _sum(lab, adapter, case, [long], clip, scale=(1e9,))
    assert float(alone.norm()) <= clip * (1 + 1e-6)


def test_the_mean_loss_of_a_batch_is_refused(lab: Any) -> None:
    adapter = lab.attach(*BERT, "lora")
    batch = lab.batch(*BERT, lab.records(*BERT, LENGTHS))
    with ClippedGradients(adapter.model, adapter.trainables(), 1.0) as engine:
        for reduce in (torch.mean, lambda losses: losses[:, None]):
            with pytest.raises(UserError, match=r"loss of shape \[.*\]; under DP it must be one number an example"):
                engine.add(reduce(lab.losses(adapter.model, batch)))


def test_losses_that_were_averaged_in_groups_are_refused(lab: Any) -> None:
    adapter = lab.attach(*BERT, "lora")
    batch = lab.batch(*BERT, lab.records(*BERT, (3, 4, 5, 6)))
    with (
        ClippedGradients(adapter.model, adapter.trainables(), 1.0) as engine,
        pytest.raises(UserError, match="does not have one row for each of the 2 examples"),
    ):
        engine.add(lab.losses(adapter.model, batch).reshape(2, 2).mean(1))


# --- noise ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "task"), [("bert", TEXT), ("vit", "image-classification")])
@pytest.mark.parametrize("method", ["lora", "bitfit"])
def test_noise_of_the_promised_size_is_on_every_coordinate(lab: Any, family: str, task: str, method: str) -> None:
    """Noise alone, many times: per tensor a two-sided chi-square test, the head like every other."""
    adapter = lab.attach(family, task, method)
    sigma, clip, expected, steps = 1.3, 0.5, 20.0, 60
    stream = _stream("noise", family, method)
    draws = []
    with ClippedGradients(adapter.model, adapter.trainables(), clip) as engine:
        for _ in range(steps):
            engine.release(sigma, expected, stream)
            draws.append(_flat(adapter).double().numpy() * expected / (sigma * clip))
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


def test_the_release_is_the_sum_plus_the_noise_over_the_expected_batch(lab: Any) -> None:
    adapter = _double(lab, (*BERT, "lora"))
    records = lab.records(*BERT, LENGTHS)
    clean = _sum(lab, adapter, (*BERT, "lora"), [records], 0.5)
    with ClippedGradients(adapter.model, adapter.trainables(), 0.5) as engine:
        engine.add(lab.losses(adapter.model, lab.batch(*BERT, records)))
        engine.release(2.0, 40.0, _stream("a"))
        got = _flat(adapter)
    noise = torch.from_numpy(_stream("a").normal(adapter.spec.parameters))
    # Divided by the expected size: the actual one is a secret.
    _close(got, (clean + 2.0 * 0.5 * noise) / 40.0, relative=1e-12)


def test_an_empty_batch_is_a_step_of_noise_alone(lab: Any) -> None:
    adapter = _double(lab, (*BERT, "lora"))
    with ClippedGradients(adapter.model, adapter.trainables(), 0.5) as engine:
        engine.release(2.0, 10.0, _stream("b"))
        untouched = _flat(adapter)
        engine.add(torch.zeros(0, dtype=torch.float64))
        engine.release(2.0, 10.0, _stream("b"))
        assert torch.equal(_flat(adapter), untouched)
    noise = torch.from_numpy(_stream("b").normal(adapter.spec.parameters))
    _close(untouched, 2.0 * 0.5 * noise / 10.0, relative=1e-12)


def test_a_release_forgets_what_it_released(lab: Any) -> None:
    adapter = _double(lab, (*BERT, "lora"))
    case, records = (*BERT, "lora"), lab.records(*BERT, LENGTHS)
    once = _sum(lab, adapter, case, [records], 1.0)
    with ClippedGradients(adapter.model, adapter.trainables(), 1.0) as engine:
        for _ in range(3):
            engine.add(lab.losses(adapter.model, lab.batch(*BERT, records)))
            engine.release(0.0, 1.0, _stream())
            _close(_flat(adapter), once, relative=1e-12)
            with torch.no_grad():
                # What an optimiser does between releases must not reach the next one.
                for parameter in adapter.trainables().values():
                    parameter.add_(0.0)


@pytest.mark.parametrize(
    ("noise", "expected"), [(-1.0, 10.0), (float("nan"), 10.0), (float("inf"), 10.0), (1.0, 0.0), (1.0, -3.0)]
)
def test_a_release_without_meaning_is_refused(lab: Any, noise: float, expected: float) -> None:
    adapter = lab.attach(*BERT, "lora")
    with (
        ClippedGradients(adapter.model, adapter.trainables(), 1.0) as engine,
        pytest.raises(ValueError, match="makes no sense"),
    ):
        engine.release(noise, expected, _stream())


# --- rows that are no numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_left_out_and_counted(lab: Any, bad: float) -> None:
    case = (*BERT, "lora")
    adapter = _double(lab, case)
    records = lab.records(*BERT, LENGTHS)
    rows = _loop(lab, adapter, case, records)
    with ClippedGradients(adapter.model, adapter.trainables(), 1.0) as engine:
        losses = lab.losses(adapter.model, lab.batch(*BERT, records))
        engine.add(losses * torch.tensor([1.0, bad, 1.0, 1.0, bad], dtype=losses.dtype))
        assert engine.skipped == 2
        engine.release(0.0, 1.0, _stream())
        _close(_flat(adapter), _clipped(rows[[0, 2, 3]], 1.0))


def test_a_gradient_too_large_for_its_norm_is_left_out(lab: Any) -> None:
    """In float32 a norm overflows before its entries do; the row must not come through unclipped."""
    adapter = lab.attach(*BERT, "lora")
    lab.shaken(adapter)
    got = _sum(lab, adapter, (*BERT, "lora"), [lab.records(*BERT, LENGTHS)], 1.0, scale=(1.0, 1e30, 1.0, 1.0, 1.0))
    assert torch.isfinite(got).all()
    assert float(got.norm()) <= 4.0 * (1 + 1e-6)


def test_a_gradient_of_zero_stays_zero(lab: Any) -> None:
    adapter = _double(lab, (*BERT, "lora"))
    got = _sum(lab, adapter, (*BERT, "lora"), [lab.records(*BERT, (3, 4))], 1.0, scale=(0.0, 0.0))
    assert torch.equal(got, torch.zeros_like(got))


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "method", "names"),
    [
        ("bert", "dora", "query.lora_A.default.weight"),
        ("gpt2", "dora", "c_attn.lora_A.default.weight"),
        ("bert", "ia3", "key.ia3_l.default"),
        ("t5", "ia3", "ia3_l.default"),
        ("bert", "prompt", "prompt_encoder.default.embedding.weight"),
    ],
)
def test_methods_without_exact_gradients_are_refused_by_tensor(lab: Any, family: str, method: str, names: str) -> None:
    adapter = lab.attach(family, TEXT, method)
    with pytest.raises(UserError) as refusal:
        ClippedGradients(adapter.model, adapter.trainables(), 1.0)
    text = str(refusal.value)
    assert names in text and "no exact per-sample gradient" in text and "choose lora" in text
    assert "\n" not in text
    named = text.split()[1]
    assert named in adapter.trainables()


def test_every_method_says_whether_it_can_be_private(lab: Any, fitting: Case) -> None:
    """The word in the registry and the check in the engine agree."""
    from fedgraft.methods import create_method

    adapter = lab.attach(*fitting)
    if create_method(fitting[2]).dp == "exact":
        ClippedGradients(adapter.model, adapter.trainables(), 1.0)
    else:
        assert create_method(fitting[2]).dp.startswith("refused")
        with pytest.raises(UserError, match="no exact per-sample gradient"):
            ClippedGradients(adapter.model, adapter.trainables(), 1.0)


def test_a_trainable_that_is_not_listed_is_refused(lab: Any) -> None:
    adapter = lab.attach(*BERT, "lora")
    for name in adapter.trainables():
        rest = {n: p for n, p in adapter.trainables().items() if n != name}
        with pytest.raises(UserError, match="it would escape clipping") as refusal:
            ClippedGradients(adapter.model, rest, 1.0)
        assert name in str(refusal.value)


def test_a_listed_tensor_that_is_frozen_or_foreign_is_refused(lab: Any) -> None:
    adapter = lab.attach(*BERT, "lora")
    listed = adapter.trainables()
    first = next(iter(listed))
    listed[first].requires_grad_(False)
    with pytest.raises(UserError, match=f"tensor {first} is listed as trained but is frozen"):
        ClippedGradients(adapter.model, listed, 1.0)
    with pytest.raises(UserError, match="no layer of the model owns it"):
        ClippedGradients(adapter.model, {**adapter.trainables(), "stranger": nn.Parameter(torch.zeros(3))}, 1.0)
    with pytest.raises(UserError, match="nothing to clip"):
        ClippedGradients(nn.Linear(2, 2).requires_grad_(False), {}, 1.0)


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bound_that_is_none_is_refused(lab: Any, clip: float) -> None:
    adapter = lab.attach(*BERT, "lora")
    with pytest.raises(UserError, match=r"privacy\.clip"):
        ClippedGradients(adapter.model, adapter.trainables(), clip)


class _Toy(nn.Module):
    """A linear layer behind something that may mix records."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.between = between
        self.last = nn.Linear(4, 1)
        self.between.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.between(x))[:, 0]


def test_two_layers_that_share_a_tensor_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(UserError, match="two layers share it"):
        ClippedGradients(model, dict(model.named_parameters()), 1.0)


def test_layers_without_an_exact_rule_are_refused() -> None:
    for layer in (nn.Embedding(5, 4), nn.GRU(4, 4), nn.Bilinear(4, 4, 4), nn.PReLU(), nn.BatchNorm1d(4)):
        with pytest.raises(UserError, match=f"its layer is {type(layer).__name__}"):
            ClippedGradients(layer, dict(layer.named_parameters()), 1.0)


def test_batch_statistics_never_leave_without_noise() -> None:
    """A frozen BatchNorm in training mode mixes the records and moves its running mean."""
    model, x = _Toy(nn.BatchNorm1d(4)), torch.randn(6, 4)
    trainables = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with ClippedGradients(model, trainables, 1.0) as engine:
        model.eval()
        model.last.train()
        engine.add(model(x))
        model.between.train()
        with pytest.raises(UserError, match="layer between keeps statistics of the batch"):
            engine.add(model(x))
    model = _Toy(nn.BatchNorm1d(4, track_running_stats=False))
    with pytest.raises(UserError, match=r"layer between \(BatchNorm1d\) normalises over the batch"):
        ClippedGradients(model, {n: p for n, p in model.named_parameters() if p.requires_grad}, 1.0)


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


@pytest.mark.parametrize("kind", [_Mixed, _Behind, _Once])
def test_rows_that_the_hooks_got_wrong_are_found_on_the_first_batch(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind()
    with (
        ClippedGradients(model, dict(model.named_parameters()), 1.0) as engine,
        pytest.raises(UserError, match="the hooks gave another gradient than its example alone"),
    ):
        engine.add(model(torch.randn(6, 4)))


# --- what is left behind -------------------------------------------------------------------------------------------


def _footprint(model: nn.Module) -> dict[str, tuple[str, ...]]:
    parts: dict[str, Any] = {**dict(model.named_modules()), **dict(model.named_parameters())}
    marks = {name: tuple(sorted(vars(part))) for name, part in parts.items()}
    for name, module in model.named_modules():
        hooks = (module._forward_hooks, module._backward_hooks, module._forward_pre_hooks, module._backward_pre_hooks)
        marks[name] += (str([len(h) for h in hooks]), str(module.training))
    return marks


def test_nothing_is_left_behind(lab: Any, exact: Case) -> None:
    adapter = lab.attach(*exact)
    lab.shaken(adapter)
    model, records = adapter.model, lab.records(*exact[:2], LENGTHS)
    batch = lab.batch(*exact[:2], records)
    before, names = _footprint(model), [n for n, _ in model.named_parameters()]
    with torch.no_grad():
        want = lab.losses(model, batch)
    results = []
    for _ in range(2):
        engine = ClippedGradients(model, adapter.trainables(), 1.0)
        for _ in range(2):
            with engine:
                engine.add(lab.losses(model, batch))
                engine.release(1.0, 5.0, _stream("left"))
                results.append(_flat(adapter))
            assert _footprint(model) == before
            assert all(p.grad is None for p in model.parameters())
    assert [n for n, _ in model.named_parameters()] == names
    assert all(torch.equal(result, results[0]) for result in results)
    with torch.no_grad():
        assert torch.equal(lab.losses(model, batch), want)
    # Plain training still works, and is not hooked.
    lab.losses(model, batch).sum().backward()
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())


def test_a_failure_inside_leaves_nothing_behind_and_nothing_in_the_next_sum(lab: Any) -> None:
    case = (*BERT, "lora")
    adapter = _double(lab, case)
    records = lab.records(*BERT, LENGTHS)
    want, before = _sum(lab, adapter, case, [records], 1.0), _footprint(adapter.model)
    engine = ClippedGradients(adapter.model, adapter.trainables(), 1.0)

    def interrupted() -> None:
        with engine:
            engine.add(lab.losses(adapter.model, lab.batch(*BERT, records)))
            lab.losses(adapter.model, lab.batch(*BERT, records))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert _footprint(adapter.model) == before
    with engine:
        engine.add(lab.losses(adapter.model, lab.batch(*BERT, records)))
        engine.release(0.0, 1.0, _stream())
        _close(_flat(adapter), want, relative=1e-12)


def test_a_forward_pass_without_its_backward_is_never_taken_for_another(lab: Any) -> None:
    adapter = _double(lab, (*BERT, "lora"))
    batch = lab.batch(*BERT, lab.records(*BERT, LENGTHS))
    with ClippedGradients(adapter.model, adapter.trainables(), 1.0) as engine:
        lab.losses(adapter.model, batch)
        with pytest.raises(UserError, match="got no per-sample gradient"):
            engine.add(lab.losses(adapter.model, batch))


def test_evaluation_between_steps_changes_nothing(lab: Any) -> None:
    case = (*BERT, "lora")
    adapter = _double(lab, case)
    records = lab.records(*BERT, LENGTHS)
    want = _sum(lab, adapter, case, [records], 1.0)
    with ClippedGradients(adapter.model, adapter.trainables(), 1.0) as engine:
        with torch.no_grad():
            lab.losses(adapter.model, lab.batch(*BERT, records[:2]))
        engine.add(lab.losses(adapter.model, lab.batch(*BERT, records)))
        with torch.no_grad():
            lab.losses(adapter.model, lab.batch(*BERT, records[:1]))
        engine.release(0.0, 1.0, _stream())
        _close(_flat(adapter), want, relative=1e-12)


def test_outside_its_context_it_refuses(lab: Any) -> None:
    adapter = lab.attach(*BERT, "lora")
    engine = ClippedGradients(adapter.model, adapter.trainables(), 1.0)
    with pytest.raises(UserError, match="got no per-sample gradient"):
        engine.add(lab.losses(adapter.model, lab.batch(*BERT, lab.records(*BERT, LENGTHS))))
