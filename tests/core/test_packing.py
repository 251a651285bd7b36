from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedgraft.core.adapter import AdapterSpec, AdapterState, LowRankPair, TensorSpec
from fedgraft.core.errors import UserError
from fedgraft.core.packing import Table, agree, pack, unpack

WIRES = ("fp32", "fp16", "bf16")
A, B, HEAD, WIDE = "q.lora_A.default.weight", "q.lora_B.default.weight", "head.bias", "wide"


def lora_spec(rank: int = 2, alpha: float = 4.0) -> AdapterSpec:
    return AdapterSpec(
        "lora",
        (
            TensorSpec(A, (rank, 4), role="lora_A", averaging="product"),
            TensorSpec(B, (3, rank), role="lora_B", averaging="product"),
            TensorSpec(HEAD, (3,), role="head"),
            TensorSpec(WIDE, (2,), "float64"),
        ),
        (LowRankPair(A, B, alpha / rank),),
        rank=rank,
        alpha=alpha,
    )


def lora_state(spec: AdapterSpec | None = None, seed: int = 0) -> AdapterState:
    spec = spec or lora_spec()
    generator = np.random.default_rng(seed)
    return AdapterState(spec, {t.name: generator.normal(size=t.shape).astype(t.dtype) for t in spec.tensors})


def torch_rounded(array: np.ndarray, wire: str) -> np.ndarray:
    """What a float32 array is after a trip through ``wire``, by PyTorch's own casts."""
    if array.dtype == np.float64 or wire == "fp32":
        return array
    narrow = torch.float16 if wire == "fp16" else torch.bfloat16
    return torch.from_numpy(array.copy()).to(narrow).to(torch.float32).numpy()


@st.composite
def states(draw):
    shapes = draw(st.lists(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5), min_size=0, max_size=5))
    tensors, specs = {}, []
    for i, shape in enumerate(shapes):
        dtype = draw(st.sampled_from(["float32", "float64"]))
        # Every number that fits float16, with ties, subnormals and signed zeros among them.
        numbers = st.floats(-65504, 65504, width=32 if dtype == "float32" else 64)
        tensors[f"t{i}"] = draw(hnp.arrays(dtype, shape, elements=numbers))
        specs.append(TensorSpec(f"t{i}", shape, dtype))
    return AdapterState(AdapterSpec("m", tuple(specs)), tensors)


# Round trips


@given(states(), st.sampled_from(WIRES))
def test_unpacking_gives_back_the_tensors_as_pytorch_rounds_them(state, wire):
    arrays, table = pack(state, wire=wire)
    assert len(arrays) <= 2 and all(array.ndim == 1 for array in arrays.values())
    again = unpack(arrays, Table.from_json(table.to_json(), "north"), state.spec, sender="north")
    assert list(again) == list(state) and again.spec == state.spec
    for name in state:
        assert again[name].dtype == state[name].dtype and again[name].shape == state[name].shape
        assert again[name].tobytes() == torch_rounded(state[name], wire).tobytes()


def bf16_bits(values: np.ndarray) -> np.ndarray:
    state = AdapterState(AdapterSpec("m", (TensorSpec("t", values.shape),)), {"t": values})
    arrays, table = pack(state, wire="bf16")
    assert arrays["bfloat16"].dtype == np.int16
    again = unpack(arrays, table, state.spec, sender="north")
    assert again["t"].tobytes() == torch.from_numpy(arrays["bfloat16"]).view(torch.bfloat16).float().numpy().tobytes()
    return arrays["bfloat16"]


@pytest.mark.parametrize("low", [0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_every_bfloat16_neighbourhood_rounds_as_in_pytorch(low):
    """All 65,536 upper halves with lower halves below, at and above the tie: subnormals, zeros and the largest."""
    bits = (np.arange(0x10000, dtype=np.uint32) << 16) | np.uint32(low)
    values = bits.view(np.float32)
    with np.errstate(over="ignore"):
        rounded = torch.from_numpy(values.copy()).to(torch.bfloat16)
    finite = np.isfinite(values) & torch.isfinite(rounded).numpy()
    assert finite.sum() >= 0x10000 - 2 * 0x81
    np.testing.assert_array_equal(bf16_bits(values[finite]), rounded.view(torch.int16).numpy()[finite])


@given(hnp.arrays(np.uint32, 64, elements=st.integers(0, 2**32 - 1)))
def test_any_bits_round_to_bfloat16_as_in_pytorch(bits):
    values = bits.view(np.float32)
    rounded = torch.from_numpy(values.copy()).to(torch.bfloat16)
    finite = np.isfinite(values) & torch.isfinite(rounded).numpy()
    np.testing.assert_array_equal(bf16_bits(values[finite]), rounded.view(torch.int16).numpy()[finite])


@pytest.mark.parametrize(
    ("wire", "largest", "arrives", "overflows", "mend"),
    [
        ("fp16", 65519.99, 65504.0, 65520.0, "set server.wire_dtype to bf16 or fp32"),
        ("bf16", 3.396177e38, 3.3895314e38, 3.3961775292304601e38, "set server.wire_dtype to fp32"),
    ],
)
def test_a_number_too_large_for_the_wire_is_refused_with_the_mend(wire, largest, arrives, overflows, mend, refused):
    spec = AdapterSpec("m", (TensorSpec("small", (1,)), TensorSpec("big", (1,))))

    def state(value):
        return AdapterState(spec, {"small": np.zeros(1, "f4"), "big": np.array([value], "f4")})

    arrays, table = pack(state(-largest), wire=wire)
    assert unpack(arrays, table, spec, sender="north")["big"][0] == np.float32(-arrives)
    with refused("tensor big overflows", wire, mend):
        pack(state(-overflows), wire=wire)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_tensor_is_never_packed(wire, bad, refused):
    state = lora_state()
    state = AdapterState(state.spec, {**state, HEAD: np.array([0, bad, 0], "f4")})
    with refused(f"tensor {HEAD} holds NaN or infinity"):
        pack(state, wire=wire)


def test_a_big_endian_senders_numbers_arrive(refused):
    state = lora_state()
    for wire in WIRES:
        arrays, table = pack(state, wire=wire)
        swapped = {key: array.astype(array.dtype.newbyteorder(">")) for key, array in arrays.items()}
        assert unpack(swapped, table, state.spec, sender="n") == unpack(arrays, table, state.spec, sender="n")


def test_policies_travel_by_position():
    spec = lora_spec().with_policy("freeze", lambda t: t.name == A).with_policy("local", lambda t: t.name == HEAD)
    arrays, table = pack(lora_state(spec))
    assert (table.freeze, table.local) == ((0,), (2,))
    again = unpack(arrays, table, lora_spec(), sender="the server")
    assert again.spec == spec and again.spec.select("freeze") == (A,) and again.spec.select("local") == (HEAD,)


def test_what_arrives_does_not_change_with_the_buffer_it_came_in():
    arrays, table = pack(lora_state())
    again = unpack(arrays, table, lora_spec(), sender="north")
    for array in arrays.values():
        array[:] = 0
    assert again == lora_state()


# Parts


def test_a_part_needs_exactly_the_declared_tensors(refused):
    state = lora_state()
    arrays, table = pack(state.only([A, HEAD]))
    part = unpack(arrays, table, state.spec, sender="north", names=[A, HEAD])
    assert part == state.only([A, HEAD])
    with refused("north", f"tensor {B} is missing"):
        unpack(arrays, table, state.spec, sender="north")
    with refused("north", f"tensor {B} is missing"):
        unpack(arrays, table, state.spec, sender="north", names=[A, B, HEAD])
    with refused("north", f"tensor {HEAD} is not among the declared tensors"):
        unpack(arrays, table, state.spec, sender="north", names=[A])


def test_a_part_is_completed_from_what_is_held(refused):
    old, new = lora_state(seed=1), lora_state(seed=2)
    mixed = AdapterState(new.spec, {**old, B: new[B]})
    arrays, table = pack(mixed.only([B]), whole=mixed.digest, rest=old.digest)
    assert (table.state, table.rest) == (mixed.digest, old.digest)
    assert unpack(arrays, table, new.spec, sender="the server", held=old) == mixed
    with refused("the server", f"the state {old.digest[:12]}", "is not held here"):
        unpack(arrays, table, new.spec, sender="the server")
    with refused("the server", "do not match the digest"):
        unpack(arrays, table, new.spec, sender="the server", held=new)
    with refused("the server", f"tensor {A} is missing"):
        unpack(arrays, table, new.spec, sender="the server", held=old.only([HEAD]))


def test_nothing_changed_is_an_empty_message():
    state = lora_state()
    arrays, table = pack(state.only([]), whole=state.digest, rest=state.digest)
    assert arrays == {} and table.tensors == ()
    assert unpack(arrays, table, state.spec, sender="the server", held=state) == state


def test_a_changed_number_is_found_by_the_digest(refused):
    arrays, table = pack(lora_state())
    arrays["float32"][3] += 1e-3
    with refused("north", "do not match the digest"):
        unpack(arrays, table, lora_spec(), sender="north")


def test_a_narrow_wire_arrives_though_its_digest_is_of_the_wide_values():
    state = lora_state()
    arrays, table = pack(state, wire="fp16")
    assert table.state == state.digest != unpack(arrays, table, state.spec, sender="north").digest


# Strictness

Entries = list[tuple[str, tuple[int, ...]]]


def swap(entries: Entries) -> Entries:
    return [entries[1], entries[0], *entries[2:]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda e: [("evil", (1,)), *e], ["unknown tensor evil"]),
        (lambda e: [(e[0][0] + "\n", e[0][1]), *e[1:]], ["unknown tensor"]),
        (lambda e: e[:1] + e[2:], [f"tensor {B} is missing"]),
        (lambda e: [], [f"tensor {A} is missing"]),
        (lambda e: [*e, e[1]], [f"tensor {B} is listed twice"]),
        (lambda e: [e[0], (B, (2, 3)), *e[2:]], [f"tensor {B} has shape [2, 3], expected [3, 2]"]),
        (lambda e: [(A, (8,)), *e[1:]], [f"tensor {A} has shape [8], expected [2, 4]"]),
        (swap, ["not in the order"]),
    ],
)
@pytest.mark.parametrize("wire", WIRES)
def test_a_table_that_lists_other_tensors_is_refused(change, words, wire, refused):
    arrays, table = pack(lora_state(), wire=wire)
    changed = replace(table, tensors=tuple(change(list(table.tensors))))
    with refused("north: ", *words):
        unpack(arrays, Table.from_json(changed.to_json(), "north"), lora_spec(), sender="north")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: {"float64": a["float64"]}, ["the packed float32 array should be float32[17], got nothing"]),
        (lambda a: a | {"float32": a["float32"][:-1]}, ["should be float32[17], got float32[16]"]),
        (lambda a: a | {"float32": np.append(a["float32"], np.float32(0))}, ["got float32[18]"]),
        (lambda a: a | {"float32": a["float32"].reshape(1, 17)}, ["got float32[1, 17]"]),
        (lambda a: a | {"float32": a["float32"].astype("f8")}, ["got float64[17]"]),
        (lambda a: a | {"float32": a["float32"].astype(str)}, ["should be float32[17], got str"]),
        (
            lambda a: a | {"float64": a["float64"][:1]},
            ["packed float64 array should be float64[2], got float64[1]"],
        ),
        (lambda a: a | {"float16": np.zeros(2, "f2")}, ["an array of float16 that the table does not list"]),
        (lambda a: a | {"x\n": np.zeros(2, "f2")}, ["an array of x"]),
    ],
)
def test_arrays_that_the_table_does_not_describe_are_refused(change, words, refused):
    arrays, table = pack(lora_state())
    with refused("north: ", *words):
        unpack(change(arrays), table, lora_spec(), sender="north")


@pytest.mark.parametrize(
    ("wire", "key", "bits"),
    [("fp32", "float32", np.float32(np.nan)), ("fp16", "float16", np.float16(np.inf)), ("bf16", "bfloat16", 0x7F80)],
)
def test_a_non_finite_number_on_the_wire_is_refused_by_tensor(wire, key, bits, refused):
    arrays, table = pack(lora_state(), wire=wire)
    arrays[key][14] = bits
    with refused("north: ", f"tensor {HEAD} holds NaN or infinity"):
        unpack(arrays, table, lora_spec(), sender="north")


def test_a_rank_mismatch_says_both_ranks(refused):
    arrays, table = pack(lora_state(lora_spec(rank=4)))
    with refused("north: ", A, "rank 4 against rank 2", "set method.rank alike"):
        unpack(arrays, table, lora_spec(rank=2), sender="north")


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        (lora_spec(alpha=8.0), ["here lora, rank 2, alpha 4.0"]),
        (replace(lora_spec(), method="rslora"), ["differs in its tensors, method, rank, alpha or scaling"]),
        (replace(lora_spec(), tensors=lora_spec().tensors[:2]), ["differs in its tensors"]),
        (replace(lora_spec(), pairs=()), ["use one configuration everywhere"]),
        (AdapterSpec("bitfit", (TensorSpec("q.bias", (3,)),)), ["unknown tensor q.bias; this end trains lora"]),
    ],
)
def test_another_adapter_is_refused_with_what_differs(theirs, words, refused):
    arrays, table = pack(lora_state(theirs))
    with refused("north: ", *words):
        unpack(arrays, table, lora_spec(), sender="north")


def test_positions_beyond_the_adapter_are_refused(refused):
    _, table = pack(lora_state())
    for changed in (replace(table, freeze=(4,)), replace(table, local=(10**30,))):
        with refused("north: ", "more tensors than this end's lora adapter"):
            agree(changed, lora_spec(), "north")


# The table itself


def test_a_table_survives_json():
    _, table = pack(lora_state(lora_spec().with_policy("freeze", lambda t: t.name == A)), wire="bf16", rest="abc")
    assert Table.from_json(table.to_json(), "north") == table


@pytest.mark.parametrize("version", [0, 1, 3, "2", 2.0, True, None, [], {"x": [1]}, 10**4000])
def test_another_version_is_refused(version, refused):
    values = asdict(pack(lora_state())[1]) | {"version": version}
    with refused("north: wire format", "this end speaks 2"):
        Table.from_json(json.dumps(values), "north")


@pytest.mark.parametrize(
    "text", ["", "{", "nonsense", "[" * 100_000, '{"version":' * 50_000, '{"version": 1' + "0" * 5000 + "}", None, 3]
)
def test_a_table_that_is_not_json_is_refused(text, refused):
    with refused("north: the adapter's table of contents is not JSON"):
        Table.from_json(text, "north")


@pytest.mark.parametrize("text", ["[]", "3", "null", '"x"', "{}"])
def test_json_that_is_no_table_is_refused(text, refused):
    with refused("north: wire format"):
        Table.from_json(text, "north")


@pytest.mark.parametrize("key", ["spec", "state", "rest", "wire", "tensors", "freeze", "local"])
def test_a_missing_or_extra_entry_is_named(key, refused):
    values = asdict(pack(lora_state())[1])
    del values[key]
    with refused("north: ", f"unknown or missing entry `{key}`"):
        Table.from_json(json.dumps(values), "north")
    values = asdict(pack(lora_state())[1]) | {f"{key}2": 1}
    with refused("north: ", f"unknown or missing entry `{key}2`"):
        Table.from_json(json.dumps(values), "north")


@pytest.mark.parametrize(
    "change",
    [
        {"spec": 3},
        {"state": None},
        {"rest": []},
        {"wire": "fp8"},
        {"wire": ["fp32"]},
        {"freeze": 1},
        {"freeze": [-1]},
        {"freeze": [1.0]},
        {"freeze": [True]},
        {"local": ["0"]},
        {"local": {"0": 1}},
        {"tensors": 3},
        {"tensors": {"ab": 1}},
        {"tensors": ["ab"]},
        {"tensors": [[A]]},
        {"tensors": [[A, [2], 3]]},
        {"tensors": [[3, [2]]]},
        {"tensors": [[A, 2]]},
        {"tensors": [[A, "2"]]},
        {"tensors": [[A, [-2]]]},
        {"tensors": [[A, [2.0]]]},
        {"tensors": [{"a": 1, "": 2}]},
    ],
)
def test_a_malformed_table_is_refused(change, refused):
    values = asdict(pack(lora_state())[1]) | change
    with refused("north: the adapter's table of contents is malformed"):
        Table.from_json(json.dumps(values), "north")


# Fuzz


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([A, B, HEAD, WIDE, *WIRES, "", 0, 1, 2, 3, 4]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def mutate(data: st.DataObject, values: dict) -> dict:
    """``values`` with one to three random changes anywhere: a value replaced, dropped, doubled or moved."""
    for _ in range(data.draw(st.integers(1, 3))):
        node = values
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = data.draw(st.sampled_from(keys))
            if isinstance(node[key], dict | list) and node[key] and data.draw(st.booleans()):
                node = node[key]
                continue
            action = data.draw(st.sampled_from(["replace", "drop", "double", "move"]))
            if action == "drop":
                del node[key]
            elif action == "double" and isinstance(node, list):
                node.insert(data.draw(st.integers(0, len(node))), node[key])
            elif action == "move" and isinstance(node, list):
                node.insert(data.draw(st.integers(0, len(node) - 1)), node.pop(key))
            else:
                node[key] = data.draw(json_values)
            break
    return values


@settings(max_examples=400)
@given(st.data(), st.sampled_from(WIRES))
def test_a_mutated_table_is_refused_or_changes_nothing(data, wire):
    state = lora_state()
    arrays, table = pack(state, wire=wire)
    expected = unpack(arrays, table, state.spec, sender="north")
    text = json.dumps(mutate(data, json.loads(table.to_json())))
    try:
        again = unpack(arrays, Table.from_json(text, "north"), state.spec, sender="north", held=expected)
    except UserError as error:
        assert str(error).startswith("north: ") and str(error).isprintable()
    else:
        assert again == expected


@settings(max_examples=200)
@given(st.data())
def test_mutated_text_is_refused_or_changes_nothing(data):
    state = lora_state()
    arrays, table = pack(state)
    text = table.to_json()
    at = data.draw(st.integers(0, len(text)))
    cut = data.draw(st.integers(0, 8))
    text = text[:at] + data.draw(st.text(st.characters(codec=None), max_size=4)) + text[at + cut :]
    try:
        again = unpack(arrays, Table.from_json(text, "north"), state.spec, sender="north")
    except UserError as error:
        assert str(error).startswith("north: ") and str(error).isprintable()
    else:
        assert again == state
