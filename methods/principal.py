"""The principal part of the base weights as low-rank factors, computed where the weights are."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..core.adapter import AdapterState
from .attach import AttachedAdapter
from .bases import bases_of
from .offset import module_of


def principal_factors(adapter: AttachedAdapter, state: AdapterState) -> dict[str, np.ndarray]:
    """For every pair of ``state``, by name, factors with s B A = SVD_r(W0), the singular values shared by both.

    W0 is as the model has it now; the base weights of ``adapter`` are not changed. Raises :class:`UserError` that names
    a layer whose weight is quantised or too small for the rank.
    """
    found = {}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        # A very large weight is decomposed by a randomised routine.
        torch.manual_seed(0)
        for pair in state.spec.pairs:
            layer: Any = adapter.model.get_submodule(module_of(pair))
            rank = len(state[pair.a])
            u, vt = bases_of(layer, module_of(pair).removeprefix("base_model.model."), rank, "svd")
            weight = layer.get_base_layer().weight.to(u)
            if pair.fan_in_fan_out:
                weight = weight.T
            # U^T W V is the diagonal of singular values.
            root = ((u.T @ weight) * vt).sum(1).clamp(min=0).div(pair.scaling).sqrt()
            found[pair.a] = (root[:, None] * vt).cpu().numpy().astype(state[pair.a].dtype)
            found[pair.b] = (u * root).cpu().numpy().astype(state[pair.b].dtype)
    return found
