"""TIES against the published three steps on dense matrices, in blocks or at once, and against PEFT's on one matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft.utils.merge_utils import ties as peft_ties

from fedgraft.core.adapter import AdapterState
from fedgraft.strategies.merging import Adapter, create_merger, elementwise


def published(
    dense: list[dict[str, np.ndarray]], p: np.ndarray, density: float, together: bool
) -> dict[str, np.ndarray]:
    """Trim, elect, merge, one entry at a time."""
    kept = []
    for own in dense:
        groups = [list(own)] if together else [[name] for name in own]
        out = {}
        for names in groups:
            flat = np.sort(np.abs(np.concatenate([own[name].reshape(-1) for name in names])))[::-1]
            least = flat[max(1, int(density * flat.size)) - 1] * (1 - 1e-12)
            out |= {name: np.where(np.abs(own[name]) >= least, own[name], 0.0) for name in names}
        kept.append(out)
    merged = {}
    for name, first in dense[0].items():
        merged[name] = np.zeros_like(first)
        for at in np.ndindex(first.shape):
            values = [own[name][at] for own in kept]
            elected = np.sign(sum(w * v for w, v in zip(p, values, strict=True)))
            agree = [(w, v) for w, v in zip(p, values, strict=True) if np.sign(v) == elected and v]
            if agree:
                merged[name][at] = sum(w * v for w, v in agree) / sum(w for w, _ in agree)
    return merged


@pytest.mark.parametrize("held", [40, 2**20])
@pytest.mark.parametrize("trim", ["adapter", "matrix"])
@pytest.mark.parametrize("density", [0.05, 0.2, 0.7, 1.0])
def test_it_is_the_published_rule_on_dense_changes(
    density: float, trim: str, held: int, zoo: Any, weights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = zoo.mixed()
    want = published([zoo.dense(x.state) for x in adapters], weights(adapters), density, trim == "adapter")
    monkeypatch.setattr(elementwise, "HELD", held)
    merged = zoo.merge("ties", adapters, 13, density=density, trim=trim, scale=1.5)
    zoo.close(zoo.dense(merged.state), {name: 1.5 * x for name, x in want.items()}, 1e-8)
    assert merged.lost < 1e-6


def test_what_the_rank_loses_is_said(zoo: Any, weights: Any) -> None:
    adapters = zoo.mixed()
    want = published([zoo.dense(x.state) for x in adapters], weights(adapters), 0.2, True)
    merged = zoo.merge("ties", adapters, 3)
    got = zoo.dense(merged.state)
    apart = sum(np.sum((got[k] - x) ** 2) for k, x in want.items()) / sum(np.sum(x**2) for x in want.values())
    assert merged.lost == pytest.approx(np.sqrt(apart), rel=1e-9) and merged.lost > 0.2
    zoo.close(got, {name: zoo.cut(x, 3) for name, x in want.items()}, 1e-8)


def test_peft_on_one_dense_matrix_is_the_same_but_for_the_weights(zoo: Any) -> None:
    """Its TIES on dense tensors divides the weighted sum by a count: with weights of one it is the paper's."""
    adapters = [zoo.adapter("north", 1), zoo.adapter("south", 2, 4), zoo.adapter("west", 3, 2)]
    dense = [zoo.dense(x.state) for x in adapters]
    merged = zoo.dense(zoo.merge("ties", adapters, 13, density=0.3, trim="matrix").state)
    for name in dense[0]:
        theirs = peft_ties([torch.tensor(own[name]) for own in dense], torch.ones(3), 0.3).numpy()
        np.testing.assert_allclose(merged[name], theirs, atol=1e-9)


def test_only_the_change_since_a_common_start_is_trimmed(zoo: Any, weights: Any) -> None:
    adapters, start = zoo.mixed(), zoo.adapter("start", 9, 2).state
    zero = zoo.dense(start)
    tau = [{k: d[k] - zero[k] for k in zero} for d in (zoo.dense(x.state) for x in adapters)]
    want = published(tau, weights(adapters), 0.2, True)
    merged = zoo.merge("ties", adapters, 13, context={"start": start})
    zoo.close(zoo.dense(merged.state), {k: zero[k] + x for k, x in want.items()}, 1e-8)


def test_an_entry_that_cancels_is_zero(zoo: Any) -> None:
    first = zoo.adapter("north", 1)
    spec = first.state.spec
    flipped = {name: -array if ".lora_B." in name else array for name, array in first.state.items()}
    merged = zoo.merge("ties", [first, Adapter("south", AdapterState(spec, flipped))])
    assert all(not matrix.any() for matrix in zoo.dense(merged.state).values())
    assert merged.lost == 0.0


def test_it_says_how_many_entries_agreed(zoo: Any, weights: Any) -> None:
    adapters = zoo.alike()
    merged = zoo.merge("ties", adapters, density=0.5)
    dense = [np.concatenate([x.reshape(-1) for x in zoo.dense(a.state).values()]) for a in adapters]
    kept = [np.where(np.abs(d) >= np.sort(np.abs(d))[::-1][d.size // 2 - 1] * (1 - 1e-12), d, 0) for d in dense]
    elected = np.sign(np.tensordot(weights(adapters), kept, 1))
    for adapter, own in zip(adapters, kept, strict=True):
        share = np.sum((np.sign(own) == elected) & (own != 0)) / np.sum(own != 0)
        assert merged.reasons[adapter.name] == f"largest 50% of its entries, {share:.0%} of them with the elected sign"


def test_noise_for_privacy_is_warned_of() -> None:
    for rule in ("ties", "knots"):
        assert "noise of differential privacy" in create_merger(rule).warning(True)
        assert f"`{rule}`" in create_merger(rule).warning(True)
        assert create_merger(rule).warning(False) == ""
    assert create_merger("uniform").warning(True) == ""
