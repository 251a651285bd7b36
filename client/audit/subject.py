"""What is audited: a site's plan, model and engine, on an excerpt of its records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from ...core.adapter import AdapterState
from ...core.config import RunConfig
from ...core.errors import UserError
from ...core.tasks import Example
from ...methods.principal import principal_factors
from ...privacy.clipping import require_exact
from ...privacy.plan import PrivacyPlan
from ...strategies import create_aggregator
from ..data import Records
from ..resident import Resident, resident
from .reference import Reference

#: The adapter is shaken by this much before it is looked at: a factor that starts at zero would hide errors.
_SHAKE = 0.02
#: Bytes that the single gradients of the excerpt may take.
_MOST_BYTES = 2 << 30


@dataclass(frozen=True)
class Subject:
    """One site under audit.

    ``plan``: what the site's whole data are promised; ``examples`` and ``groups``: the excerpt, encoded, and the
    records and the key of each of its units; ``state``: the adapter at which everything is looked at.
    """

    site: str
    config: RunConfig
    plan: PrivacyPlan
    resident: Resident
    state: AdapterState
    examples: Sequence[Example]
    groups: Sequence[np.ndarray]
    keys: Sequence[bytes]
    records: int
    reference: Reference = field(repr=False)

    @property
    def owner(self) -> np.ndarray:
        """The unit of every record of the excerpt."""
        owner = np.empty(len(self.examples), dtype=np.int64)
        for unit, group in enumerate(self.groups):
            owner[group] = unit
        return owner

    @property
    def most_records(self) -> int:
        """How many records of a unit a step may see."""
        return self.config.privacy.records_per_patient


def subject(config: RunConfig, site: str, records: Records, *, units: int) -> Subject:
    """Prepare the audit of ``site`` on an excerpt of at most ``units`` privacy units of its training ``records``.

    Raises :class:`UserError` where the site would refuse to train, or where nothing is promised.
    """
    if not config.privacy.enabled:
        raise UserError("privacy.enabled is false: nothing is promised, so there is nothing to audit")
    by_patient = config.privacy.unit == "patient"
    if by_patient and records.patients is None:
        raise UserError(f"site {site}: the privacy unit is the patient, but its records name none")
    everybody, keys = records.units(by_patient=by_patient)
    plan = PrivacyPlan.for_run(config, len(everybody), config.total_steps)
    model = resident(config)
    # The resident adapter may still carry the policies and extras of another run.
    model.adapter.adopt(model.adapter.fresh)
    fresh = model.adapter.load_peft(config.start_from) if config.start_from else model.adapter.read()
    aggregator = create_aggregator(config.strategy, config.strategy_options)
    aggregator.principal = partial(principal_factors, model.adapter)
    start = aggregator.prepare(fresh)
    model.adapter.adopt(start.spec)
    require_exact(model.adapter.model, model.adapter.trainables())
    random = np.random.default_rng()
    shaken = AdapterState(
        start.spec,
        {
            name: (array + _SHAKE * random.standard_normal(array.shape)).astype(array.dtype)
            for name, array in start.items()
        },
    )
    size = sum(parameter.numel() for parameter in model.adapter.trainables().values())
    units = max(16, min(units, _MOST_BYTES // (4 * size)))
    chosen = _excerpt(records, everybody, units, random)
    picked = np.concatenate([everybody[unit] for unit in chosen])
    taken = records.take(picked)
    labels = None if taken.labels is None else taken.labels.tolist()
    examples = model.task.encode(taken.inputs, labels, model.base.processor)
    ends = np.cumsum([len(everybody[unit]) for unit in chosen])
    watched = _still(config)
    return Subject(
        site=site,
        config=watched,
        plan=plan,
        resident=model,
        state=shaken,
        examples=examples,
        groups=np.split(np.arange(len(picked)), ends[:-1]),
        keys=[keys[unit] for unit in chosen],
        records=len(records),
        reference=Reference(model, shaken, examples, watched),
    )


def _excerpt(records: Records, groups: Sequence[np.ndarray], units: int, random: np.random.Generator) -> list[int]:
    """Units at random, but always the one with the longest input and the one with the most records."""
    longest = max(range(len(records)), key=lambda index: len(str(records.inputs[index])))
    first = [
        next(unit for unit, group in enumerate(groups) if longest in group),
        max(range(len(groups)), key=lambda unit: len(groups[unit])),
    ]
    return list(dict.fromkeys([*first, *random.permutation(len(groups)).tolist()]))[:units]


def _still(config: RunConfig) -> RunConfig:
    """The configuration without dropout, under which no gradient could be computed a second time."""
    return config.model_copy(
        update={
            "method": config.method.model_copy(update={"dropout": 0.0}),
            "train": config.train.model_copy(update={"base_dropout": False}),
        }
    )
