"""Layer 3: the noise is there, of the right size and shape, in every tensor, fresh at every step and every site.

What was released, less the clean clipped sum, over sigma C, must be independent standard normals. Each look is a
classical test with a known distribution: chi-square of sum Z^2 (two-sided), Kolmogorov and Smirnov against N(0, 1),
the exact t distribution of a correlation; and for the sampler the binomial distribution of how many units were drawn.
All of them together are held at ``ALPHA`` (Bonferroni), so that an honest run fails once in a thousand audits at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats

from .verdict import Verdict

ALPHA = 1e-3
#: Values of a tensor that the Kolmogorov-Smirnov test sorts; more would only cost time.
_MOST_SORTED = 200_000
_BINS = 61
_EDGE = 4.5
_QUANTILES = 99


@dataclass(frozen=True)
class Run:
    """The standardised noise of one observed training: ``z`` (K, P), a step a row."""

    name: str
    z: torch.Tensor


@dataclass(frozen=True)
class Draws:
    """How many of ``units`` units each step sampled, where each should have taken part with chance ``rate``."""

    name: str
    sizes: tuple[int, ...]
    units: int
    rate: float


@dataclass(frozen=True)
class _Look:
    """One test: what it looked at, in words that name the fault should it fail, and its p-value."""

    kind: str
    fault: str
    p: float


def noise(
    runs: Sequence[Run],
    tensors: Sequence[tuple[str, int]],
    draws: Sequence[Draws] = (),
    *,
    alpha: float = ALPHA,
    steps: int | None = None,
) -> Verdict:
    """Whether the noise of all ``runs`` is what it should be. ``tensors``: name and size of each, in order.

    ``draws``: samples of a Poisson sampler, to be held against the binomial distribution; ``steps``: how many releases
    each run owes; a run with fewer has skipped some (an empty batch, say).
    """
    findings = [
        f"{run.name}: {len(run.z)} noisy steps were released where the plan takes {steps}"
        for run in runs
        if steps is not None and len(run.z) != steps
    ]
    if not all(bool(torch.isfinite(run.z).all()) for run in runs):
        return Verdict("noise", "The noise is not finite.", (*findings, "what was released holds NaN or infinity"))
    if not any(len(run.z) for run in runs):
        return Verdict("noise", "Nothing was released.", (*findings, "no noisy step was released"))
    looks = [*_looks(runs, tensors), *_samples(draws)]
    threshold = alpha / max(1, len(looks))
    failed = sorted((look for look in looks if not look.p >= threshold), key=lambda look: look.p)
    findings += [
        f"{look.fault} (p {'= ' + format(look.p, '.1e') if look.p else '< 1e-300'}, the limit is {threshold:.1e})"
        for look in failed
    ]
    everything = torch.cat([run.z.reshape(-1) for run in runs]).double().numpy()
    variance = float((everything**2).mean())
    said = (
        f"{len(everything):,} noise values in {len(tensors)} tensors: std {variance**0.5:.4f} of what the plan says, "
        "normal, fresh at every step and site."
        if not findings
        else f"The noise is not what the plan says: {len(findings)} tests failed."
    )
    kinds = list(dict.fromkeys(look.kind for look in looks))
    return Verdict(
        "noise",
        said,
        tuple(findings),
        {
            "alpha": alpha,
            "tests": len(looks),
            "threshold": threshold,
            "values": len(everything),
            "variance": variance,
            "smallest_p": {kind: min(look.p for look in looks if look.kind == kind) for kind in kinds},
            "runs": [run.name for run in runs],
            "steps": [len(run.z) for run in runs],
        },
        _drawing(everything),
    )


def _looks(runs: Sequence[Run], tensors: Sequence[tuple[str, int]]) -> Iterator[_Look]:
    z = torch.cat([run.z for run in runs]).double().numpy()
    yield from _sizes(z, runs, tensors)
    yield from _shapes(z, tensors)
    yield from _repeats(z, runs)
    yield from _copies(z, tensors)


def _sizes(z: np.ndarray, runs: Sequence[Run], tensors: Sequence[tuple[str, int]]) -> Iterator[_Look]:
    """sum Z^2 of each tensor over all steps, and of each step over all tensors: chi-square."""
    for name, columns in _columns(tensors):
        p, share = _chi_square(z[:, columns])
        yield _Look("size", f"tensor {name}: its noise has {share:.3g} times the variance that the plan says", p)
    for name, row in _steps(z, runs):
        p, share = _chi_square(row)
        yield _Look("size", f"{name}: its noise has {share:.3g} times the variance that the plan says", p)


def _chi_square(values: np.ndarray) -> tuple[float, float]:
    """The two-sided p-value of the sum of squares of standard normals, and the mean square."""
    total, count = float((values**2).sum()), values.size
    p = 2 * min(float(stats.chi2.cdf(total, count)), float(stats.chi2.sf(total, count)))
    return min(1.0, p), total / count


def _shapes(z: np.ndarray, tensors: Sequence[tuple[str, int]]) -> Iterator[_Look]:
    for name, columns in _columns(tensors):
        values = z[:, columns].reshape(-1)
        values = values[:: -(-values.size // _MOST_SORTED)]
        p = float(stats.kstest(values, "norm", method="asymp" if len(values) > 1000 else "auto").pvalue)
        yield _Look("shape", f"tensor {name}: its noise is not normal", p)


def _repeats(z: np.ndarray, runs: Sequence[Run]) -> Iterator[_Look]:
    """The correlation of every two releases, of one run or of two."""
    where = [(run.name, step) for run in runs for step in range(1, len(run.z) + 1)]
    norms = np.linalg.norm(z, axis=1)
    products = z @ z.T / np.maximum(np.outer(norms, norms), 1e-300)
    for i, (one, first) in enumerate(where):
        for j in range(i):
            other, second = where[j]
            pair = f"steps {second} and {first} of {one}" if one == other else f"{other} and {one}"
            p = _correlation(products[i, j], z.shape[1])
            yield _Look(
                "steps" if one == other else "runs",
                f"{pair}: their noise correlates by {products[i, j]:.3g}, so it can be subtracted",
                p,
            )


def _copies(z: np.ndarray, tensors: Sequence[tuple[str, int]]) -> Iterator[_Look]:
    """The correlation of every two tensors of one size within the same steps."""
    by_size: dict[int, list[tuple[str, slice]]] = {}
    for name, columns in _columns(tensors):
        by_size.setdefault(columns.stop - columns.start, []).append((name, columns))
    for size, group in by_size.items():
        count = size * len(z)
        if len(group) < 2 or count < 8:
            continue
        rows = np.stack([z[:, columns].reshape(-1) for _, columns in group])
        norms = np.linalg.norm(rows, axis=1)
        products = rows @ rows.T / np.maximum(np.outer(norms, norms), 1e-300)
        for i, (name, _) in enumerate(group):
            for j in range(i):
                fault = f"tensors {group[j][0]} and {name}: their noise correlates by {products[i, j]:.3g}"
                yield _Look("tensors", fault, _correlation(products[i, j], count))


def _correlation(r: float, count: int) -> float:
    """The two-sided p-value of the correlation of ``count`` pairs about a known mean of zero."""
    if count < 3:
        return 1.0
    r = min(max(float(r), -1.0), 1.0)
    return float(2 * stats.t.sf(abs(r) * np.sqrt((count - 1) / max(1 - r * r, 1e-300)), count - 1))


def _samples(draws: Sequence[Draws]) -> Iterator[_Look]:
    """How many were drawn in all, and how often a sample was of a middling size: both are binomial."""
    for drawn in draws:
        size, steps = stats.binom(drawn.units, min(drawn.rate, 1.0)), len(drawn.sizes)
        total, expected = sum(drawn.sizes), drawn.units * drawn.rate * steps
        fault = f"{drawn.name}: {total:,} units were sampled in {steps} steps, where {expected:,.0f} are expected"
        yield _Look("sampling", fault, float(stats.binomtest(total, drawn.units * steps, min(drawn.rate, 1.0)).pvalue))
        low, high = size.ppf(0.25), size.ppf(0.75)
        chance = float(size.cdf(high) - size.cdf(low - 1))
        middling = sum(low <= count <= high for count in drawn.sizes)
        fault = (
            f"{drawn.name}: {middling} of {steps} samples are of {low:.0f} to {high:.0f} units, {chance:.0%} should be"
        )
        yield _Look("sampling", fault, float(stats.binomtest(middling, steps, min(chance, 1.0)).pvalue))


def _columns(tensors: Sequence[tuple[str, int]]) -> Iterator[tuple[str, slice]]:
    at = 0
    for name, size in tensors:
        yield name, slice(at, at + size)
        at += size


def _steps(z: np.ndarray, runs: Sequence[Run]) -> Iterator[tuple[str, np.ndarray]]:
    at = 0
    for run in runs:
        for step in range(len(run.z)):
            yield f"{run.name}, step {step + 1}", z[at + step]
        at += len(run.z)


def _drawing(values: np.ndarray) -> Mapping[str, object]:
    """A histogram of the noise and its quantiles beside those of N(0, 1)."""
    counts, edges = np.histogram(np.clip(values, -_EDGE, _EDGE), bins=_BINS, range=(-_EDGE, _EDGE))
    levels = np.arange(1, _QUANTILES + 1) / (_QUANTILES + 1)
    return {
        "edges": [round(float(edge), 4) for edge in edges],
        "counts": counts.tolist(),
        "normal": [round(float(q), 4) for q in stats.norm.ppf(levels)],
        "quantiles": [round(float(q), 4) for q in np.quantile(values, levels)],
    }
