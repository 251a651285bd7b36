"""Every federated LoRA strategy on one small task: without privacy, at epsilon 8 and at epsilon 2.

    python benchmarks/digits.py                    all of it, about an hour on one core; goes on where it was stopped
    python benchmarks/digits.py --only fedit,ffa   these alone
    python benchmarks/digits.py --table            prints and draws what is there

A network (64-64-64-10) learns upright digits (scikit-learn's, 8 x 8); ten sites, Dirichlet 0.3 in the labels, then
adapt it to rotated ones of other writers (each image four times, by angles of 60 +- 15 degrees, each a record of its
own): adapters on all three layers, 40 rounds of 10 local steps. The aggregators and
site-side rules are those of `fedgraft.strategies`, through the same calls as in a run; the training is plain NumPy with
clipped per-example gradients and Gaussian noise (without privacy the mean gradient is clipped, to the same norm), so
that a run takes seconds. Learning rates: the best of one grid on a
validation split, the same trials for every strategy; then five other seeds (data split, sites, base network, noise).

Two accuracies: of the global adapter on the test digits, and at the sites, of each site's own adapter (personal tensors
included) on test digits weighted to the site's mix of labels. Noise comes from a seed: this is an experiment, not a
protection.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage, stats
from sklearn.datasets import load_digits

from fedgraft.core.adapter import AdapterSpec, AdapterState, LowRankPair, TensorSpec, offset_a, offset_b
from fedgraft.privacy import calibrate_noise
from fedgraft.strategies import Aggregator, LocalRule, create_aggregator
from fedgraft.strategies.contract.bench import Bench

RESULTS = Path(__file__).parent / "results" / "digits.json"
PICTURE = Path(__file__).parent.parent / "docs" / "images" / "digits.svg"
SITES, ALPHA, ROUNDS, STEPS, BATCH, CLIP, DELTA = 10, 0.3, 40, 10, 32, 1.0, 1e-3
RANK, CORE, HEADS, MOMENTUM = 4, 16, 2, 0.9
ANGLE, JITTER, COPIES = 60.0, 15.0, 4
SIZES = (64, 64, 64, 10)
UPRIGHT, VALIDATION, TEST = 500, 150, 300
PRIVACY: dict[str, float | None] = {"none": None, "8": 8.0, "2": 2.0}
RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
TUNING, SEEDS = (101, 102), (1, 2, 3, 4, 5)
#: Name in the table: strategy, its options, the kind of adapter.
ENTRIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "fedit": ("fedit", {}, "lora"),
    "ffa": ("ffa", {"basis": "random"}, "lora"),
    "ffa orthonormal": ("ffa", {"basis": "orthonormal"}, "lora"),
    "ffa svd": ("ffa", {"basis": "random"}, "svd"),
    "fedsa": ("fedsa", {}, "lora"),
    "rolora": ("rolora", {}, "lora"),
    "la-lora": ("la-lora", {}, "lora"),
    "lora-a2": ("lora-a2", {}, "lora"),
    "fed-sb": ("fed-sb", {}, "core"),
    "ravan": ("ravan", {}, "ravan"),
    "flora": ("flora", {}, "lora"),
    "flexlora": ("flexlora", {}, "lora"),
    "hlora": ("hlora", {}, "lora"),
    "hetlora": ("hetlora", {}, "lora"),
    "raflora": ("raflora", {}, "lora"),
    "fedex": ("fedex", {}, "lora"),
    "lora-fair": ("lora-fair", {}, "lora"),
    "fedsvd": ("fedsvd", {}, "lora"),
    "fedask": ("fedask", {}, "lora"),
    "fedrot": ("fedrot", {}, "lora"),
    "frlora": ("frlora", {}, "lora"),
    "deer": ("deer", {}, "lora"),
    "flora-na": ("flora-na", {}, "lora"),
    "medlora": ("medlora", {}, "lora"),
}


# Data and base network


class Task:
    """One seed's digits, sites and base network."""

    def __init__(self, seed: int) -> None:
        random = np.random.default_rng([seed, 7])
        images, labels = load_digits(return_X_y=True)
        order = random.permutation(len(images))
        images, labels = images[order].reshape(-1, 8, 8) / 16, labels[order]
        parts = np.split(np.arange(len(images)), np.cumsum([UPRIGHT, VALIDATION, TEST]))
        self.weights = _pretrained(images[parts[0]].reshape(-1, 64), labels[parts[0]], random)
        self.validation, self.test, (x, y) = (
            (_turned(images[part], copies, random), np.repeat(labels[part], copies))
            for part, copies in zip(parts[1:], (1, 1, COPIES), strict=True)
        )
        self.sites = {f"site-{i}": (x[at], y[at]) for i, at in enumerate(_dealt(y, random))}


def _turned(images: np.ndarray, copies: int, random: np.random.Generator) -> np.ndarray:
    angles = random.uniform(ANGLE - JITTER, ANGLE + JITTER, (len(images), copies))
    turned = [
        ndimage.rotate(image, angle, reshape=False, order=1)
        for image, own in zip(images, angles, strict=True)
        for angle in own
    ]
    return np.stack(turned).reshape(-1, 64)


def _dealt(labels: np.ndarray, random: np.random.Generator) -> list[np.ndarray]:
    """Indices of each site's digits, by Dirichlet shares of each label; every site has at least a batch."""
    while True:
        sites: list[list[int]] = [[] for _ in range(SITES)]
        for label in range(10):
            at = random.permutation(np.flatnonzero(labels == label))
            cuts = np.cumsum(random.dirichlet([ALPHA] * SITES))[:-1] * len(at)
            for site, part in zip(sites, np.split(at, cuts.astype(int)), strict=True):
                site.extend(part)
        if min(map(len, sites)) >= BATCH:
            return [np.array(sorted(site)) for site in sites]


def _pretrained(x: np.ndarray, y: np.ndarray, random: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
    """Weights and biases after full-batch Adam on upright digits."""
    layers = [(random.standard_normal((m, n)) * np.sqrt(2 / n), np.zeros(m)) for n, m in pairwise(SIZES)]
    first = [[np.zeros_like(p) for p in layer] for layer in layers]
    second = [[np.zeros_like(p) for p in layer] for layer in layers]
    for step in range(1, 201):
        inputs, deltas = _backward(layers, x, y)
        for at, (h, delta) in enumerate(zip(inputs, deltas, strict=True)):
            for k, g in enumerate((delta.T @ h / len(x), delta.mean(0))):
                first[at][k] = 0.9 * first[at][k] + 0.1 * g
                second[at][k] = 0.99 * second[at][k] + 0.01 * g * g
                layers[at][k][...] -= (
                    0.01 * (first[at][k] / (1 - 0.9**step)) / (np.sqrt(second[at][k] / (1 - 0.99**step)) + 1e-8)
                )
    return layers


def _logits(layers: list[tuple[np.ndarray, np.ndarray]], x: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    inputs = []
    for at, (w, b) in enumerate(layers):
        inputs.append(x)
        x = x @ w.T + b
        if at < len(layers) - 1:
            x = np.maximum(x, 0)
    return x, inputs


def _backward(
    layers: list[tuple[np.ndarray, np.ndarray]], x: np.ndarray, y: np.ndarray
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Input (batch, n) and loss gradient at the output (batch, m) of each layer, for each example by itself."""
    z, inputs = _logits(layers, x)
    z = np.exp(z - z.max(1, keepdims=True))
    delta = z / z.sum(1, keepdims=True)
    delta[np.arange(len(y)), y] -= 1
    deltas = [delta]
    for (w, _), h in zip(layers[:0:-1], inputs[:0:-1], strict=True):
        delta = (delta @ w) * (h > 0)
        deltas.append(delta)
    return inputs, deltas[::-1]


# Adapters


class Layer:
    """One layer's adapter: names of its tensors, its weight, and its per-example gradients in factored form."""

    def __init__(self, at: int, kind: str) -> None:
        self.a = f"layer.{at}.lora_A.default.weight"
        self.b = f"layer.{at}.lora_B.default.weight"
        self.core = self.heads = self.scale = ""
        if kind in ("core", "ravan"):
            self.a = f"layer.{at}.lora_A.default.basis.weight"
        if kind == "core":
            self.core = f"layer.{at}.lora_A.default.core.weight"
        if kind == "ravan":
            self.heads = f"layer.{at}.lora_A.default.core.heads"
            self.scale = f"layer.{at}.lora_A.default.core.scale"

    def middle(self, values: dict[str, np.ndarray]) -> np.ndarray | None:
        if self.core:
            return values[self.core]
        if self.heads:
            scaled = values[self.heads] * values[self.scale][:, None, None]
            return np.block(
                [[part if i == j else np.zeros_like(part) for j in range(HEADS)] for i, part in enumerate(scaled)]
            )
        return None

    def change(self, values: dict[str, np.ndarray]) -> np.ndarray:
        """B A, or B R A, dense: the layers are small."""
        middle = self.middle(values)
        right = values[self.a] if middle is None else middle @ values[self.a]
        return values[self.b] @ right

    def gradients(
        self, values: dict[str, np.ndarray], s: float, h: np.ndarray, delta: np.ndarray
    ) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """(name, u, v): the gradient of example i is u_i v_i^T, or for heads and scales a stack of such."""
        left, right = s * delta @ values[self.b], h @ values[self.a].T
        if self.core:
            yield self.core, left, right
        elif self.heads:
            shape = (len(h), HEADS, -1)
            lefts, rights = left.reshape(shape), right.reshape(shape)
            yield self.heads, lefts * values[self.scale][None, :, None], rights
            yield self.scale, np.einsum("bhr,hrs,bhs->bh", lefts, values[self.heads], rights), np.ones((len(h), 0))
        else:
            yield self.a, left, h
            yield self.b, s * delta, right


def _squares(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Squared norm of each example's gradient."""
    if u.ndim == 3:
        return ((u**2).sum(2) * (v**2).sum(2)).sum(1)
    return (u**2).sum(1) * ((v**2).sum(1) if v.shape[1] else 1.0)


def _total(u: np.ndarray, v: np.ndarray, weights: np.ndarray) -> np.ndarray:
    if u.ndim == 3:
        return np.einsum("bhr,bhs,b->hrs", u, v, weights)
    return (u * weights[:, None]).T @ v if v.shape[1] else weights @ u


def initial(task: Task, kind: str, seed: int) -> AdapterState:
    """A fresh adapter of ``kind`` lora, svd (A from W0), core (LoRA-SB) or ravan."""
    random = np.random.default_rng([seed, 8])
    tensors: list[TensorSpec] = []
    values: dict[str, np.ndarray] = {}
    pairs = []
    for at, (w, _) in enumerate(task.weights):
        layer, (m, n) = Layer(at, kind), w.shape
        u, _, vt = np.linalg.svd(w)
        if kind in ("core", "ravan"):
            each = min(CORE, m) // (HEADS if kind == "ravan" else 1)
            rank = each * (HEADS if kind == "ravan" else 1)
            tensors += [
                TensorSpec(layer.a, (rank, n), role="basis", policy="freeze"),
                TensorSpec(layer.b, (m, rank), role="basis", policy="freeze"),
            ]
            values |= {layer.a: vt[:rank], layer.b: u[:, :rank]}
            if kind == "core":
                tensors.append(TensorSpec(layer.core, (rank, rank), role="core", averaging="linear"))
                values[layer.core] = np.zeros((rank, rank))
            else:
                tensors.append(TensorSpec(layer.heads, (HEADS, each, each), role="core", averaging="product"))
                tensors.append(TensorSpec(layer.scale, (HEADS,), role="scale", averaging="product"))
                values |= {layer.heads: np.zeros((HEADS, each, each)), layer.scale: np.ones(HEADS)}
            continue
        tensors += [
            TensorSpec(layer.a, (RANK, n), role="lora_A", averaging="product"),
            TensorSpec(layer.b, (m, RANK), role="lora_B", averaging="product"),
        ]
        pairs.append(LowRankPair(layer.a, layer.b, 2.0))
        bound = 1 / math.sqrt(n)
        values[layer.a] = vt[:RANK] if kind == "svd" else random.uniform(-bound, bound, (RANK, n))
        values[layer.b] = np.zeros((m, RANK))
    method = {"core": "lora-sb", "ravan": "ravan"}.get(kind, "lora")
    rank = CORE if pairs == [] else RANK
    options = {} if pairs else {"common_rank": True}
    spec = AdapterSpec(method, tuple(tensors), tuple(pairs), rank=rank, alpha=2.0 * rank, options=options)
    return AdapterState(spec, {name: array.astype(np.float32) for name, array in values.items()})


# The federation


class Digits(Bench):
    """The contract suite's federation, with real digits, real gradients, clipping and noise in it."""

    steps = STEPS

    def __init__(self, entry: str, task: Task, lr: float, noise: dict[str, float] | None, seed: int) -> None:
        name, options, kind = ENTRIES[entry]
        self.task, self.lr, self.noise, self.seed = task, lr, noise, seed
        self.layers = [Layer(at, kind) for at in range(len(task.weights))]
        self.s = 2.0
        weights = {site: float(len(y)) for site, (_, y) in task.sites.items()}
        super().__init__(lambda: create_aggregator(name, options), initial(task, kind, seed), weights)
        self.pairs = {pair.a: pair for pair in self.state.spec.pairs}

    def aggregator(self) -> Aggregator:
        rule = super().aggregator()
        rule.principal = self._principal
        return rule

    def _principal(self, initial: AdapterState) -> dict[str, np.ndarray]:
        """s B A as the principal part of each base weight, as the server has it from the base model."""
        found = {}
        for pair, (w, _) in zip(initial.spec.pairs, self.task.weights, strict=True):
            u, sigma, vt = np.linalg.svd(w, full_matrices=False)
            root = np.sqrt(sigma[:RANK] / pair.scaling)
            found |= {
                pair.a: (root[:, None] * vt[:RANK]).astype(np.float32),
                pair.b: (u[:, :RANK] * root).astype(np.float32),
            }
        return found

    def network(self, values: dict[str, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        found = []
        for layer, (w, b) in zip(self.layers, self.task.weights, strict=True):
            whole = w + self.s * layer.change(values)
            pair = self.pairs.get(layer.a)
            if pair is not None and offset_a(pair) in values:
                whole = whole + values[offset_b(pair)] @ values[offset_a(pair)]
            found.append((whole, b))
        return found

    def _trained(self, site: str, start: AdapterState, rule: LocalRule | None) -> AdapterState:
        spec = start.spec
        able = {t.name for t in spec.tensors if t.parameter and t.policy != "freeze"}
        values = {name: array.astype(np.float64) for name, array in start.items()}
        first = {name: values[name].copy() for name in able}
        x, y = self.task.sites[site]
        random = np.random.default_rng([self.seed, self.number, int(site.removeprefix("site-")), 9])
        velocity: dict[str, np.ndarray] = {}
        order = np.concatenate([random.permutation(len(x)) for _ in range(1 + STEPS * BATCH // len(x))])
        for step in range(STEPS):
            asked = rule.trains(spec, step) if rule is not None else None
            active = able if asked is None else able & set(asked)
            if self.noise is None:
                at = order[step * BATCH : (step + 1) * BATCH]
            else:
                at = np.flatnonzero(random.random(len(x)) < BATCH / len(x))
            inputs, deltas = _backward(self.network(values), x[at], y[at])
            found = [
                (name, u, v)
                for layer, h, delta in zip(self.layers, inputs, deltas, strict=True)
                for name, u, v in layer.gradients(values, self.s, h, delta)
                if name in active
            ]
            weights = np.ones(len(at))
            if self.noise is not None:
                norms = np.sqrt(sum(_squares(u, v) for _, u, v in found))
                weights = np.minimum(1.0, CLIP / np.maximum(norms, 1e-12))
            gradients = {name: _total(u, v, weights) / BATCH for name, u, v in found}
            if self.noise is None:
                norm = math.sqrt(sum(float(np.vdot(g, g)) for g in gradients.values()))
                gradients = {name: g * min(1.0, CLIP / max(norm, 1e-12)) for name, g in gradients.items()}
            for name, total in gradients.items():
                gradient: Any = total
                if self.noise is not None:
                    gradient = total + self.noise[site] * CLIP / BATCH * random.standard_normal(total.shape)
                if rule is not None:
                    gradient = rule.direction(name, gradient, values[name], first[name], step)
                velocity[name] = MOMENTUM * velocity.get(name, 0.0) + gradient
                values[name] = values[name] - self.lr * velocity[name]
        with np.errstate(over="ignore"):
            return AdapterState(spec, {name: array.astype(start[name].dtype) for name, array in values.items()})

    def _score(self, state: AdapterState) -> float:
        return self.accuracy(state, *self.task.validation)

    def accuracy(self, state: AdapterState, x: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None) -> float:
        z, _ = _logits(self.network({name: array.astype(np.float64) for name, array in state.items()}), x)
        return float(np.average(z.argmax(1) == y, weights=weights))

    def at_sites(self, x: np.ndarray, y: np.ndarray) -> float:
        """Mean over the sites, by their records, of each one's own adapter on its own mix of labels."""
        total = 0.0
        share = np.bincount(y, minlength=10) / len(y)
        for site, (_, own) in self.task.sites.items():
            state = self.received(site)
            known = self.memories.get(site, {})
            state = AdapterState(state.spec, {**state, **known.get("site-local", {}), **known.get("site-personal", {})})
            mix = np.bincount(own, minlength=10) / len(own)
            total += len(own) * self.accuracy(state, x, y, (mix / np.maximum(share, 1e-9))[y])
        return total / sum(len(own) for _, own in self.task.sites.values())


@cache
def _task(seed: int) -> Task:
    return Task(seed)


@cache
def _noise(target: float, records: int) -> float:
    """The noise multiplier of a site with that many records."""
    return calibrate_noise(target, DELTA, min(1.0, BATCH / records), ROUNDS * STEPS)


def run(entry: str, privacy: str, lr: float, seed: int) -> dict[str, Any]:
    """One run; a diverged one has accuracy 0."""
    task, target = _task(seed), PRIVACY[privacy]
    noise = None
    if target is not None:
        # Fewer records need more noise: rounded down, a site's noise is never too little.
        noise = {site: _noise(target, len(y) // 20 * 20) for site, (_, y) in task.sites.items()}
    began = time.process_time()
    bench = Digits(entry, task, lr, noise, seed)
    row: dict[str, Any] = {"entry": entry, "privacy": privacy, "lr": lr, "seed": seed}
    row |= {"noise": round(float(np.mean(list(noise.values()))), 3) if noise else None}
    try:
        with np.errstate(all="ignore"):
            for _ in range(ROUNDS):
                bench.round()
            row |= {"validation": bench.accuracy(bench.state, *bench.task.validation)}
            row |= {"validation_at_sites": bench.at_sites(*task.validation)}
            row |= {"test": bench.accuracy(bench.state, *task.test), "test_at_sites": bench.at_sites(*task.test)}
    except Exception as error:
        if "NaN" not in str(error) and "converge" not in str(error) and "finite" not in str(error):
            raise
        row |= dict.fromkeys(("validation", "validation_at_sites", "test", "test_at_sites"), 0.0)
    sent = next(iter(bench.sent.values())).state if bench.sent else bench.state
    row |= {"numbers_up": sent.parameters, "seconds": round(time.process_time() - began, 2)}
    return row


def before(seed: int) -> float:
    """Accuracy of the base network on the test digits."""
    task = _task(seed)
    z, _ = _logits(task.weights, task.test[0])
    return float((z.argmax(1) == task.test[1]).mean())


# The table


def chosen(rows: list[dict[str, Any]], entry: str, privacy: str) -> float:
    """The learning rate whose validation accuracy, where the strategy's adapter is used, is best over the trials."""
    key = "validation_at_sites" if entry == "fedsa" else "validation"
    mine = [r for r in rows if (r["entry"], r["privacy"]) == (entry, privacy) and r["seed"] in TUNING]
    return max(RATES, key=lambda lr: (np.mean([r[key] for r in mine if r["lr"] == lr]), -lr))


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and 95 % confidence interval (Student) over the seeds."""
    found = []
    for entry in ENTRIES:
        for privacy in PRIVACY:
            mine = [r for r in rows if (r["entry"], r["privacy"]) == (entry, privacy) and r["seed"] in SEEDS]
            if len(mine) < len(SEEDS):
                continue
            line: dict[str, Any] = {"entry": entry, "privacy": privacy, "lr": mine[0]["lr"]}
            line["numbers_up"] = mine[0]["numbers_up"]
            for key in ("test", "test_at_sites"):
                values = np.array([r[key] for r in mine])
                half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
                line[key], line[f"{key}_half"] = round(float(values.mean()), 4), round(float(half), 4)
            found.append(line)
    return found


def table(lines: list[dict[str, Any]]) -> None:
    titles = {"none": "no privacy", "8": "epsilon 8", "2": "epsilon 2"}
    print(f"\n{'':17}" + "".join(f"{title:>25}" for title in titles.values()) + f"{'numbers up':>12}")
    print(f"{'':17}" + f"{'global      at sites':>25}" * 3)
    for entry in ENTRIES:
        mine = {line["privacy"]: line for line in lines if line["entry"] == entry}
        if not mine:
            continue
        cells = ""
        for privacy in PRIVACY:
            line = mine.get(privacy)
            cell = f"{line['test']:.3f} ±{line['test_half']:.3f}   {line['test_at_sites']:.3f}" if line else ""
            cells += f"{cell:>25}"
        print(f"{entry:17}{cells}{next(iter(mine.values()))['numbers_up']:>12}")


def draw(lines: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [entry for entry in ENTRIES if any(line["entry"] == entry for line in lines)]
    figure, axes = plt.subplots(1, 3, figsize=(11, 0.28 * len(names) + 1.4), sharey=True)
    for axis, (privacy, title) in zip(
        axes, (("none", "no privacy"), ("8", "epsilon 8"), ("2", "epsilon 2")), strict=True
    ):
        for at, name in enumerate(names):
            for line in lines:
                if (line["entry"], line["privacy"]) == (name, privacy):
                    axis.errorbar(line["test"], at, xerr=line["test_half"], fmt="o", color="#1f5f8b", capsize=2, ms=4)
                    axis.plot(line["test_at_sites"], at, "d", color="#c8553d", ms=4)
        axis.set_title(title)
        axis.grid(axis="x", alpha=0.3)
        axis.set_xlabel("accuracy")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    handles = [
        plt.Line2D([], [], marker="o", ls="", color="#1f5f8b", label="global adapter, 95 % interval over 5 seeds"),
        plt.Line2D([], [], marker="d", ls="", color="#c8553d", label="at the sites, personal tensors included"),
    ]
    figure.legend(handles=handles, loc="lower center", ncol=2, frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="strategies of the table, separated by commas")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--results", type=Path, default=RESULTS)
    settings = parser.parse_args()
    log = settings.results.with_suffix(".jsonl")
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {(r["entry"], r["privacy"], r["lr"], r["seed"]) for r in rows}

    def once(entry: str, privacy: str, lr: float, seed: int) -> None:
        if (entry, privacy, lr, seed) in done:
            return
        row = run(entry, privacy, lr, seed)
        rows.append(row)
        with log.open("a") as file:
            file.write(json.dumps(row) + "\n")

    wanted = settings.only.split(",") if settings.only else list(ENTRIES)
    for entry in [] if settings.table else wanted:
        for privacy in PRIVACY:
            for lr in RATES:
                for seed in TUNING:
                    once(entry, privacy, lr, seed)
            best = chosen(rows, entry, privacy)
            for seed in SEEDS:
                once(entry, privacy, best, seed)
            mine = [r for r in rows if (r["entry"], r["privacy"], r["lr"]) == (entry, privacy, best)]
            print(
                f"{entry:17} {privacy:5} rate {best:<6g} "
                f"{np.mean([r['test'] for r in mine if r['seed'] in SEEDS]):.3f}  {mine[-1]['seconds']} s a run",
                flush=True,
            )
    lines = summary(rows)
    settings.results.write_text(
        json.dumps(
            {
                "what": __doc__.splitlines()[0],
                "conditions": {
                    "sites": SITES,
                    "dirichlet": ALPHA,
                    "rounds": ROUNDS,
                    "local_steps": STEPS,
                    "batch": BATCH,
                    "clip": CLIP,
                    "delta": DELTA,
                    "rank": RANK,
                    "rank of fed-sb's and ravan's cores together": CORE,
                    "angle": [ANGLE - JITTER, ANGLE + JITTER],
                    "copies": COPIES,
                    "momentum": MOMENTUM,
                    "rates": RATES,
                    "tuning_seeds": TUNING,
                    "seeds": SEEDS,
                },
                "before": round(float(np.mean([before(seed) for seed in SEEDS])), 4),
                "table": lines,
            },
            indent=1,
        )
        + "\n"
    )
    table(lines)
    draw(lines)


if __name__ == "__main__":
    main()
