"""Shadow federations, and the attack by them on a finished run: whom it trains, whom it asks about.

Two kinds of target. Where held-out patients were told apart by chance, the run itself is attacked: its training data
are the members, its held-out data the others, and both come from one distribution. Where they were not (icd10 holds
out whole categories), another distribution would pass for membership; there the run's *recipe* is attacked: every
model is trained anew on a coin's half of the training data, and each in turn is the target of all the others.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flwr.app import Context

from ... import __version__
from ...client.app import make_client_app, own_name
from ...client.data import Records, SiteData
from ...client.evaluation import evaluate
from ...client.policy import Policy, unrestricted
from ...client.resident import resident
from ...client.surroundings import Surroundings
from ...core.config import RunConfig, config_from_json
from ...core.errors import UserError
from ...core.tasks import Example
from ...privacy.noise import RandomStream
from ...server.app import run_on
from ...server.rundir import now, read_run
from ..engines.inprocess import InProcessGrid
from ..scenario import complete, site_data
from .lira import Roc, confidence, likelihood_ratios, roc

SCHEMA = 1
LEAST_SHADOWS = 4
_RATES = (0.01, 0.001)
#: Sources whose held-out records are not like the others.
_HELD_OUT_BY_CATEGORY = {"icd10"}

Kind = Literal["run", "recipe"]
#: Told before each federation: what it is for, and how many there will be.
Watch = Callable[[str, int], None]


@dataclass(frozen=True)
class Curve:
    """One attacked run: its ROC, and what it promised (``epsilon`` None: nothing)."""

    name: str
    roc: Roc
    epsilon: float | None
    delta: float | None

    def to_dict(self) -> dict[str, Any]:
        keep = _thinned(self.roc)
        return {
            "name": self.name,
            "private": self.epsilon is not None,
            "epsilon": self.epsilon,
            "delta": self.delta,
            "auc": self.roc.auc,
            "auc_error": self.roc.error,
            "members": self.roc.members,
            "others": self.roc.others,
            "tpr_at": {str(rate): self.roc.tpr_at(rate) for rate in _RATES},
            "fpr": [round(float(value), 6) for value in self.roc.fpr[keep]],
            "tpr": [round(float(value), 6) for value in self.roc.tpr[keep]],
        }


@dataclass(frozen=True)
class Finished:
    """A run that is over: its folder, configuration and adapter."""

    folder: Path
    config: RunConfig
    record: Mapping[str, Any]

    @classmethod
    def at(cls, folder: Path) -> Finished:
        """Raises :class:`UserError` for a folder without a finished run."""
        record = read_run(folder)
        if record["status"] != "finished" or not (folder / "adapter").is_dir():
            raise UserError(f"{folder}: the run is not finished, so there is no adapter to attack")
        config = complete(config_from_json(json.dumps(record["config"]), f"{folder}/run.json"))
        return cls(folder, config, record)


@dataclass(frozen=True)
class Candidates:
    """Whom the attack asks about: privacy units of all sites, each with its records."""

    sites: tuple[str, ...]
    units: tuple[Records, ...]
    #: Whether the finished run trained on the unit.
    member: np.ndarray

    def federation(self, inside: np.ndarray) -> dict[str, SiteData]:
        """Every site's data when the units ``inside`` are trained on. Raises :class:`UserError` for a site without."""
        federation = {}
        for site in dict.fromkeys(self.sites):
            at = [number for number, name in enumerate(self.sites) if name == site]
            trained, out = ([self.units[n] for n in at if inside[n] == part] for part in (True, False))
            if not trained or not out:
                raise UserError(f"site {site} has too few patients or records to leave half of them out")
            federation[site] = SiteData(site, _joined(trained), _joined(out), "attack")
        return federation


def candidates(config: RunConfig, kind: Kind) -> Candidates:
    """All privacy units of all sites: those trained on, and for the run itself those held out too."""
    sites: list[str] = []
    units: list[Records] = []
    member: list[bool] = []
    by_patient = config.privacy.unit == "patient"
    for site, data in site_data(config).items():
        for records, trained in ((data.train, True), (data.held_out, False)):
            if not trained and kind == "recipe":
                continue
            if by_patient and records.patients is None:
                raise UserError(f"site {site}: the privacy unit is the patient, but its records name none")
            for group in records.units(by_patient=by_patient)[0]:
                sites.append(site)
                unit = records.take(group)
                # Where the record is the unit, a patient may be on both sides.
                units.append(unit if by_patient else replace(unit, patients=None))
                member.append(trained)
    return Candidates(tuple(sites), tuple(units), np.array(member))


def attack(
    finished: Finished,
    *,
    shadows: int = 8,
    twin: bool = False,
    against: Finished | None = None,
    kind: Kind | None = None,
    watch: Watch = lambda what, total: None,
) -> dict[str, Any]:
    """Attack a finished run, and beside it its ``twin`` without privacy or another run (``against``).

    ``shadows``: shadow federations for each curve; ``kind``: what to attack, where not by the data's own split.
    """
    config = finished.config
    if shadows < LEAST_SHADOWS:
        raise UserError(f"--shadows {shadows}: fewer than {LEAST_SHADOWS} say nothing of a candidate")
    if twin and not config.privacy.enabled:
        raise UserError("--twin: the run has no privacy; it is its own twin")
    if against is not None and against.config.data != config.data:
        raise UserError(f"--against {against.folder}: has other data, so the two say nothing of each other")
    by_category = config.data.source in _HELD_OUT_BY_CATEGORY
    kind = kind or ("recipe" if by_category else "run")
    if kind == "run" and by_category:
        raise UserError(
            f"data.source {config.data.source} holds out whole categories: their strangeness would pass for "
            "membership; attack the recipe"
        )
    began = time.monotonic()
    targets: list[tuple[str, RunConfig, Finished | None]] = [(_name(config, finished), config, finished)]
    if twin:
        bare = config.privacy.model_copy(update={"enabled": False})
        targets.append(("the same without privacy", config.model_copy(update={"privacy": bare}), None))
    if against is not None:
        targets.append((_name(against.config, against), against.config, against))
    # A twin has no run of its own yet; a recipe needs no run at all.
    total = len(targets) * (shadows + (kind == "recipe")) + (twin and kind == "run")
    asked = candidates(config, kind)
    with tempfile.TemporaryDirectory(prefix="fedgraft-attack-") as folder:
        shop = _Workshop(Path(folder), asked, lambda what: watch(what, total))
        curves = [
            _of_run(shop, name, own, run, shadows) if kind == "run" else _of_recipe(shop, name, own, shadows)
            for name, own, run in targets
        ]
    return {
        "schema": SCHEMA,
        "kind": "fedgraft attack",
        "fedgraft": __version__,
        "time": now(),
        "seconds": round(time.monotonic() - began, 1),
        "run": str(finished.folder),
        "target": kind,
        "unit": config.privacy.unit,
        "shadows": shadows,
        "curves": [curve.to_dict() for curve in curves],
    }


def _name(config: RunConfig, finished: Finished) -> str:
    name = config.name or finished.folder.name
    return f"{name}, with privacy" if config.privacy.enabled else f"{name}, no privacy"


class _Workshop:
    """Trains federations on halves of the candidates, and asks adapters how sure they are of each candidate."""

    def __init__(self, folder: Path, asked: Candidates, watch: Callable[[str], None]) -> None:
        self.asked = asked
        self._folder = folder
        self._watch = watch
        self._made = 0
        self._examples: dict[str, list[Example]] = {}
        self._owner = np.repeat(np.arange(len(asked.units)), [len(unit) for unit in asked.units])

    def train(self, config: RunConfig, inside: np.ndarray, what: str) -> tuple[np.ndarray, dict[str, Any]]:
        """Run ``config`` on the units ``inside``; the adapter's confidence in every unit, and the run's record."""
        self._watch(what)
        data = self.asked.federation(inside)
        self._made += 1
        folder = self._folder / str(self._made)
        # Nothing is held out for judging, and a shadow's record is thrown away.
        quiet = config.model_copy(
            update={"evaluate": config.evaluate.model_copy(update={"release": "none", "every": 0})}
        )

        def place(site: str, context: Context) -> Path:
            return folder / "sites" / site

        def policy(here: Path | None, context: Context) -> Policy:
            return unrestricted()

        def of_site(own: RunConfig, site: str, path: Path, context: Context) -> SiteData:
            return data[site]

        client = make_client_app(Surroundings(own_name, place, policy, of_site))
        grid = InProcessGrid(client, len(config.site_names))
        record = run_on(grid, quiet, folder, engine="inprocess", resume=False)
        return self.ask(config, folder / "adapter"), dict(record)

    def ask(self, config: RunConfig, adapter: Path) -> np.ndarray:
        """The confidence of ``adapter`` in every unit: the mean over its records."""
        model = resident(config)
        key = f"{config.model} {config.task.to_json()}"
        if key not in self._examples:
            everything = _joined(self.asked.units)
            labels = None if everything.labels is None else everything.labels.tolist()
            self._examples[key] = list(model.task.encode(everything.inputs, labels, model.base.processor))
        scores = evaluate(model, model.adapter.load_peft(adapter), self._examples[key], config)
        losses = scores.loss_sum / np.maximum(scores.examples, 1)
        sure = confidence(losses, classes=model.task.labelled)
        return np.bincount(self._owner, weights=sure) / np.bincount(self._owner)

    def half(self, config: RunConfig, number: int) -> np.ndarray:
        """A fair coin for each unit; the same for every curve, so that the curves differ by the recipe alone."""
        return RandomStream.seeded_not_private(config.seed, "attack", number).uniform(len(self.asked.units)) < 0.5


def _of_run(shop: _Workshop, name: str, config: RunConfig, finished: Finished | None, shadows: int) -> Curve:
    """The attack on one trained adapter, whose members are known."""
    member = shop.asked.member
    if finished is not None:
        target, record = shop.ask(config, finished.folder / "adapter"), dict(finished.record)
    else:
        target, record = shop.train(config, member, f"{name}: the target")
    inside = np.stack([shop.half(config, number) for number in range(shadows)])
    sure = np.stack(
        [shop.train(config, half, f"{name}: shadow {number} of {shadows}")[0] for number, half in enumerate(inside, 1)]
    )
    return Curve(name, roc(likelihood_ratios(target, sure, inside), member), *_promise(record))


def _of_recipe(shop: _Workshop, name: str, config: RunConfig, shadows: int) -> Curve:
    """The attack on every one of ``shadows`` + 1 adapters by all the others."""
    count = shadows + 1
    inside = np.stack([shop.half(config, number) for number in range(count)])
    sure, promises = [], []
    for number, half in enumerate(inside, 1):
        confidences, record = shop.train(config, half, f"{name}: model {number} of {count}")
        sure.append(confidences)
        promises.append(_promise(record))
    everything = np.stack(sure)
    others = [np.arange(count) != target for target in range(count)]
    scores = [
        likelihood_ratios(everything[target], everything[rest], inside[rest]) for target, rest in enumerate(others)
    ]
    found = roc(np.concatenate(scores), inside.reshape(-1), groups=np.repeat(np.arange(count), len(shop.asked.units)))
    return Curve(name, found, *max(promises, key=lambda promise: promise[0] or 0.0))


def _promise(record: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """The epsilon and delta of the site that spent most; nothing where any site promised nothing."""
    told = [site.get("privacy") or {} for site in record["sites"].values()]
    if not told or not all(entry.get("enabled") for entry in told):
        return None, None
    worst = max(told, key=lambda entry: entry["epsilon"])
    epsilon = float(worst["epsilon"])
    return (epsilon, float(worst["delta"])) if math.isfinite(epsilon) else (None, None)


def _joined(parts: Sequence[Records]) -> Records:
    labels = None if parts[0].labels is None else np.concatenate([part.labels for part in parts])
    named = all(part.patients is not None for part in parts)
    return Records(
        [value for part in parts for value in part.inputs],
        labels,
        [key for part in parts for key in part.patients or ()] if named else None,
    )


def _thinned(found: Roc, most: int = 400) -> np.ndarray:
    """Where to look at a ROC of many points: all of the first, then ever fewer."""
    count = len(found.fpr)
    if count <= most:
        return np.arange(count)
    return np.unique(np.concatenate([np.geomspace(1, count, most).astype(int) - 1, [0, count - 1]]))
