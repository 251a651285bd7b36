"""AdapterSoup: which adapters to average for new texts, told by embeddings of the texts that each was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field
from scipy.optimize import linear_sum_assignment

from ...core.errors import UserError
from ..aggregator import Options
from .merger import Adapter, Context, Merged, Merger, Needs, merger
from .mixing import alone, shares, weighted

#: Principal axes that a mixture is fitted on: full covariances of 384 dimensions cannot be had from 100 texts each.
_AXES = 32


class AdapterSoupOptions(Options):
    """How adapters are picked, and the published thresholds."""

    select: Literal["similarity", "clustering"] = Field("similarity", description="mean cosine, or a Gaussian mixture")
    threshold: float = Field(0.15, ge=-1, le=1, description="similarity: the least mean cosine")
    share: float = Field(0.1, gt=0, le=1, description="clustering: the least share of the texts in a cluster")
    most: int = Field(5, ge=1, description="at most so many adapters")


@dataclass(frozen=True)
class Picked:
    """By adapter name: how near it is (a mean cosine, or a share of the texts), and which were picked."""

    nearness: Mapping[str, float]
    names: tuple[str, ...]


@merger("adaptersoup")
class AdapterSoup(Merger):
    """dW = mean of dW_k over the picked adapters, at most 5 of them; heads are averaged over the same.

    ``similarity``: those whose texts' embeddings have a mean cosine of at least 0.15 with the new texts', the nearest
    first. ``clustering``: a Gaussian mixture of one component an adapter; those whose component takes at least a tenth
    of the new texts. An adapter comes with embeddings of some of its texts, or with one vector alone, their mean over
    vectors of length one, which may be a DP release: the mean cosine over all pairs of texts is the inner product of
    the two means, and a mixture of spheres needs no more than the means, so only the mixture's shape is lost. The
    average is exact on dW, up to the rank of the result. Source: Chronopoulou et al. 2023, "AdapterSoup", arXiv
    2302.07027, section 3.
    """

    summary = "mean of the adapters whose texts are nearest to the new ones"
    equation = "dW = mean of dW_k over S; S: mean cos(e_k, e) > 0.15, or >= 10 % of texts in cluster k; |S| <= 5"
    source = "Chronopoulou et al. 2023, arXiv 2302.07027"
    needs = Needs(embeddings=True)
    Options = AdapterSoupOptions

    def merge(self, adapters: Sequence[Adapter], context: Context) -> Merged:
        options = self.options
        shares(adapters)
        if len(adapters) == 1:
            return alone(adapters[0], context)
        if context.texts is None or not len(context.texts):
            raise UserError("rule `adaptersoup` picks adapters by the texts that they are for; give some")
        for adapter in adapters:
            if adapter.name not in context.embeddings:
                raise UserError(
                    f"adapter {adapter.name} comes without an embedding of its texts; have its site make one, or leave "
                    "the adapter out"
                )
        known = {adapter.name: context.embeddings[adapter.name] for adapter in adapters}
        if options.select == "similarity":
            picked = by_similarity(known, context.texts, options.threshold, options.most)
            unit, least = "mean cosine", f"{options.threshold:g}"
        else:
            picked = by_clusters(known, context.texts, options.share, options.most, context.noise, context.seed)
            unit, least = "share of the texts", f"{options.share:g}"
        if not picked.names:
            best = max(picked.nearness, key=lambda name: picked.nearness[name])
            key = "threshold" if options.select == "similarity" else "share"
            raise UserError(
                f"rule `adaptersoup`: no adapter is near enough; the nearest is {best} with a {unit} of "
                f"{picked.nearness[best]:.3f}, below {least}: lower the option {key}"
            )
        share = 1.0 / len(picked.names)
        state, lost = weighted(adapters, dict.fromkeys(picked.names, share), context)
        reasons = {}
        for adapter in adapters:
            value = f"{unit} {picked.nearness[adapter.name]:.3f}"
            if adapter.name in picked.names:
                reasons[adapter.name] = f"picked: {value}"
            elif picked.nearness[adapter.name] >= float(least):
                reasons[adapter.name] = f"left out: {value}, but {options.most} others are nearer"
            else:
                reasons[adapter.name] = f"left out: {value} is below {least}"
        weights = {adapter.name: share if adapter.name in picked.names else 0.0 for adapter in adapters}
        return Merged(state, weights, reasons, lost)


def by_similarity(known: Mapping[str, np.ndarray], texts: np.ndarray, threshold: float = 0.15, most: int = 5) -> Picked:
    """Pick the nearest by the mean cosine over all pairs of an adapter's texts and the new ``texts``.

    Rows are vectors of length one, so the mean over all pairs is <mean of the one, mean of the other>; an adapter may
    come with that mean alone.
    """
    centre = _rows(texts, "the texts").mean(axis=0)
    near = {name: float(_rows(rows, name, centre.size).mean(axis=0) @ centre) for name, rows in known.items()}
    return _nearest(near, threshold, most)


def by_clusters(
    known: Mapping[str, np.ndarray],
    texts: np.ndarray,
    share: float = 0.1,
    most: int = 5,
    noise: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Picked:
    """Pick those whose component of a Gaussian mixture takes at least ``share`` of the new ``texts``.

    Where every adapter comes with texts of its own, the mixture is fitted to all of them (scikit-learn, one covariance,
    on the principal axes), each component starting from one adapter's centre, and components are matched to adapters
    by the most texts in common. Where some come with a mean alone, its components are spheres of one size around the
    means, and a text belongs to the nearest; ``noise`` is the standard deviation on each coordinate of a mean, whose
    square, d times, is taken from its length: else adapters with more noise would seem farther from every text.
    """
    new = _rows(texts, "the texts")
    rows = {name: _rows(held, name, new.shape[1]) for name, held in known.items()}
    if all(len(held) > 1 for held in rows.values()) and len(rows) > 1:
        owner = _mixture(list(rows.values()), new, seed)
    else:
        centres = np.stack([held.mean(axis=0) for held in rows.values()])
        deviations = np.array([(noise or {}).get(name, 0.0) for name in rows])
        lengths = np.sum(centres**2, axis=1) - new.shape[1] * deviations**2
        owner = np.argmin(lengths - 2 * new @ centres.T, axis=1)
    counts = np.bincount(owner, minlength=len(rows)) / len(new)
    return _nearest(dict(zip(rows, counts.tolist(), strict=True)), share, most)


def _mixture(known: Sequence[np.ndarray], new: np.ndarray, seed: int) -> np.ndarray:
    """To which adapter the component of each new text belongs."""
    mixtures, decomposition = _scikit()
    every = np.concatenate(known)
    owners = np.repeat(np.arange(len(known)), [len(rows) for rows in known])
    axes = decomposition.PCA(min(_AXES, *every.shape), random_state=seed % 2**32).fit(every)
    points = axes.transform(every)
    mixture = mixtures.GaussianMixture(
        len(known),
        covariance_type="tied",
        means_init=np.stack([points[owners == k].mean(axis=0) for k in range(len(known))]),
        random_state=seed % 2**32,
    ).fit(points)
    shared = np.zeros((len(known), len(known)))
    np.add.at(shared, (mixture.predict(points), owners), 1)
    components, adapters = linear_sum_assignment(-shared)
    return adapters[np.argsort(components)][mixture.predict(axes.transform(new))]


def _nearest(nearness: Mapping[str, float], least: float, most: int) -> Picked:
    order = sorted(nearness, key=lambda name: (-nearness[name], name))
    return Picked(nearness, tuple(name for name in order if nearness[name] >= least)[:most])


def _rows(vectors: np.ndarray, name: str, width: int | None = None) -> np.ndarray:
    """``vectors`` as rows in float64. Raises :class:`UserError` that names whose they are."""
    rows = np.atleast_2d(np.asarray(vectors, dtype=np.float64))
    if rows.ndim != 2 or not rows.size or not np.isfinite(rows).all():
        raise UserError(f"the embeddings of {name} are no list of vectors of finite numbers")
    if width is not None and rows.shape[1] != width:
        raise UserError(
            f"the embeddings of {name} have {rows.shape[1]} numbers, those of the texts {width}: made by another "
            "base model"
        )
    return rows


def _scikit() -> Any:
    try:
        from sklearn import decomposition, mixture
    except ImportError:
        raise UserError(
            "rule `adaptersoup` fits a mixture with scikit-learn: pip install 'fedgraft[merge]', or select = similarity"
        ) from None
    return mixture, decomposition
