"""KnOTS: bring the changes of all adapters into one basis by a joint SVD, and merge there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from ..lowrank import Factors, stacked
from .merger import Adapter, Context, Merged, merger
from .mixing import alone, assembled, changes, mean_rest, require_products, shares, started
from .ties import Election, Ties, TiesOptions

#: Directions of smaller singular values, relative to the largest, are rounding of float32 factors.
_NOTHING = 1e-7


class KnotsOptions(TiesOptions):
    """Those of TIES; ``merge``: by TIES or by the mean; ``basis``: whether V_k are weighted by singular values."""

    merge: Literal["ties", "mean"] = Field("ties", description="merge V_k by TIES or by their mean")
    basis: Literal["v", "sv"] = Field("v", description="merge V_k (the equation), or S V_k (as its authors ran it)")


@merger("knots")
class Knots(Ties):
    """[dW_1 ... dW_K] = U S [V_1 ... V_K]; V = TIES or mean of the V_k; dW = lambda U S V.

    One orthonormal basis U for all adapters makes entries of V_k comparable where those of dW_k are not. The joint SVD
    comes from the factors: QR of [s_1 B_1 ... s_K B_K] and of each A_k^T, and the SVD of a core of sum r_k rows and
    columns; V_k (q, n), q <= sum r_k, is kept as a product too, whose entries are made in blocks. The result has rank q
    and is cut to the nearest of the result's rank. ``basis = sv`` merges S V_k and leaves S out of the product, as in
    the published configurations. By the mean, either is the weighted mean of dW_k. Source: Stoica et al. 2024, "Model
    merging with SVD to tie the KnOTS", arXiv 2410.19735, section 4.
    """

    summary = "joint SVD of all dW, TIES on the right singular vectors"
    equation = "[dW_1 ... dW_K] = U S [V_1 ... V_K]; dW = lambda U S TIES(V_1 ... V_K)"
    source = "Stoica et al. 2024, arXiv 2410.19735"
    Options = KnotsOptions

    def merge(self, adapters: Sequence[Adapter], context: Context) -> Merged:
        require_products(self.name, context.spec)
        p = shares(adapters)
        if len(adapters) == 1:
            return alone(adapters[0], context)
        left, held = {}, {}
        for pair in context.spec.pairs:
            u, s, parts = joint_svd(changes(adapters, pair, context))
            if not len(s):
                continue  # nobody changed it
            left[pair.a] = u if self.options.basis == "sv" else u * s
            held[pair.a] = [(s[:, None] * b if self.options.basis == "sv" else b, a) for b, a in parts]
        if self.options.merge == "mean":
            right = {name: np.tensordot(list(p.values()), [b @ a for b, a in xs], 1) for name, xs in held.items()}
            reasons = {adapter.name: f"weight {adapter.weight:g}" for adapter in adapters}
        else:
            election = Election(p, held, self.options.density, self.options.trim)
            right = {name: np.concatenate([election.rows(name, cut) for cut in election.cuts[name]]) for name in held}
            reasons = election.reasons()
        products = {}
        for pair in context.spec.pairs:
            (_, n), (m, _) = context.spec.by_name[pair.a].shape, context.spec.by_name[pair.b].shape
            terms = [(self.options.scale, left[pair.a], right[pair.a])] if pair.a in left else []
            if (start := started(pair, context)) is not None:
                terms.append((1.0, *start))
            products[pair.a] = stacked(terms) if terms else (np.zeros((m, 0)), np.zeros((0, n)))
        state, lost = assembled(context.spec, products, mean_rest(adapters, p, context))
        return Merged(state, p, reasons, lost)


def joint_svd(matrices: Sequence[Factors]) -> tuple[np.ndarray, np.ndarray, list[Factors]]:
    """U (m, q), S (q) and V_k (q, n) as factors: b_k @ a_k = U diag(S) V_k, and [V_1 ... V_K] of orthonormal rows."""
    q_left, r_left = np.linalg.qr(np.concatenate([b for b, _ in matrices], axis=1))
    rights = [np.linalg.qr(a.T) for _, a in matrices]
    columns, core = 0, []
    for _, r in rights:
        core.append(r_left[:, columns : columns + r.shape[1]] @ r.T)
        columns += r.shape[1]
    u, s, vt = np.linalg.svd(np.concatenate(core, axis=1), full_matrices=False)
    rank = int(np.sum(s > _NOTHING * s[0])) if len(s) and s[0] > 0 else 0
    parts, column = [], 0
    for q, r in rights:
        parts.append((vt[:rank, column : column + r.shape[0]], q.T))
        column += r.shape[0]
    return q_left @ u[:, :rank], s[:rank], parts
