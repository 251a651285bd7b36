"""Merging by statistics of the data: Fisher information of the parameters, Gram matrices of the layers' inputs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field
from scipy.linalg import solve

from ...core.adapter import AdapterState
from ...core.errors import UserError
from ..aggregator import Options
from ..lowrank import stacked
from .merger import Adapter, Context, Merged, Merger, Needs, merger
from .mixing import alone, assembled, mean_rest, product, released, require_products, rest_names, shares, written


class FisherOptions(Options):
    """``floor`` is added to each Fisher number, as a share of the adapter's mean, so that none is divided by zero."""

    floor: float = Field(1e-6, gt=0, description="added to the information, as a share of its mean")


@merger("fisher")
class FisherMerging(Merger):
    """theta = sum_k p_k F_k theta_k / sum_k p_k F_k for each number, F_k the diagonal Fisher information.

    On the factors themselves, which are what the information is about, so adapters must have one rank and have started
    from one seed: B and A of another basis cannot be averaged, however well known. A scaling that differs is folded
    into B, and its square into the information. F is additive over records; under privacy it is a release of its own.
    Source: Matena and Raffel 2022, "Merging models with Fisher-weighted averaging", arXiv 2111.09832, equation 4.
    """

    summary = "mean of the factors, each number weighted by its Fisher information"
    equation = "theta = sum_k p_k F_k theta_k / sum_k p_k F_k"
    source = "Matena and Raffel 2022, arXiv 2111.09832"
    needs = Needs(fisher=True, labels=True)
    Options = FisherOptions

    def merge(self, adapters: Sequence[Adapter], context: Context) -> Merged:
        p = shares(adapters)
        if len(adapters) == 1:
            return alone(adapters[0], context)
        spec = context.spec
        above = {tensor.name: np.zeros(tensor.shape) for tensor in spec.tensors}
        below = {tensor.name: np.zeros(tensor.shape) for tensor in spec.tensors}
        mass = {}
        for adapter in adapters:
            fisher = _fisher_of(adapter, context)
            scales = _scales(adapter, context)
            floor = self.options.floor * float(np.mean(np.concatenate([x.reshape(-1) for x in fisher.values()])))
            if not floor > 0:
                raise UserError(
                    f"adapter {adapter.name}: its Fisher information is zero everywhere; give it more records"
                )
            for name in above:
                theta = adapter.state[name].astype(np.float64) * scales.get(name, 1.0)
                weight = p[adapter.name] * (fisher[name].astype(np.float64) + floor) / scales.get(name, 1.0) ** 2
                above[name] += weight * theta
                below[name] += weight
            mass[adapter.name] = p[adapter.name] * float(sum(x.astype(np.float64).sum() for x in fisher.values()))
        tensors = {name: above[name] / below[name] for name in above}
        if context.heads == "first":
            tensors |= {n: adapters[0].state[n] for n in rest_names(spec) if spec.by_name[n].role == "head"}
        whole = sum(mass.values())
        return Merged(
            written(spec, tensors),
            {name: value / whole for name, value in mass.items()},
            {name: f"its share of all Fisher information, by weight {p[name]:.3f}" for name in p},
            notes=(released("the records that the information is of"),),
        )


def _fisher_of(adapter: Adapter, context: Context) -> AdapterState:
    if adapter.name not in context.fisher:
        raise UserError(f"adapter {adapter.name} comes without Fisher information; give records for it")
    fisher = context.fisher[adapter.name].require_finite()
    for name, values in fisher.items():
        if np.any(values < 0):
            raise UserError(f"adapter {adapter.name}: the Fisher information of {name} is negative")
    return fisher


def _scales(adapter: Adapter, context: Context) -> dict[str, float]:
    """What each B must be multiplied by to have the scaling of the result. Raises for another rank or other layers."""
    own = {pair.a: pair for pair in adapter.state.spec.pairs}
    found = {}
    for pair in context.spec.pairs:
        want = context.spec.by_name[pair.a].shape
        if pair.a not in own or adapter.state[pair.a].shape != want:
            have = adapter.state[pair.a].shape[0] if pair.a in own else 0
            raise UserError(
                f"adapter {adapter.name}: has rank {have} at {pair.a}, the result {want[0]}; rule `fisher` needs one "
                "rank: use `regmean` or `uniform`"
            )
        found[pair.b] = own[pair.a].scaling / pair.scaling
    return found


class RegMeanOptions(Options):
    """``shrink`` multiplies what is not on the diagonal of the Gram matrices."""

    shrink: float = Field(
        0.9, ge=0, le=1, description="off-diagonal entries of the Gram matrices are multiplied by this"
    )
    ridge: float = Field(1e-6, gt=0, description="added to the diagonal, as a share of its mean")


@merger("regmean")
class RegMean(Merger):
    """dW = (sum_k p_k dW_k G_k)(sum_k p_k G_k)^-1, with G_k = X_k^T X_k of the layer's inputs, off-diagonals shrunk.

    It minimises sum_k p_k |X_k (dW - dW_k)^T|^2, the squared change of the layer's outputs. Exact up to the rank of the
    result: dW_k G_k G^-1 = s_k B_k (A_k G_k G^-1) is a product of the same rank, and only the Gram matrices (n, n) are
    full. A little on the diagonal keeps the sum invertible, and averages plainly what no input reaches. Everything
    beside the pairs is averaged. G is additive over records; under privacy it is a release of its own. Source: Jin et
    al. 2023, "Dataless knowledge fusion", arXiv 2212.09849, equations 2 and 3.
    """

    summary = "least squares of the layers' outputs on each adapter's inputs"
    equation = "dW = (sum_k p_k dW_k G_k)(sum_k p_k G_k)^-1, G_k = X_k^T X_k"
    source = "Jin et al. 2023, arXiv 2212.09849"
    needs = Needs(grams=True)
    Options = RegMeanOptions

    def merge(self, adapters: Sequence[Adapter], context: Context) -> Merged:
        require_products(self.name, context.spec)
        p = shares(adapters)
        if len(adapters) == 1:
            return alone(adapters[0], context)
        products = {}
        seen = dict.fromkeys(p, 0.0)
        for pair in context.spec.pairs:
            (_, n), (m, _) = context.spec.by_name[pair.a].shape, context.spec.by_name[pair.b].shape
            grams = {x.name: p[x.name] * self._gram(x, pair.a, n, context) for x in adapters}
            total = np.sum(list(grams.values()), axis=0)
            terms = []
            for adapter in adapters:
                seen[adapter.name] += float(np.trace(grams[adapter.name]) / np.trace(total))
                b, a = product(adapter.state, pair)
                if b.size:
                    # A_k G_k G^-1 = (G^-1 G_k A_k^T)^T: both are symmetric.
                    terms.append((1.0, b, solve(total, grams[adapter.name] @ a.T, assume_a="pos").T))
            products[pair.a] = stacked(terms) if terms else (np.zeros((m, 0)), np.zeros((0, n)))
        state, lost = assembled(context.spec, products, mean_rest(adapters, p, context))
        weights = {name: value / len(context.spec.pairs) for name, value in seen.items()}
        return Merged(
            state,
            weights,
            dict.fromkeys(p, "its share of the inputs' energy, mean over the layers"),
            lost,
            (released("the records that the Gram matrices are of"),),
        )

    def _gram(self, adapter: Adapter, name: str, n: int, context: Context) -> np.ndarray:
        held = context.grams.get(adapter.name, {}).get(name)
        if held is None:
            raise UserError(f"adapter {adapter.name} comes without the Gram matrix of the inputs of {name}")
        gram = np.asarray(held, dtype=np.float64)
        if gram.shape != (n, n) or not np.isfinite(gram).all():
            raise UserError(f"adapter {adapter.name}: the Gram matrix of {name} is not {n} x {n} finite numbers")
        diagonal = np.diag(gram)
        if not np.trace(gram) > 0 or diagonal.min() < 0:
            raise UserError(f"adapter {adapter.name}: the Gram matrix of {name} has no positive diagonal")
        shrunk = self.options.shrink * (gram + gram.T) / 2
        shrunk[np.diag_indices(n)] = diagonal + self.options.ridge * diagonal.mean()
        return shrunk
