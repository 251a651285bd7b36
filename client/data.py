"""A site's records: read from its own disk, checked at the edge, split by patient."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from ..core.config import RunConfig
from ..core.errors import PrivateError, UserError
from ..core.tasks import create_task
from ..privacy.sampling import group_by_unit, shares
from .identity import fingerprint, record_digests, unit_keys

_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"}


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
        return Records(
            [self.inputs[i] for i in indices],
            self.labels[indices] if self.labels is not None else None,
            [self.patients[i] for i in indices] if self.patients is not None else None,
        )


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
    path = Path(path)
    if path.is_dir():
        return _image_folder(path, config)
    if not path.is_file():
        raise PrivateError(f"{path}: no such file")
    rows = _rows(path)
    if not rows:
        raise PrivateError(f"{path}: holds no records")
    task, data = create_task(config.task), config.data
    column = data.text_column if task.input_kind == "text" else data.image_column
    inputs = _column(rows, column, path, f"data.{task.input_kind}_column")
    if task.input_kind == "image":
        inputs = [path.parent / str(name) for name in inputs]
    labels = None
    if task.labelled:
        labels = label_indices(
            _column(rows, data.label_column, path, "data.label_column"), config.task.labels, str(path)
        )
    patients = None
    if data.patient_column in rows[0]:
        # As texts without blanks around them, so that one person does not count as two.
        patients = [str(key).strip() for key in _column(rows, data.patient_column, path, "data.patient_column")]
    elif config.privacy.enabled and config.privacy.unit == "patient":
        raise PrivateError(
            f"{path}: no column `{data.patient_column}` (columns: {', '.join(map(str, rows[0]))}); the privacy unit is "
            'the patient, so set data.patient_column, or privacy.unit = "record"'
        )
    return Records(inputs, labels, patients)


def label_indices(labels: Sequence[Any], known: Sequence[str], where: str) -> np.ndarray:
    """Positions in the label set. Raises :class:`PrivateError` that names the first label outside it."""
    if not known:
        found = sorted({str(label) for label in labels})[:20]
        raise PrivateError(f"{where}: say the label set in task.labels; this file has {found}")
    index = {label: i for i, label in enumerate(known)}
    for number, label in enumerate(labels, 1):
        if str(label) not in index:
            raise PrivateError(f"{where}: record {number} has the label `{label}`, which is not in task.labels")
    return np.array([index[str(label)] for label in labels], dtype=np.int64)


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


def _rows(path: Path) -> list[dict[str, Any]]:
    kind = path.suffix.lower()
    try:
        if kind in (".csv", ".tsv"):
            with path.open(newline="", encoding="utf-8-sig") as file:
                return list(csv.DictReader(file, delimiter="\t" if kind == ".tsv" else ","))
        if kind in (".jsonl", ".ndjson"):
            with path.open(encoding="utf-8-sig") as file:
                return [_object(line, number, path) for number, line in enumerate(file, 1) if line.strip()]
        if kind == ".parquet":
            return pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, ValueError, csv.Error, pyarrow.ArrowException) as error:
        raise PrivateError(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}") from None
    raise PrivateError(f"{path}: not a CSV, TSV, JSONL or Parquet file, nor an image folder")


def _object(line: str, number: int, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise PrivateError(f"{path}: line {number} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise PrivateError(f"{path}: line {number} is not a JSON object")
    return value


def _column(rows: list[dict[str, Any]], column: str, path: Path, key: str) -> list[Any]:
    if column not in rows[0]:
        raise PrivateError(f"{path}: no column `{column}` (columns: {', '.join(map(str, rows[0]))}); set {key}")
    values = [row.get(column) for row in rows]
    for number, value in enumerate(values, 1):
        # NaN, which differs from itself, is how tables from pandas say that a cell is empty.
        if value is None or value != value or (isinstance(value, str) and not value.strip()):
            raise PrivateError(f"{path}: record {number} has no `{column}`")
    return values


def _image_folder(path: Path, config: RunConfig) -> Records:
    files = sorted(p for p in path.glob("*/*") if p.suffix.lower() in _IMAGES)
    if not files:
        raise PrivateError(f"{path}: no images in subfolders named by label")
    if config.privacy.enabled and config.privacy.unit == "patient":
        raise PrivateError(
            f"{path}: an image folder names no patients; give a table with an image and a patient column, or set "
            'privacy.unit = "record"'
        )
    labels = label_indices([file.parent.name for file in files], config.task.labels, str(path))
    return Records(files, labels)
