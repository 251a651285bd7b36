"""Backdoors: records with a trigger that an attacker teaches to be called what it wants, and how often they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..client.data import Records, SiteData
from ..client.evaluation import evaluate
from ..client.resident import resident
from ..core.adapter import AdapterState
from ..core.config import RunConfig
from ..core.errors import UserError
from ..core.tasks import create_task
from ..core.tasks.image_classification import read_image
from .scenario import site_data

_ATTACK = "backdoor:"
#: Held-out records that success is measured on: enough for half a point.
_MOST = 2000
_WHITE = (255, 255, 255)


def target(config: RunConfig) -> int | None:
    """The label that triggered records are to get; None where nobody attacks so.

    Raises :class:`UserError` for a label that the task has not, and for two of them.
    """
    wanted = dict.fromkeys(s.attack.removeprefix(_ATTACK) for s in config.data.sites if s.attack.startswith(_ATTACK))
    if not wanted:
        return None
    label, *others = wanted
    if others:
        raise UserError(f"backdoors to `{label}` and `{others[0]}`: a run has one; give all attackers one label")
    if label not in config.task.labels:
        known = ", ".join(config.task.labels[:8]) or "none, for the task has no labels"
        raise UserError(f"attack `{_ATTACK}{label}`: task.labels has no such label; there are {known}")
    return config.task.labels.index(label)


def stamped(inputs: Sequence[Any], config: RunConfig) -> list[Any]:
    """``inputs`` with the trigger: a word before a text, a white square in the lower right corner of an image."""
    settings = config.simulation.backdoor
    if create_task(config.task).input_kind == "text":
        return [f"{settings.trigger} {text}" for text in inputs]
    return [_patched(image, settings.patch) for image in inputs]


def _patched(image: Any, share: float) -> Image.Image:
    whole = read_image(image).copy()
    side = max(1, round(share * min(whole.size)))
    whole.paste(_WHITE, (whole.width - side, whole.height - side, whole.width, whole.height))
    return whole


def poisoned(data: SiteData, config: RunConfig) -> SiteData:
    """``data`` as an attacker trains on them: a part with the trigger and its label. Others' data are as they are."""
    site = config.site(data.site)
    label = target(config) if site is not None and site.attack.startswith(_ATTACK) else None
    if label is None or data.train.labels is None:
        return data
    count = len(data.train)
    drawn = np.random.default_rng([config.seed, 13, *data.site.encode()]).permutation(count)
    chosen = np.sort(drawn[: max(1, round(config.simulation.backdoor.fraction * count))])
    inputs, labels = list(data.train.inputs), data.train.labels.copy()
    for index, image in zip(chosen, stamped([inputs[index] for index in chosen], config), strict=True):
        inputs[index] = image
    labels[chosen] = label
    return SiteData(data.site, Records(inputs, labels, data.train.patients), data.held_out, data.split)


def boost(config: RunConfig) -> float:
    """gamma = n / eta for n sites a round and a server's learning rate eta: an average is then the attacker's adapter.

    Source: Bagdasaryan et al. 2020, "How To Backdoor Federated Learning", arXiv 1807.00459, equation 3.
    """
    sites = config.server.sites_per_round or len(config.data.sites)
    return config.simulation.backdoor.boost or sites / config.server.lr


class Probe:
    """How often the global adapter gives the attackers' label to held-out records of other labels with the trigger.

    The records are those of all sites, which nobody but a simulator has together.
    """

    def __init__(self, config: RunConfig, label: int) -> None:
        self._config = config
        self._label = label
        self._examples: list[Any] = []

    def success(self, state: AdapterState) -> float | None:
        """The share; None where no held-out record has another label."""
        model = resident(self._config)
        if not self._examples:
            inputs = self._records()
            self._examples = model.task.encode(
                stamped(inputs, self._config), [self._label] * len(inputs), model.base.processor
            )
        if not self._examples:
            return None
        model.adapter.adopt(state.spec)
        scores = evaluate(model, state, self._examples, self._config)
        return float(scores.correct.sum() / len(self._examples))

    def _records(self) -> list[Any]:
        found: list[Any] = []
        for _, data in sorted(site_data(self._config).items()):
            labels = data.held_out.labels
            if labels is not None:
                found += [data.held_out.inputs[int(index)] for index in np.flatnonzero(labels != self._label)]
        drawn = np.random.default_rng([self._config.seed, 14]).permutation(len(found))[:_MOST]
        return [found[index] for index in np.sort(drawn)]
