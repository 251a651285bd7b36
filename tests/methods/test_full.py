"""Full fine-tuning: every weight trains, is exchanged, is clipped exactly, and comes out as a model of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedgraft.core.errors import UserError

TEXT, LM, IMAGE = "sequence-classification", "causal-lm", "image-classification"
CASES = [("bert", TEXT), ("roberta", TEXT), ("llama", TEXT), ("gpt2", LM), ("vit", IMAGE)]
LENGTHS = (3, 9, 1, 6)


@pytest.mark.parametrize(("family", "task"), CASES)
def test_every_weight_of_the_base_model_trains_once(lab: Any, family: str, task: str) -> None:
    base = lab.base(family, task)
    adapter = lab.attach(family, task, "full")
    assert adapter.spec.parameters == sum(p.numel() for p in base.model.parameters()) == base.parameters
    assert adapter.spec.select("share") == adapter.spec.names == tuple(adapter.trainables())
    assert not any(".lora_" in name or ".original_module." in name for name in adapter.spec.names)


@pytest.mark.parametrize(("family", "task"), CASES)
def test_before_training_it_computes_what_the_base_model_does(lab: Any, family: str, task: str) -> None:
    base, adapter = lab.base(family, task), lab.attach(family, task, "full")
    batch = lab.batch(family, task, lab.records(family, task, LENGTHS))
    with torch.no_grad():
        assert torch.equal(lab.losses(base.model, batch), lab.losses(adapter.model, batch))


@pytest.mark.parametrize(("family", "task"), CASES)
def test_it_starts_again_from_what_it_wrote(lab: Any, family: str, task: str, tmp_path: Path) -> None:
    adapter, other = lab.attach(family, task, "full"), lab.attach(family, task, "full", seed=2)
    state = lab.shaken(adapter)
    adapter.save_peft(tmp_path / "whole", state)
    assert adapter.read() == state, "writing leaves the resident model as it is"
    read = other.load_peft(tmp_path / "whole")
    assert all(np.array_equal(read[name], state[name]) for name in state)
    batch = lab.batch(family, task, lab.records(family, task, LENGTHS))
    with torch.no_grad():
        assert torch.equal(lab.losses(adapter.model, batch), lab.losses(other.model, batch))


@pytest.mark.parametrize(
    ("family", "task", "auto"),
    [("bert", TEXT, AutoModelForSequenceClassification), ("gpt2", LM, AutoModelForCausalLM)],
)
def test_transformers_alone_loads_the_folder(lab: Any, family: str, task: str, auto: Any, tmp_path: Path) -> None:
    adapter = lab.attach(family, task, "full")
    adapter.save_peft(tmp_path / "whole", lab.shaken(adapter))
    model, report = auto.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    model.eval()
    batch = lab.batch(family, task, lab.records(family, task, LENGTHS))
    with torch.no_grad():
        assert torch.allclose(lab.losses(model, batch), lab.losses(adapter.model, batch), atol=1e-6)


@pytest.mark.parametrize(("family", "task"), [("bert", TEXT), ("llama", TEXT), ("vit", IMAGE)])
def test_its_gradients_are_clipped_as_one_example_after_another_would_be(lab: Any, family: str, task: str) -> None:
    case = (family, task, "full")
    adapter = lab.double(case)
    records = lab.records(family, task, LENGTHS)
    rows = lab.rows(adapter, case, records)
    clip = float(rows.norm(dim=1).median())
    lab.close(lab.summed(adapter, case, [records], clip), lab.clipped(rows, clip), relative=1e-8)


def test_a_folder_that_does_not_fit_is_refused(lab: Any, tmp_path: Path) -> None:
    adapter = lab.attach("bert", TEXT, "full")
    whole = adapter.save_peft(tmp_path / "whole", adapter.read()) / "model.safetensors"
    tensors = load_file(whole)
    taken = tensors.pop("bert.embeddings.word_embeddings.weight")
    before = adapter.read()
    for put, said in (
        ({}, r"has no value for tensor bert\.embeddings\.word_embeddings\.weight"),
        ({"bert.embeddings.word_embeddings.weight": taken[1:].clone()}, r"word_embeddings\.weight has shape"),
        ({"bert.embeddings.word_embeddings.weight": taken * float("nan")}, r"whole: tensor .*word_embeddings\.weight"),
    ):
        save_file({**tensors, **put}, whole, metadata={"format": "pt"})
        with pytest.raises(UserError, match=said):
            adapter.load_peft(tmp_path / "whole")
    with pytest.raises(UserError, match=r"no config\.json"):
        adapter.load_peft(tmp_path)
    assert adapter.read() == before
