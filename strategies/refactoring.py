"""Strategies that average dW itself, and make new factors of the average: FlexLoRA, HLoRA and raFLoRA.

The factors of a pair at rank r are ordered by their singular values, so that the first r_k rows of A and columns of B
are the best change of rank r_k: that is what a site of a smaller rank receives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from ..core.adapter import AdapterState, LowRankPair, explain_shape
from ..core.errors import UserError
from ..core.update import Update
from .aggregator import Aggregator, Capabilities, Options, strategy
from .averaging import RunningMean
from .lowrank import Factors, completed, stacked, svd
from .sketching import COLUMNS, ProductSum, TestMatrices

#: Singular values below this share of the largest are rounding.
_NOTHING = 1e-12


def require_factors(state: AdapterState, name: str) -> AdapterState:
    """``state``, or a :class:`UserError` when the method of strategy ``name`` is not low-rank."""
    if not state.spec.pairs:
        raise UserError(
            f"strategy `{name}` works on the factors of a low-rank method; {state.spec.method} has none: choose lora"
        )
    return state


def require_whole_pairs(state: AdapterState, name: str) -> None:
    """Raise :class:`UserError` where sites would share one factor of a pair alone, before any of them has trained."""
    for pair in state.spec.pairs:
        a, b = (state.spec.by_name[factor].policy for factor in (pair.a, pair.b))
        if (a == "share") != (b == "share"):
            own = pair.a if a != "share" else pair.b
            raise UserError(
                f"strategy `{name}` needs both factors of a pair, and tensor_policy keeps back {own}; share it, or "
                "keep back both"
            )


def truncated(state: AdapterState, rank: int) -> AdapterState:
    """The adapter with the first ``rank`` rows of each A and columns of each B.

    What is left of dW keeps its size: B takes up what the scaling alpha / r of the smaller rank differs.
    """
    spec = state.spec.with_rank(rank)
    if spec == state.spec:
        return state
    tensors = dict(state)
    for pair, own in zip(state.spec.pairs, spec.pairs, strict=True):
        b = state[pair.b]
        tensors[pair.a] = state[pair.a][:rank]
        tensors[pair.b] = (b[:, :rank].astype(np.float64) * (pair.scaling / own.scaling)).astype(b.dtype)
    return AdapterState(spec, tensors)


def part_of_site(state: AdapterState, ranks: Mapping[str, int], site: str) -> AdapterState:
    """What ``site`` receives of ``state``, by its rank in ``ranks``."""
    rank = ranks.get(site, state.spec.rank)
    return state if rank is None or rank == state.spec.rank else truncated(state, rank)


def factor_pairs(update: Update, state: AdapterState) -> Iterator[tuple[LowRankPair, LowRankPair]]:
    """Each pair of ``state`` whose factors ``update`` holds, with the pair as the site has it.

    Raises :class:`UserError` for a factor that is missing, does not fit, or is not finite.
    """
    for pair, own in zip(state.spec.pairs, update.state.spec.pairs, strict=True):
        there = [name in update.state for name in (pair.a, pair.b)]
        if not any(there):
            continue
        if not all(there):
            missing = pair.b if there[0] else pair.a
            raise UserError(f"{update.site}: tensor {missing} is not shared, so dW is unknown; share both factors")
        (_, n), (m, _) = state[pair.a].shape, state[pair.b].shape
        a, b = update.state[pair.a], update.state[pair.b]
        for name, got, want in ((pair.a, a.shape, (len(a), n)), (pair.b, b.shape, (m, len(a)))):
            if got != want:
                raise UserError(f"{update.site}: {explain_shape(name, got, want)}")
        yield pair, own


def refactored(pair: LowRankPair, change: Factors, state: AdapterState, *, evenly: bool) -> dict[str, np.ndarray]:
    """A and B of the shapes in ``state`` for the best part of ``change``, the whole s B A: U S / s and V^T.

    ``evenly``: U sqrt(S / s) and sqrt(S / s) V^T. A keeps full rank where ``change`` has less: two factors that are
    zero in the same slice would never train again.
    """
    rank = len(state[pair.a])
    u, s, vt = svd(*change, rank)
    left, right = s / pair.scaling, np.ones_like(s)
    if evenly:
        alive = s > _NOTHING * s.max(initial=0.0)
        left, right = np.where(alive, np.sqrt(left), 0.0), np.where(alive, np.sqrt(left), 1.0)
    b = np.zeros(state[pair.b].shape)
    b[:, : len(s)] = u * left
    a = completed(vt, state[pair.a], rank)
    a[: len(s)] *= right[:, None]
    return {pair.a: a.astype(state[pair.a].dtype), pair.b: b.astype(state[pair.b].dtype)}


def _most(state: AdapterState) -> int:
    """The rank of ``state``."""
    return max((len(state[pair.a]) for pair in state.spec.pairs), default=0)


class OtherTensors:
    """The mean of all shared tensors that are no low-rank factor: heads, biases, magnitudes."""

    def __init__(self, state: AdapterState) -> None:
        factors = {name for pair in state.spec.pairs for name in (pair.a, pair.b)}
        self._names = frozenset(name for name in state.spec.names if name not in factors)
        self._mean = RunningMean()
        self.weight = 0.0

    def add(self, update: Update) -> None:
        """Add the others of ``update``; raises :class:`UserError` for numbers that are not finite, factors included."""
        if not (update.weight > 0 and np.isfinite(self.weight + update.weight)):
            raise UserError(f"the weight of an update is {update.weight}; it must be a positive number")
        update.state.require_finite()
        self._mean.add(update.state.only(self._names), update.weight)
        self.weight += update.weight

    def result(self) -> dict[str, np.ndarray]:
        return dict(self._mean.result())


class RefactoringOptions(Options):
    """``columns``: of the sketch that many sites are kept in, for each rank of the adapter."""

    columns: int = Field(COLUMNS, ge=2)


class Refactoring(Aggregator):
    """The rank-r part of a weighted mean of the sites' s_k B_k A_k, as new factors.

    A subclass says whether B gets the singular values or both factors do, ``evenly``, and may weigh slices of a site's
    factors apart.
    """

    evenly: ClassVar[bool] = False
    Options = RefactoringOptions
    capabilities = Capabilities(needs_individual=True, resets_state=True, heterogeneous_ranks=True)

    def prepare(self, initial: AdapterState) -> AdapterState:
        require_factors(initial, self.name)
        if not any(initial[pair.b].any() for pair in initial.spec.pairs):
            return initial
        # An adapter from elsewhere: what a site of a smaller rank gets of it must be its best part.
        tensors = dict(initial)
        for pair in initial.spec.pairs:
            tensors |= refactored(
                pair, stacked([(pair.scaling, initial[pair.b], initial[pair.a])]), initial, evenly=self.evenly
            )
        return AdapterState(initial.spec, tensors)

    def for_site(self, state: AdapterState, site: str) -> AdapterState:
        return part_of_site(state, self.ranks, site)

    def start_round(self, state: AdapterState) -> None:
        require_whole_pairs(state, self.name)
        self._state = state
        self._others = OtherTensors(state)
        self._bounds = self._slices(state)
        draw = TestMatrices()
        self._sums = {
            pair.a: [
                ProductSum(len(state[pair.b]), state[pair.a].shape[1], len(state[pair.a]), draw, self.options.columns)
                for _ in self._bounds
            ]
            for pair in state.spec.pairs
        }
        self._weights = {pair.a: np.zeros(len(self._bounds)) for pair in state.spec.pairs}

    def add(self, update: Update) -> None:
        pairs = list(factor_pairs(update, self._state))
        self._others.add(update)
        for pair, own in pairs:
            a, b = update.state[pair.a], update.state[pair.b]
            if len(self._bounds) > 1 and len(a) not in self._bounds:
                raise UserError(f"{update.site}: has rank {len(a)}, which no site of this run was given")
            start = 0
            for position, end in enumerate(self._bounds):
                self._sums[pair.a][position].add(update.weight * own.scaling, b[:, start:end], a[start:end])
                self._weights[pair.a][position] += update.weight
                start = end
                if end >= len(a):
                    break

    def result(self) -> AdapterState:
        tensors = self._others.result()
        for pair in self._state.spec.pairs:
            weights = self._weights[pair.a]
            if not weights.any():
                continue
            parts = [total.factors() for total in self._sums[pair.a]]
            heard = [(b / weight, a) for (b, a), weight in zip(parts, weights, strict=True) if weight]
            whole = np.concatenate([b for b, _ in heard], axis=1), np.concatenate([a for _, a in heard])
            tensors |= refactored(pair, whole, self._state, evenly=self.evenly)
        names = [name for name in self._state.spec.names if name in tensors]
        return AdapterState(self._state.spec, tensors, names=names).require_finite()

    def _slices(self, state: AdapterState) -> Sequence[int]:
        """Where the slices of rank end whose weights are told apart."""
        return (_most(state),)


@strategy("flexlora")
class FlexLoRA(Refactoring):
    """U S V^T = SVD_r(sum p_k s_k B_k A_k), with p_k = w_k / sum w; then B = U S / s and A = V^T.

    Exact where the mean has rank r or less; else what is lost is the least that rank r must lose. Above a total rank of
    about 40 r the mean is sketched (:class:`~fedgraft.strategies.sketching.ProductSum`), which loses about a fifth
    more. A site of rank r_k receives the best part of rank r_k. Sites of small rank pull the slices that only others
    have towards zero (raflora does not). Source: Bai et al. 2024, "Federated Fine-tuning of Large Language Models under
    Heterogeneous Tasks and Client Resources", arXiv 2402.11505.
    """

    summary = "B A = SVD_r(sum p_k s_k B_k A_k), ranks may differ"
    equation = "U S V^T = SVD_r(sum_k p_k s_k B_k A_k), p_k = w_k / sum w; B = U S / s, A = V^T; site k: first r_k"
    source = "Bai et al. 2024, arXiv 2402.11505"


@strategy("hlora")
class HLoRA(Refactoring):
    """The product of FlexLoRA with its singular values split evenly: B = U sqrt(S / s), A = sqrt(S / s) V^T.

    With L = [sqrt(p_k s_k) B_k ...] and R = [sqrt(p_k s_k) A_k; ...], the mean is L R: QR of L and of R^T, then the SVD
    of the small core. Both factors are of one size, so that one rate trains both. Loses what FlexLoRA loses. Source:
    Liu et al. 2025, "HLoRA", arXiv 2503.00813; the variant by QR is NVIDIA FLARE's.
    """

    summary = "the product of flexlora, its singular values split evenly between B and A"
    equation = (
        "U S V^T = SVD_r([sqrt(p_k s_k) B_k ...] [sqrt(p_k s_k) A_k; ...]); B = U sqrt(S / s), A = sqrt(S / s) V^T"
    )
    source = "Liu et al. 2025, arXiv 2503.00813"
    evenly = True


@strategy("raflora")
class RaFLoRA(Refactoring):
    """FlexLoRA with each slice of rank averaged over the sites that have it.

    The ranks of the sites cut 1..r into slices; D_h = sum_{k: r_k >= h} w_k s_k B_k[:, h] A_k[h, :] / sum_{k: r_k >= h}
    w_k; then U S V^T = SVD_r(sum_h D_h), B = U S / s, A = V^T. FlexLoRA divides every slice by the weight of all sites,
    so that what only large sites have shrinks each round by their share, until nothing above the smallest rank is left.
    With equal ranks it is FlexLoRA; with mixed ranks it is no weighted mean of dW, on purpose. Source: Wu et al. 2026,
    "Preventing Rank Collapse in Federated Low-Rank Adaptation with Client Heterogeneity", arXiv 2602.13486.
    """

    summary = "flexlora with each rank slice averaged over the sites that have it"
    equation = "D_h = sum_{k: r_k >= h} w_k s_k B_k[:, h] A_k[h, :] / sum_{k: r_k >= h} w_k; SVD_r(sum_h D_h)"
    source = "Wu et al. 2026, arXiv 2602.13486"

    def _slices(self, state: AdapterState) -> Sequence[int]:
        rank = _most(state)
        return sorted({rank, *self.ranks.values()}) if self.ranks else range(1, rank + 1)
