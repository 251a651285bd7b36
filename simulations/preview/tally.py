"""What each site of a scenario holds, counted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...core.config import RunConfig, ShiftConfig
from ..scenario import site_data
from ..shift import noise_of, shift_of


@dataclass(frozen=True)
class Tally:
    """Counts of a federation's records.

    ``train``: of each site and class, as the site has them labelled, shape (sites, classes), one class where there are
    no labels; ``held_out``: of each site; ``patients``: trained on, of each site, where they are named; ``shifts``: how
    each site differs.
    """

    sites: tuple[str, ...]
    classes: tuple[str, ...]
    train: np.ndarray
    held_out: np.ndarray
    patients: np.ndarray | None
    shifts: tuple[str, ...]

    @property
    def skew(self) -> float:
        """Mean total variation distance of a site's mix of classes from that of all: 0 alike, towards 1 apart."""
        mixes = self.train / self.train.sum(1, keepdims=True)
        everybody = self.train.sum(0) / self.train.sum()
        return float(0.5 * np.abs(mixes - everybody).sum(1).mean())


def tally(config: RunConfig) -> Tally:
    """Deal the records of ``config`` and count them. Raises :class:`UserError` as a run of it would."""
    train, held_out, patients, shifts = [], [], [], []
    classes = config.task.labels
    # The entries of the sites that hold the records, which a baseline may keep apart from those that train.
    entries = {site.name: site for site in config.data.sites}
    for name, data in site_data(config).items():
        labels = data.train.labels
        labelled = labels is not None and classes
        train.append(np.bincount(labels, minlength=len(classes)) if labelled else np.array([len(data.train)]))  # type: ignore[arg-type]
        held_out.append(len(data.held_out))
        patients.append(len(set(data.train.patients)) if data.train.patients is not None else -1)
        noise = noise_of(config.data, entries[name])
        told = [_told(shift_of(config.data, entries[name], config.seed))]
        told += [f"{100 * noise.rate:g} % wrong labels, {noise.kind}"] if noise is not None else []
        told += [f"attack {entries[name].attack}"] if entries[name].attack else []
        shifts.append(", ".join(part for part in told if part))
    width = max(len(counts) for counts in train)
    return Tally(
        tuple(entries),
        classes if width == len(classes) else ("records",),
        np.stack(train),
        np.array(held_out),
        np.array(patients) if min(patients) >= 0 else None,
        tuple(shifts),
    )


def _told(shift: ShiftConfig | None) -> str:
    if shift is None:
        return ""
    return shift.kind if shift.kind == "invert" else f"{shift.kind} {shift.strength:+.2f}"
