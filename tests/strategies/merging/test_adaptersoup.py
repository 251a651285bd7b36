from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import pytest

from fedgraft.core.adapter import AdapterSpec, AdapterState, LowRankPair, TensorSpec
from fedgraft.core.errors import UserError
from fedgraft.strategies.merging import Adapter, Context, create_merger
from fedgraft.strategies.merging.adaptersoup import by_clusters, by_similarity

A, B, HEAD = "x.lora_A.default.weight", "x.lora_B.default.weight", "head.weight"
SPEC = AdapterSpec(
    "lora",
    (
        TensorSpec(A, (2, 9), "float64", "lora_A", "product"),
        TensorSpec(B, (7, 2), "float64", "lora_B", "product"),
        TensorSpec(HEAD, (3, 4), "float64", "head"),
    ),
    (LowRankPair(A, B, 2.0),),
    2,
    4.0,
)
WIDTH = 24


def adapter(name: str, seed: int) -> Adapter:
    draw = np.random.default_rng(seed)
    return Adapter(name, AdapterState(SPEC, {t.name: draw.standard_normal(t.shape) for t in SPEC.tensors}))


def vectors(centre: np.ndarray, count: int, seed: int, spread: float = 0.15) -> np.ndarray:
    """Vectors of length one around ``centre``."""
    rows = centre + spread * np.random.default_rng(seed).standard_normal((count, centre.size))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


CENTRES = np.linalg.qr(np.random.default_rng(0).standard_normal((WIDTH, WIDTH)))[0][:4]
NAMES = ("heart", "lung", "skin", "bone")


def known(count: int = 40) -> dict[str, np.ndarray]:
    return {name: vectors(CENTRES[i], count, i + 1) for i, name in enumerate(NAMES)}


def mixture(shares: tuple[int, ...]) -> np.ndarray:
    return np.concatenate([vectors(CENTRES[i], count, 50 + i) for i, count in enumerate(shares) if count])


def soup(texts: np.ndarray | None, embeddings: dict[str, np.ndarray] | None = None, **options: Any) -> Any:
    adapters = [adapter(name, i) for i, name in enumerate(NAMES)]
    context = Context(spec=SPEC, embeddings=known() if embeddings is None else embeddings, texts=texts)
    return create_merger("adaptersoup", options).merge(adapters, context)


def test_similarity_is_the_mean_cosine_over_all_pairs_of_texts() -> None:
    texts = mixture((5, 3, 0, 0))
    found = by_similarity(known(), texts)
    for name, rows in known().items():
        cosines = [
            float(u @ v / np.linalg.norm(u) / np.linalg.norm(v)) for u in rows for v in texts
        ]  # each pair by itself
        assert found.nearness[name] == pytest.approx(sum(cosines) / len(cosines), rel=1e-10)


def test_a_mean_alone_says_of_similarity_what_all_texts_say() -> None:
    texts = mixture((5, 3, 0, 0))
    means = {name: rows.mean(axis=0, keepdims=True) for name, rows in known().items()}
    whole, short = by_similarity(known(), texts), by_similarity(means, texts)
    assert short.names == whole.names
    np.testing.assert_allclose(list(short.nearness.values()), list(whole.nearness.values()), rtol=1e-12)


def test_the_nearest_come_first_and_no_more_than_asked_for() -> None:
    texts = mixture((6, 4, 3, 0))
    assert by_similarity(known(), texts, 0.05).names == ("heart", "lung", "skin")
    assert by_similarity(known(), texts, 0.05, most=2).names == ("heart", "lung")
    assert by_similarity(known(), texts, 0.99).names == ()


@pytest.mark.parametrize("alone", [False, True])
def test_clusters_take_the_texts_of_their_own_domain(alone: bool) -> None:
    held = {name: rows.mean(axis=0, keepdims=True) if alone else rows for name, rows in known().items()}
    found = by_clusters(held, mixture((60, 33, 7, 0)))
    assert found.nearness == pytest.approx({"heart": 0.6, "lung": 0.33, "skin": 0.07, "bone": 0.0}, abs=0.011)
    assert found.names == ("heart", "lung")
    assert by_clusters(held, mixture((60, 33, 7, 0)), share=0.05).names == ("heart", "lung", "skin")


def test_a_mean_with_much_noise_does_not_lose_its_texts() -> None:
    """Noise makes every mean longer by noise^2 d; a site with more of it would seem far from every text."""
    draw = np.random.default_rng(5)
    noise = {"heart": 0.25, "lung": 0.02, "skin": 0.02, "bone": 0.02}
    texts = vectors(CENTRES[0], 100, 70, 0.3)
    told, untold = [], []
    for _ in range(40):
        held = {
            name: vectors(CENTRES[i], 60, i, 0.3).mean(axis=0, keepdims=True)
            + noise[name] * draw.standard_normal((1, WIDTH))
            for i, name in enumerate(NAMES)
        }
        told.append(by_clusters(held, texts, noise=noise).nearness["heart"])
        untold.append(by_clusters(held, texts).nearness["heart"])
    assert np.mean(told) > 0.7
    assert np.mean(told) > np.mean(untold) + 0.3


def test_the_soup_is_the_mean_of_the_picked_adapters_alone() -> None:
    merged = soup(mixture((6, 5, 0, 0)), threshold=0.15)
    picked = [adapter("heart", 0).state, adapter("lung", 1).state]
    dense = sum(state.delta(SPEC.pairs[0]) for state in picked) / 2
    u, s, vt = np.linalg.svd(dense)
    np.testing.assert_allclose(merged.state.delta(SPEC.pairs[0]), (u[:, :2] * s[:2]) @ vt[:2], atol=1e-12)
    assert merged.lost == pytest.approx(np.sqrt(np.sum(s[2:] ** 2) / np.sum(s**2)), rel=1e-9)
    np.testing.assert_allclose(merged.state[HEAD], (picked[0][HEAD] + picked[1][HEAD]) / 2, rtol=1e-12)
    assert merged.weights == {"heart": 0.5, "lung": 0.5, "skin": 0.0, "bone": 0.0}
    assert merged.reasons["heart"].startswith("picked: mean cosine 0.")
    assert "is below 0.15" in merged.reasons["bone"]


def test_a_kept_head_is_the_first_adapters_even_if_that_was_not_picked() -> None:
    adapters = [adapter(name, i) for i, name in enumerate(NAMES)]
    context = Context(spec=SPEC, embeddings=known(), texts=mixture((0, 6, 5, 0)), heads="first")
    merged = create_merger("adaptersoup").merge(adapters, context)
    assert merged.weights["heart"] == 0.0
    np.testing.assert_array_equal(merged.state[HEAD], adapters[0].state[HEAD])


def test_who_was_left_out_for_others_is_told_so() -> None:
    merged = soup(mixture((6, 5, 0, 0)), most=1)
    assert merged.weights["heart"] == 1.0
    assert merged.reasons["lung"].endswith("but 1 others are nearer")


def test_clustering_gives_each_picked_adapter_the_same_weight() -> None:
    merged = soup(mixture((60, 30, 10, 0)), select="clustering", share=0.2)
    assert merged.weights == {"heart": 0.5, "lung": 0.5, "skin": 0.0, "bone": 0.0}
    assert "share of the texts 0.6" in merged.reasons["heart"]


def test_if_none_is_near_the_nearest_is_named() -> None:
    with pytest.raises(UserError, match=r"no adapter is near enough; the nearest is heart .* lower the option"):
        soup(mixture((6, 5, 0, 0)), threshold=0.95)


def test_texts_and_embeddings_that_are_missing_are_named() -> None:
    with pytest.raises(UserError, match="give some"):
        soup(None)
    with pytest.raises(UserError, match="adapter bone comes without an embedding"):
        soup(mixture((5, 0, 0, 0)), {name: rows for name, rows in known().items() if name != "bone"})


@pytest.mark.parametrize(
    ("rows", "told"),
    [(np.ones((3, 5)), "of lung have 5 numbers, those of the texts 24"), (np.full((2, WIDTH), np.nan), "of lung")],
)
def test_embeddings_that_do_not_fit_are_named(rows: np.ndarray, told: str) -> None:
    with pytest.raises(UserError, match=told):
        by_similarity({**known(), "lung": rows}, mixture((5, 0, 0, 0)))


def test_a_missing_scikit_learn_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return plain(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'fedgraft\[merge\]'"):
        by_clusters(known(), mixture((5, 0, 0, 0)))
