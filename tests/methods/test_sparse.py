"""Masks of weights: which ones a rule chooses, that they alone train, and that the methods keep the contract."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import PeftModel

from fedgraft.core.errors import UserError
from fedgraft.methods.importance import RULES, load_mask, mask_of, most, save_mask
from fedgraft.simulations.contract.suite import MethodContract, laboratory

BERT = ("bert", "sequence-classification")
KEEP = 0.02


@cache
def mask_file(folder: Path, method: str, case: tuple[str, str]) -> str:
    lab = laboratory()
    path = folder / f"{method}-{'-'.join(case)}.safetensors"
    examples = lab.records(*case, (3, 7, 5))
    save_mask(path, mask_of(method, lab.base(*case), lab.task(case[1]), examples, KEEP, lambda done, of: None))
    return str(path)


class Masked(MethodContract):
    cases: ClassVar[tuple[tuple[str, str], ...]] = (BERT, ("gpt2", "causal-lm"))
    folder: Path

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        self.folder = tmp_path_factory.getbasetemp()

    def settings_for(self, case: tuple[str, str]) -> dict[str, Any]:
        return {"mask": mask_file(self.folder, self.method, case)}


class TestFish(Masked):
    method = "fish"


class TestLotteryTicket(Masked):
    method = "lt-sft"


def test_the_fisher_information_is_the_mean_of_squared_gradients_and_sam_the_square_of_the_mean() -> None:
    lab = laboratory()
    base, task = lab.base(*BERT), lab.task(BERT[1])
    base.model.double()
    examples = lab.records(*BERT, (4, 9, 2))
    name = "bert.encoder.layer.1.output.dense"
    weight = base.model.get_submodule(name).weight
    gradients = []
    for example in examples:
        weight.requires_grad_(True)
        (gradient,) = torch.autograd.grad(lab.losses(base.model, lab.batch(*BERT, [example])).sum(), weight)
        gradients.append(gradient)
    weight.requires_grad_(False)
    rows = torch.stack(gradients)
    for rule, want in (("fish", (rows**2).mean(0)), ("sam", rows.mean(0) ** 2)):
        got = RULES[rule](base, task, examples, lambda done, of: None)[name]
        # The task's own loss goes through float32.
        assert float((got - want).norm()) <= 1e-5 * float(want.norm())


def test_a_mask_is_the_largest_scores_of_all_layers_together() -> None:
    scores = {"a": torch.tensor([[1.0, 9.0], [2.0, 8.0]]), "b": torch.tensor([[7.0, 0.0, 0.5]])}
    assert {k: v.tolist() for k, v in most(scores, 3 / 7).items()} == {"a": [[0, 1], [1, 1]], "b": [[0, 0]]}
    assert {k: v.tolist() for k, v in most(scores, 1 / 7, turned=["a"]).items()} == {"a": [[1, 0]]}


def test_lottery_tickets_leave_the_weights_where_they_were() -> None:
    lab = laboratory()
    base = lab.base(*BERT)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    found = RULES["lt-sft"](base, lab.task(BERT[1]), lab.records(*BERT, (4, 9, 2)), lambda done, of: None)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())
    assert not any(p.requires_grad for p in base.model.parameters())
    assert all(float(score.max()) > 0 for score in found.values())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"nowhere.dense": torch.zeros(3, 2, dtype=torch.int32)}, "the model has no layer nowhere.dense"),
        (
            {"bert.encoder.layer.0.output.dense": torch.tensor([[99, 0]])},
            "places outside of layer bert.encoder.layer.0",
        ),
        ({"bert.encoder.layer.0.output.dense": torch.zeros(3)}, "no list of (row, column)"),
    ],
)
def test_a_mask_of_another_model_is_refused(tmp_path: Path, change: dict[str, torch.Tensor], said: str) -> None:
    from safetensors.torch import save_file

    save_file(change, tmp_path / "mask.safetensors")
    with pytest.raises(UserError) as refusal:
        laboratory().attach(*BERT, "fish", mask=str(tmp_path / "mask.safetensors"))
    assert said in str(refusal.value)


def test_no_mask_and_no_file_are_one_line_each(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"set method\.mask to a file from `fedgraft methods mask sam`"):
        laboratory().attach(*BERT, "sam")
    with pytest.raises(UserError, match="no mask file"):
        load_mask(str(tmp_path / "none"))


def test_a_saved_adapter_needs_its_mask_file_no_more(tmp_path: Path) -> None:
    lab = laboratory()
    mask = Path(mask_file(tmp_path, "fish", BERT))
    adapter = lab.attach(*BERT, "fish", mask=str(mask))
    state = lab.shaken(adapter)
    folder = adapter.save_peft(tmp_path / "adapter", state)
    mask.unlink()
    batch = lab.batch(*BERT, lab.records(*BERT, (3, 5)))
    with torch.no_grad():
        adapter.write(state)
        want = lab.losses(adapter.model, batch)
        plain = PeftModel.from_pretrained(lab.base(*BERT).model, str(folder)).eval()
        assert float((lab.losses(plain, batch) - want).abs().max()) <= 1e-6
    assert "import fedgraft.methods" in (folder / "README.md").read_text()
