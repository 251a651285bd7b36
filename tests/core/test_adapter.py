from __future__ import annotations

import hashlib
import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save_file

from fedgraft.core.adapter import AdapterSpec, AdapterState, LowRankPair, TensorSpec, explain_shape
from fedgraft.core.errors import NonFiniteError, UserError

EPS = {"float32": 2.0**-23, "float64": 2.0**-52}


def spec_of(*tensors: tuple[str, tuple[int, ...]], dtype: str = "float32", **options) -> AdapterSpec:
    return AdapterSpec("lora", tuple(TensorSpec(name, shape, dtype) for name, shape in tensors), **options)


@st.composite
def states(draw, count: int = 1):
    """``count`` states of one random spec: 1 to 4 tensors of either dtype, scalars and empty tensors included."""
    shapes = draw(st.lists(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4), min_size=1, max_size=4))
    dtypes = [draw(st.sampled_from(["float32", "float64"])) for _ in shapes]
    spec = AdapterSpec(
        "m", tuple(TensorSpec(f"t{i}", s, d) for i, (s, d) in enumerate(zip(shapes, dtypes, strict=True)))
    )
    made = []
    for _ in range(count):
        tensors = {}
        for tensor in spec.tensors:
            numbers = st.floats(-(2.0**60), 2.0**60, width=32 if tensor.dtype == "float32" else 64)
            tensors[tensor.name] = draw(hnp.arrays(tensor.dtype, tensor.shape, elements=numbers))
        made.append(AdapterState(spec, tensors))
    return tuple(made)


def wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64)


# Arithmetic


@given(states(2))
def test_sum_and_difference_are_rounded_once_from_float64(pair):
    a, b = pair
    for name in a:
        dtype = a[name].dtype
        np.testing.assert_array_equal((a + b)[name], (wide(a[name]) + wide(b[name])).astype(dtype))
        np.testing.assert_array_equal((a - b)[name], (wide(a[name]) - wide(b[name])).astype(dtype))


@given(states(3))
def test_addition_commutes_exactly_and_associates_within_rounding(triple):
    a, b, c = triple
    assert a + b == b + a
    left, right = (a + b) + c, a + (b + c)
    for name in a:
        bound = 4 * EPS[a[name].dtype.name] * (abs(wide(a[name])) + abs(wide(b[name])) + abs(wide(c[name])))
        assert (abs(wide(left[name]) - wide(right[name])) <= bound).all()


@given(states(), st.floats(-1e6, 1e6))
def test_scaling_is_rounded_once_from_float64_whatever_the_factor_is_made_of(made, factor):
    (a,) = made
    expected = {name: (wide(array) * factor).astype(array.dtype) for name, array in a.items()}
    for product in (a * factor, factor * a, np.float64(factor) * a, a * np.float64(factor)):
        assert isinstance(product, AdapterState)
        for name, array in product.items():
            assert array.dtype == a[name].dtype
            np.testing.assert_array_equal(array, expected[name])


@given(states(2), st.floats(-1e3, 1e3))
def test_scaling_distributes_over_addition_within_rounding(pair, factor):
    a, b = pair
    left, right = (a + b) * factor, a * factor + b * factor
    for name in a:
        bound = 4 * EPS[a[name].dtype.name] * abs(factor) * (abs(wide(a[name])) + abs(wide(b[name])))
        assert (abs(wide(left[name]) - wide(right[name])) <= bound + 1e-44).all()


@given(states(2))
def test_dot_and_norm_equal_an_exact_sum_of_products(pair):
    a, b = pair
    products = [float(x) * float(y) for name in a for x, y in zip(a[name].flat, b[name].flat, strict=True)]
    bound = len(products) * EPS["float64"] * math.fsum(map(abs, products))
    assert abs(a.dot(b) - math.fsum(products)) <= bound
    squares = [float(x) ** 2 for name in a for x in a[name].flat]
    assert math.isclose(a.norm(), math.sqrt(math.fsum(squares)), rel_tol=1e-12)


def test_dot_is_accumulated_in_float64():
    state = AdapterState(spec_of(("a", (3,))), {"a": np.array([1e8, 1.0, 1e8], dtype=np.float32)})
    other = AdapterState(state.spec, {"a": np.array([1.0, 1.0, -1.0], dtype=np.float32)})
    assert state.dot(other) == 1.0


def test_arithmetic_of_different_adapters_is_refused(refused):
    a = AdapterState(spec_of(("a", (2,)), ("b", (1,))), {"a": np.zeros(2, "f4"), "b": np.zeros(1, "f4")})
    other_name = AdapterState(spec_of(("a", (2,)), ("c", (1,))), {"a": np.zeros(2, "f4"), "c": np.zeros(1, "f4")})
    other_order = AdapterState(spec_of(("b", (1,)), ("a", (2,))), {"a": np.zeros(2, "f4"), "b": np.zeros(1, "f4")})
    other_shape = AdapterState(spec_of(("a", (1,)), ("b", (1,))), {"a": np.zeros(1, "f4"), "b": np.zeros(1, "f4")})
    for operation in (lambda x, y: x + y, lambda x, y: x - y, lambda x, y: x.dot(y)):
        with refused("differ in their tensors: b"):
            operation(a, other_name)
        with refused("differ in their tensors: the order"):
            operation(a, other_order)
        with refused("tensor a has shape [1], expected [2]"):
            operation(a, other_shape)


def test_map_keeps_the_dtype_and_refuses_another_shape(refused):
    state = AdapterState(spec_of(("a", (2,))), {"a": np.array([1, 4], "f4")})
    assert state.map(lambda array: np.sqrt(array.astype(np.float64)))["a"].dtype == np.float32
    with refused("tensor a", "[1]", "[2]"):
        state.map(lambda array: array[:1])


# Immutability


def test_arrays_are_read_only():
    state = AdapterState(spec_of(("a", (2,))), {"a": np.zeros(2, "f4")})
    for made in (state, state * 2.0, state + state, state.only(["a"]), state.filled_from(state)):
        with pytest.raises(ValueError, match="read-only"):
            made["a"][0] = 1.0


def test_later_changes_to_the_source_do_not_reach_the_state():
    source = np.zeros((2, 2), "f4")
    view = source.T
    view.flags.writeable = False
    direct, through_view = (AdapterState(spec_of(("a", (2, 2))), {"a": array}) for array in (source, view))
    before = direct.digest
    source[:] = 1.0
    for state in (direct, through_view):
        np.testing.assert_array_equal(state["a"], np.zeros((2, 2)))
        assert state.digest == before


def test_read_only_memory_is_not_copied():
    source = np.zeros(2, "f4")
    source.flags.writeable = False
    assert np.shares_memory(AdapterState(spec_of(("a", (2,))), {"a": source})["a"], source)


def test_big_endian_arrays_become_native():
    swapped = np.array([1.0, 2.0], ">f4")
    swapped.flags.writeable = False
    state = AdapterState(spec_of(("a", (2,))), {"a": swapped})
    assert state["a"].dtype == np.dtype("f4") and state["a"].dtype.isnative
    np.testing.assert_array_equal(state["a"], [1.0, 2.0])


# Construction


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"a": np.zeros(2, "f4")}, ["tensor b is missing"]),
        ({"a": np.zeros(2, "f4"), "b": np.zeros(1, "f4"), "c": np.zeros(1, "f4")}, ["unknown tensor c"]),
        (
            {"a": np.zeros(2, "f4"), "b": np.zeros(1, "f4"), "c": np.zeros(1), "d": np.zeros(1)},
            ["unknown tensor c and 1 more"],
        ),
        ({"a": np.zeros(3, "f4"), "b": np.zeros(1, "f4")}, ["tensor a has shape [3], expected [2]"]),
        ({"a": np.zeros(2, "f8"), "b": np.zeros(1, "f4")}, ["tensor a is float64, expected float32"]),
        ({"a": np.zeros(2, "i4"), "b": np.zeros(1, "f4")}, ["tensor a is int32, expected float32"]),
    ],
)
def test_tensors_that_do_not_fit_the_spec_are_refused(tensors, words, refused):
    with refused(*words):
        AdapterState(spec_of(("a", (2,)), ("b", (1,))), tensors)


def test_the_order_is_the_specs_not_the_dictionarys():
    spec = spec_of(("b", ()), ("a", ()))
    state = AdapterState(spec, {"a": np.array(1, "f4"), "b": np.array(2, "f4")})
    assert list(state) == ["b", "a"] and len(state) == 2 and state.parameters == 2


def test_parts_and_their_completion():
    spec = spec_of(("a", (1,)), ("b", (1,)), ("c", (1,)))
    ones, twos = (AdapterState(spec, {n: np.full(1, v, "f4") for n in "abc"}) for v in (1, 2))
    part = ones.only({"c", "a", "zzz"})
    assert list(part) == ["a", "c"]
    assert {name: float(array[0]) for name, array in part.filled_from(twos).items()} == {"a": 1, "b": 2, "c": 1}
    assert list(part.filled_from(twos)) == ["a", "b", "c"]
    with pytest.raises(UserError, match="tensor b is missing"):
        part.filled_from(part)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_tensor_is_named(bad):
    state = AdapterState(spec_of(("a", (2,)), ("b", (2,))), {"a": np.zeros(2, "f4"), "b": np.array([0, bad], "f4")})
    with pytest.raises(NonFiniteError, match="tensor b holds NaN or infinity"):
        state.require_finite()
    assert state.only(["a"]).require_finite() is not None


@pytest.mark.parametrize("transposed", [False, True])
def test_delta_is_the_scaled_product(transposed):
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 3)).astype("f4"), generator.normal(size=(4, 2)).astype("f4")
    pair = LowRankPair("A", "B", 0.5, transposed)
    spec = AdapterSpec("lora", (TensorSpec("A", (2, 3)), TensorSpec("B", (4, 2))), (pair,))
    dense = [[0.5 * sum(float(b[i, k]) * float(a[k, j]) for k in range(2)) for j in range(3)] for i in range(4)]
    np.testing.assert_allclose(AdapterState(spec, {"A": a, "B": b}).delta(pair), dense, rtol=1e-14)


# Digest


def naive_digest(state: AdapterState) -> str:
    text = b""
    for name, array in state.items():
        kind = "f" if array.dtype == np.float32 else "d"
        text += f"{name}|[{', '.join(map(str, array.shape))}]|{array.dtype}|".encode()
        text += b"".join(struct.pack(f"<{kind}", number) for number in array.flatten(order="C"))
    return hashlib.sha256(text).hexdigest()


@given(states())
def test_the_digest_is_sha256_over_names_shapes_dtypes_and_values(made):
    assert made[0].digest == naive_digest(made[0])


def test_the_digest_does_not_depend_on_memory_layout():
    values = np.arange(6, dtype="f4").reshape(2, 3)
    spec = spec_of(("a", (2, 3)))
    assert AdapterState(spec, {"a": values}).digest == AdapterState(spec, {"a": np.asfortranarray(values)}).digest
    apart = np.zeros((2, 6), "f4")
    apart[:, ::2] = values
    apart.flags.writeable = False
    column = spec_of(("a", (2, 1)))
    assert AdapterState(spec, {"a": apart[:, ::2]}).digest == AdapterState(spec, {"a": values}).digest
    assert AdapterState(column, {"a": apart[:, 2:3]}).digest == AdapterState(column, {"a": values[:, 1:2]}).digest


@settings(max_examples=50)
@given(states(), st.data())
def test_any_flipped_bit_changes_the_digest(made, data):
    (state,) = made
    names = [name for name, array in state.items() if array.size]
    if not names:
        return
    name = data.draw(st.sampled_from(names))
    raw = bytearray(state[name].tobytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    flipped = np.frombuffer(bytes(raw), state[name].dtype).reshape(state[name].shape)
    assert AdapterState(state.spec, {**state, name: flipped}).digest != state.digest


def test_name_shape_dtype_and_order_change_the_digest():
    zeros = np.zeros(4, "f4")
    made = [
        AdapterState(spec_of(("a", (4,))), {"a": zeros}),
        AdapterState(spec_of(("b", (4,))), {"b": zeros}),
        AdapterState(spec_of(("a", (2, 2))), {"a": zeros.reshape(2, 2)}),
        AdapterState(spec_of(("a", (4, 1))), {"a": zeros.reshape(4, 1)}),
        AdapterState(spec_of(("a", (4,)), dtype="float64"), {"a": zeros.astype("f8")}),
        AdapterState(spec_of(("a", (2,)), ("b", (2,))), {"a": zeros[:2], "b": zeros[2:]}),
        AdapterState(spec_of(("b", (2,)), ("a", (2,))), {"a": zeros[:2], "b": zeros[2:]}),
        AdapterState(spec_of(("a", (4,))), {"a": -zeros}),
    ]
    assert len({state.digest for state in made}) == len(made)


def test_equal_states_are_one_in_a_set_and_the_spec_counts():
    spec = spec_of(("a", (1,)), alpha=16)
    a, b = (AdapterState(spec, {"a": np.ones(1, "f4")}) for _ in range(2))
    assert a == b and len({a, b}) == 1
    other = a.with_spec(spec_of(("a", (1,)), alpha=8))
    assert other.digest == a.digest and other != a
    assert a != "a"


# Description


PAIRED = AdapterSpec(
    "lora",
    (
        TensorSpec("q.lora_A.w", (2, 4), role="lora_A", averaging="product"),
        TensorSpec("q.lora_B.w", (4, 2), role="lora_B", averaging="product", policy="freeze"),
        TensorSpec("head", (3,), "float64", role="head", averaging="linear", policy="local"),
    ),
    (LowRankPair("q.lora_A.w", "q.lora_B.w", 2, fan_in_fan_out=True),),
    rank=2,
    alpha=4,
    options={"target": ("query", "value"), "deep": {"x": [1, 2.5, None, True]}},
)


def test_a_description_equals_itself_after_json():
    again = AdapterSpec.from_json(PAIRED.to_json())
    assert again == PAIRED and hash(again) == hash(PAIRED)
    assert again.digest == PAIRED.digest and len(PAIRED.digest) == 16
    assert again.to_json() == PAIRED.to_json()


def test_whole_numbers_and_floats_describe_alike():
    def spec(number):
        return AdapterSpec("m", PAIRED.tensors, (LowRankPair("q.lora_A.w", "q.lora_B.w", number),), 2, number)

    assert spec(16).digest == spec(16.0).digest


@pytest.mark.parametrize(
    "change",
    [
        {"method": "rslora"},
        {"rank": 3},
        {"alpha": 5},
        {"options": {"target": ["query"]}},
        {"pairs": []},
        {"pairs": [{"a": "q.lora_A.w", "b": "q.lora_B.w", "scaling": 3.0, "fan_in_fan_out": True}]},
        {"pairs": [{"a": "q.lora_A.w", "b": "q.lora_B.w", "scaling": 2.0, "fan_in_fan_out": False}]},
        *({"tensors": {key: value}} for key, value in [("policy", "freeze"), ("averaging", "linear")]),
        *({"tensors": {key: value}} for key, value in [("role", "x"), ("shape", [4, 2]), ("dtype", "float64")]),
    ],
)
def test_every_part_of_a_description_changes_its_digest(change):
    values = json.loads(PAIRED.to_json())
    if isinstance(change.get("tensors"), dict):
        values["tensors"][0] |= change["tensors"]
    else:
        values |= change
    changed = AdapterSpec.from_json(json.dumps(values))
    assert changed.digest != PAIRED.digest and changed != PAIRED


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "", "shape": ()}, "a tensor is called ''"),
        ({"name": "a", "shape": (-1,)}, "is not a shape"),
        ({"name": "a", "shape": (1.5,)}, "is not a shape"),
        ({"name": "a", "shape": (True,)}, "is not a shape"),
        ({"name": "a", "shape": (1,), "dtype": "float16"}, "dtype float16 is not one of float32, float64"),
        ({"name": "a", "shape": (1,), "policy": "keep"}, "policy keep is not one of share, freeze, local"),
        ({"name": "a", "shape": (1,), "averaging": "mean"}, "averaging mean is not one of"),
    ],
)
def test_a_tensor_that_cannot_be_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        TensorSpec(**arguments)


@pytest.mark.parametrize(
    "build",
    [
        lambda: spec_of(("a", (1,)), ("a", (2,))),
        lambda: AdapterSpec("m", (TensorSpec("a", (1,)),), (LowRankPair("a", "b", 1.0),)),
        lambda: AdapterSpec("m", (), rank="8"),
        lambda: AdapterSpec(3, ()),
    ],
)
def test_a_description_that_cannot_be_is_refused(build):
    with pytest.raises(ValueError):
        build()


def test_policies_are_selected_in_order():
    spec = spec_of(("a", (1,)), ("b", (1,)), ("c", (1,))).with_policy("local", lambda t: t.name != "b")
    assert spec.select("local") == ("a", "c") and spec.select("share") == ("b",)
    assert spec.select("local", "share") == ("a", "b", "c")
    assert spec.parameters == 3


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.data())
def test_a_damaged_description_is_refused_or_whole(data):
    values = json.loads(PAIRED.to_json())
    node, keys = values, list(values)
    while True:
        key = data.draw(st.sampled_from(keys))
        below = node[key]
        if not isinstance(below, dict | list) or not below or data.draw(st.booleans()):
            break
        node, keys = below, list(below) if isinstance(below, dict) else list(range(len(below)))
    node[key] = data.draw(json_values)
    try:
        spec = AdapterSpec.from_json(json.dumps(values))
    except UserError as error:
        assert "not an adapter description" in str(error)
    else:
        assert AdapterSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, '{"rank": 1' + "0" * 5000 + "}"])
def test_no_description_at_all_is_refused(text, refused):
    with refused("not an adapter description"):
        AdapterSpec.from_json(text)


# Shapes in words


def test_a_rank_mismatch_says_both_ranks():
    assert explain_shape("q.lora_A.default.weight", (4, 32), (8, 32)) == (
        "tensor q.lora_A.default.weight has shape [4, 32], expected [8, 32]: "
        "rank 4 against rank 8; set method.rank alike everywhere"
    )
    assert "rank 4 against rank 8" in explain_shape("q.lora_B.default.weight", (32, 4), (32, 8))


@pytest.mark.parametrize(
    ("name", "got", "want"),
    [
        ("q.lora_A.default.weight", (8, 16), (8, 32)),
        ("q.lora_A.default.weight", (4, 16), (8, 32)),
        ("classifier.weight", (4, 32), (8, 32)),
        ("q.lora_A.default.weight", (4, 32, 3, 3), (8, 32, 3, 3)),
    ],
)
def test_other_mismatches_do_not_speak_of_ranks(name, got, want):
    assert explain_shape(name, got, want) == f"tensor {name} has shape {list(got)}, expected {list(want)}"


# Files


@settings(max_examples=30)
@given(states())
def test_a_file_gives_back_the_very_state(tmp_path_factory, made):
    path = tmp_path_factory.mktemp("state") / "a.safetensors"
    made[0].save(path)
    again = AdapterState.load(path)
    assert again == made[0]
    for name in again:
        assert again[name].dtype == made[0][name].dtype
        assert again[name].tobytes() == made[0][name].tobytes()


def small_state() -> AdapterState:
    values = {"q.lora_A.w": np.arange(8, dtype="f4").reshape(2, 4), "q.lora_B.w": np.ones((4, 2), "f4")}
    return AdapterState(PAIRED, {**values, "head": np.array([0.5, -1.0, 1e-300])})


def test_a_part_of_a_state_is_a_file_too(tmp_path):
    part = small_state().only(["head"])
    part.save(tmp_path / "part.safetensors")
    again = AdapterState.load(tmp_path / "part.safetensors")
    assert again == part and list(again) == ["head"] and again.spec == PAIRED


def test_equal_states_are_equal_files(tmp_path):
    for i in range(8):
        small_state().save(tmp_path / f"{i}.safetensors")
    assert len({(tmp_path / f"{i}.safetensors").read_bytes() for i in range(8)}) == 1


def test_a_file_cut_anywhere_is_refused_by_name(tmp_path, refused):
    path = tmp_path / "cut.safetensors"
    small_state().save(path)
    whole = path.read_bytes()
    for length in (*range(0, len(whole), 13), *range(len(whole) - 10, len(whole))):
        path.write_bytes(whole[:length])
        with refused(str(path)):
            AdapterState.load(path)


def test_one_flipped_byte_anywhere_is_refused_by_name(tmp_path):
    path = tmp_path / "flipped.safetensors"
    state = small_state()
    state.save(path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    accepted = []
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (0x01, 0x20, 0x80)[at % 3]]) + whole[at + 1 :])
        try:
            assert AdapterState.load(path) == state
            accepted.append(at)
        except UserError as error:
            assert str(error).startswith(f"{path}: ")
    # Only what changes nothing may pass: a letter of an escape sequence or a space of the header.
    assert all(at < header for at in accepted)
    assert len(accepted) < 10


def test_changed_meaning_under_the_same_values_is_refused(tmp_path, refused):
    path = tmp_path / "meaning.safetensors"
    small_state().save(path)
    whole = path.read_bytes()
    assert whole.count(b'scaling\\\\\\":2.0') == 1
    path.write_bytes(whole.replace(b'scaling\\\\\\":2.0', b'scaling\\\\\\":3.0'))
    with refused(str(path), "does not match its checksum"):
        AdapterState.load(path)


def test_foreign_files_are_refused_by_name(tmp_path, refused):
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": np.zeros(2, "f4")}, foreign)
    with refused(str(foreign), "not one of fedgraft's"):
        AdapterState.load(foreign)
    for metadata in ("", "{}", "[]", '{"spec": "{}", "checksum": ""}', '{"spec": 3, "checksum": ""}', "[" * 100_000):
        save_file({"a": np.zeros(2, "f4")}, foreign, metadata={"fedgraft": metadata})
        with refused(str(foreign)):
            AdapterState.load(foreign)
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x04cposix\nsystem\n.")
    for other in ("pickle.safetensors", "none.safetensors", "."):
        with refused(str(Path(tmp_path / other))):
            AdapterState.load(tmp_path / other)


def test_tensors_that_the_description_does_not_name_are_refused(tmp_path, refused):
    path = tmp_path / "extra.safetensors"
    state = small_state()
    description = state.spec.to_json()
    save_file(
        {**state, "extra": np.zeros(1, "f4")},
        path,
        metadata={"fedgraft": json.dumps({"spec": description, "checksum": state._checksum(description)})},
    )
    with refused(str(path), "unknown tensor extra"):
        AdapterState.load(path)
