"""KnOTS against the joint SVD of dense matrices side by side."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedgraft.strategies.merging import elementwise
from fedgraft.strategies.merging.knots import joint_svd

from .test_ties import published


def _dense_knots(
    dense: list[dict[str, np.ndarray]], p: np.ndarray, density: float, basis: str, together: bool = True
) -> dict[str, np.ndarray]:
    left, rights = {}, [{} for _ in dense]  # type: ignore[var-annotated]
    for name in dense[0]:
        u, s, vt = np.linalg.svd(np.concatenate([own[name] for own in dense], axis=1), full_matrices=False)
        keep = s > 1e-7 * s[0]
        u, s, vt = u[:, keep], s[keep], vt[keep]
        left[name] = u if basis == "sv" else u * s
        for own, part in zip(
            rights, np.split(s[:, None] * vt if basis == "sv" else vt, len(dense), axis=1), strict=True
        ):
            own[name] = part
    merged = published(rights, p, density, together)
    return {name: left[name] @ merged[name] for name in left}


@pytest.mark.parametrize("held", [40, 2**20])
@pytest.mark.parametrize("basis", ["v", "sv"])
@pytest.mark.parametrize("density", [0.2, 1.0])
def test_it_is_ties_on_the_right_vectors_of_the_joint_svd(
    density: float, basis: str, held: int, zoo: Any, weights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = zoo.mixed()
    want = _dense_knots([zoo.dense(x.state) for x in adapters], weights(adapters), density, basis)
    monkeypatch.setattr(elementwise, "HELD", held)
    merged = zoo.merge("knots", adapters, 13, density=density, basis=basis, scale=0.6)
    zoo.close(zoo.dense(merged.state), {name: 0.6 * x for name, x in want.items()}, 1e-8)


@pytest.mark.parametrize("basis", ["v", "sv"])
def test_by_the_mean_it_is_the_weighted_mean(basis: str, zoo: Any) -> None:
    adapters = zoo.mixed()
    merged = zoo.merge("knots", adapters, 9, merge="mean", basis=basis)
    zoo.close(zoo.dense(merged.state), zoo.dense(zoo.merge("uniform", adapters, 9).state))


def test_the_joint_svd_comes_from_the_factors() -> None:
    draw = np.random.default_rng(0)
    parts = [(draw.standard_normal((30, r)), draw.standard_normal((r, 20))) for r in (2, 5, 1)]
    dense = np.concatenate([b @ a for b, a in parts], axis=1)
    u, s, found = joint_svd(parts)
    np.testing.assert_allclose(s, np.linalg.svd(dense, compute_uv=False)[:8], rtol=1e-10)
    vt = np.concatenate([b @ a for b, a in found], axis=1)
    np.testing.assert_allclose(u * s @ vt, dense, atol=1e-10)
    np.testing.assert_allclose(u.T @ u, np.eye(8), atol=1e-12)
    np.testing.assert_allclose(vt @ vt.T, np.eye(8), atol=1e-10)


def test_ranks_above_the_sides_of_the_layer_are_no_harm() -> None:
    draw = np.random.default_rng(0)
    parts = [(draw.standard_normal((4, 6)), draw.standard_normal((6, 3))) for _ in range(3)]
    u, s, found = joint_svd(parts)
    assert len(s) == 4
    np.testing.assert_allclose(
        u * s @ np.concatenate([b @ a for b, a in found], axis=1),
        np.concatenate([b @ a for b, a in parts], axis=1),
        atol=1e-10,
    )


def test_a_change_of_nothing_stays_nothing(zoo: Any) -> None:
    still = [replace(x, state=x.state.map(lambda array: 0 * array)) for x in zoo.mixed()]
    for rule in ("knots", "ties", "dare", "uniform", "mera", "task-arithmetic"):
        merged = zoo.merge(rule, still)
        assert all(not matrix.any() for matrix in zoo.dense(merged.state).values())
        assert merged.lost == 0.0
