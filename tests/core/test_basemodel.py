from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertModel,
)

from fedgraft.core.basemodel import BaseModel, describe, fingerprint, load_pretrained, quiet, resolve
from fedgraft.core.config import TaskConfig
from fedgraft.core.tasks import create_task

LABELS = ("a", "b", "c")


def load(
    folder: str | Path, seed: int = 0, labels: tuple[str, ...] = LABELS, name: str = "sequence-classification"
) -> BaseModel:
    config = TaskConfig(name=name, labels=labels)
    return create_task(config).load(str(folder), config, seed)


@pytest.fixture
def bert(tiny_model, tmp_path) -> Path:
    """A copy of the tiny BERT that a test may spoil."""
    return Path(shutil.copytree(tiny_model("bert"), tmp_path / "bert"))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# Names


def test_a_package_folder_is_found_inside_the_package(tiny_model, tmp_path, monkeypatch):
    package = tmp_path / "carried_model"
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copytree(tiny_model("bert"), package / "files" / "model")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve("package:carried_model/files/model") == str(package / "files" / "model")
    assert load("package:carried_model/files/model").fingerprint == load(tiny_model("bert")).fingerprint
    assert "carried_model" not in sys.modules


def test_a_folder_and_a_hub_name_stay_what_they_are(bert, monkeypatch):
    assert resolve(str(bert)) == str(bert)
    assert resolve("org/model") == "org/model"
    monkeypatch.setenv("HOME", str(bert.parent))
    assert resolve("~/bert") == str(bert)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("package:no_such_package/model", ["the Python package no_such_package is not installed"]),
        ("package:", ["is not installed"]),
        ("package:a.b/c", ["the Python package a.b is not installed"]),
        ("package:__main__/x", ["the Python package __main__ is not installed"]),
        ("package:json.py", ["is not installed"]),
        ("package:peft/no/such", ["the package peft has no folder no/such"]),
        ("/no/such/folder", ["no such folder"]),
        ("./no-such-folder", ["no such folder"]),
        ("~/no-such-folder", ["no such folder"]),
        ("no-such-org/no-such-model", ["no local folder of that name", "hub"]),
        ("no such model", ["no local folder of that name"]),
        ("a/b/c", ["no local folder of that name"]),
        ("x" * 5000, ["not a path or a hub name"]),
        ("a\0b", ["model a"]),
    ],
)
def test_a_model_that_cannot_be_had_is_one_line(name, words, refused):
    shown = " ".join(name.split())[:100].replace("\0", "\\x00")
    with refused(f"model {shown}", *words):
        load(name)


# Damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "config.json").unlink(), ["the folder has no config.json"]),
        (lambda f: (f / "config.json").write_text("{"), ["not a valid JSON"]),
        (lambda f: (f / "config.json").write_text("[]"), ["cannot be loaded"]),
        (lambda f: (f / "config.json").write_text("{}"), ["cannot be loaded"]),
        (lambda f: (f / "config.json").write_text('{"model_type": "alien"}'), ["cannot be loaded", "alien"]),
        (lambda f: (f / "config.json").write_text('{"model_type": "bert", "hidden_size": "x"}'), ["hidden_size"]),
        (lambda f: (f / "model.safetensors").unlink(), ["has no .safetensors file"]),
        (lambda f: (f / "model.safetensors").write_bytes(b""), ["the model cannot be loaded"]),
        (lambda f: cut(f / "model.safetensors"), ["the model cannot be loaded"]),
        (lambda f: (f / "tokenizer.json").write_text("{"), ["its tokenizer or image processor cannot be loaded"]),
        (lambda f: (f / "tokenizer.json").unlink(), ["its tokenizer or image processor cannot be loaded"]),
        (
            lambda f: [(f / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
            ["its tokenizer knows no words"],
        ),
    ],
)
def test_a_damaged_folder_is_refused_by_name(spoil, words, bert, refused):
    spoil(bert)
    with refused(f"model {bert}: ", *words):
        load(bert)


def test_an_incomplete_checkpoint_is_refused_by_tensor(bert, refused):
    name = "encoder.layer.1.attention.self.query.weight"
    edit_weights(bert, lambda weights: weights.pop(name))
    with refused(str(bert), f"the checkpoint lacks tensor bert.{name}"):
        load(bert)


def test_a_checkpoint_without_a_language_model_head_cannot_be_one(tiny_model, refused):
    with refused("the checkpoint lacks tensor lm_head.weight"):
        load(tiny_model("llama"), name="causal-lm", labels=())


def test_a_tensor_of_another_shape_is_refused_by_name_and_shapes(bert, refused):
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps(config | {"intermediate_size": 16}))
    with refused(str(bert), "tensor bert.encoder.layer.0.intermediate.dense.bias has shape [64], expected [16]"):
        load(bert)


def test_a_head_for_other_labels_is_refused(bert, refused):
    with quiet():
        AutoModelForSequenceClassification.from_pretrained(bert, num_labels=5).save_pretrained(bert)
    with refused(str(bert), "tensor classifier.bias has shape [5], expected [3]", "other labels than task.labels"):
        load(bert)
    assert load(bert, labels=("a", "b", "c", "d", "e")).head == ("classifier",)


@pytest.mark.parametrize("labels", [(), ("only",)])
def test_fewer_than_two_labels_are_refused(labels, bert, refused):
    with refused(f"task.labels names {len(labels)} labels", "needs two or more"):
        load(bert, labels=labels)


def test_pickled_weights_are_not_read(bert, refused):
    weights = bert / "model.safetensors"
    torch.save(load_file(weights), bert / "pytorch_model.bin")
    weights.rename(bert / "adapter_model.safetensors")
    with refused("the model cannot be loaded"):
        load(bert)
    (bert / "adapter_model.safetensors").unlink()
    with refused("has no .safetensors file"):
        load(bert)


@pytest.mark.parametrize("model_type", ["alien", "bert"])
def test_code_in_the_models_folder_does_not_run(model_type, bert, refused):
    marker = bert / "ran"
    (bert / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass C: ...\n")
    config = json.loads((bert / "config.json").read_text())
    config |= {
        "model_type": model_type,
        "auto_map": {"AutoConfig": "evil.C", "AutoModelForSequenceClassification": "evil.C", "AutoTokenizer": "evil.C"},
    }
    (bert / "config.json").write_text(json.dumps(config))
    if model_type == "bert":
        assert type(load(bert).model).__name__ == "BertForSequenceClassification"
    else:
        with refused(f"model {bert}: "):
            load(bert)
    assert not marker.exists()


# What a base model is


def test_a_base_model_is_frozen_float32_and_in_evaluation_mode(bert):
    edit_weights(
        bert, lambda weights: weights.update({k: v.half() for k, v in weights.items() if v.is_floating_point()})
    )
    base = load(bert)
    parameters = list(base.model.parameters())
    assert parameters and not any(p.requires_grad for p in parameters)
    assert {p.dtype for p in parameters} == {torch.float32}
    assert not any(module.training for module in base.model.modules())
    assert base.parameters == sum(p.numel() for p in parameters) and base.bytes == 4 * base.parameters
    again = describe(base.model.train().requires_grad_(True), base.processor, set(), base.head)
    assert not any(module.training for module in again.model.modules())
    assert not any(p.requires_grad for p in again.model.parameters())


def test_loading_leaves_the_random_state_and_the_log_level_alone(bert):
    from transformers.utils import logging

    before, level, bars = torch.random.get_rng_state(), logging.get_verbosity(), logging.is_progress_bar_enabled()
    load(bert, seed=5)
    assert torch.equal(before, torch.random.get_rng_state())
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (level, bars)


def test_loading_prints_nothing(bert, capfd):
    load(bert)
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err == ""


def test_fresh_tensors_are_drawn_from_the_seed(bert):
    def head(seed: int) -> dict[str, torch.Tensor]:
        torch.rand(3)  # the caller's random state must not matter
        model, missing = load_pretrained(AutoModelForSequenceClassification, str(bert), seed, num_labels=3)
        assert missing == {"classifier.weight", "classifier.bias"}
        return {name: tensor for name, tensor in model.state_dict().items() if name in missing}

    first, again, other = head(1), head(1), head(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


# The head


@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("bert", ("classifier",)),
        ("roberta", ("classifier",)),
        ("gpt2", ("score",)),
        ("llama", ("score",)),
        ("t5", ("classification_head",)),
    ],
)
def test_the_head_of_each_family(family, head, tiny_model):
    assert load(tiny_model(family)).head == head


def test_the_head_of_an_image_model(tiny_model):
    assert load(tiny_model("vit"), name="image-classification").head == ("classifier",)


def test_a_language_model_has_no_head_of_the_tasks(tiny_model):
    assert load(tiny_model("gpt2", "causal-lm"), name="causal-lm", labels=()).head == ()


SMALL = {"vocab_size": 100, "max_position_embeddings": 64}
DISTILBERT = DistilBertConfig(dim=32, n_layers=1, n_heads=4, hidden_dim=64, **SMALL)
DEBERTA = DebertaV2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, **SMALL)


@pytest.mark.parametrize(
    ("make", "head"),
    [
        (lambda _: DistilBertModel(DISTILBERT), "pre_classifier"),
        (lambda _: DebertaV2Model(DEBERTA), "pooler"),
        (lambda folder: BertModel.from_pretrained(folder, add_pooling_layer=False), "bert.pooler"),
    ],
)
def test_whatever_had_to_be_made_is_part_of_the_head(make, head, bert):
    """It would otherwise stay random and frozen."""
    with quiet():
        make(bert).save_pretrained(bert)
    first, second = load(bert, seed=1), load(bert, seed=2)
    assert first.head == ("classifier", head)
    assert first.model.get_submodule(head) is not None
    assert first.fingerprint == second.fingerprint


# The fingerprint


def naive_fingerprint(model: torch.nn.Module, leave_out: set[str]) -> str:
    text = b""
    for name in sorted(model.state_dict()):
        if name not in leave_out:
            tensor = model.state_dict()[name]
            dtype, code = {torch.float32: ("torch.float32", "<f4"), torch.int64: ("torch.int64", "<i8")}[tensor.dtype]
            text += f"{name}|[{', '.join(str(n) for n in tensor.shape)}]|{dtype}|".encode()
            text += np.array(tensor.tolist(), dtype=code).tobytes()
    return hashlib.sha256(text).hexdigest()


def test_the_fingerprint_is_sha256_over_names_shapes_dtypes_and_bytes(bert):
    base = load(bert)
    fresh = {"classifier.weight", "classifier.bias"}
    assert fingerprint(base.model, fresh) == naive_fingerprint(base.model, fresh)
    assert fingerprint(base.model) == naive_fingerprint(base.model, set())


def test_the_fingerprint_leaves_a_fresh_head_out(bert):
    one, two = load(bert, seed=1), load(bert, seed=2)
    assert not torch.equal(one.model.classifier.weight, two.model.classifier.weight)
    assert one.fingerprint == two.fingerprint
    # Nor does the number of labels count.
    assert load(bert, labels=("x", "y")).fingerprint == one.fingerprint


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("config.json", '"num_attention_heads": 4', '"num_attention_heads": 2'),
        ("config.json", '"layer_norm_eps": 1e-12', '"layer_norm_eps": 1e-06'),
        ("tokenizer.json", '"fever"', '"fewer"'),
    ],
)
def test_the_same_weights_read_or_wired_otherwise_are_another_model(bert, file, old, new):
    before = load(bert)
    text = (bert / file).read_text(encoding="utf-8")
    assert old in text
    (bert / file).write_text(text.replace(old, new), encoding="utf-8")
    after = load(bert)
    assert after.fingerprint != before.fingerprint
    fresh = {"classifier.weight", "classifier.bias"}
    assert fingerprint(after.model, fresh) == fingerprint(before.model, fresh)


def test_a_head_that_came_with_the_model_counts(bert):
    without = load(bert).fingerprint
    with quiet():
        AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3).save_pretrained(bert)
    first, again = load(bert, seed=1).fingerprint, load(bert, seed=2).fingerprint
    assert first == again != without
    edit_weights(bert, lambda weights: weights["classifier.bias"].add_(1.0))
    assert load(bert).fingerprint != first


def test_one_flipped_bit_of_any_tensor_changes_the_fingerprint(bert):
    before = load(bert).fingerprint
    names = sorted(load_file(bert / "model.safetensors"))
    assert len(names) > 30

    for name in names[:: len(names) // 6]:

        def flip(weights: dict[str, torch.Tensor], name: str = name) -> None:
            weights[name].view(-1)[-1:].view(torch.int32).bitwise_xor_(1)

        edit_weights(bert, flip)
        assert load(bert).fingerprint != before
        edit_weights(bert, flip)
        assert load(bert).fingerprint == before


def test_the_fingerprint_covers_buffers_scalars_and_narrow_dtypes():
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.tensor(3))
            self.register_buffer("mask", torch.tensor([True, False]))
            self.register_buffer("none", torch.zeros(0, 3))
            self.narrow = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16).t())

    one = Odd()
    seen = {fingerprint(one)}
    one.count += 1
    seen.add(fingerprint(one))
    one.mask[1] = True
    seen.add(fingerprint(one))
    one.narrow.data[0, 1] = 2
    seen.add(fingerprint(one))
    one.none = torch.zeros(3, 0)
    seen.add(fingerprint(one))
    assert len(seen) == 5
