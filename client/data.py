"""A site's records: read from its own disk, checked at the edge, split by patient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..core.config import RunConfig
from ..core.errors import PrivateError, UserError
from ..core.records import read_table
from ..privacy.sampling import group_by_unit, shares
from .identity import fingerprint, record_digests, unit_keys


@dataclass(frozen=True)
class Records:
    """Raw records: ``inputs`` (texts, or paths of images), ``labels`` as indices into the label set, ``patients``."""

    inputs: Sequence[Any]
    labels: np.ndarray | None = None
    patients: Sequence[object] | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    @cached_property
    def digests(self) -> list[bytes]:
        """SHA-256 of what each record holds. Raises :class:`PrivateError` for an image that cannot be read."""
        return record_digests(self.inputs, self.labels, self.patients)

    def units(self, *, by_patient: bool) -> tuple[list[np.ndarray], list[bytes]]:
        """Record indices of each privacy unit, and its key, which hangs on the unit alone."""
        patients = self.patients if by_patient else None
        groups = group_by_unit(patients, len(self))
        return groups, unit_keys(groups, self.digests, patients)

    def take(self, indices: np.ndarray) -> Records:
        taken = Records(
            [self.inputs[i] for i in indices],
            self.labels[indices] if self.labels is not None else None,
            [self.patients[i] for i in indices] if self.patients is not None else None,
        )
        if "digests" in vars(self):
            vars(taken)["digests"] = [self.digests[i] for i in indices]
        return taken


@dataclass(frozen=True)
class SiteData:
    """What one site trains on and what it holds out. No patient is in both.

    ``split`` names the rule that told them apart: under one rule a patient is always on the same side.
    """

    site: str
    train: Records
    held_out: Records
    split: str = "as given"

    def __post_init__(self) -> None:
        if not len(self.train):
            raise PrivateError(f"site {self.site} has no training records")
        if self.train.patients is not None and self.held_out.patients is not None:
            both = set(self.train.patients) & set(self.held_out.patients)
            if both:
                raise PrivateError(f"site {self.site}: {len(both)} patients are both trained on and held out")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all records, whatever their order and however they are split."""
        return fingerprint([*self.train.digests, *self.held_out.digests])


def read_records(path: str | Path, config: RunConfig) -> Records:
    """Read a CSV, JSONL or Parquet table, or an image folder (one subfolder a label).

    Raises :class:`PrivateError` that names the file and the column, label or line.
    """
    table = read_table(path, config)
    return Records(table.inputs, table.labels, table.patients)


def split(records: Records, config: RunConfig, site: str) -> SiteData:
    """Hold out about ``data.test_fraction`` of the patients (of the records, where there is no patient column).

    On which side a patient falls is drawn from its own key, so that one patient more or less moves no other: else a
    neighbouring data set would train on other people altogether.
    """
    groups, keys = records.units(by_patient=records.patients is not None)
    away = shares(keys, config.seed, site, "held-out") < config.data.test_fraction
    if len(groups) < 2:
        raise PrivateError(f"site {site} has one patient or record: too few to hold any out")
    if (away.all() or not away.any()) and not config.privacy.enabled:
        # Without a promise to keep, one may move for the sake of the rest.
        drawn = shares(keys, config.seed, site, "held-out")
        away[drawn.argmax() if away.all() else drawn.argmin()] ^= True
    if away.all() or not away.any():
        raise PrivateError(
            f"site {site}: of its {len(groups)} patients or records {'all' if away.all() else 'none'} fell into the "
            "held-out part; change data.test_fraction or seed"
        )
    sides = [np.sort(np.concatenate([groups[i] for i in np.flatnonzero(side)])) for side in (~away, away)]
    rule = f"seed {config.seed}, {config.data.test_fraction:g} held out"
    return SiteData(site, records.take(sides[0]), records.take(sides[1]), rule)


def load_site(config: RunConfig, site: str, path: str) -> SiteData:
    """A site's own file or folder, split."""
    if not path:
        raise PrivateError(f"site {site}: no data path; set data.sites[].path (or data-path in the node configuration)")
    try:
        return split(read_records(path, config), config, site)
    except UserError as error:
        raise PrivateError(f"site {site}: {error}") from None
