"""LoRA on a pruned model: which heads and channels go, that they are gone, and that the rest keeps the contract."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file

from fedgraft.core.errors import UserError
from fedgraft.methods import pruning
from fedgraft.methods.importance import save_mask
from fedgraft.methods.pruning import Block, blocks_of, criterion, kept_units, sparsity
from fedgraft.simulations.contract.suite import CASES, MethodContract, laboratory

BERT = ("bert", "sequence-classification")
LLAMA = ("llama", "causal-lm")
SETTINGS: dict[str, Any] = {"rank": 4, "alpha": 8.0}


@cache
def kept(case: tuple[str, str]) -> dict[str, torch.Tensor]:
    lab = laboratory()
    examples = lab.records(*case, (3, 7, 5))
    return kept_units(lab.base(*case), lab.task(case[1]), examples, 0.5, lambda done, of: None, steps=12)


def mask_file(folder: Path, case: tuple[str, str]) -> str:
    path = folder / f"lora-prune-{'-'.join(case)}.safetensors"
    if not path.is_file():
        save_mask(path, kept(case))
    return str(path)


class Pruned(MethodContract):
    method = "lora-prune"
    folder: Path

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        self.folder = tmp_path_factory.getbasetemp()

    def settings_for(self, case: tuple[str, str]) -> dict[str, Any]:
        return {"mask": mask_file(self.folder, case)}


class TestPruned(Pruned):
    """Heads with keys and values of their own, and heads that have them in common."""

    cases: ClassVar[tuple[tuple[str, str], ...]] = (BERT, LLAMA)


@pytest.mark.slow
class TestPrunedElsewhere(Pruned):
    cases: ClassVar[tuple[tuple[str, str], ...]] = tuple(case for case in CASES if case not in (BERT, LLAMA))


# --- which units there are, and what they are worth ---


def test_the_criterion_is_what_a_step_does_to_the_product_times_the_weight() -> None:
    torch.manual_seed(0)
    w, a, b = (torch.randn(shape, dtype=torch.float64) for shape in ((5, 7), (2, 7), (5, 2)))
    da, db = torch.randn_like(a), torch.randn_like(b)
    got = criterion(w, a, b, da, db, 2.0)
    for i in range(5):
        for j in range(7):
            step = float(b[i] @ a[:, j] - (b - db)[i] @ (a - da)[:, j])
            want = (step * float(w[i, j] + 2.0 * b[i] @ a[:, j])) ** 2
            assert float(got[i, j]) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_a_unit_is_worth_the_sum_over_all_that_goes_with_it(family: str) -> None:
    """Rows of queries, keys and values and columns of the output for a head; tiny models have four heads of eight."""
    base = laboratory().base(family, "sequence-classification")
    blocks = blocks_of(base.model)
    attention, channels = blocks[0], blocks[1]
    torch.manual_seed(1)
    shapes = {
        "bert": [(32, 32), (32, 32), (32, 32), (32, 32)],
        "gpt2": [(96, 32), (32, 32)],
        "llama": [(32, 32), (16, 32), (16, 32), (32, 32)],
    }[family]
    weights = {path: torch.rand(shape) for path, shape in zip(attention.sides, shapes, strict=True)}
    *rows, output = weights.values()
    want = []
    for head in range(2 if family == "llama" else 4):
        own = slice(8 * head, 8 * head + 8)
        total = 0.0
        if family == "gpt2":
            total += sum(float(rows[0][32 * third :][own].sum()) for third in range(3))
        elif family == "llama":
            own = slice(16 * head, 16 * head + 16)
            total += float(rows[0][own].sum()) + sum(float(r[8 * head : 8 * head + 8].sum()) for r in rows[1:])
        else:
            total += sum(float(row[own].sum()) for row in rows)
        want.append(total + float(output[:, own].sum()))
    assert attention.scores(weights).tolist() == pytest.approx(want, rel=1e-5)
    inner = channels.units
    assert inner == (128 if family == "gpt2" else 64) and len(channels.rows) == (2 if family == "llama" else 1)
    dense = {path: torch.rand(inner, 32) for path in channels.rows} | {
        p: torch.rand(32, inner) for p in channels.columns
    }
    for unit in (0, inner - 1):
        total = sum(float(dense[path][unit].sum()) for path in channels.rows)
        total += sum(float(dense[path][:, unit].sum()) for path in channels.columns)
        assert float(channels.scores(dense)[unit]) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_first_scores_are_those_of_the_dense_gradients_that_lora_sees(family: str) -> None:
    """With B = 0 and dL/dB = s G A^T, G the gradient of the weight itself: (s G A^T A * W0)^2, summed."""
    lab, case = laboratory(), (family, "sequence-classification")
    base = lab.base(*case)
    base.model.double()
    batch = lab.batch(*case, lab.records(*case, (4, 9, 2)))
    blocks = blocks_of(base.model)
    weights = {path: base.model.get_submodule(path).weight for block in blocks for path in block.sides}
    for weight in weights.values():
        weight.requires_grad_(True)
    dense = torch.autograd.grad(lab.losses(base.model, batch).mean(), list(weights.values()))
    for weight in weights.values():
        weight.requires_grad_(False)
    trial = pruning._Trial(base.model, blocks)
    lab.losses(base.model, batch).mean().backward()
    got = trial.scores()
    trial.close()
    squares = {}
    for (path, weight), gradient in zip(weights.items(), dense, strict=True):
        upright, weight = (gradient.T, weight.T) if family == "gpt2" else (gradient, weight)
        a = trial.a[path].detach()
        squares[path] = (2.0 * upright @ a.T @ a * weight).square()
    for block, scores in zip(blocks, got, strict=True):
        lab.close(scores, block.scores(squares))


def test_units_go_by_the_cube_and_never_come_back() -> None:
    found = [sparsity(step, 100, 0.5) for step in (0, 10, 50, 90, 100)]
    assert found == pytest.approx([0.0, 0.0, 0.5 * (1 - 0.5**3), 0.5, 0.5])
    blocks = blocks_of(laboratory().base(*BERT).model)
    trial = pruning._Trial(laboratory().base(*BERT).model, blocks)
    low = [torch.arange(float(block.units)) for block in blocks]
    trial.prune(low, 0.25)
    assert trial.stay[0].tolist() == [False, True, True, True]
    trial.prune([-one + 100 for one in low], 0.5)
    assert trial.stay[0].tolist() == [False, True, True, False]
    assert int(trial.stay[1].sum()) == 32
    trial.prune(low, 1.0)
    assert all(int(stay.sum()) == 1 for stay in trial.stay)


def test_choosing_leaves_the_model_as_it_was_and_the_same_share_of_each_block() -> None:
    lab = laboratory()
    base = lab.base(*BERT)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    found = kept_units(base, lab.task(BERT[1]), lab.records(*BERT, (3, 7, 5)), 0.5, lambda done, of: None, steps=12)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())
    assert not any(p.requires_grad for p in base.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.model.modules())
    for layer in range(2):
        prefix = f"bert.encoder.layer.{layer}"
        heads = [
            found[f"{prefix}.attention.{name}"] for name in ("self.query", "self.key", "self.value", "output.dense")
        ]
        assert all(torch.equal(one, heads[0]) for one in heads) and len(heads[0]) == 16
        assert {int(row) // 8 for row in heads[0]} == {int(row) // 8 for row in heads[0][::8]}
        channels = found[f"{prefix}.intermediate.dense"], found[f"{prefix}.output.dense"]
        assert torch.equal(*channels) and len(channels[0]) == 32
    assert all(torch.equal(one, kept(BERT)[path]) for path, one in found.items())


# --- a model without them ---


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_a_fresh_adapter_computes_what_the_base_with_zeros_in_the_place_of_the_units_computes(
    family: str, tmp_path: Path
) -> None:
    lab, case = laboratory(), (family, "causal-lm" if family == "llama" else "sequence-classification")
    adapter = lab.attach(*case, "lora-prune", mask=mask_file(tmp_path, case))
    naive = lab.base(*case).model
    for block in blocks_of(lab.base(*case).model):
        for path, places in block.sides.items():
            layer, gone = naive.get_submodule(path), set(places.flatten().tolist()) - set(kept(case)[path].tolist())
            assert gone
            with torch.no_grad():
                weight = layer.weight.T if family == "gpt2" else layer.weight
                for place in gone:
                    if path in block.columns:
                        weight[:, place] = 0.0
                        continue
                    weight[place] = 0.0
                    if layer.bias is not None:
                        layer.bias[place] = 0.0
    batch = lab.batch(*case, lab.records(*case, (3, 7)))
    with torch.no_grad():
        whole = lab.losses(lab.base(*case).model, batch)
        got, want = lab.losses(adapter.model, batch), lab.losses(naive, batch)
    assert float((got - want).abs().max()) <= 1e-6 < float((whole - want).abs().max())
    # The factors have no numbers for what is gone.
    sizes = {name: tuple(p.shape) for name, p in adapter.trainables().items() if ".lora_" in name}
    assert all((4 in shape) for shape in sizes.values())
    block = blocks_of(lab.base(*case).model)[0]
    (path,) = block.columns
    assert sizes[f"base_model.model.{path}.graft.default.lora_A.weight"] == (4, len(kept(case)[path]))


def test_a_saved_adapter_needs_its_mask_file_no_more(tmp_path: Path) -> None:
    lab = laboratory()
    mask = Path(mask_file(tmp_path, BERT))
    adapter = lab.attach(*BERT, "lora-prune", mask=str(mask))
    state = lab.shaken(adapter)
    folder = adapter.save_peft(tmp_path / "adapter", state)
    mask.unlink()
    batch = lab.batch(*BERT, lab.records(*BERT, (3, 5)))
    with torch.no_grad():
        adapter.write(state)
        want = lab.losses(adapter.model, batch)
        plain = PeftModel.from_pretrained(lab.base(*BERT).model, str(folder)).eval()
        assert float((lab.losses(plain, batch) - want).abs().max()) <= 1e-6


def _without(path: str, by: int = 1) -> dict[str, torch.Tensor]:
    return {**kept(BERT), path: kept(BERT)[path][by:]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda: _without("bert.encoder.layer.0.attention.self.key"), "leaves no whole heads or channels of bert"),
        (lambda: _without("bert.encoder.layer.1.output.dense", 32), "leaves no whole heads or channels of bert"),
        (lambda: {path: places.flip(0) for path, places in kept(BERT).items()}, "is no list of rows"),
        (lambda: {**kept(BERT), "nowhere.dense": torch.arange(3)}, "the model has no layer nowhere.dense"),
        (
            lambda: {path: places + 99 for path, places in kept(BERT).items()},
            "leaves no whole heads or channels of bert",
        ),
        (lambda: {"bert.encoder.layer.0.output.dense": torch.tensor([[1, 0]])}, "is no list of rows"),
    ],
)
def test_a_mask_of_another_model_or_method_is_refused(tmp_path: Path, change: Any, said: str) -> None:
    save_file(change(), tmp_path / "mask.safetensors")
    with pytest.raises(UserError) as refusal:
        laboratory().attach(*BERT, "lora-prune", mask=str(tmp_path / "mask.safetensors"))
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_no_mask_is_one_line() -> None:
    with pytest.raises(UserError, match=r"set method\.mask to a file from `fedgraft methods mask lora-prune`"):
        laboratory().attach(*BERT, "lora-prune")


def test_a_model_whose_heads_are_not_known_is_refused() -> None:
    model = laboratory().base(*BERT).model
    model.config.num_attention_heads = 5
    with pytest.raises(UserError, match=r"how the heads lie in bert.encoder.layer.0.attention.self is not known"):
        blocks_of(model)


def test_a_federation_trains_a_pruned_model_under_privacy(tiny_federation: Any, tmp_path: Path) -> None:
    config = tiny_federation.private(**{"method.name": "lora-prune", "method.mask": mask_file(tmp_path, BERT)})
    tiny_federation.run(config, tmp_path / "run")
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_units_of_one_layer_lie_where_they_are_said_to() -> None:
    block = Block({"up": torch.arange(3)[:, None]}, {"down": torch.arange(3)[:, None]})
    left = block.kept(torch.tensor([True, False, True]))
    assert {path: places.tolist() for path, places in left.items()} == {"up": [0, 2], "down": [0, 2]}
