"""PEFT folders without their base model: every LoRA type is read as it computes, and written for plain PEFT to load."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from fedgraft.core.errors import UserError
from fedgraft.methods.peftfolder import (
    CONFIG,
    WEIGHTS,
    convert_folder,
    key_of,
    locate,
    peft_type,
    read_folder,
    write_folder,
)
from fedgraft.strategies.merging import Adapter
from fedgraft.strategies.merging.mixing import common_spec, lifted

TASK = "sequence-classification"
TARGETS = {"bert": ["query", "value"], "gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"]}
EMBEDDING = {"bert": "word_embeddings", "gpt2": "wte", "llama": "embed_tokens"}
KINDS: dict[str, Callable[[str], dict[str, Any]]] = {
    "plain": lambda family: {"r": 2, "lora_alpha": 5},
    "patterns": lambda family: {
        "r": 4,
        "rank_pattern": {r"0\..*(query|c_attn|q_proj)": 3},
        "alpha_pattern": {r"1\..*(value|c_attn|v_proj)": 7},
    },
    "rslora": lambda family: {"r": 3, "lora_alpha": 4, "use_rslora": True},
    "dora": lambda family: {"r": 2, "use_dora": True},
    "all biases": lambda family: {"r": 2, "bias": "all"},
    "own biases": lambda family: {"r": 2, "bias": "lora_only"},
    "embedding": lambda family: {"r": 2, "target_modules": [*TARGETS[family], EMBEDDING[family]]},
    "some layers": lambda family: {"r": 2, "layers_to_transform": [1]},
    "by pattern": lambda family: {"r": 2, "target_modules": rf".*1\..*({'|'.join(TARGETS[family])})"},
}
CASES = [(family, kind) for family in ("bert", "gpt2") for kind in KINDS] + [("llama", "patterns")]


@pytest.fixture
def made(lab: Any, tmp_path: Path) -> Callable[..., tuple[PeftModel, Path]]:
    """Writes a folder with a shaken adapter of PEFT's own; the adapted model and the folder."""

    def make(family: str, config: Any = None, name: str = "adapter", **settings: Any) -> tuple[PeftModel, Path]:
        base = lab.base(family, TASK)
        if config is None:
            config = peft.LoraConfig(**{"target_modules": TARGETS[family], **settings})
        config.task_type, config.modules_to_save = "SEQ_CLS", list(base.head)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(base.model, config).eval()
        torch.manual_seed(len(name))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(str(tmp_path / name), save_embedding_layers=False)
        return model, tmp_path / name

    return make


def logits(model: Any, lab: Any, family: str) -> torch.Tensor:
    batch = lab.batch(family, TASK, lab.records(family, TASK, (3, 9, 1, 6)))
    with torch.no_grad():
        return model(**{key: value for key, value in batch.items() if key != "labels"}).logits


def loaded(lab: Any, family: str, folder: Path) -> PeftModel:
    """By plain PEFT; a tensor that it misses or does not know is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
        return PeftModel.from_pretrained(lab.base(family, TASK).model, str(folder)).eval()


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_what_is_read_is_what_the_model_trains_and_adds(
    family: str, kind: str, made: Callable[..., tuple[PeftModel, Path]]
) -> None:
    """Every trained parameter by its own name, and each pair's delta is what PEFT merges into the weight."""
    model, folder = made(family, **KINDS[kind](family))
    state = read_folder(folder).state
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(state) == set(trained)
    assert all(np.array_equal(state[name], p.detach().numpy()) for name, p in trained.items())
    modules = dict(model.named_modules())
    for pair in state.spec.pairs:
        layer: Any = modules[re.split(r"\.lora_(?:embedding_)?A\.", pair.a)[0]]
        delta = layer.get_delta_weight("default").detach().numpy()
        ours = state.delta(pair)
        np.testing.assert_allclose(ours.T if pair.fan_in_fan_out else ours, delta, atol=1e-6)
        assert key_of(pair.a) in load_file(folder / WEIGHTS)
    assert {t.role for t in state.spec.tensors} >= {"lora_A", "lora_B", "head"}


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_at_a_larger_rank_plain_peft_computes_the_same(
    family: str, kind: str, made: Callable[..., tuple[PeftModel, Path]], lab: Any, tmp_path: Path
) -> None:
    model, folder = made(family, **KINDS[kind](family))
    read = read_folder(folder)
    spec = common_spec([Adapter("one", read.state)], 7)
    out = write_folder(tmp_path / "out", lifted(read.state, spec), read)
    again = loaded(lab, family, out)
    assert float((logits(again, lab, family) - logits(model, lab, family)).abs().max()) <= 1e-5
    config: Any = again.peft_config["default"]
    assert config.r == 7 and not config.rank_pattern
    if "biases" not in kind:
        assert set(load_file(out / WEIGHTS)) == set(load_file(folder / WEIGHTS))
    same = read_folder(out)
    assert same.state.spec.pairs == spec.pairs and dict(same.state).keys() == dict(read.state).keys()


@pytest.mark.parametrize(("family", "kind"), CASES[: len(KINDS)])
def test_as_it_is_it_comes_back_to_the_byte(
    family: str, kind: str, made: Callable[..., tuple[PeftModel, Path]], tmp_path: Path
) -> None:
    _, folder = made(family, **KINDS[kind](family))
    read = read_folder(folder)
    out = write_folder(tmp_path / "out", read.state, read)
    before, after = load_file(folder / WEIGHTS), load_file(out / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert read_folder(out).state == read.state
    told, now = (json.loads((f / CONFIG).read_text()) for f in (folder, out))
    assert {key for key in told if told[key] != now[key]} <= {"rank_pattern", "alpha_pattern", "lora_alpha", "r"}


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_a_folder_of_a_run_reads_as_the_runs_own_adapter(lab: Any, method: str, tmp_path: Path) -> None:
    adapter = lab.attach("bert", TASK, method)
    state = lab.shaken(adapter)
    folder = adapter.save_peft(tmp_path / "adapter", state)
    read = read_folder(folder).state
    assert read.spec.method == method and read.spec.rank == 4 and read.spec.alpha == 8.0
    assert set(read.spec.pairs) == set(state.spec.pairs)
    assert {t.name: (t.shape, t.role, t.averaging) for t in read.spec.tensors} == {
        t.name: (t.shape, t.role, t.averaging) for t in state.spec.tensors
    }
    assert all(np.array_equal(read[name], state[name]) for name in state)
    out = write_folder(tmp_path / "out", read, read_folder(folder))
    assert lab.attach("bert", TASK, method, seed=2).load_peft(out) == state


def test_half_precision_is_widened(made: Callable[..., tuple[PeftModel, Path]]) -> None:
    _, folder = made("bert", r=2)
    weights = load_file(folder / WEIGHTS)
    for kind in (torch.float16, torch.bfloat16):
        save_file({key: tensor.to(kind) for key, tensor in weights.items()}, folder / WEIGHTS)
        state = read_folder(folder).state
        assert all(t.dtype == "float32" for t in state.spec.tensors)
        for name, array in state.items():
            assert np.array_equal(array, weights[key_of(name)].to(kind).float().numpy())


def test_layers_are_in_the_order_of_their_numbers(made: Callable[..., tuple[PeftModel, Path]]) -> None:
    _, folder = made("bert", r=2)
    weights = load_file(folder / WEIGHTS)
    moved = {re.sub(r"layer\.1\.", "layer.10.", key): tensor for key, tensor in weights.items()}
    second = {
        key.replace("layer.0.", "layer.2."): tensor.clone() for key, tensor in weights.items() if "layer.0." in key
    }
    save_file({**moved, **second}, folder / WEIGHTS)
    layers = [re.findall(r"layer\.(\d+)", pair.a)[0] for pair in read_folder(folder).state.spec.pairs]
    assert layers == ["0", "0", "2", "2", "10", "10"]


def test_a_run_directory_is_meant_by_its_adapter(made: Callable[..., tuple[PeftModel, Path]], tmp_path: Path) -> None:
    made("bert", name="adapter", r=2)
    (tmp_path / "run.json").write_text(
        json.dumps(
            {
                "config": {"task": {"labels": ["a", "b", "c"]}, "privacy": {"enabled": True}},
                "model": {"fingerprint": "f00d"},
            }
        )
    )
    read = read_folder(tmp_path)
    assert read.path == tmp_path / "adapter" == locate(tmp_path) and peft_type(tmp_path) == "LORA"
    assert read.labels == ("a", "b", "c") and read.fingerprint == "f00d" and read.private
    (tmp_path / "run.json").write_text("{")
    bare = read_folder(tmp_path)
    assert bare.run is None and bare.labels == () and bare.fingerprint == "" and not bare.private


def test_without_heads_the_folder_holds_none(
    made: Callable[..., tuple[PeftModel, Path]], lab: Any, tmp_path: Path
) -> None:
    _, folder = made("bert", r=2)
    read = read_folder(folder)
    out = write_folder(tmp_path / "out", read.state, read, heads=False)
    assert all(".lora_" in key for key in load_file(out / WEIGHTS))
    again = loaded(lab, "bert", out)
    base = lab.base("bert", TASK).model
    assert torch.equal(again.get_base_model().classifier.weight, base.classifier.weight)


def test_modules_that_another_adapter_added_are_named_whole(
    made: Callable[..., tuple[PeftModel, Path]], lab: Any, tmp_path: Path
) -> None:
    """The first's `target_modules` say nothing of `key`, nor of the layer that it leaves out."""
    _, one = made("bert", name="one", r=2, layers_to_transform=[1])
    model, two = made("bert", name="three", r=3, target_modules=["key", "query"])
    folders = [read_folder(one), read_folder(two)]
    spec = common_spec([Adapter(str(i), folder.state) for i, folder in enumerate(folders)])
    state = lifted(folders[1].state, spec)
    out = write_folder(tmp_path / "out", state, folders[0])
    again = loaded(lab, "bert", out)
    assert float((logits(again, lab, "bert") - logits(model, lab, "bert")).abs().max()) <= 1e-5
    ranks = {pair.a: spec.by_name[pair.a].shape[0] for pair in spec.pairs}
    assert sorted(ranks.values()) == [2, 3, 3, 3, 3]


# Other types, by PEFT's conversion

CONVERTIBLE = {
    "fourierft": lambda t: peft.FourierFTConfig(n_frequency=20, target_modules=t),
    "loha": lambda t: peft.LoHaConfig(r=2, target_modules=t),
    "lokr": lambda t: peft.LoKrConfig(r=2, target_modules=t),
    "vera": lambda t: peft.VeraConfig(r=8, target_modules=t),
}


@pytest.mark.parametrize("kind", sorted(CONVERTIBLE))
def test_other_types_become_lora_through_their_base_model(
    kind: str, made: Callable[..., tuple[PeftModel, Path]], lab: Any, tiny_model: Any, tmp_path: Path
) -> None:
    """Exactly at full rank; at a small one with the error that is said."""
    model, folder = made("bert", CONVERTIBLE[kind](TARGETS["bert"]), kind)
    with pytest.raises(UserError, match=r"its type is .*; only LORA is read without its base model"):
        read_folder(folder)
    width = model.get_base_model().config.hidden_size
    whole = convert_folder(folder, tiny_model("bert"), width)
    assert whole.lost < 1e-5 and whole.state.spec.rank == width
    out = write_folder(tmp_path / "whole", whole.state, whole)
    assert float((logits(loaded(lab, "bert", out), lab, "bert") - logits(model, lab, "bert")).abs().max()) <= 1e-4

    small = convert_folder(folder, tiny_model("bert"), 2)
    missed = total = 0.0
    modules = dict(model.named_modules())
    for pair in small.state.spec.pairs:
        delta = modules[pair.a.partition(".lora_A.")[0]].get_delta_weight("default").detach().double().numpy()  # type: ignore[operator]
        missed += float(np.sum((small.state.delta(pair) - delta) ** 2))
        total += float(np.sum(delta**2))
    assert small.lost == pytest.approx(np.sqrt(missed / total), rel=1e-3, abs=1e-5)


def test_a_conversion_keeps_the_layout_of_gpt2(
    made: Callable[..., tuple[PeftModel, Path]], lab: Any, tiny_model: Any, tmp_path: Path
) -> None:
    model, folder = made("gpt2", peft.VeraConfig(r=8, target_modules=["c_attn"], fan_in_fan_out=True), "vera")
    width = model.get_base_model().config.n_embd
    converted = convert_folder(folder, tiny_model("gpt2"), width)
    assert converted.lost < 1e-5
    out = write_folder(tmp_path / "out", converted.state, converted)
    assert float((logits(loaded(lab, "gpt2", out), lab, "gpt2") - logits(model, lab, "gpt2")).abs().max()) <= 1e-4


def test_prompts_and_scalings_cannot_be_made_lora(lab: Any, tiny_model: Any, tmp_path: Path) -> None:
    for method, kind in (("prefix", "PREFIX_TUNING"), ("ia3", "IA3")):
        adapter = lab.attach("bert", TASK, method)
        folder = adapter.save_peft(tmp_path / method, lab.shaken(adapter))
        with pytest.raises(UserError, match=f"{method}: {kind} cannot be made LoRA"):
            convert_folder(folder, tiny_model("bert"), 4)


def test_a_type_without_a_task_says_no_model_to_load(
    made: Callable[..., tuple[PeftModel, Path]], tiny_model: Any
) -> None:
    _, folder = made("bert", CONVERTIBLE["lokr"](TARGETS["bert"]), "lokr")
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "task_type": None}))
    with pytest.raises(UserError, match="its task_type is None, which does not say what model to load"):
        convert_folder(folder, tiny_model("bert"), 4)


# What is refused


def _edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def _retensor(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / WEIGHTS).unlink(), f"not a PEFT adapter folder: it has no {WEIGHTS}"),
        (lambda f: (f / CONFIG).unlink(), f"not a PEFT adapter folder: it has no {CONFIG}"),
        (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), "it has no adapter_model.safetensors; save it as"),
        (lambda f: shutil.rmtree(f), "no such folder"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:100]), "not a whole safetensors file"),
        (lambda f: (f / CONFIG).write_text("{"), "not JSON"),
        (lambda f: (f / CONFIG).write_text("[]"), "not the configuration of a PEFT adapter"),
        (lambda f: _edit(f, r=9), "has rank 2, its lora_B 2, adapter_config.json says 9"),
        (lambda f: _edit(f, r=0), "r is 0; it must be a positive number"),
        (lambda f: _edit(f, lora_alpha="much"), "lora_alpha is 'much'; it must be a positive number"),
        (lambda f: _edit(f, rank_pattern=[1]), "rank_pattern is not a table"),
        (lambda f: _edit(f, init_lora_weights="pissa"), "init_lora_weights is pissa, which changes the base model too"),
        (lambda f: _edit(f, lora_bias=True), "its lora_bias is True, which cannot be merged"),
        (lambda f: _edit(f, trainable_token_indices=[1]), "its trainable_token_indices is [1], which cannot be merged"),
        (lambda f: _edit(f, modules_to_save=None), "is neither a low-rank factor nor of its modules_to_save"),
        (lambda f: _retensor(f, lambda w: w.pop(next(k for k in w if "lora_B" in k))), "has no lora_B beside it"),
        (lambda f: _retensor(f, lambda w: w.pop(next(k for k in w if "lora_A" in k))), "has no lora_A beside it"),
        (lambda f: _retensor(f, lambda w: next(iter(w.values())).fill_(torch.nan)), "holds NaN or infinity"),
        (
            lambda f: _retensor(f, lambda w: w.update({next(k for k in w if "lora_A" in k): torch.ones(2, 3, 1, 1)})),
            "only linear layers are merged",
        ),
        (
            lambda f: _retensor(f, lambda w: [w.pop(k) for k in list(w) if "lora_" in k]),
            "has no low-rank factors",
        ),
        (lambda f: _retensor(f, lambda w: w.update(stranger=torch.ones(2))), "tensor stranger is neither"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_in_a_line(
    damage: Callable[[Path], Any], says: str, made: Callable[..., tuple[PeftModel, Path]]
) -> None:
    _, folder = made("bert", r=2)
    damage(folder)
    with pytest.raises(UserError) as refusal:
        read_folder(folder)
    assert str(folder) in str(refusal.value) and says in str(refusal.value)


def test_a_folder_that_holds_something_is_not_written_over(
    made: Callable[..., tuple[PeftModel, Path]], tmp_path: Path
) -> None:
    _, folder = made("bert", r=2)
    read = read_folder(folder)
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match="is not an empty folder"):
        write_folder(folder, read.state, read)
    assert sorted(folder.iterdir()) == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is not an empty folder"):
        write_folder(tmp_path / "file", read.state, read)
