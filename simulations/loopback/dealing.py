"""A scenario's records as files of the sites: what a simulation deals in memory, a deployment reads from its disks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from ...client.data import Records
from ...core.config import DataConfig, RunConfig
from ...core.errors import UserError
from ...core.tasks import create_task
from ...deployment.files import PRIVATE_FILE, private_folder, write
from ..scenario import site_data

#: What real sites' data have of a configuration's: how their tables are read, and what is held out.
_KEPT = ("text_column", "label_column", "image_column", "patient_column", "test_fraction")


def with_files(config: RunConfig, folder: Path) -> RunConfig:
    """``config`` as a job of real sites: each has a file of its own, below ``folder`` unless it has one already.

    A site gets the records that the simulation would have it train on, and holds out ``data.test_fraction`` of them.
    Raises :class:`UserError` for what only a simulation obeys, and when the disk is full or read-only.
    """
    if all(site.path for site in config.data.sites):
        return config
    if config.simulated:
        raise UserError(f"{config.simulated[0]} is for simulations; these sites are real, so leave it out")
    sites = []
    for site in config.data.sites:
        place = folder / site.name
        private_folder(place)
        rows = _rows(site_data(config)[site.name].train, config, place)
        path = place.absolute() / "records.jsonl"
        write(path, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), PRIVATE_FILE)
        sites.append(site.model_copy(update={"path": str(path)}))
    data = DataConfig(sites=tuple(sites), **{key: getattr(config.data, key) for key in _KEPT})
    return config.model_copy(update={"data": data})


def _rows(records: Records, config: RunConfig, place: Path) -> list[dict[str, Any]]:
    """One object a record, by the names of the configuration's columns."""
    data, labels = config.data, config.task.labels
    column = data.text_column if create_task(config.task).input_kind == "text" else data.image_column
    rows = []
    for at, given in enumerate(records.inputs):
        row = {column: _input(given, place / f"{at:06}.png")}
        if records.labels is not None:
            row[data.label_column] = labels[records.labels[at]]
        if records.patients is not None:
            row[data.patient_column] = str(records.patients[at])
        rows.append(row)
    return rows


def _input(given: Any, path: Path) -> str:
    """A text as it is, an image's file; one that has none is written to ``path``."""
    if isinstance(given, Image.Image):
        given.save(path)
        return path.name
    return str(given)
