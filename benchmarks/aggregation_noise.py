"""How much of the noise on the factors arrives in the aggregated dW: the real aggregators against the closed forms.

    python benchmarks/aggregation_noise.py     writes benchmarks/results/aggregation_noise.json and prints a table

K sites hold dW = s B A with A (r, n) and B (m, r), and each sends its factors with independent normal noise of standard
deviation sigma on every number, as differential privacy would have it. The figure is E |dW' - E0|^2, summed over the
m n numbers of dW, with dW' what the aggregator makes of it, E0 what it makes without noise. By strategy, for equal
weights (for weights p_k read sum p_k^2 in place of 1 / K, and its square in place of 1 / K^2):

    fedit                      s^2 ( sigma^2 (m |A|^2 + n |B|^2) / K + sigma^4 r m n / K^2 )
    fedex, flora, flexlora     s^2 ( sigma^2 (m |A|^2 + n |B|^2) / K + sigma^4 r m n / K )
    ffa (A frozen)             s^2 sigma^2 m |A|^2 / K
    fed-sb (B, A frozen)       s^2 sigma^2 |A|^2 |B|^2 / K, the noise being that on R in dW = s B R A

Averaging the products, which is what makes an aggregation exact, takes in K times as much of the product of two noises
as averaging the factors. FlexLoRA at full rank (method.rank = min(m, n), sites at r), where its SVD cuts nothing off.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedgraft.core.adapter import AdapterSpec, AdapterState, LowRankPair, TensorSpec
from fedgraft.core.update import Update
from fedgraft.strategies import create_aggregator
from fedgraft.strategies.core_matrix import dense_cores

RESULTS = Path(__file__).parent / "results" / "aggregation_noise.json"
M, N, RANK, ALPHA = 24, 20, 4, 8.0
DRAWS, BOUND = 2000, 0.03
SITES, SIGMAS = (3, 10), (0.05, 0.3, 1.0)
PAIR = LowRankPair("q.lora_A.weight", "q.lora_B.weight", ALPHA / RANK)
LORA = AdapterSpec(
    "lora",
    (
        TensorSpec(PAIR.a, (RANK, N), dtype="float64", role="lora_A", averaging="product"),
        TensorSpec(PAIR.b, (M, RANK), dtype="float64", role="lora_B", averaging="product"),
    ),
    (PAIR,),
    rank=RANK,
    alpha=ALPHA,
)
_LEFT, _CORE, _RIGHT = (
    f"q.{name}.weight" for name in ("lora_B.default", "lora_A.default.core", "lora_A.default.basis")
)
CORES = AdapterSpec(
    "lora-sb",
    (
        TensorSpec(_RIGHT, (RANK, N), dtype="float64", role="basis", policy="freeze"),
        TensorSpec(_CORE, (RANK, RANK), dtype="float64", role="core", averaging="linear"),
        TensorSpec(_LEFT, (M, RANK), dtype="float64", role="basis", policy="freeze"),
    ),
    rank=RANK,
    alpha=ALPHA,
    options={"common_rank": True},
)


def square(array: np.ndarray) -> float:
    return float(np.sum(array * array))


def averaged_factors(sent: Sequence[AdapterState], p: np.ndarray, sigma: float) -> float:
    """The variance of s (sum p_k B_k)(sum p_k A_k)."""
    a, b = (sum(w * state[name] for w, state in zip(p, sent, strict=True)) for name in (PAIR.a, PAIR.b))
    s, r, share = sent[0].spec.pairs[0].scaling, len(np.asarray(a)), float(np.sum(p**2))
    linear = sigma**2 * (M * square(np.asarray(a)) + N * square(np.asarray(b))) * share
    return s**2 * (linear + sigma**4 * r * M * N * share**2)


def averaged_products(sent: Sequence[AdapterState], p: np.ndarray, sigma: float) -> float:
    """The variance of s sum p_k B_k A_k."""
    total = 0.0
    for w, state in zip(p, sent, strict=True):
        pair = state.spec.pairs[0]
        linear = sigma**2 * (M * square(state[pair.a]) + N * square(state[pair.b]))
        total += (w * pair.scaling) ** 2 * (linear + sigma**4 * len(state[pair.a]) * M * N)
    return total


def frozen_a(sent: Sequence[AdapterState], p: np.ndarray, sigma: float) -> float:
    """The variance of s (sum p_k B_k) A."""
    pair = sent[0].spec.pairs[0]
    return pair.scaling**2 * sigma**2 * M * square(sent[0][pair.a]) * float(np.sum(p**2))


def cores_alone(sent: Sequence[AdapterState], p: np.ndarray, sigma: float) -> float:
    """The variance of s B (sum p_k R_k) A."""
    sizes = square(sent[0][_LEFT]) * square(sent[0][_RIGHT])
    return (ALPHA / RANK) ** 2 * sigma**2 * sizes * float(np.sum(p**2))


@dataclass(frozen=True)
class Case:
    """A strategy, the adapter that its server and its sites hold, and the closed form."""

    strategy: str
    variance: Callable[[Sequence[AdapterState], np.ndarray, float], float]
    spec: AdapterSpec = LORA
    site_rank: int = 0


# The scaling at the sites is the same as everybody else's, alpha / r, and r / min(m, n) of it at the server.
FULL = min(M, N)
CASES = (
    Case("fedit", averaged_factors),
    Case("fedex", averaged_products),
    Case("flora", averaged_products),
    Case("flexlora", averaged_products, LORA.with_rank(FULL), RANK),
    Case("ffa", frozen_a),
    Case("fed-sb", cores_alone, CORES),
)


class Federation:
    """A case and its sites, of equal factors unless ``unlike``, ready to be asked again and again."""

    def __init__(self, case: Case, weights: Sequence[float], *, unlike: bool = False, seed: int = 0) -> None:
        self.case, self.weights = case, list(weights)
        self.p = np.array(self.weights) / sum(self.weights)
        # The same factors for every strategy, so that they can be compared.
        self.random = np.random.default_rng([seed, 1])
        options = {"basis": "random"} if case.strategy == "ffa" else {}
        self.rule = create_aggregator(case.strategy, options)
        self.names = [f"site-{number}" for number in range(len(self.weights))]
        rank = case.site_rank or RANK
        self.rule.ranks = dict.fromkeys(self.names, rank)
        self.state = self.rule.prepare(self._drawn(case.spec))
        self.random = np.random.default_rng([seed, 2])
        self.rule.round = 1
        self.rule.start_round(self.state)
        spec = self.rule.for_site(self.state, self.names[0]).spec
        first = self._drawn(spec)
        self.sent = [self._at_site(self._drawn(spec) if unlike else first) for _ in self.names]
        self.zero = self.aggregated(0.0)

    def _drawn(self, spec: AdapterSpec) -> AdapterState:
        """Factors of the size that they have in training: A as it is initialised, B about as large."""
        return AdapterState(spec, {t.name: self.random.standard_normal(t.shape) / np.sqrt(N) for t in spec.tensors})

    def _at_site(self, drawn: AdapterState) -> AdapterState:
        """``drawn``, with what is frozen as the server has it."""
        return AdapterState(drawn.spec, {**drawn, **{n: self.state[n] for n in drawn.spec.select("freeze")}})

    def aggregated(self, sigma: float) -> np.ndarray:
        """The dense dW that the aggregator makes of updates with fresh noise."""
        self.rule.start_round(self.state)
        for site, state, weight in zip(self.names, self.sent, self.weights, strict=True):
            shared = state.spec.select("share")
            noisy = {name: state[name] + sigma * self.random.standard_normal(state[name].shape) for name in shared}
            self.rule.add(Update(site, AdapterState(state.spec, noisy, names=shared), weight))
        result = self.rule.result()
        if set(result) != set(result.spec.names):
            result = AdapterState(self.state.spec, {**self.state, **result})
        if result.spec.pairs:
            return result.delta(result.spec.pairs[0])
        return dense_cores(result)[_CORE]

    def measured(self, sigma: float, draws: int) -> tuple[float, float]:
        """The variance of dW, summed over its numbers, and the standard error of that."""
        found = np.array([square(self.aggregated(sigma) - self.zero) for _ in range(draws)])
        return float(found.mean()), float(found.std(ddof=1) / np.sqrt(draws))

    def expected(self, sigma: float) -> float:
        return self.case.variance(self.sent, self.p, sigma)


def main() -> None:
    began = time.monotonic()
    rows: list[dict[str, Any]] = []
    base = np.nan
    print(f"{'strategy':10}{'K':>4}{'sigma':>7}{'measured':>12}{'closed form':>13}{'off by':>9}{'over fedit':>12}")
    for count in SITES:
        for sigma in SIGMAS:
            for case in CASES:
                federation = Federation(case, [1.0] * count)
                got, error = federation.measured(sigma, DRAWS)
                want = federation.expected(sigma)
                rows.append(
                    {
                        "strategy": case.strategy,
                        "sites": count,
                        "sigma": sigma,
                        "measured": got,
                        "standard_error": error,
                        "closed_form": want,
                        "relative_error": got / want - 1,
                    }
                )
                base = got if case.strategy == "fedit" else base
                print(
                    f"{case.strategy:10}{count:4}{sigma:7.2f}{got:12.4g}{want:13.4g}{got / want - 1:9.2%}"
                    f"{got / base:12.2f}",
                    flush=True,
                )
    worst = max(abs(row["relative_error"]) for row in rows)
    summary = {
        "m": M,
        "n": N,
        "rank": RANK,
        "scaling": ALPHA / RANK,
        "draws": DRAWS,
        "bound": BOUND,
        "worst_relative_error": worst,
        "seconds": round(time.monotonic() - began, 1),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"summary": summary, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary, indent=1))
    if worst > BOUND:
        sys.exit(f"a closed form is off by more than {BOUND:.0%}")


if __name__ == "__main__":
    main()
