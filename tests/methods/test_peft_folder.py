"""An adapter as a PEFT folder: plain PEFT computes the same, it comes back the same, a strange one is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file

from fedgraft.core.adapter import AdapterState
from fedgraft.core.errors import UserError
from fedgraft.methods import AttachedAdapter

Case = tuple[str, str, str]
BERT = ("bert", "sequence-classification")
#: A folder holds their A' = R A, of which no reader knows the parts; what comes back computes the same.
MERGED = ("lora-sb", "ravan")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def test_plain_peft_computes_the_same_and_it_comes_back_the_same(lab: Any, fitting: Case, tmp_path: Path) -> None:
    family, task, _ = fitting
    adapter = lab.attach(*fitting, seed=1)
    state = lab.shaken(adapter)
    adapter.write(AdapterState(state.spec, {name: 0 * array for name, array in state.items()}))
    folder = adapter.save_peft(tmp_path / "adapter", state)
    assert {file.name for file in folder.iterdir()} >= {WEIGHTS, CONFIG}
    assert not list(folder.glob("*.bin"))

    plain = PeftModel.from_pretrained(lab.base(family, task).model, str(folder)).eval()
    batch = lab.batch(family, task, lab.records(family, task, (3, 9, 1, 6)))
    batch.pop("labels", None)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        assert float((plain(**inputs).logits - adapter.model(**inputs).logits).abs().max()) <= 1e-5

    receiver = lab.attach(*fitting, seed=2)
    parameters = receiver.trainables()
    loaded = receiver.load_peft(folder)
    assert dict(loaded).keys() == dict(state).keys()
    if fitting[2] in MERGED:
        with torch.no_grad():
            assert float((receiver.model(**inputs).logits - adapter.model(**inputs).logits).abs().max()) <= 1e-5
    else:
        assert all(np.array_equal(loaded[name], state[name]) for name in state)
    assert receiver.read() == loaded
    assert all(receiver.trainables()[name] is parameter for name, parameter in parameters.items())


def test_a_folder_that_plain_peft_wrote_is_read(lab: Any, tmp_path: Path) -> None:
    base = lab.base(*BERT)
    plain = get_peft_model(base.model, LoraConfig(task_type=TaskType.SEQ_CLS, r=4, lora_alpha=8, lora_dropout=0.3))
    for parameter in plain.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    plain.save_pretrained(tmp_path)
    plain.eval()
    adapter = lab.attach(*BERT, "lora", target_modules=("query", "value"))
    state = adapter.load_peft(tmp_path)
    held = dict(plain.named_parameters())
    assert all(np.array_equal(state[name], held[name].detach().numpy()) for name in state)


@pytest.fixture
def saved(lab: Any, tmp_path: Path) -> Callable[..., Path]:
    """Writes a folder with a shaken adapter on the tiny BERT."""

    def save(method: str = "lora", **settings: Any) -> Path:
        adapter = lab.attach(*BERT, method, **settings)
        return adapter.save_peft(tmp_path / method, lab.shaken(adapter))

    return save


def _refused(adapter: AttachedAdapter, folder: Path, says: str) -> None:
    """It is refused in one line that names the folder, and the model is as it was."""
    before = {name: tensor.clone() for name, tensor in adapter.model.state_dict().items()}
    with pytest.raises(UserError) as refusal:
        adapter.load_peft(folder)
    assert str(folder) in str(refusal.value)
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)
    after = adapter.model.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


@pytest.mark.parametrize(
    ("theirs", "ours", "says"),
    [
        ("ia3", "lora", "its peft_type is IA3, this run's is LORA"),
        ("lora", "ia3", "its peft_type is LORA, this run's is IA3"),
        ("prefix", "prompt", "its peft_type is PREFIX_TUNING, this run's is PROMPT_TUNING"),
        ("ln", "bitfit", "its peft_type is LN_TUNING, this run's is LORA"),
        ("rslora", "lora", "its use_rslora is True, this run's is False"),
        ("dora", "lora", "its use_dora is True, this run's is False"),
        ("lora", "bitfit", "its bias is none, this run's is all"),
        ("bitfit", "lora", "its bias is all, this run's is none"),
    ],
)
def test_another_method_is_refused(lab: Any, saved: Callable[..., Path], theirs: str, ours: str, says: str) -> None:
    # Rank 1 and alpha 1 are what BitFit's carrier has: nothing but the method may tell them apart.
    _refused(lab.attach(*BERT, ours, rank=1, alpha=1.0), saved(theirs, rank=1, alpha=1.0), says)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rank": 8}, "its r is 8, this run's is 4"),
        ({"alpha": 16.0}, "its lora_alpha is 16.0, this run's is 8.0"),
        ({"target_modules": ("query",)}, "value.lora_A.weight is missing"),
        ({"target_modules": ("query", "key", "value")}, "key.lora_A.weight is not of this adapter"),
        ({"layers": (1,)}, "layer.0.attention.self.query.lora_A.weight is missing"),
    ],
)
def test_another_shape_of_lora_is_refused(
    lab: Any, saved: Callable[..., Path], settings: dict[str, Any], says: str
) -> None:
    _refused(lab.attach(*BERT, "lora"), saved(**settings), says)


def test_another_length_of_prefix_is_refused(lab: Any, saved: Callable[..., Path]) -> None:
    _refused(lab.attach(*BERT, "prefix"), saved("prefix", virtual_tokens=5), "its num_virtual_tokens is 5, this run's")


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("alpha_pattern", {"query": 32}, "its alpha_pattern is {'query': 32}"),
        ("rank_pattern", {"query": 2}, "its rank_pattern is {'query': 2}"),
        ("init_lora_weights", "pissa", "its init_lora_weights is pissa"),
        ("lora_bias", True, "its lora_bias is True"),
    ],
)
def test_a_configuration_that_changes_the_function_is_refused(
    lab: Any, saved: Callable[..., Path], key: str, value: object, says: str
) -> None:
    folder = saved()
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, key: value}))
    _refused(lab.attach(*BERT, "lora"), folder, says)


def test_scaled_inputs_are_not_taken_for_scaled_outputs(lab: Any, saved: Callable[..., Path]) -> None:
    """(IA)3 vectors of a square layer have one shape before and after it; only the configuration tells."""
    folder = saved("ia3", target_modules=("key", "value"))
    _refused(lab.attach(*BERT, "ia3", target_modules=("value", "key")), folder, "its feedforward_modules is ['value']")


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_a_truncated_file_is_refused(lab: Any, saved: Callable[..., Path], keep: int) -> None:
    folder = saved()
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:keep])
    _refused(lab.attach(*BERT, "lora"), folder, "not a PEFT adapter folder")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"peft_type": "NONSENSE"}', "null"])
def test_a_broken_configuration_is_refused(lab: Any, saved: Callable[..., Path], content: str) -> None:
    folder = saved()
    (folder / CONFIG).write_text(content)
    _refused(lab.attach(*BERT, "lora"), folder, "not a PEFT adapter folder")


def test_a_configuration_without_a_type_is_refused(lab: Any, saved: Callable[..., Path]) -> None:
    folder = saved()
    (folder / CONFIG).write_text("{}")
    _refused(lab.attach(*BERT, "lora"), folder, "its peft_type is None, this run's is LORA")


@pytest.mark.parametrize("file", [WEIGHTS, CONFIG])
def test_a_missing_file_is_refused_and_no_other_place_is_tried(
    lab: Any, saved: Callable[..., Path], file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*arguments: object, **options: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("peft.config.hf_hub_download", asked)
    folder = saved()
    (folder / file).unlink()
    # A pickle beside it must not stand in for the safetensors file.
    torch.save({}, folder / "adapter_model.bin")
    _refused(lab.attach(*BERT, "lora"), folder, f"it has no {file}")
    shutil.rmtree(folder)
    _refused(lab.attach(*BERT, "lora"), folder, "it has no")


def _changed(folder: Path, change: Callable[[dict[str, torch.Tensor], str], None]) -> str:
    tensors = load_file(str(folder / WEIGHTS))
    name = next(name for name in tensors if "lora_B" in name)
    change(tensors, name)
    save_file(tensors, str(folder / WEIGHTS))
    return name


def test_a_wrong_shape_is_refused(lab: Any, saved: Callable[..., Path]) -> None:
    folder = saved()
    name = _changed(folder, lambda tensors, n: tensors.update({n: torch.zeros(3, 4)}))
    _refused(lab.attach(*BERT, "lora"), folder, f"tensor {name} has shape [3, 4], expected [32, 4]")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(lab: Any, saved: Callable[..., Path], value: float) -> None:
    folder = saved()
    name = _changed(folder, lambda tensors, n: tensors[n][0].fill_(value))
    _refused(lab.attach(*BERT, "lora"), folder, f"tensor {name} holds NaN or infinity")


def test_a_base_weight_smuggled_in_is_refused(lab: Any, saved: Callable[..., Path]) -> None:
    folder = saved()
    name = "base_model.model.bert.encoder.layer.0.output.dense.weight"
    _changed(folder, lambda tensors, _: tensors.update({name: torch.zeros(32, 64)}))
    _refused(lab.attach(*BERT, "lora"), folder, f"tensor {name} is not of this adapter")
