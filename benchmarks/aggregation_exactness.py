"""How far each strategy's aggregated dW is from the true weighted mean of the sites' dW, and what theory says of it.

    python benchmarks/aggregation_exactness.py      writes benchmarks/results/aggregation_exactness.json and a table

K sites of unequal weight drift at random from a common start, by the seam of each strategy (its own part of the
training and its second pass included), for three rounds in float32. Two pairs: an `nn.Linear` and one in the layout of
`Conv1D`; alpha / r is 4 and 2. The error is the Frobenius norm of the difference over that of the true mean, of the
whole dW (what was added to the base weights included), computed densely here; of the rounds and the pairs, the largest.
Beside it PEFT's `add_weighted_adapter` on the adapters of the first round.

Theory, computed from the very updates, densely: `exact` 1e-6 or less (float32); `truncation` what the best rank r must
lose; `cross term` sum p_k (B_k - B)(A_k - A); the others by their published equations.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import platform
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedgraft.core.adapter import AdapterSpec, AdapterState, LowRankPair, TensorSpec
from fedgraft.core.errors import UserError, one_line
from fedgraft.strategies import Aggregator, strategies
from fedgraft.strategies.contract.bench import Bench, drawn, fresh

RESULTS = Path(__file__).parent / "results" / "aggregation_exactness.json"
EXACT = 1e-6
ROUNDS = 3
ALPHA = 16.0
LAYOUTS = {"linear": (96, 80, False), "conv1d": (64, 112, True)}
RECORDS = (30, 10, 25, 5, 17, 40, 8, 21, 12, 33)


@dataclass(frozen=True)
class Case:
    sites: int
    rank: int
    mixed: bool = False

    @property
    def name(self) -> str:
        return f"K={self.sites} r={'2/4/8' if self.mixed else self.rank}"

    @property
    def weights(self) -> dict[str, float]:
        return {f"site-{k:02d}": float(RECORDS[k % len(RECORDS)]) for k in range(self.sites)}

    @property
    def ranks(self) -> dict[str, int]:
        return {site: (8, 2, 4)[k % 3] if self.mixed else self.rank for k, site in enumerate(self.weights)}


CASES = [Case(k, r) for r in (4, 8) for k in (3, 5, 20)] + [Case(k, 8, mixed=True) for k in (3, 5, 20)]


def spec_of(rank: int) -> AdapterSpec:
    tensors, pairs = [], []
    for name, (m, n, turned) in LAYOUTS.items():
        tensors += [
            TensorSpec(f"{name}.lora_A.weight", (rank, n), role="lora_A", averaging="product"),
            TensorSpec(f"{name}.lora_B.weight", (m, rank), role="lora_B", averaging="product"),
        ]
        pairs.append(LowRankPair(f"{name}.lora_A.weight", f"{name}.lora_B.weight", ALPHA / rank, turned))
    tensors.append(TensorSpec("head", (4, 6), role="head"))
    return AdapterSpec("lora", tuple(tensors), tuple(pairs), rank=rank, alpha=ALPHA)


class Drifting(Bench):
    """Sites that pull towards targets of which one half is common: all move, and apart."""

    def _target(self, site: str, tensor: TensorSpec) -> np.ndarray:
        whole = self.state.spec.by_name.get(tensor.name, tensor).shape
        pull = drawn(whole, "common", tensor.name) + drawn(whole, "target", site, tensor.name)
        return pull[tuple(slice(n) for n in tensor.shape)] / np.sqrt(max(whole[-1:], default=1))


# What theory says, from the updates of a round. Everything dense: this is the other way of computing it.


def _products(bench: Bench, number: int) -> list[tuple[float, np.ndarray, np.ndarray, float]]:
    """(p_k, B_k, A_k, s_k) of the factors that were sent, in float64."""
    total = sum(update.weight for update in bench.sent.values())
    found = []
    for update in bench.sent.values():
        pair, state = update.state.spec.pairs[number], update.state
        found.append((update.weight / total, state[pair.b].astype(float), state[pair.a].astype(float), pair.scaling))
    return found


def _cross_term(bench: Bench, number: int, mean: np.ndarray) -> float:
    sent = _products(bench, number)
    b, a = sum(p * b for p, b, _, _ in sent), sum(p * a for p, _, a, _ in sent)
    return float(np.linalg.norm(sum(p * s * (left - b) @ (right - a) for p, left, right, s in sent)))


def _truncation(bench: Bench, number: int, mean: np.ndarray) -> float:
    values = np.linalg.svd(mean, compute_uv=False)
    return float(np.sqrt((values[bench.state.spec.rank or 0 :] ** 2).sum()))


def _best(dense: np.ndarray, rank: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(dense, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def _by_slices(bench: Bench, number: int, mean: np.ndarray) -> float:
    rank, sent = bench.state.spec.rank or 0, _products(bench, number)
    total = np.zeros_like(mean)
    for h in range(rank):
        have = [(p, b, a, s) for p, b, a, s in sent if len(a) > h]
        share = sum(p for p, _, _, _ in have)
        total += sum((p / share * s * np.outer(b[:, h], a[h]) for p, b, a, s in have), np.zeros_like(mean))
    return float(np.linalg.norm(_best(total, rank) - mean))


def _padded(bench: Bench, number: int, mean: np.ndarray) -> float:
    rank, sent = bench.state.spec.rank or 0, _products(bench, number)
    shares = np.array([p * np.linalg.norm(s * b @ a) for p, b, a, s in sent])
    shares /= shares.sum()
    left = sum(q * s * np.pad(b, ((0, 0), (0, rank - len(a)))) for q, (_, b, a, s) in zip(shares, sent, strict=True))
    right = sum(q * np.pad(a, ((0, rank - len(a)), (0, 0))) for q, (_, _, a, _) in zip(shares, sent, strict=True))
    return float(np.linalg.norm(left @ right - mean))


def _aligned(bench: Bench, number: int, mean: np.ndarray, penalty: float = 0.01) -> float:
    """LoRA-FAIR: B moves to fit the mean of the products at the mean A."""
    sent = _products(bench, number)
    scale = sent[0][3]
    b, a = sum(p * b for p, b, _, _ in sent), sum(p * a for p, _, a, _ in sent)
    goal = sum(p * left @ right for p, left, right, _ in sent)
    moved = (goal - b @ a) @ a.T @ np.linalg.inv(a @ a.T + penalty * np.eye(len(a)))
    return float(scale * np.linalg.norm((b + moved) @ a - goal))


Theory = Callable[[Bench, int, np.ndarray], float]
THEORY: Mapping[str, tuple[str, Theory]] = {
    **dict.fromkeys(("flexlora", "hlora", "fedask"), ("truncation", _truncation)),
    **dict.fromkeys(
        (
            "fedit",
            "fedprox",
            "fednova",
            "scaffold",
            "fedrot",
            "la-lora",
            "frlora",
            "ditto",
            "fedper",
            "fedrep",
            "fedbn",
        ),
        ("cross term", _cross_term),
    ),
    "raflora": ("slices", _by_slices),
    "hetlora": ("padding", _padded),
    "lora-fair": ("alignment", _aligned),
}
#: Not means of dW by intent, so that their distance from one is no fault.
NO_MEAN = {
    "robust": ("bulyan", "fltrust", "geometric-median", "krum", "median", "multi-krum", "norm-bound", "trimmed-mean"),
    "merging": ("adaptersoup", "dare", "knots", "lorahub", "task-arithmetic", "ties", "uniform"),
    "personal": ("fedsa", "ifca"),
    "other weights": ("fedbuff", "medlora"),
}


def measured(cls: type[Aggregator], case: Case) -> dict[str, Any]:
    """The errors of one strategy in one case, with theory's; or why there are none."""
    own = getattr(cls, "contract_spec", None)
    if case.mixed and not cls.capabilities.heterogeneous_ranks:
        return {"refused": "cannot mix ranks"}
    if own is not None and case.rank != 8:
        return {"refused": "measured at the rank of its own method"}
    spec = own() if own is not None else spec_of(case.rank)
    options = cls.Options.model_validate(dict(getattr(cls, "contract_options", {})))
    effect = getattr(cls, "contract_effect", lambda state: {p.a: state.delta(p) for p in state.spec.pairs})
    try:
        bench = Drifting(lambda: cls(options), fresh(spec), case.weights, ranks={} if own is not None else case.ranks)
        rounds = [_round(cls, bench, effect) for _ in range(ROUNDS)]
    except UserError as error:
        return {"refused": one_line(error)}
    except Exception as error:  # a strategy that is not ready must not cost the others their figures
        return {"failed": repr(error)}
    worst = max((found for each in rounds for found in each), key=lambda found: found["error"], default=None)
    return worst if worst is not None else {"refused": "the sites keep a factor: there is no common dW"}


def _round(
    cls: type[Aggregator], bench: Bench, effect: Callable[[AdapterState], Mapping[str, np.ndarray]]
) -> list[dict[str, Any]]:
    """One round: for each pair the error, and theory's."""
    got = effect(bench.round())
    brought = {site: bench.brought[site] for site in bench.sent}
    local = {t.name for state in brought.values() for t in state.spec.tensors if t.policy == "local"}
    total = sum(bench.weights[site] for site in brought)
    parts = {site: effect(state) for site, state in brought.items()}
    found = []
    for number, name in enumerate(parts[next(iter(parts))]):
        pairs = bench.state.spec.pairs
        if number < len(pairs) and local & {pairs[number].a, pairs[number].b}:
            continue
        mean: np.ndarray = sum(np.asarray(bench.weights[site] * part[name]) for site, part in parts.items()) / total
        if mean.shape != got[name].shape or not np.any(mean):
            continue
        size = float(np.linalg.norm(mean))
        line: dict[str, Any] = {"error": float(np.linalg.norm(got[name] - mean)) / size, "round": bench.number}
        if number < len(pairs):
            line["layout"] = "conv1d" if pairs[number].fan_in_fan_out else "linear"
            if cls.name in THEORY:
                line["theory"] = THEORY[cls.name][1](bench, number, mean) / size
        found.append(line)
    return found


def claim(cls: type[Aggregator]) -> str:
    if cls.capabilities.exact:
        return "exact"
    if cls.name in THEORY:
        return THEORY[cls.name][0]
    kind = next((kind for kind, names in NO_MEAN.items() if cls.name in names), "")
    return f"no mean ({kind})" if kind else "none"


def holds(said: str, line: Mapping[str, Any]) -> bool | None:
    """Whether a figure is what theory says; None where there is nothing to say."""
    if "error" not in line:
        return None
    if said == "exact":
        return bool(line["error"] <= EXACT)
    if "theory" in line:
        return bool(abs(line["error"] - line["theory"]) <= max(EXACT, 1e-3 * line["theory"]))
    return None


# PEFT's own merging, on the same adapters


def of_peft(case: Case, adapters: Mapping[str, AdapterState]) -> dict[str, Any]:
    """Errors of `add_weighted_adapter` on ``adapters``, by way of combining."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            (m, n, _), (m2, n2, _) = LAYOUTS.values()
            self.linear = torch.nn.Linear(n, m, bias=False)
            self.conv1d = Conv1D(m2, n2)

    def config(rank: int) -> LoraConfig:
        return LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=list(LAYOUTS), lora_dropout=0.0)

    sites, weights = list(adapters), case.weights
    total = sum(weights[site] for site in sites)
    shares = [weights[site] / total for site in sites]
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        model = get_peft_model(Two(), config(adapters[sites[0]].spec.rank or 0), adapter_name=sites[0])
        for site in sites[1:]:
            model.add_adapter(site, config(adapters[site].spec.rank or 0))
        layers = {name: getattr(model.base_model.model, name) for name in LAYOUTS}
        for site, state in adapters.items():
            for name, pair in zip(LAYOUTS, state.spec.pairs, strict=True):
                layers[name].lora_A[site].weight.data = torch.from_numpy(state[pair.a].copy())
                layers[name].lora_B[site].weight.data = torch.from_numpy(state[pair.b].copy())
        means = {
            name: sum(
                p * adapters[site].delta(adapters[site].spec.pairs[k]) for p, site in zip(shares, sites, strict=True)
            )
            for k, name in enumerate(LAYOUTS)
        }
        found: dict[str, Any] = {}
        for kind, more in (("cat", {}), ("svd", {"svd_rank": 8}), ("linear", {}), ("ties", {"density": 0.5})):
            try:
                model.add_weighted_adapter(sites, shares, kind, combination_type=kind, **more)
            except ValueError as error:
                found[kind] = {"refused": one_line(error)}
                continue
            errors = []
            for name, mean in means.items():
                delta = layers[name].get_delta_weight(kind).detach().double().numpy()
                delta = delta.T if LAYOUTS[name][2] else delta
                errors.append(float(np.linalg.norm(delta - mean) / np.linalg.norm(mean)))
            found[kind] = {"error": max(errors)}
            if kind == "svd":
                tails = [np.linalg.svd(mean, compute_uv=False) for mean in means.values()]
                found[kind]["theory"] = max(float(np.sqrt((v[8:] ** 2).sum() / (v**2).sum())) for v in tails)
            if kind == "cat":
                found[kind]["theory"] = 0.0
    return found


def adapters_of(case: Case) -> dict[str, AdapterState]:
    """What the sites of ``case`` hold after one round of training at their ranks."""
    bench = Drifting(lambda: strategies()["flexlora"](), fresh(spec_of(case.rank)), case.weights, ranks=case.ranks)
    bench.round()
    return dict(bench.brought)


def cell(line: Mapping[str, Any]) -> str:
    if "error" not in line:
        return "!" if "failed" in line else "-"
    theory = f" ({line['theory']:.2g})" if line.get("theory") else ""
    return f"{line['error']:.2g}{theory}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="names of strategies; all that are registered if not given")
    parser.add_argument("--no-peft", action="store_true")
    asked = parser.parse_args()
    known = {n: c for n, c in strategies().items() if not asked.only or n in asked.only}
    table: dict[str, Any] = {}
    header = f"{'strategy':18s} {'theory says':24s} " + " ".join(f"{case.name:>18s}" for case in CASES)
    print(header)
    for name, cls in known.items():
        said = claim(cls)
        lines = {case.name: measured(cls, case) for case in CASES}
        checks = [ok for line in lines.values() if (ok := holds(said, line)) is not None]
        table[name] = {"claim": said, "as_theory_says": all(checks) if checks else None, "cases": lines}
        if all("refused" in line for line in lines.values()):
            print(f"{name:18s} {lines[CASES[0].name]['refused'][:140]}")
            continue
        wrong = "" if not checks or all(checks) else "   DIFFERS FROM THEORY"
        print(f"{name:18s} {said:24s} " + " ".join(f"{cell(line):>18s}" for line in lines.values()) + wrong)
    peft: dict[str, Any] = {}
    if not asked.no_peft:
        for case in CASES:
            peft[case.name] = of_peft(case, adapters_of(case))
        for kind in ("cat", "svd", "linear", "ties"):
            row = " ".join(f"{cell(peft[case.name][kind]):>18s}" for case in CASES)
            print(f"{'PEFT ' + kind:18s} {'add_weighted_adapter':24s} {row}")
    if not asked.only and not asked.no_peft:
        import peft as peft_package

        about = {
            "sites": [3, 5, 20],
            "ranks": [4, 8, "8/2/4 by turns"],
            "alpha": ALPHA,
            "shapes": {name: list(shape[:2]) for name, shape in LAYOUTS.items()},
            "rounds": ROUNDS,
            "dtype": "float32",
            "exact_means": EXACT,
            "numpy": np.__version__,
            "peft": peft_package.__version__,
            "machine": platform.machine(),
        }
        RESULTS.write_text(json.dumps({"about": about, "strategies": table, "peft": peft}, indent=1) + "\n")
        print(f"{RESULTS} written")
    if bad := [name for name, row in table.items() if row["as_theory_says"] is False]:
        raise SystemExit(f"not as theory says: {', '.join(bad)}")


if __name__ == "__main__":
    main()
