"""A low-rank change of the base weights computes what the dense sum does, and leaves no byte behind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

from fedgraft.core.adapter import AdapterState, TensorSpec, offset_a, offset_b
from fedgraft.core.basemodel import fingerprint
from fedgraft.core.errors import UserError
from fedgraft.methods import AttachedAdapter
from fedgraft.methods.offset import module_of

TEXT = "sequence-classification"
BOTH = pytest.mark.parametrize("family", ["bert", "gpt2"])
LENGTHS = (3, 9, 1, 6)


def _offset(state: AdapterState, seed: int = 0, ranks: tuple[int, ...] = (2, 5), scale: float = 0.2) -> AdapterState:
    """``state`` with a random offset; the pairs take the ``ranks`` in turn, 0 is none."""
    random = np.random.default_rng(seed)
    held = {pair.a: ranks[i % len(ranks)] for i, pair in enumerate(state.spec.pairs)}
    spec = state.spec.bare.with_offset(held)
    own = {name: state[name] for name in spec.bare.names}
    return AdapterState(
        spec, own | {t.name: (scale * random.standard_normal(t.shape)).astype("float32") for t in spec.extras}
    )


def _bases(adapter: AttachedAdapter) -> dict[str, torch.Tensor]:
    """The base weight of each adapted layer, by the pair's ``a``."""
    return {pair.a: adapter.model.get_submodule(module_of(pair)).get_base_layer().weight for pair in adapter.spec.pairs}


def _digest(adapter: AttachedAdapter) -> str:
    return fingerprint(adapter.model, frozenset(adapter.spec.names))


def _logits(lab: Any, model: Any, family: str) -> torch.Tensor:
    batch = lab.batch(family, TEXT, lab.records(family, TEXT, LENGTHS))
    with torch.no_grad():
        logits: torch.Tensor = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    return logits


@BOTH
def test_the_base_weights_are_the_original_ones_plus_the_dense_offset(lab: Any, family: str) -> None:
    adapter = lab.attach(family, TEXT, "lora")
    before = {name: weight.detach().clone() for name, weight in _bases(adapter).items()}
    places = {name: weight.data_ptr() for name, weight in _bases(adapter).items()}
    state = _offset(lab.shaken(adapter), ranks=(2, 0, 5))
    adapter.write(state)
    for pair in state.spec.pairs:
        weight = _bases(adapter)[pair.a]
        assert weight.data_ptr() == places[pair.a]
        if offset_a(pair) not in state:
            assert torch.equal(weight, before[pair.a])
            continue
        dense = state[offset_b(pair)].astype(np.float64) @ state[offset_a(pair)].astype(np.float64)
        assert dense.shape == (state[pair.b].shape[0], state[pair.a].shape[1])
        want = before[pair.a].double().numpy() + (dense.T if family == "gpt2" else dense)
        # float32: the product of rank 5, the sum and the store round once each.
        np.testing.assert_allclose(weight.detach().numpy(), want, rtol=0, atol=1e-6)
        assert not weight.requires_grad


@BOTH
def test_an_offset_computes_what_the_same_change_in_the_adapter_does(lab: Any, family: str) -> None:
    """s B A moved into the offset, with B = 0 left behind, is the same function: layout and scale are right."""
    adapter = lab.attach(family, TEXT, "lora", alpha=10.0)
    state = lab.shaken(adapter)
    want = _logits(lab, adapter.model, family)
    spec = state.spec.with_offset({pair.a: 4 for pair in state.spec.pairs})
    moved = dict(state)
    for pair in state.spec.pairs:
        moved[offset_a(pair)] = state[pair.a]
        moved[offset_b(pair)] = (pair.scaling * state[pair.b]).astype("float32")
        moved[pair.b] = np.zeros_like(state[pair.b])
    adapter.write(AdapterState(spec, moved))
    assert float((_logits(lab, adapter.model, family) - want).abs().max()) < 1e-5


def test_the_direction_of_dora_includes_the_offset(lab: Any) -> None:
    adapter = lab.attach("bert", TEXT, "dora")
    state = lab.shaken(adapter)
    want = _logits(lab, adapter.model, "bert")
    spec = state.spec.with_offset({pair.a: 4 for pair in state.spec.pairs})
    moved = dict(state)
    for pair in state.spec.pairs:
        moved[offset_a(pair)] = state[pair.a]
        moved[offset_b(pair)] = (pair.scaling * state[pair.b]).astype("float32")
        moved[pair.b] = np.zeros_like(state[pair.b])
    adapter.write(AdapterState(spec, moved))
    assert float((_logits(lab, adapter.model, "bert") - want).abs().max()) < 1e-5


@BOTH
def test_many_offsets_in_turn_leave_no_byte_behind(lab: Any, family: str) -> None:
    """One resident model serves many sites, and its fingerprint was taken once."""
    adapter = lab.attach(family, TEXT, "lora")
    plain, before = lab.shaken(adapter), _digest(adapter)
    for seed in range(4):
        # Large against the weights, so that W + U - U would lose digits of W.
        adapter.write(_offset(plain, seed, ranks=((2, 5), (0, 3), (4, 0), (1, 1))[seed], scale=30.0))
        assert _digest(adapter) != before
        adapter.write(_offset(plain, seed + 10))
    adapter.write(plain)
    assert _digest(adapter) == before
    assert adapter.read() == plain
    assert adapter._offset._original == {}


def test_the_result_does_not_hang_on_the_offsets_before(lab: Any) -> None:
    one, two = lab.attach("bert", TEXT, "lora"), lab.attach("bert", TEXT, "lora")
    first, second = (_offset(lab.shaken(one), seed, scale=30.0) for seed in (1, 2))
    one.write(first)
    one.write(second)
    two.write(second)
    assert _digest(one) == _digest(two)


def test_an_unchanged_offset_is_not_applied_again(lab: Any) -> None:
    adapter = lab.attach("bert", TEXT, "lora")
    state = _offset(lab.shaken(adapter))
    adapter.write(state)
    versions = {name: weight._version for name, weight in _bases(adapter).items()}
    shaken = AdapterState(state.spec, {**state, state.spec.pairs[0].a: state[state.spec.pairs[0].a] * 2})
    adapter.write(shaken)
    assert {name: weight._version for name, weight in _bases(adapter).items()} == versions
    assert np.array_equal(adapter.read()[state.spec.pairs[0].a], shaken[state.spec.pairs[0].a])
    changed = offset_b(state.spec.pairs[0])
    adapter.write(AdapterState(state.spec, {**state, changed: -state[changed]}))
    moved = [name for name, weight in _bases(adapter).items() if weight._version != versions[name]]
    assert moved == [state.spec.pairs[0].a]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_base_in_another_precision_is_rounded_once_and_comes_back_whole(lab: Any, dtype: torch.dtype) -> None:
    adapter = lab.attach("bert", TEXT, "lora")
    plain = lab.shaken(adapter)
    adapter.model.to(dtype)
    before = {name: weight.detach().clone() for name, weight in _bases(adapter).items()}
    state = _offset(plain)
    adapter.write(state)
    for pair in state.spec.pairs:
        kind = torch.float64 if dtype == torch.float64 else torch.float32
        dense = torch.tensor(state[offset_b(pair)], dtype=kind) @ torch.tensor(state[offset_a(pair)], dtype=kind)
        assert torch.equal(_bases(adapter)[pair.a], (before[pair.a].to(kind) + dense).to(dtype))
    adapter.write(plain)
    assert all(torch.equal(weight, before[name]) for name, weight in _bases(adapter).items())


def test_extras_are_no_tensors_of_the_model(lab: Any) -> None:
    adapter = lab.attach("bert", TEXT, "lora")
    plain = lab.shaken(adapter)
    control = TensorSpec("control", (3,), role="control", policy="freeze", parameter=False)
    spec = plain.spec.with_extras([control]).with_policy("receive", lambda t: t.role == "lora_A")
    state = AdapterState(spec, {**plain, "control": np.ones(3, "float32")})
    adapter.adopt(spec)
    adapter.write(state)
    assert set(adapter.trainables()) == set(plain.spec.names), "what is received trains like what is shared"
    read = adapter.read()
    assert tuple(read) == plain.spec.names and read.spec == spec
    assert all(np.array_equal(read[name], plain[name]) for name in read)
    adapter.write(AdapterState(spec, dict(plain), names=plain.spec.names))


def test_a_state_that_lacks_the_offset_it_speaks_of_is_refused(lab: Any) -> None:
    adapter = lab.attach("bert", TEXT, "lora")
    state = _offset(lab.shaken(adapter))
    before = _digest(adapter)
    own = AdapterState(state.spec, {name: state[name] for name in state.spec.bare.names}, names=state.spec.bare.names)
    missing = offset_a(state.spec.pairs[0]).replace(".", r"\.")
    with pytest.raises(UserError, match=f"not the whole adapter: {missing}"):
        adapter.write(own)
    assert _digest(adapter) == before


def test_another_adapters_description_is_not_adopted(lab: Any) -> None:
    adapter, other = lab.attach("bert", TEXT, "lora"), lab.attach("bert", TEXT, "lora", layers=(1,))
    with pytest.raises(UserError, match=r"the description is not of this adapter: .*layer\.0"):
        adapter.adopt(other.spec)


def test_a_smaller_rank_is_not_spread_over_a_larger(lab: Any) -> None:
    """torch would copy one row of A into all four."""
    adapter = lab.attach("bert", TEXT, "lora")
    before = adapter.read()
    low = before.spec.with_rank(1)
    tensors = {t.name: np.ones(t.shape, "float32") for t in low.tensors}
    with pytest.raises(UserError, match=r"rank 1 against rank 4"):
        adapter.write(AdapterState(low, tensors))
    assert adapter.read() == before


@pytest.mark.parametrize("kind", ["integers", "subclass", "float8"])
def test_a_quantised_base_is_refused_before_anything_changes(lab: Any, kind: str) -> None:
    class Packed(torch.Tensor):
        pass

    adapter = lab.attach("bert", TEXT, "lora")
    plain = lab.shaken(adapter)
    # The last layer, so that the others come first.
    layer = adapter.model.get_submodule(module_of(plain.spec.pairs[-1])).get_base_layer()
    weight = layer.weight.detach()
    packed: Mapping[str, torch.Tensor] = {
        "integers": weight.to(torch.int8),
        "subclass": weight.as_subclass(Packed),
        "float8": weight.to(torch.float8_e4m3fn),
    }
    del layer.weight
    layer.weight = packed[kind]
    first = _bases(adapter)[plain.spec.pairs[0].a].detach().clone()
    with pytest.raises(UserError, match="quantised or no plain matrix; load the base model unquantised") as refusal:
        adapter.write(_offset(plain))
    assert str(refusal.value).startswith(f"layer {module_of(plain.spec.pairs[-1])}: ")
    assert torch.equal(_bases(adapter)[plain.spec.pairs[0].a], first)
    adapter.write(plain)


def test_a_weight_that_is_used_in_two_places_is_refused(lab: Any) -> None:
    adapter = lab.attach("bert", TEXT, "lora")
    plain = lab.shaken(adapter)
    first, last = (adapter.model.get_submodule(module_of(plain.spec.pairs[i])).get_base_layer() for i in (0, -1))
    last.weight = first.weight
    with pytest.raises(UserError, match=r"this one is also .*layer\.\d.*; leave the layer out of method"):
        adapter.write(_offset(plain))


@BOTH
@pytest.mark.parametrize("engine", ["exact", "opacus"])
def test_clipping_stays_exact_on_changed_base_weights(lab: Any, family: str, engine: str) -> None:
    case = (family, TEXT, "lora")
    adapter = lab.attach(*case)
    plain = lab.shaken(adapter)
    adapter.write(plain)
    adapter.model.double()
    records = lab.records(family, TEXT, (3, 11, 1, 6))
    norms = lab.rows(adapter, case, records).norm(dim=1)
    adapter.write(_offset(plain))
    rows = lab.rows(adapter, case, records)
    assert float((rows.norm(dim=1) - norms).abs().max()) > 1e-3, "the offset must matter"
    clip = float(rows.norm(dim=1).median())
    assert (rows.norm(dim=1) > clip).any() and (rows.norm(dim=1) < clip).any()
    lab.close(lab.summed(adapter, case, [records], clip, engine=engine), lab.clipped(rows, clip))
    adapter.write(plain)
    assert float((lab.rows(adapter, case, records).norm(dim=1) - norms).abs().max()) < 1e-12


@BOTH
@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_plain_peft_computes_the_same_from_a_folder(lab: Any, family: str, method: str, tmp_path: Path) -> None:
    """On the original base model, with other ranks in each layer, and an alpha that is no multiple of any."""
    adapter = lab.attach(family, TEXT, method, rank=3, alpha=7.0)
    state = _offset(lab.shaken(adapter), ranks=(2, 0, 5))
    adapter.save_peft(tmp_path, state)
    want = _logits(lab, adapter.model, family)
    without = lab.attach(family, TEXT, method, rank=3, alpha=7.0)
    without.write(state.only(state.spec.bare.names).with_spec(state.spec.bare))
    assert float((_logits(lab, without.model, family) - want).abs().max()) > 1e-2, "the offset must matter"

    plain = PeftModel.from_pretrained(lab.base(family, TEXT).model, str(tmp_path)).eval()
    assert float((_logits(lab, plain, family) - want).abs().max()) < 1e-5
    merged = {name: p.detach().double().numpy() for name, p in plain.merge_and_unload().named_parameters()}
    base = dict(lab.base(family, TEXT).model.named_parameters())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for pair in state.spec.pairs:
        layer = module_of(pair).removeprefix("base_model.model.")
        assert config["rank_pattern"].get(f"^{layer}", 3) == 3 + state.spec.by_name.get(offset_a(pair), _NONE).shape[0]
        if method != "dora":
            delta = merged[f"{layer}.weight"] - base[f"{layer}.weight"].detach().double().numpy()
            np.testing.assert_allclose(delta.T if pair.fan_in_fan_out else delta, state.delta(pair), atol=2e-6)


_NONE = TensorSpec("none", (0,))


def test_a_folder_without_an_offset_is_the_plain_one(lab: Any, tmp_path: Path) -> None:
    """Also after an offset: and what is loaded from it stands on the original base weights."""
    adapter = lab.attach("bert", TEXT, "lora")
    plain, before = lab.shaken(adapter), _digest(adapter)
    adapter.save_peft(tmp_path / "before", plain)
    adapter.write(_offset(plain))
    adapter.save_peft(tmp_path / "after", plain)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "before" / file).read_bytes() == (tmp_path / "after" / file).read_bytes()
    adapter.write(_offset(plain))
    assert adapter.load_peft(tmp_path / "before") == plain
    assert _digest(adapter) == before


def test_a_folder_with_an_offset_is_no_start_for_another_rank(lab: Any, tmp_path: Path) -> None:
    adapter = lab.attach("bert", TEXT, "lora")
    adapter.save_peft(tmp_path, _offset(lab.shaken(adapter)))
    with pytest.raises(UserError, match="its alpha_pattern is"):
        lab.attach("bert", TEXT, "lora").load_peft(tmp_path)
