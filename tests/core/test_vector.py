"""An adapter as one vector: in the order of the names, and back in the tensors' own shapes and dtypes."""

from __future__ import annotations

import numpy as np

from fedgraft.core.adapter import AdapterSpec, AdapterState, TensorSpec
from fedgraft.core.vector import flat, moved

SPEC = AdapterSpec("lora", (TensorSpec("a", (2, 3)), TensorSpec("b", (1,)), TensorSpec("c", (2,))))
STATE = AdapterState(
    SPEC,
    {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array([10], np.float32),
        "c": np.array([20, 21], np.float32),
    },
)


def test_tensors_come_one_after_the_other_in_the_order_asked_for():
    assert flat(STATE, ("c", "a")).tolist() == [20, 21, 0, 1, 2, 3, 4, 5]
    assert flat(STATE, ("c", "a")).dtype == np.float64
    assert flat(STATE, ()).shape == (0,)


def test_what_is_moved_is_the_named_tensors_and_nothing_else():
    found = moved(STATE, ("a", "c"), np.arange(8) * 0.5)
    assert tuple(found) == ("a", "c")
    assert found["a"].tolist() == [[0, 1.5, 3], [4.5, 6, 7.5]] and found["c"].tolist() == [23, 24.5]
    assert found["a"].dtype == np.float32
    assert np.array_equal(flat(found, ("a", "c")) - flat(STATE, ("a", "c")), np.arange(8) * 0.5)
