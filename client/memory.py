"""What a site keeps of a run from round to round and lets nobody see: its own tensors, what its strategy remembers.

Kept by round, so that a run that goes on from an earlier checkpoint finds what the site knew then.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path

from ..core.adapter import AdapterState
from ..core.errors import UserError

_KEEP = 8


class SiteMemory:
    """States by name, for one site and run, in ``folder``; None: in this process, for tests."""

    def __init__(self, folder: Path | None, run: str) -> None:
        # The server chose the run's name, so no path is made of it.
        name = hashlib.sha256(run.encode()).hexdigest()[:16]
        self._folder = folder / "memory" / name if folder is not None else None
        self._rounds: dict[int, dict[str, AdapterState]] = {}

    def before(self, round: int) -> Mapping[str, AdapterState]:
        """What was kept after the last round before ``round``; empty where there was none."""
        past = [kept for kept in self._known() if kept < round]
        return self._read(max(past)) if past else {}

    def of(self, round: int) -> Mapping[str, AdapterState]:
        """What was kept after ``round``, or after the last one before it."""
        return self.before(round + 1)

    def keep(self, round: int, states: Mapping[str, AdapterState]) -> None:
        """Keep ``states`` as what was known after ``round``; forgets later rounds, and those long past.

        Raises :class:`UserError` when the disk is full or read-only.
        """
        known = self._known()
        if states:
            self._write(round, states)
        stale = [other for other in known if other > round or (other == round and not states)]
        for other in (*stale, *sorted(known)[: -_KEEP - 1]):
            self._forget(other)

    def _known(self) -> list[int]:
        if self._folder is None:
            return list(self._rounds)
        return [int(path.name) for path in self._folder.glob("[0-9]*") if path.name.isdecimal()]

    def _read(self, round: int) -> dict[str, AdapterState]:
        if self._folder is None or round in self._rounds:
            return self._rounds[round]
        place = self._folder / str(round)
        self._rounds = {round: {path.stem: AdapterState.load(path) for path in sorted(place.glob("*.safetensors"))}}
        return self._rounds[round]

    def _write(self, round: int, states: Mapping[str, AdapterState]) -> None:
        if self._folder is None:
            self._rounds[round] = dict(states)
            return
        place, beside = self._folder / str(round), self._folder / f".{round}"
        try:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            for name, state in states.items():
                state.save(beside / f"{name}.safetensors")
            shutil.rmtree(place, ignore_errors=True)
            beside.rename(place)
        except Exception as error:
            raise UserError(f"{self._folder}: what the site must remember cannot be written: {error}") from None
        self._rounds = {round: dict(states)}

    def _forget(self, round: int) -> None:
        self._rounds.pop(round, None)
        if self._folder is not None:
            shutil.rmtree(self._folder / str(round), ignore_errors=True)
