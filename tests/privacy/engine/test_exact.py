"""The engine's clipped sum is that of a loop over examples, whatever the model, method and way to run."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fedgraft.core.errors import UserError
from fedgraft.privacy.clipping import ExactGradients, create_engine
from fedgraft.privacy.noise import RandomStream

Case = tuple[str, str, str]
TEXT, IMAGE = "sequence-classification", "image-classification"
BERT = ("bert", TEXT)
LORA = (*BERT, "lora")
STREAM = RandomStream.seeded_not_private("test")


def _median(rows: torch.Tensor) -> float:
    """A bound that cuts some rows and not others, or half of the rule would go untested."""
    norms = rows.norm(dim=1)
    clip = float(norms.median())
    assert (norms > 1.01 * clip).any() and (norms < 0.99 * clip).any()
    return clip


def test_the_clipped_sum_is_that_of_a_loop_over_examples(lab: Any, fitting: Case) -> None:
    adapter = lab.double(fitting)
    records = lab.records(*fitting[:2], lab.lengths)
    rows = lab.rows(adapter, fitting, records)
    clip = _median(rows)
    lab.close(lab.summed(adapter, fitting, [records], clip), lab.clipped(rows, clip))


def test_micro_batches_add_up_to_one_batch(lab: Any, fitting: Case) -> None:
    adapter = lab.double(fitting)
    records = lab.records(*fitting[:2], lab.lengths)
    rows = lab.rows(adapter, fitting, records)
    clip = _median(rows)
    # The second is larger than the first, and the last has one row.
    batches = [records[:1], records[1:4], records[4:]]
    lab.close(lab.summed(adapter, fitting, batches, clip), lab.clipped(rows, clip))


CHECKPOINTED = [
    *[("bert", TEXT, method) for method in ("lora", "dora", "bitfit", "ia3", "ln", "prompt")],
    *[("gpt2", TEXT, method) for method in ("lora", "dora", "bitfit", "ia3")],
    *[("llama", TEXT, method) for method in ("dora", "ln")],
    *[("t5", TEXT, method) for method in ("lora", "dora", "ln")],
    *[("vit", IMAGE, method) for method in ("lora", "bitfit")],
]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("case", CHECKPOINTED, ids=lambda case: f"{case[0]}-{case[2]}")
def test_checkpointing_of_either_kind_changes_nothing(lab: Any, case: Case, reentrant: bool) -> None:
    adapter = lab.double(case)
    records = lab.records(*case[:2], lab.lengths)
    rows = lab.rows(adapter, case, records)
    clip = _median(rows)
    runs = lab.checkpointed(adapter, reentrant=reentrant)
    got = lab.summed(adapter, case, [records[:3], records[3:]], clip)
    lab.close(got, lab.clipped(rows, clip))
    assert len(runs) >= 3 * len({id(module) for module, _ in runs}), "no layer was run a second time"
    assert any(not grad for _, grad in runs) == reentrant


def test_bf16_autocast_keeps_the_bound_in_float32(lab: Any, fitting: Case) -> None:
    """Activations are rounded; norms, scales, sums and noise are not, also when `add` runs inside the autocast."""
    adapter = lab.attach(*fitting)
    lab.shaken(adapter)
    records = lab.records(*fitting[:2], lab.lengths)
    batch = lab.batch(*fitting[:2], records)
    rows = lab.rows(adapter, fitting, records)
    clip = 0.1 * float(rows.norm(dim=1).min())
    with create_engine("exact", adapter.model, adapter.trainables(), clip) as engine:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            engine.expect(len(records))
            engine.add(lab.losses(adapter.model, batch))
        engine.release(0.0, 1.0, STREAM)
        got = lab.flat(adapter.trainables())
        for row in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                lab.add(engine, adapter, fitting, [records[row]])
            engine.release(0.0, 1.0, STREAM)
            assert float(lab.flat(adapter.trainables()).norm()) == pytest.approx(clip, rel=1e-5)
    lab.close(got, lab.clipped(rows, clip), relative=0.1)
    assert got.dtype == torch.float32


@pytest.mark.parametrize("targets", [("projection", "q_proj"), ("projection",)])
def test_convolutions_are_exact(lab: Any, targets: tuple[str, ...]) -> None:
    case = ("vit", IMAGE, "lora")
    adapter = lab.double(case, target_modules=targets)
    assert any("patch_embeddings.projection" in name for name in adapter.trainables())
    records = lab.records(*case[:2], lab.lengths)
    rows = lab.rows(adapter, case, records)
    clip = _median(rows)
    lab.close(lab.summed(adapter, case, [records], clip), lab.clipped(rows, clip))


def test_a_frozen_factor_is_left_out_and_the_rest_is_exact(lab: Any) -> None:
    adapter = lab.double(LORA)
    frozen = {pair.a for pair in adapter.spec.pairs}
    adapter.adopt(adapter.spec.with_policy("freeze", lambda tensor: tensor.name in frozen))
    assert set(adapter.trainables()) == set(adapter.spec.names) - frozen
    records = lab.records(*BERT, lab.lengths)
    rows = lab.rows(adapter, LORA, records)
    clip = _median(rows)
    lab.close(lab.summed(adapter, LORA, [records], clip), lab.clipped(rows, clip))
    assert all(p.grad is None for n, p in adapter.model.named_parameters() if n in frozen)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_dropout_is_exact_for_the_masks_that_were_drawn(lab: Any, method: str) -> None:
    case = (*BERT, method)
    adapter = lab.double(case, dropout=0.4)
    batch = lab.batch(*BERT, lab.records(*BERT, lab.lengths))
    for name, module in adapter.model.named_modules():
        if ".lora_dropout" in name:
            module.train()
    torch.manual_seed(0)
    rows = lab.gradients(list(adapter.trainables().values()), lab.losses(adapter.model, batch))
    clip = float(rows.norm(dim=1).median())
    torch.manual_seed(0)
    with create_engine("exact", adapter.model, adapter.trainables(), clip) as engine:
        engine.expect(5)
        engine.add(lab.losses(adapter.model, batch))
        engine.release(0.0, 1.0, STREAM)
        lab.close(lab.flat(adapter.trainables()), lab.clipped(rows, clip))


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "prompt"])
def test_a_model_that_stays_in_memory_is_clipped_as_well_in_every_round(lab: Any, method: str) -> None:
    """New values, another engine, a deep copy: each time the loop's own sum."""
    case = (*BERT, method)
    adapter = lab.double(case)
    records = lab.records(*BERT, lab.lengths)
    for seed in range(3):
        adapter.model.float()
        lab.shaken(adapter, seed=seed)
        adapter.model.double()
        rows = lab.rows(adapter, case, records)
        clip = _median(rows)
        lab.close(lab.summed(adapter, case, [records], clip), lab.clipped(rows, clip))
        adapter = type(adapter)(copy.deepcopy(adapter.model), adapter.spec)
        lab.close(lab.summed(adapter, case, [records], clip), lab.clipped(rows, clip))


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared(torch.tanh(self.shared(x))).sum(1)


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(torch.tanh(self.one(x))).sum(1)


@pytest.mark.parametrize("kind", [_Twice, _Tied])
def test_what_is_used_twice_counts_twice(lab: Any, kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = kind().double(), torch.randn(5, 4, dtype=torch.float64)
    parameters = dict(model.named_parameters())
    rows = lab.gradients(list(parameters.values()), (model(row[None])[0] for row in x))
    clip = _median(rows)
    with create_engine("exact", model, parameters, clip) as engine:
        engine.expect(5)
        engine.add(model(x))
        engine.release(0.0, 1.0, STREAM)
        lab.close(lab.flat(parameters), lab.clipped(rows, clip))


# --- refusals ------------------------------------------------------------------------------------------------------


def test_an_input_without_the_batch_in_front_is_refused_by_layer_and_tensor() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x.transpose(0, 1)).sum((0, 2))

    model = Turned()
    with create_engine("exact", model, dict(model.named_parameters()), 1.0) as engine:
        engine.expect(5)
        with pytest.raises(UserError, match=r"layer layer gets an input whose first .*tensor layer\.weight"):
            model(torch.randn(5, 3, 4))


def test_a_trainable_without_a_part_in_the_batch_is_refused(lab: Any) -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.spare = nn.Linear(4, 1), nn.Linear(4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)[:, 0]

    model = Branch()
    with create_engine("exact", model, dict(model.named_parameters()), 1.0) as engine:
        engine.expect(5)
        with pytest.raises(UserError, match=r"tensor spare\.weight took no part in this batch"):
            engine.add(model(torch.randn(5, 4)))


def test_a_forward_pass_that_nobody_announced_is_refused(lab: Any) -> None:
    adapter = lab.attach(*LORA)
    lab.shaken(adapter)
    batch = lab.batch(*BERT, lab.records(*BERT, lab.lengths))
    with create_engine("exact", adapter.model, adapter.trainables(), 1.0) as engine:
        losses = lab.losses(adapter.model, batch)
        with pytest.raises(RuntimeError, match=r"expect\(\) has not said"):
            engine.add(losses)
        engine.expect(5)
        with pytest.raises(UserError, match="outside of the layer that owns it"):
            engine.add(losses)
        # What is refused stays where no optimizer finds it.
        assert all(p.grad is None for p in adapter.trainables().values())


def test_gradients_left_from_before_are_not_taken_for_rows_of_their_own(lab: Any) -> None:
    adapter = lab.double(LORA)
    records = lab.records(*BERT, lab.lengths)
    want = lab.summed(adapter, LORA, [records], 0.5)
    for parameter in adapter.trainables().values():
        parameter.grad = torch.full_like(parameter, 1e6)
    lab.close(lab.summed(adapter, LORA, [records], 0.5), want, relative=1e-12)


def test_a_batch_that_takes_too_much_memory_is_refused_with_the_size_that_does_not(lab: Any) -> None:
    adapter = lab.double(LORA)
    trainables = adapter.trainables()
    size = 8 * sum(p.numel() for p in trainables.values())
    records = lab.records(*BERT, lab.lengths)
    with ExactGradients(adapter.model, trainables, 1.0, memory=3 * size + 1) as engine:
        assert engine.most_rows == 3
        with pytest.raises(UserError, match=r"set train\.micro_batch to 3 or less"):
            engine.expect(4)
        for part in (records[:3], records[3:]):
            lab.add(engine, adapter, LORA, part)
        engine.release(0.0, 1.0, STREAM)
        got = lab.flat(trainables)
    lab.close(got, lab.clipped(lab.rows(adapter, LORA, records), 1.0))


def test_rows_are_held_against_a_backward_pass_of_their_own_once_a_model_and_set_of_trainables(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = lab.attach(*LORA)
    lab.shaken(adapter)
    records, held = lab.records(*BERT, lab.lengths), []
    verify = ExactGradients._verify
    monkeypatch.setattr(ExactGradients, "_verify", lambda *given: (held.append(1), verify(*given)))
    for _ in range(3):
        lab.summed(adapter, LORA, [records[:3], records[3:]], 1.0)
    assert len(held) == 1
    frozen = {pair.a for pair in adapter.spec.pairs}
    adapter.adopt(adapter.spec.with_policy("freeze", lambda tensor: tensor.name in frozen))
    lab.summed(adapter, LORA, [records], 1.0)
    assert len(held) == 2


def test_a_row_that_is_not_finite_puts_the_check_off_to_the_next_batch(lab: Any) -> None:
    torch.manual_seed(0)

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x.flip(0)).flip(0)[:, 0]

    model = Mixed()
    with create_engine("exact", model, dict(model.named_parameters()), 1.0) as engine:
        engine.expect(4)
        engine.add(model(torch.randn(4, 4)) * torch.tensor([1.0, float("nan"), 1.0, 1.0]))
        engine.expect(4)
        with pytest.raises(UserError, match="example alone"):
            engine.add(model(torch.randn(4, 4)))
