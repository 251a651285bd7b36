"""LoRAHub: weights for the adapters found by a gradient-free search on a few labelled records."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field

from ...core.adapter import AdapterSpec, AdapterState
from ...core.errors import UserError
from ..aggregator import Options
from ..lowrank import stacked
from .merger import Adapter, Context, Merged, Merger, Needs, merger
from .mixing import alone, assembled, changes, fitted, require_products, rest_names, shares, started

#: What stands for a loss that is no number; nevergrad takes none that is larger.
_WORST = 1e20


class LoRAHubOptions(Options):
    """The published settings, and ``compose``: ``factors`` sums A and B apart (the paper), ``products`` sums B A."""

    compose: Literal["factors", "products"] = Field("factors", description="sum A and B apart (paper), or B A (exact)")
    steps: int = Field(40, ge=1, description="compositions that are tried, each one pass over the few records")
    bound: float = Field(1.5, gt=0, description="weights lie in [-bound, bound]")
    penalty: float = Field(0.05, ge=0, description="times the mean |w|, added to the loss")
    most: int = Field(20, ge=1, description="of more adapters so many are drawn at random")
    optimiser: str = Field("NGOpt", description="a gradient-free optimiser of nevergrad, such as NGOpt or Shiwa")


@dataclass(frozen=True)
class Found:
    """The best weights of a search, their objective, that of w = 0, and every objective in the order of the tries."""

    weights: np.ndarray
    objective: float
    start: float
    tried: tuple[float, ...]


@merger("lorahub")
class LoRAHub(Merger):
    """dW = s (sum w_i B_i)(sum w_i A_i), with w in [-1.5, 1.5]^K that minimises CE + 0.05 mean |w| on a few records.

    The search starts at w = 0, takes 40 gradient-free steps, and the best weights it tried are kept, so that the
    objective is never above that of w = 0. Heads are summed by the same weights. The product of sums holds the
    cross terms w_i w_j B_i A_j; ``compose = products`` takes sum w_i s_i B_i A_i instead, which is exact up to the
    rank of the result. Of DP adapters the result is post-processing, but the few records are not paid for by that.
    Source: Huang et al. 2023, "LoraHub", arXiv 2307.13269, section 3; optimisers of nevergrad.
    """

    summary = "weights by a gradient-free search on a few labelled records"
    equation = "dW = s (sum w_i B_i)(sum w_i A_i), w = argmin CE + 0.05 mean|w|, w in [-1.5, 1.5]"
    source = "Huang et al. 2023, arXiv 2307.13269"
    needs = Needs(loss=True, labels=True)
    Options = LoRAHubOptions

    def merge(self, adapters: Sequence[Adapter], context: Context) -> Merged:
        options = self.options
        shares(adapters)
        if len(adapters) == 1:
            return alone(adapters[0], context)
        if context.loss is None:
            raise UserError("rule `lorahub` searches on a few labelled records; give them")
        chosen = list(adapters)
        if len(chosen) > options.most:
            drawn = np.random.default_rng([context.seed, 20]).permutation(len(chosen))[: options.most]
            chosen = [adapters[i] for i in sorted(drawn.tolist())]
        composed = (by_factors if options.compose == "factors" else by_products)(chosen, context)
        loss = context.loss
        found = search(
            lambda weights: loss(composed(weights)[0]),
            len(chosen),
            steps=options.steps,
            bound=options.bound,
            penalty=options.penalty,
            seed=context.seed,
            optimiser=options.optimiser,
        )
        state, lost = composed(found.weights)
        weights = dict.fromkeys((adapter.name for adapter in adapters), 0.0)
        reasons = dict.fromkeys(weights, f"not among the {options.most} of {len(adapters)} that were drawn")
        for adapter, weight in zip(chosen, found.weights.tolist(), strict=True):
            weights[adapter.name] = weight
            reasons[adapter.name] = f"found by {len(found.tried)} tries on {context.labels} labelled records"
        notes = (
            f"objective {found.objective:.4f} after {len(found.tried)} tries, {found.start:.4f} at w = 0",
            f"the weights depend on the {context.labels} labelled records: unless these are public, the merged adapter "
            "is a new release about them, which no privacy budget has paid for",
        )
        return Merged(state, weights, reasons, lost, notes)


#: What weights make of some adapters, and the relative error that the rank of the result costs.
Composition = Callable[[np.ndarray], tuple[AdapterState, float]]


def by_factors(adapters: Sequence[Adapter], context: Context) -> Composition:
    """A = sum w_i A_i, B = sum w_i B_i, each adapter's scaling folded into its B, smaller ranks filled up with zeros.

    Raises :class:`UserError` for adapters whose factors cannot be added to one another.
    """
    spec = context.spec
    for adapter in adapters:
        for pair in adapter.state.spec.pairs:
            if len(adapter.state[pair.a]) > rank_of(spec, pair.a):
                raise UserError(
                    f"rule `lorahub` adds factors, and adapter {adapter.name} has rank {len(adapter.state[pair.a])}, "
                    f"the result {rank_of(spec, pair.a)}; raise the rank of the result, or set compose = products"
                )
    if any(started(pair, context) is not None for pair in spec.pairs):
        raise UserError("rule `lorahub` adds factors of adapters that start from zero; set compose = products")
    rest = _rest(adapters, context)
    parts = {
        pair.a: [fitted(*own, rank_of(spec, pair.a))[0] for own in changes(adapters, pair, context)]
        for pair in spec.pairs
    }

    def composed(weights: np.ndarray) -> tuple[AdapterState, float]:
        products = {
            name: (_sum(weights, [b for b, _ in own]), _sum(weights, [a for _, a in own]))
            for name, own in parts.items()
        }
        return assembled(spec, products, rest(weights))

    return composed


def by_products(adapters: Sequence[Adapter], context: Context) -> Composition:
    """dW = sum w_i s_i B_i A_i (changes since a common start, added to it), cut to the rank of the result."""
    rest = _rest(adapters, context)
    parts = {pair.a: changes(adapters, pair, context) for pair in context.spec.pairs}
    starts = {pair.a: started(pair, context) for pair in context.spec.pairs}

    def composed(weights: np.ndarray) -> tuple[AdapterState, float]:
        products = {}
        for name, factors in parts.items():
            terms = [(float(w), *own) for w, own in zip(weights, factors, strict=True)]
            if (start := starts[name]) is not None:
                terms.append((1.0, *start))
            products[name] = stacked(terms)
        return assembled(context.spec, products, rest(weights))

    return composed


def rank_of(spec: AdapterSpec, a: str) -> int:
    """The rank of the pair whose right factor is ``a``."""
    return spec.by_name[a].shape[0]


def _rest(adapters: Sequence[Adapter], context: Context) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """sum w_i theta_i of the heads, from a common start where there is one; the first's where they are kept."""
    require_products("lorahub", context.spec)
    names = rest_names(context.spec)
    for name in names:
        if context.spec.by_name[name].role != "head":
            raise UserError(
                f"rule `lorahub` composes low-rank factors and heads, and the adapters have a tensor {name} beside "
                "them: convert the adapters to LoRA"
            )

    def composed(weights: np.ndarray) -> dict[str, np.ndarray]:
        if context.heads == "first":
            return {name: adapters[0].state[name] for name in names}
        found = {name: _sum(weights, [adapter.state[name] for adapter in adapters]) for name in names}
        if context.start is not None:
            for name in names:
                found[name] += (1.0 - float(weights.sum())) * context.start[name].astype(np.float64)
        return found

    return composed


def search(
    loss: Callable[[np.ndarray], float],
    count: int,
    *,
    steps: int = 40,
    bound: float = 1.5,
    penalty: float = 0.05,
    seed: int = 0,
    optimiser: str = "NGOpt",
) -> Found:
    """Minimise ``loss(w) + penalty * mean |w|`` over [-bound, bound]^count without gradients, from w = 0.

    What is found is never worse than w = 0. A loss that is no number counts as the worst. The same ``seed`` gives the
    same tries.
    """
    nevergrad = _nevergrad()
    if optimiser not in nevergrad.optimizers.registry:
        raise UserError(f"option `optimiser` of rule `lorahub`: nevergrad has no `{optimiser}`; NGOpt is a good choice")
    known: dict[bytes, float] = {}

    def objective(weights: np.ndarray) -> float:
        """Solvers come back to the points where they stood: the loss of each is asked for once."""
        key = (weights + 0.0).tobytes()
        if key not in known:
            value = float(loss(weights)) + penalty * float(np.mean(np.abs(weights)))
            known[key] = value if np.isfinite(value) else _WORST
        return known[key]

    best = np.zeros(count)
    least = objective(best)
    box = nevergrad.p.Array(init=np.zeros(count)).set_bounds(-bound, bound)
    box.random_state.seed(seed % 2**32)
    tried = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its solvers remark on settings that it chose itself
        engine = nevergrad.optimizers.registry[optimiser](parametrization=box, budget=steps)
        for _ in range(steps):
            candidate = engine.ask()
            weights = np.clip(np.asarray(candidate.value, dtype=np.float64), -bound, bound)
            tried.append(objective(weights))
            engine.tell(candidate, tried[-1])
            if tried[-1] < least:
                best, least = weights, tried[-1]
    return Found(best, least, objective(np.zeros(count)), tuple(tried))


def _sum(weights: np.ndarray, arrays: Sequence[np.ndarray]) -> np.ndarray:
    """sum_i w_i x_i in float64."""
    total = np.zeros(arrays[0].shape)
    for weight, array in zip(weights.tolist(), arrays, strict=True):
        total += weight * array.astype(np.float64)
    return total


def _nevergrad() -> Any:
    try:
        import nevergrad
    except ImportError:
        raise UserError("rule `lorahub` needs nevergrad: pip install 'fedgraft[merge]'") from None
    return nevergrad
