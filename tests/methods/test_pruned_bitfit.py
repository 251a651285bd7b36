"""S-BitFit and U-BitFit: which biases their search leaves, that they alone train, and the contract."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file

from fedgraft.core.errors import UserError
from fedgraft.methods.biases import biases_of, chosen, cost, kept_biases
from fedgraft.methods.importance import save_mask
from fedgraft.simulations.contract.suite import MethodContract, laboratory

BERT = ("bert", "sequence-classification")
LAYER = "bert.encoder.layer.1.output.dense"


@cache
def kept(case: tuple[str, str], whole: bool, keep: float) -> dict[str, torch.Tensor]:
    lab = laboratory()
    records = lab.records(*case, (3, 7, 5))
    task = lab.task(case[1])
    return kept_biases(lab.base(*case), task, records, keep, lambda done, of: None, whole=whole, steps=20)


class Pruned(MethodContract):
    cases: ClassVar[tuple[tuple[str, str], ...]] = (BERT, ("gpt2", "causal-lm"), ("llama", "causal-lm"))
    unfit: ClassVar[dict[str, str]] = {"llama": "has no biases; choose lora"}
    folder: Path

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        self.folder = tmp_path_factory.getbasetemp()

    def settings_for(self, case: tuple[str, str]) -> dict[str, Any]:
        path = self.folder / f"{self.method}-{'-'.join(case)}.safetensors"
        mask = {"x": torch.arange(2)} if case[0] == "llama" else kept(case, self.method == "s-bitfit", 0.5)
        save_mask(path, mask)
        return {"mask": str(path)}


class TestStructured(Pruned):
    method = "s-bitfit"
    # Attention does not see the bias of its keys.
    inert: ClassVar[tuple[str, ...]] = (".key.graft.default.values",)


class TestUnstructured(Pruned):
    method = "u-bitfit"
    inert: ClassVar[tuple[str, ...]] = (".key.graft.default.values",)


def test_a_score_is_what_the_loss_gains_when_a_small_change_goes_back() -> None:
    lab = laboratory()
    base = lab.base(*BERT)
    base.model.double()
    bias, batch = biases_of(base)[LAYER], lab.batch(*BERT, lab.records(*BERT, (4, 9, 2)))
    change = 1e-5 * torch.randn(bias.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        bias.add_(change)
    bias.requires_grad_(True)
    loss = lab.losses(base.model, batch).mean()
    (gradient,) = torch.autograd.grad(loss, bias)
    bias.requires_grad_(False)
    scores = cost(change, gradient)
    for k in range(len(bias)):
        with torch.no_grad():
            bias[k] -= change[k]
            gained = float(lab.losses(base.model, batch).mean() - loss.detach())
            bias[k] += change[k]
        # The rest of the series is of second order in a change of 1e-5.
        assert abs(gained - float(scores[k])) <= 1e-8


def test_single_numbers_stay_by_their_own_score_and_whole_biases_by_the_sum_of_theirs() -> None:
    scores = {"a": torch.tensor([5.0, -9.0]), "b": torch.tensor([1.0, 2.0, 3.0]), "c": torch.tensor([4.0])}
    single = chosen(scores, 3 / 6, whole=False)
    assert {path: at.tolist() for path, at in single.items()} == {"a": [0], "b": [2], "c": [0]}
    assert {path: at.tolist() for path, at in chosen(scores, 4 / 6, whole=True).items()} == {"b": [0, 1, 2], "c": [0]}
    assert {path: at.tolist() for path, at in chosen(scores, 1 / 6, whole=False).items()} == {"a": [0]}
    # One that is too large leaves the room to the next; the best is kept in any case.
    assert list(chosen({**scores, "b": torch.ones(3)}, 2 / 6, whole=True)) == ["c"]
    assert list(chosen(scores, 1 / 6, whole=True)) == ["b"]


@pytest.mark.parametrize("whole", [True, False])
def test_the_search_leaves_the_model_as_it_was_and_no_more_than_the_share(whole: bool) -> None:
    lab = laboratory()
    base = lab.base(*BERT)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    records = lab.records(*BERT, (3, 7, 5))
    found = kept_biases(base, lab.task(BERT[1]), records, 0.2, lambda done, of: None, whole=whole, steps=20)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())
    assert not any(p.requires_grad for p in base.model.parameters())
    sizes = {path: bias.numel() for path, bias in biases_of(base).items()}
    count = sum(map(len, found.values()))
    assert count <= 0.2 * sum(sizes.values()) and not any(path.startswith("classifier") for path in found)
    if whole:
        assert all(len(at) == sizes[path] for path, at in found.items())
    else:
        assert count == int(0.2 * sum(sizes.values())) and any(len(at) < sizes[path] for path, at in found.items())
    # The same records choose the same biases, wherever they are chosen.
    assert all(torch.equal(at, kept(BERT, whole, 0.2)[path]) for path, at in found.items())


def test_only_the_kept_numbers_of_a_bias_change(tmp_path: Path) -> None:
    lab = laboratory()
    save_file({LAYER: torch.tensor([2, 30])}, tmp_path / "mask")
    adapter = lab.attach(*BERT, "u-bitfit", mask=str(tmp_path / "mask"))
    place = adapter.model.get_submodule(f"base_model.model.{LAYER}")
    part = place.graft["default"]
    with torch.no_grad():
        part.values.copy_(torch.tensor([0.5, -2.0]))
        x = torch.randn(3, 64)
        want = place.base_layer(x)
        want[:, 2] += 0.5
        want[:, 30] -= 2.0
        assert torch.equal(place(x), want)
    assert sum(p.numel() for name, p in adapter.trainables().items() if "classifier" not in name) == 2


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        ({LAYER: torch.tensor([2, 32])}, f"the model has no such bias of {LAYER}"),
        ({LAYER: torch.tensor([-1, 3])}, f"the model has no such bias of {LAYER}"),
        ({"classifier": torch.tensor([0])}, "the model has no such bias of classifier"),
        ({LAYER: torch.tensor([[1, 0]])}, "is no list of rows"),
    ],
)
def test_a_mask_of_another_model_or_method_is_refused(tmp_path: Path, mask: Any, said: str) -> None:
    save_file(mask, tmp_path / "mask")
    with pytest.raises(UserError) as refusal:
        laboratory().attach(*BERT, "s-bitfit", mask=str(tmp_path / "mask"))
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_no_mask_is_one_line() -> None:
    with pytest.raises(UserError, match=r"set method\.mask to a file from `fedgraft methods mask u-bitfit`"):
        laboratory().attach(*BERT, "u-bitfit")
