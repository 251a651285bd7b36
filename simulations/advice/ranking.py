"""Methods ranked for a model, a federation and a budget, by what each would send, hold, and drown in noise."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ...methods import Method
from ...privacy.accounting import calibrate_noise
from ...server.method_card import Count, count
from ...server.traffic import Skeleton

#: What the catalogue reached in `benchmarks/methods.py`, by method and by whether there was privacy.
_MEASURED = Path(__file__).with_name("measured.json")
_NO_PRIVACY, _PRIVATE = "none", "epsilon 8"
_LENGTH, _MICRO = 128, 8
_MIB, _GIB = 2**20, 2**30
#: A round whose upload takes longer than this is not waited for.
_PATIENCE = 60.0


@dataclass(frozen=True)
class Federation:
    """What there is: ``sites``, each with ``units`` records, ``uplink`` in Mbit/s and ``memory`` in GiB.

    ``epsilon``: of the whole run for each record, 0 for none; a run is ``steps`` optimiser steps of ``batch`` records.
    """

    sites: int
    epsilon: float
    uplink: float
    memory: float
    units: int = 1000
    batch: int = 125
    steps: int = 40

    @property
    def noise(self) -> float:
        """The noise multiplier of a site's step; 0 without privacy."""
        return _noise(self.epsilon, self.batch / self.units, self.steps, self.units) if self.epsilon else 0.0

    def noise_to_signal(self, numbers: int) -> float:
        """Length of the noise in the mean of the sites' steps over the longest that a clipped mean gradient can be.

        sigma C sqrt(P) / B at one site, and less by sqrt(sites) in the mean, over C.
        """
        return self.noise * math.sqrt(numbers / self.sites) / self.batch


@cache
def _noise(epsilon: float, rate: float, steps: int, units: int) -> float:
    delta = 10.0 ** -math.ceil(math.log10(10 * units))
    return calibrate_noise(epsilon, delta, rate, steps)


@dataclass(frozen=True)
class Advice:
    """One method as it would do here; ``against``: why it is out of the question, empty where it is not.

    ``seconds_up``: a site's upload of a round; ``noise``: see :meth:`Federation.noise_to_signal`; ``memory``: GiB at a
    site, about; ``expected``: accuracy on the data that all methods were measured on, None where this one was not.
    """

    method: str
    summary: str
    count: Count
    seconds_up: float
    noise: float
    memory: float
    expected: float | None
    reasons: tuple[str, ...]
    against: str = ""


@cache
def measured() -> dict[str, Any]:
    """What was measured of each method, by name."""
    found: dict[str, Any] = json.loads(_MEASURED.read_text(encoding="utf-8"))
    return found


def advise(
    methods: Iterable[Method], on: Skeleton, federation: Federation, told: Callable[[str], None] = lambda name: None
) -> list[Advice]:
    """Every method, the best first, those that are out of the question last.

    The order is that of the expected accuracy: what was measured without privacy, less what the noise took at the
    measured budget, times how much more of it there is here. Methods that were not measured come after them, those
    with less noise, or else with less to send, first.
    """
    found = []
    for method in methods:
        told(method.name)
        found.append(_one(method, on, federation))
    return sorted(found, key=_order)


def _order(advice: Advice) -> tuple[bool, bool, float, float, int]:
    known = advice.expected is not None
    return bool(advice.against), not known, -(advice.expected or 0.0), advice.noise, advice.count.trained


def _one(method: Method, on: Skeleton, federation: Federation) -> Advice:
    counted = Count(method.name, refused=method.refused) if method.refused else count(method, on)
    numbers = counted.trained
    seconds = 8 * counted.shared / (1e6 * federation.uplink)
    noise = federation.noise_to_signal(numbers)
    memory = _memory(on, counted, private=federation.epsilon > 0)
    expected = None if counted.refused else _expected(method.name, noise)
    against = counted.refused
    if not against and federation.epsilon and method.dp != "exact":
        against = f"with privacy: {method.dp.removeprefix('refused: ')}"
    if not against and memory > federation.memory:
        against = f"needs about {memory:.2g} GiB at a site"
    if not against and seconds > _PATIENCE:
        against = f"a round's upload takes {seconds:.0f} s"
    reasons = () if against else tuple(_reasons(method, counted, federation, noise, expected))
    return Advice(method.name, method.summary, counted, seconds, noise, memory, expected, reasons, against)


def _expected(name: str, noise: float) -> float | None:
    entry = measured()["methods"].get(name, {})
    plain, private = entry.get(_NO_PRIVACY), entry.get(_PRIVATE)
    if plain is None or (noise and private is None):
        return None
    if not noise:
        return float(plain)
    then = Federation(**measured()["federation"]).noise_to_signal(entry["trainable"])
    return max(0.0, float(plain - (plain - private) * noise / then))


def _memory(on: Skeleton, counted: Count, *, private: bool) -> float:
    """GiB at a site, about: weights, adapter with its gradient and Adam's moments, activations, a row an example."""
    config: Any = on.base.model.config
    width, depth, heads = (
        int(getattr(config, key, 0) or 0) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")
    )
    length = min(_LENGTH, int(getattr(config, "max_position_embeddings", 0) or _LENGTH))
    # In fp32: some sixteen tensors as wide as the hidden states a layer, and two of the attention's weights.
    activations = 4 * _MICRO * depth * length * (16 * width + 2 * heads * length)
    rows = 4 * _MICRO * counted.trained if private else 0
    return (on.base.bytes + 4 * counted.frozen + 16 * counted.trained + activations + rows) / _GIB


def _reasons(
    method: Method, counted: Count, federation: Federation, noise: float, expected: float | None
) -> Iterable[str]:
    if expected is None:
        yield "not measured"
    if federation.epsilon:
        if noise < 0.1:
            yield "hardly any noise"
        elif noise > 1:
            yield "more noise than signal"
    if federation.sites > 1 and counted.linear:
        yield "averages exactly"
    if counted.shared < _MIB:
        yield "under a MiB a round"
    if method.merges:
        yield "merges"
