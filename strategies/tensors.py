"""Between NumPy's arrays and the tensors that a training is made of, whatever library these are of."""

from __future__ import annotations

from typing import Any

import numpy as np


def like(array: np.ndarray, tensor: Any) -> Any:
    """``array`` as a tensor of the kind, dtype and device of ``tensor``."""
    if isinstance(tensor, np.ndarray):
        return array.astype(tensor.dtype)
    # torch will not wrap read-only memory without a warning; this copies either way.
    return tensor.new_tensor(array if array.flags.writeable else array.copy())


def as_array(tensor: Any) -> np.ndarray:
    """``tensor`` as an array in float64."""
    if not isinstance(tensor, np.ndarray):
        tensor = tensor.detach().cpu().double().numpy()
    return np.array(tensor, dtype=np.float64)
