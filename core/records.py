"""Records of a table or an image folder: read from the disk of whoever owns them, checked at the edge."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from .config import RunConfig
from .errors import PrivateError
from .tasks import create_task

_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Table:
    """Raw records: ``inputs`` (texts, or paths of images), ``labels`` as indices into the label set, ``patients``."""

    inputs: Sequence[Any]
    labels: np.ndarray | None = None
    patients: Sequence[object] | None = None


def read_table(path: str | Path, config: RunConfig, *, trains: bool = True, labels: bool = True) -> Table:
    """Read a CSV, JSONL or Parquet table, or an image folder (one subfolder a label).

    ``trains``: whether the records are those of a site, which must name patients where these are the privacy unit;
    ``labels``: whether the task's labels are read (a folder's always are). Raises :class:`PrivateError` that names the
    file and the column, label or line.
    """
    path = Path(path)
    if path.is_dir():
        return _image_folder(path, config, trains)
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
    indices = None
    if task.labelled and labels:
        indices = label_indices(
            _column(rows, data.label_column, path, "data.label_column"), config.task.labels, str(path)
        )
    patients = None
    if data.patient_column in rows[0]:
        # As texts without blanks around them, so that one person does not count as two.
        patients = [str(key).strip() for key in _column(rows, data.patient_column, path, "data.patient_column")]
    elif trains and config.privacy.enabled and config.privacy.unit == "patient":
        raise PrivateError(
            f"{path}: no column `{data.patient_column}` (columns: {', '.join(map(str, rows[0]))}); the privacy unit is "
            'the patient, so set data.patient_column, or privacy.unit = "record"'
        )
    return Table(inputs, indices, patients)


def read_column(path: str | Path, column: str, key: str) -> list[Any]:
    """One column of a table. Raises :class:`PrivateError` that names the column and the ``key`` that asks for it."""
    path = Path(path)
    if path.is_dir():
        raise PrivateError(f"{path}: an image folder has no column `{column}`; give a table, or another {key}")
    return _column(_rows(path), column, path, key)


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


def _image_folder(path: Path, config: RunConfig, trains: bool) -> Table:
    files = sorted(p for p in path.glob("*/*") if p.suffix.lower() in _IMAGES)
    if not files:
        raise PrivateError(f"{path}: no images in subfolders named by label")
    if trains and config.privacy.enabled and config.privacy.unit == "patient":
        raise PrivateError(
            f"{path}: an image folder names no patients; give a table with an image and a patient column, or set "
            'privacy.unit = "record"'
        )
    labels = label_indices([file.parent.name for file in files], config.task.labels, str(path))
    return Table(files, labels)
