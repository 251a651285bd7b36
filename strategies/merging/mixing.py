"""What the merging rules share: one description for mixed ranks, what adapters change as factors, weighted sums."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from ...core.adapter import AdapterSpec, AdapterState, LowRankPair, TensorSpec, explain_shape
from ...core.errors import UserError
from ..lowrank import Factors, effective, stacked, svd
from .merger import Adapter, Context, Heads, Merged

#: Below this a sum of shares is taken for what it was meant to be.
_ROUNDING = 1e-12


def shares(adapters: Sequence[Adapter]) -> dict[str, float]:
    """The weight of each adapter divided by their sum, by name. Raises :class:`UserError` for weights that are none."""
    names = [adapter.name for adapter in adapters]
    if not names:
        raise UserError("there is no adapter to merge")
    if len(set(names)) != len(names):
        raise UserError(f"two adapters are called {next(n for n in names if names.count(n) > 1)}")
    for adapter in adapters:
        if not (adapter.weight > 0 and np.isfinite(adapter.weight)):
            raise UserError(f"adapter {adapter.name}: its weight is {adapter.weight}; it must be a positive number")
    total = sum(adapter.weight for adapter in adapters)
    return {adapter.name: adapter.weight / total for adapter in adapters}


def with_ranks(spec: AdapterSpec, ranks: Mapping[str, int]) -> AdapterSpec:
    """A copy whose pairs have ``ranks`` (by a pair's ``a``), each scaled by the adapter's own rule for its rank."""
    power = 0.5 if spec.options.get("scaling") == "sqrt" else 1.0
    shapes: dict[str, tuple[int, ...]] = {}
    pairs = []
    for pair in spec.pairs:
        (before, n), (m, _) = spec.by_name[pair.a].shape, spec.by_name[pair.b].shape
        rank = ranks.get(pair.a, before)
        shapes[pair.a], shapes[pair.b] = (rank, n), (m, rank)
        own = spec.alpha is not None and pair.scaling == spec.alpha / before**power
        scaling = spec.alpha / rank**power if own else pair.scaling * (before / rank) ** power
        pairs.append(replace(pair, scaling=scaling))
    tensors = tuple(replace(t, shape=shapes.get(t.name, t.shape)) for t in spec.tensors)
    largest = max((shapes[pair.a][0] for pair in pairs), default=spec.rank)
    return replace(spec, tensors=tensors, pairs=tuple(pairs), rank=largest)


def common_spec(adapters: Sequence[Adapter], rank: int | None = None, heads: Heads = "mean") -> AdapterSpec:
    """The description of what ``adapters`` merge into: the first's, with every pair that any of them has.

    Each pair has ``rank``, or the largest rank that an adapter has there. Raises :class:`UserError` that names the
    adapter and the tensor where they cannot be merged: a layer of another shape, or a tensor beside the pairs that one
    of them lacks or has in another shape.
    """
    shares(adapters)
    if rank is not None and rank < 1:
        raise UserError(f"the rank of the merged adapter is {rank}; it must be at least 1")
    first = adapters[0].state.spec
    ranks: dict[str, int] = {}
    found: dict[str, tuple[LowRankPair, TensorSpec, TensorSpec]] = {}
    for adapter in adapters:
        spec = adapter.state.spec
        for pair in spec.pairs:
            a, b = spec.by_name[pair.a], spec.by_name[pair.b]
            _, known_a, known_b = found.setdefault(pair.a, (pair, a, b))
            for name, got, want in ((pair.a, a.shape[1], known_a.shape[1]), (pair.b, b.shape[0], known_b.shape[0])):
                if got != want:
                    raise UserError(
                        f"adapter {adapter.name}: tensor {name} is for a layer of {got}, another's of {want}"
                    )
            ranks[pair.a] = max(ranks.get(pair.a, 0), a.shape[0])
        _require_same_rest(adapter, first, heads)
    own = {pair.a for pair in first.pairs}
    extra = [entry for name, entry in found.items() if name not in own]
    whole = replace(
        first,
        tensors=(*first.bare.tensors, *(t for _, a, b in extra for t in (a, b))),
        pairs=(*first.pairs, *(pair for pair, _, _ in extra)),
    )
    return with_ranks(whole, ranks if rank is None else dict.fromkeys(ranks, rank))


def rest_names(spec: AdapterSpec) -> tuple[str, ...]:
    """The parameters that are no factor of a pair: heads, biases, scaling vectors."""
    factors = {name for pair in spec.pairs for name in (pair.a, pair.b)}
    return tuple(tensor.name for tensor in spec.tensors if tensor.parameter and tensor.name not in factors)


def _require_same_rest(adapter: Adapter, first: AdapterSpec, heads: Heads) -> None:
    spec = adapter.state.spec
    for name in rest_names(first):
        want = first.by_name[name]
        if heads == "first" and want.role == "head":
            continue
        if name not in spec.by_name:
            raise UserError(f"adapter {adapter.name}: has no tensor {name}, which the first adapter has")
        if spec.by_name[name].shape != want.shape:
            text = explain_shape(name, spec.by_name[name].shape, want.shape)
            hint = "; a head for other labels: keep the first's or leave heads out" if want.role == "head" else ""
            raise UserError(f"adapter {adapter.name}: {text}{hint}")
    for name in rest_names(spec):
        if name not in first.by_name and not (heads == "first" and spec.by_name[name].role == "head"):
            raise UserError(f"adapter {adapter.name}: has a tensor {name}, which the first adapter lacks")


def product(state: AdapterState, pair: LowRankPair) -> Factors:
    """The dW of ``state`` for ``pair`` of a common description, its scaling in the left factor; of rank 0 if none."""
    own = next((held for held in state.spec.pairs if held.a == pair.a), None)
    if own is not None:
        return effective(state, own)
    return np.zeros((0, 0)), np.zeros((0, 0))


def changes(adapters: Sequence[Adapter], pair: LowRankPair, context: Context) -> list[Factors]:
    """What each adapter changes for ``pair``: its dW, less that of the common start if there is one, as factors."""
    (_, n), (m, _) = context.spec.by_name[pair.a].shape, context.spec.by_name[pair.b].shape
    found = []
    for adapter in adapters:
        terms = [(1.0, *product(adapter.state, pair))]
        if (start := started(pair, context)) is not None:
            terms.append((-1.0, *start))
        held = [term for term in terms if term[1].size]
        found.append(stacked(held) if held else (np.zeros((m, 0)), np.zeros((0, n))))
    return found


def started(pair: LowRankPair, context: Context) -> Factors | None:
    """The dW of the common start as factors, or None where it is zero."""
    if context.start is None:
        return None
    b, a = product(context.start, pair)
    return (b, a) if np.any(b) and np.any(a) else None


def fitted(b: np.ndarray, a: np.ndarray, rank: int) -> tuple[Factors, float, float]:
    """``b @ a`` by factors of exactly ``rank``, and the squared norms of what was cut off and of the whole.

    Factors of at most that rank stay as they are, with zeros beside them. Others become the nearest product of that
    rank (an SVD through the factors), each singular value shared by both.
    """
    have = b.shape[1]
    if have > rank:
        u, s, vt = svd(b, a)
        root = np.sqrt(s[:rank])
        missed, whole = float(np.sum(s[rank:] ** 2)), float(np.sum(s**2))
        (b, a), have = (u[:, :rank] * root, root[:, None] * vt[:rank]), len(root)
    else:
        missed, whole = 0.0, float(np.sum((b.T @ b) * (a @ a.T)))
    wide, tall = np.zeros((b.shape[0], rank)), np.zeros((rank, a.shape[1]))
    wide[:, :have], tall[:have] = b, a
    return (wide, tall), missed, whole


def assembled(
    spec: AdapterSpec, products: Mapping[str, Factors], rest: Mapping[str, np.ndarray]
) -> tuple[AdapterState, float]:
    """The adapter ``spec`` of ``products`` (dW by a pair's ``a``) and ``rest``; and the relative error of all dW.

    A product of a larger rank than ``spec`` says is cut to the nearest one of that rank.
    """
    tensors = dict(rest)
    missed = whole = 0.0
    for pair in spec.pairs:
        (b, a), cut, total = fitted(*products[pair.a], spec.by_name[pair.a].shape[0])
        tensors[pair.b], tensors[pair.a] = b / pair.scaling, a
        missed, whole = missed + cut, whole + total
    lost = float(np.sqrt(missed / whole)) if whole > 0 else 0.0
    return written(spec, tensors), lost


def written(spec: AdapterSpec, tensors: Mapping[str, np.ndarray]) -> AdapterState:
    """A state of ``spec`` from arrays of any precision. Raises :class:`NonFiniteError` for one that is not finite."""
    return AdapterState(spec, {t.name: tensors[t.name].astype(t.dtype) for t in spec.tensors}).require_finite()


def lifted(state: AdapterState, spec: AdapterSpec) -> AdapterState:
    """The same adapter as ``spec`` describes it: exactly where its rank is enough, else the nearest of that rank."""
    products = {}
    for pair in spec.pairs:
        b, a = product(state, pair)
        (_, n), (m, _) = spec.by_name[pair.a].shape, spec.by_name[pair.b].shape
        products[pair.a] = (b, a) if b.size else (np.zeros((m, 0)), np.zeros((0, n)))
    return assembled(spec, products, {name: state[name] for name in rest_names(spec)})[0]


def mean_rest(adapters: Sequence[Adapter], weights: Mapping[str, float], context: Context) -> dict[str, np.ndarray]:
    """sum_k w_k theta_k of what is no factor of a pair; weights sum to one. The first's heads where they are kept."""
    found: dict[str, np.ndarray] = {}
    for name in rest_names(context.spec):
        if context.heads == "first" and context.spec.by_name[name].role == "head":
            found[name] = adapters[0].state[name]
            continue
        found[name] = np.zeros(context.spec.by_name[name].shape)
        for adapter in adapters:
            if weight := weights.get(adapter.name, 0.0):
                found[name] += weight * adapter.state[name].astype(np.float64)
    return found


def weighted(
    adapters: Sequence[Adapter], coefficients: Mapping[str, float], context: Context
) -> tuple[AdapterState, float]:
    """dW = sum_k c_k dW_k (changes since a common start, added to it), exact but for the rank; and what that lost.

    Everything beside the pairs is averaged by shares in proportion to the coefficients, which must not be negative.
    """
    total = sum(coefficients.values())
    products = {}
    for pair in context.spec.pairs:
        terms = [(c, *product(x.state, pair)) for x in adapters if (c := coefficients.get(x.name, 0.0))]
        start = started(pair, context)
        if start is not None and abs(1.0 - total) > _ROUNDING:
            terms.append((1.0 - total, *start))
        products[pair.a] = _sum(terms, context.spec, pair)
    rest = mean_rest(adapters, {name: c / total for name, c in coefficients.items()}, context)
    return assembled(context.spec, products, rest)


def _sum(terms: Iterable[tuple[float, np.ndarray, np.ndarray]], spec: AdapterSpec, pair: LowRankPair) -> Factors:
    held = [term for term in terms if term[1].size]
    if held:
        return stacked(held)
    return np.zeros((spec.by_name[pair.b].shape[0], 0)), np.zeros((0, spec.by_name[pair.a].shape[1]))


def alone(adapter: Adapter, context: Context) -> Merged:
    """One adapter merges into itself."""
    state, lost = weighted([adapter], {adapter.name: 1.0}, context)
    return Merged(state, {adapter.name: 1.0}, {adapter.name: "the only adapter"}, lost)


def released(records: str) -> str:
    """What a person should know who has ``records`` of their own decide about a merge."""
    return (
        f"what comes out depends on {records}: unless these are public, the merged adapter is a new release about "
        "them, which no privacy budget has paid for"
    )


def require_products(rule: str, spec: AdapterSpec) -> None:
    """Raise :class:`UserError` unless the adapters have low-rank pairs for ``rule`` to work on."""
    if not spec.pairs:
        raise UserError(
            f"rule `{rule}` works on low-rank updates; {spec.method} has none: convert the adapters to LoRA, or use "
            "`uniform`"
        )
