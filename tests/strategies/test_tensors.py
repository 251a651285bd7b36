"""Arrays and tensors of a training, to each other and back."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from fedgraft.strategies.tensors import as_array, like

ARRAY = np.arange(6.0).reshape(2, 3) / 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_array_becomes_a_tensor_of_the_same_kind_and_comes_back(dtype: torch.dtype) -> None:
    frozen = ARRAY.copy()
    frozen.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = like(frozen, torch.zeros(1, dtype=dtype))
    assert isinstance(tensor, torch.Tensor) and tensor.dtype == dtype and not tensor.requires_grad
    tensor += 1
    assert np.array_equal(frozen, ARRAY), "a copy, not a view"
    back = as_array(tensor.requires_grad_())
    assert back.dtype == np.float64
    np.testing.assert_allclose(back, ARRAY + 1, rtol=2 * float(torch.finfo(dtype).eps))


def test_an_array_stays_an_array_of_the_others_dtype() -> None:
    got = like(ARRAY, np.zeros(1, np.float32))
    assert isinstance(got, np.ndarray) and got.dtype == np.float32
    assert as_array(got).dtype == np.float64
