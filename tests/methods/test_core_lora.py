"""LoRA-SB and Ravan: dW = s B R A with frozen orthonormal factors, clipped exactly, exported as an ordinary LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from fedgraft.core.adapter import AdapterState
from fedgraft.core.errors import UserError
from fedgraft.methods.bases import drawn_rows, singular_bases
from fedgraft.methods.catalogue.core_lora import CoreFactor, HeadCores
from fedgraft.privacy.clipping import ExactGradients, require_exact

TEXT, IMAGE = "sequence-classification", "image-classification"
FAMILIES = [("bert", TEXT), ("roberta", TEXT), ("gpt2", TEXT), ("llama", TEXT), ("t5", TEXT), ("vit", IMAGE)]
METHODS = ("lora-sb", "ravan")


def _layers(state: AdapterState) -> list[str]:
    return [name.removesuffix(".lora_B.default.weight") for name in state if name.endswith(".lora_B.default.weight")]


def _dense(state: AdapterState, layer: str, scaling: float) -> np.ndarray:
    """The published sum, head by head, entry by entry of the diagonal."""
    a, b = (state[f"{layer}.{part}.weight"].astype(np.float64) for part in ("lora_A.default.basis", "lora_B.default"))
    whole = f"{layer}.lora_A.default.core.weight"
    if whole in state:
        return scaling * b @ state[whole].astype(np.float64) @ a
    heads = state[f"{layer}.lora_A.default.core.heads"].astype(np.float64)
    scales = state[f"{layer}.lora_A.default.core.scale"].astype(np.float64)
    rank = heads.shape[1]
    total = np.zeros((len(b), a.shape[1]))
    for i, (s, h) in enumerate(zip(scales, heads, strict=True)):
        own = slice(i * rank, (i + 1) * rank)
        total += scaling * s * b[:, own] @ h @ a[own]
    return total


@pytest.mark.parametrize(("family", "task"), FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_merging_adds_the_published_product_to_the_weight(lab: Any, family: str, task: str, method: str) -> None:
    adapter = lab.attach(family, task, method, rank=4, alpha=10.0)
    state = lab.shaken(adapter)
    scaling = 10.0 / (4 if method == "lora-sb" else 16)
    base = {name: p.detach().double().numpy() for name, p in lab.base(family, task).model.named_parameters()}
    adapter.model.double()
    merged = {n: p.detach().numpy() for n, p in adapter.model.merge_and_unload().named_parameters()}
    layers = _layers(state)
    assert layers
    for layer in layers:
        name = f"{layer.removeprefix('base_model.model.')}.weight"
        want = _dense(state, layer, scaling)
        got = merged[name] - base[name]
        assert np.abs(got - (want.T if family == "gpt2" else want)).max() <= 1e-12
        assert np.abs(want).max() > 1e-3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("family", "task"), FAMILIES)
def test_the_frozen_factors_are_the_largest_singular_vectors(lab: Any, method: str, family: str, task: str) -> None:
    adapter = lab.attach(family, task, method, rank=2)
    state = adapter.read()
    weights = dict(lab.base(family, task).model.named_parameters())
    rank = 2 if method == "lora-sb" else 8
    for layer in _layers(state):
        weight = weights[f"{layer.removeprefix('base_model.model.')}.weight"].detach().double().numpy()
        weight = weight.T if family == "gpt2" else weight
        a = state[f"{layer}.lora_A.default.basis.weight"].astype(np.float64)
        b = state[f"{layer}.lora_B.default.weight"].astype(np.float64)
        values = np.linalg.svd(weight, compute_uv=False)[:rank]
        np.testing.assert_allclose(a @ a.T, np.eye(rank), atol=1e-6)
        # U^T W V is the diagonal of the largest singular values: both factors, in order, with signs that agree.
        np.testing.assert_allclose(b.T @ weight @ a.T, np.diag(values), atol=1e-5 * values[0])


@pytest.mark.parametrize("method", METHODS)
def test_drawn_factors_are_orthonormal_and_hang_on_the_seed_alone(lab: Any, method: str) -> None:
    first, same, other = (lab.attach("bert", TEXT, method, init="orthonormal", seed=seed).read() for seed in (1, 1, 2))
    assert first == same and first != other
    rank = 4 if method == "lora-sb" else 16
    for layer in _layers(first):
        a, b = first[f"{layer}.lora_A.default.basis.weight"], first[f"{layer}.lora_B.default.weight"]
        np.testing.assert_allclose(a @ a.T, np.eye(rank), atol=1e-5)
        np.testing.assert_allclose(b.T @ b, np.eye(rank), atol=1e-5)
    svd = lab.attach("bert", TEXT, method).read()
    assert svd.spec.digest != first.spec.digest, "two ends with another basis must find out"


@pytest.mark.parametrize("method", METHODS)
def test_a_fresh_core_changes_nothing(lab: Any, method: str) -> None:
    batch = lab.batch("bert", TEXT, lab.records("bert", TEXT, (3, 9, 1)))
    with torch.no_grad():
        plain = lab.losses(lab.base("bert", TEXT).model, batch)
        adapted = lab.losses(lab.attach("bert", TEXT, method).model, batch)
    assert float((plain - adapted).abs().max()) <= 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_only_the_core_trains_and_the_bases_are_described_as_frozen(lab: Any, method: str) -> None:
    spec = lab.attach("bert", TEXT, method, rank=4, heads=0).spec
    assert spec.pairs == () and spec.rank == 4 and spec.options["common_rank"]
    assert {t.role for t in spec.tensors if t.policy == "freeze"} == {"basis"}
    shared = {t.role: t for t in spec.tensors if t.policy == "share"}
    if method == "lora-sb":
        assert set(shared) == {"core", "head"}
        assert shared["core"].shape == (4, 4) and shared["core"].averaging == "linear"
    else:
        assert set(shared) == {"core", "scale", "head"}
        assert shared["core"].shape == (4, 4, 4) and shared["scale"].shape == (4,)
        assert shared["core"].averaging == shared["scale"].averaging == "product"


def test_ravan_has_as_many_heads_as_asked_for(lab: Any) -> None:
    spec = lab.attach("bert", TEXT, "ravan", rank=3, heads=5).spec
    assert {t.shape for t in spec.tensors if t.role == "core"} == {(5, 3, 3)}
    assert {t.shape for t in spec.tensors if t.role == "basis"} == {(15, 32), (32, 15)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("family", "task"), [*FAMILIES, ("gpt2", "causal-lm"), ("llama", "causal-lm")])
def test_the_core_is_clipped_as_by_a_loop_over_examples(lab: Any, method: str, family: str, task: str) -> None:
    case = (family, task, method)
    adapter = lab.double(case)
    require_exact(adapter.model, adapter.trainables())
    assert all(".basis." not in name and ".lora_B." not in name for name in adapter.trainables())
    records = lab.records(family, task, lab.lengths)
    rows = lab.rows(adapter, case, records)
    clip = float(rows.norm(dim=1).median())
    lab.close(lab.summed(adapter, case, [records[:2], records[2:]], clip), lab.clipped(rows, clip))


@pytest.mark.parametrize("method", METHODS)
def test_no_example_has_to_pass_alone(lab: Any, method: str) -> None:
    """The base layer runs as ever and each core answers for itself, in one pass of the batch."""
    adapter = lab.double(("bert", TEXT, method))
    with ExactGradients(adapter.model, adapter.trainables(), 1.0) as engine:
        lab.add(engine, adapter, ("bert", TEXT, method), lab.records("bert", TEXT, lab.lengths))
        assert not engine.one_by_one
    cores = [unit for unit in engine._units if ".lora_A." in unit.path]
    assert len(cores) == 4 and all(unit.path.endswith(".core") for unit in cores)


@pytest.mark.parametrize("method", METHODS)
def test_a_folder_is_an_ordinary_lora_of_the_product(lab: Any, method: str, tmp_path: Path) -> None:
    adapter = lab.attach("gpt2", TEXT, method, rank=4, alpha=10.0)
    state = lab.shaken(adapter)
    before = dict(adapter.model.named_parameters())
    folder = adapter.save_peft(tmp_path, state)
    rank = 4 if method == "lora-sb" else 16
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", rank, 10.0)
    tensors = load_file(str(folder / "adapter_model.safetensors"))
    layers = _layers(state)
    assert len([name for name in tensors if "lora_" in name]) == 2 * len(layers)
    for layer in layers:
        a, b = (tensors[f"{layer}.{part}.weight"].double().numpy() for part in ("lora_A", "lora_B"))
        want = _dense(state, layer, 10.0 / rank)
        assert np.abs(10.0 / rank * b @ a - want).max() <= 1e-6 * np.abs(want).max()
    # The model is as it was: the same parameters in the same places.
    after = dict(adapter.model.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert adapter.read() == state


@pytest.mark.parametrize("method", METHODS)
def test_a_loaded_folder_goes_on_from_a_core_of_one(lab: Any, method: str, tmp_path: Path) -> None:
    adapter = lab.attach("bert", TEXT, method)
    state = lab.shaken(adapter)
    folder = adapter.save_peft(tmp_path, state)
    loaded = lab.attach("bert", TEXT, method, seed=2).load_peft(folder)
    scaling = 8.0 / (4 if method == "lora-sb" else 16)
    for layer in _layers(state):
        want, got = _dense(state, layer, scaling), _dense(loaded, layer, scaling)
        assert np.abs(got - want).max() <= 1e-6 * np.abs(want).max()
        core = f"{layer}.lora_A.default.core"
        if method == "lora-sb":
            assert np.array_equal(loaded[f"{core}.weight"], np.eye(4, dtype="float32"))
        else:
            assert np.array_equal(loaded[f"{core}.heads"], np.stack([np.eye(4, dtype="float32")] * 4))
            assert np.array_equal(loaded[f"{core}.scale"], np.ones(4, dtype="float32"))


def test_a_folder_that_does_not_fit_leaves_the_model_as_it_was(lab: Any, tmp_path: Path) -> None:
    adapter = lab.attach("bert", TEXT, "lora-sb", rank=2)
    folder = adapter.save_peft(tmp_path, lab.shaken(adapter))
    other = lab.attach("bert", TEXT, "lora-sb", layers=(0,), rank=2)
    before = other.read()
    with pytest.raises(UserError, match="is not of this adapter"):
        other.load_peft(folder)
    assert other.read() == before
    assert all(isinstance(m.lora_A["default"], CoreFactor) for m in other.model.modules() if hasattr(m, "lora_A"))


def test_plain_peft_merges_the_folder_to_the_same_weights(lab: Any, tmp_path: Path) -> None:
    adapter = lab.attach("bert", TEXT, "ravan")
    folder = adapter.save_peft(tmp_path, lab.shaken(adapter))
    ours: Any = adapter.model.merge_and_unload()
    plain: Any = PeftModel.from_pretrained(lab.base("bert", TEXT).model, str(folder)).merge_and_unload()
    want = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        assert float((parameter - want[name]).detach().abs().max()) <= 1e-6, name


@pytest.mark.parametrize(("method", "settings"), [("lora-sb", {"rank": 33}), ("ravan", {"rank": 8, "heads": 5})])
def test_more_directions_than_a_layer_has_are_refused(lab: Any, method: str, settings: dict[str, int]) -> None:
    for init in ("svd", "orthonormal"):
        with pytest.raises(UserError) as refusal:
            lab.attach("bert", TEXT, method, init=init, **settings)
        assert "layer bert.encoder.layer.0.attention.self.query is 32 x 32" in str(refusal.value)
        assert "lower method.rank or method.heads" in str(refusal.value)


def test_a_layer_that_is_not_linear_is_refused_by_name(lab: Any) -> None:
    with pytest.raises(UserError, match=r"fits linear layers; leave .*word_embeddings out of method\.target_modules"):
        lab.attach("bert", TEXT, "lora-sb", target_modules=("word_embeddings",))


@pytest.mark.parametrize(
    ("method", "key"), [("lora-sb", "heads"), ("lora", "heads"), ("dora", "init"), ("ia3", "init")]
)
def test_a_setting_that_means_nothing_is_refused(lab: Any, method: str, key: str) -> None:
    with pytest.raises(UserError, match=f"method.{key} means nothing to method {method}; leave it out"):
        lab.attach("bert", TEXT, method, **{key: 2 if key == "heads" else "svd"})


@pytest.mark.parametrize("method", ["lora", "rslora"])
@pytest.mark.parametrize(("family", "task"), FAMILIES)
def test_a_of_plain_lora_can_begin_at_the_right_singular_vectors(lab: Any, method: str, family: str, task: str) -> None:
    adapter, drawn = (lab.attach(family, task, method, init=init) for init in ("svd", ""))
    state, plain = adapter.read(), drawn.read()
    weights = dict(lab.base(family, task).model.named_parameters())
    for pair in state.spec.pairs:
        name = pair.a.removeprefix("base_model.model.").replace(".lora_A.default", "")
        weight = weights[name].detach().double().numpy()
        weight = weight.T if pair.fan_in_fan_out else weight
        right = np.linalg.svd(weight)[2][:4]
        a, before = state[pair.a].astype(np.float64), plain[pair.a].astype(np.float64)
        length = np.sqrt(np.mean(np.sum(before**2, axis=1)))
        # The same vectors up to their signs, as long as what was drawn.
        np.testing.assert_allclose(np.abs(a @ right.T) / length, np.eye(4), atol=1e-4)
        assert not state[pair.b].any()
    # The base weights are what they were: unlike PiSSA, this only chooses where A begins.
    wrapped = {name: p for name, p in adapter.model.named_parameters() if "lora_" not in name}
    for name, parameter in lab.base(family, task).model.named_parameters():
        held = [p for key, p in wrapped.items() if key.replace(".base_layer", "") == f"base_model.model.{name}"]
        if held:
            assert torch.equal(held[0], parameter)
    assert state.spec.options["init"] == "svd"


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_singular_bases_have_settled_signs(shape: tuple[int, int]) -> None:
    weight = torch.from_numpy(np.random.default_rng(0).standard_normal(shape))
    u, vt = singular_bases(weight, 3)
    values = np.linalg.svd(weight.numpy(), compute_uv=False)
    np.testing.assert_allclose((u.T @ weight @ vt.T).numpy(), np.diag(values[:3]), atol=1e-12)
    assert all(float(row[row.abs().argmax()]) > 0 for row in vt)


def test_a_large_weight_is_decomposed_by_sketching(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    u, v = (np.linalg.qr(random.standard_normal((60, 60)))[0] for _ in range(2))
    weight = torch.from_numpy(u * 0.8 ** np.arange(60) @ v.T)
    want = singular_bases(weight, 4)
    monkeypatch.setattr("fedgraft.methods.bases._WHOLE", 8)
    torch.manual_seed(0)
    got = singular_bases(weight, 4)
    for mine, exact in zip(got, want, strict=True):
        np.testing.assert_allclose(mine.numpy(), exact.numpy(), atol=1e-4)


def test_drawn_rows_are_uniform_in_direction() -> None:
    """Signs included: the mean of many draws is nothing, which a QR without settled signs would not give."""
    torch.manual_seed(0)
    draws = torch.stack([drawn_rows(2, 5) for _ in range(4000)])
    assert float((draws[0] @ draws[0].T - torch.eye(2)).abs().max()) <= 1e-12
    # Each entry has variance 1/5: the mean of 4000 has standard error 0.0071.
    assert float(draws.mean(0).abs().max()) <= 4.5 * 0.0071


def test_head_cores_are_a_block_diagonal_matrix() -> None:
    cores = HeadCores(3, 2).double()
    torch.manual_seed(0)
    torch.nn.init.normal_(cores.heads)
    torch.nn.init.normal_(cores.scale)
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    want = torch.zeros(6, 6, dtype=torch.float64)
    for i in range(3):
        want[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = cores.scale[i] * cores.heads[i]
    assert torch.equal(cores.matrix(), want)
    assert float((cores(x) - x @ want.T).detach().abs().max()) <= 1e-12
