"""A site's records as its training takes them: encoded, and grouped by privacy unit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..core.config import RunConfig
from ..core.errors import UserError
from ..core.tasks import Example
from ..privacy.ledger import Ledger, Limit
from .data import SiteData
from .resident import Resident


@dataclass(frozen=True)
class Encoded:
    """A site's encoded records and its privacy units; ``fingerprint``: of the data."""

    train: list[Example]
    held_out: list[Example]
    groups: list[np.ndarray]
    keys: list[bytes]
    patients: int
    held_out_groups: list[np.ndarray]
    fingerprint: str
    split: str


@dataclass(frozen=True)
class Prepared(Encoded):
    """The same with the ledger that pays for their use, and the limits of the site's policy."""

    ledger: Ledger
    limits: tuple[Limit, ...]


def encode(config: RunConfig, data: SiteData, model: Resident) -> Encoded:
    """Encode ``data`` for ``model`` and group it by the run's privacy unit.

    Raises :class:`UserError` when the unit is the patient and the records name none.
    """
    task, processor = model.task, model.base.processor
    by_patient = config.privacy.enabled and config.privacy.unit == "patient"
    if by_patient and data.train.patients is None:
        raise UserError(f"site {data.site}: the privacy unit is the patient, but its records name none")
    groups, keys = data.train.units(by_patient=by_patient)
    return Encoded(
        train=task.encode(data.train.inputs, _labels(data.train.labels), processor),
        held_out=task.encode(data.held_out.inputs, _labels(data.held_out.labels), processor),
        groups=groups,
        keys=keys,
        patients=len(set(data.train.patients or ())),
        held_out_groups=data.held_out.units(by_patient=by_patient)[0],
        fingerprint=data.fingerprint,
        split=_split(config, data),
    )


def ledger_of(config: RunConfig, encoded: Encoded, folder: Path | None, dataset: str, *, durable: bool) -> Ledger:
    """The ledger of these data, in the site's ``folder``."""
    place = folder / "ledgers" if folder is not None else None
    return Ledger(place, encoded.fingerprint, dataset=dataset, unit=config.privacy.unit, durable=durable)


def _split(config: RunConfig, data: SiteData) -> str:
    """A name for the way patients were told apart: under one name nobody is in two parts, whatever else changes.

    Where no key names the patients, that is known of one state of the data alone.
    """
    key = data.fingerprint[:16] if data.train.patients is None else f"column {config.data.patient_column}"
    return f"{data.split}, site {data.site}, by {key}"


def _labels(labels: np.ndarray | None) -> list[int] | None:
    return None if labels is None else labels.tolist()
