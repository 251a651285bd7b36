"""The run directory: run.json, metrics.jsonl, checkpoints, the final adapter. docs/run-directory.md describes it."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..core.config import RunConfig, config_from_json
from ..core.errors import UserError
from .files import cannot_write, write_json, write_parts

SCHEMA = 1


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class RunDirectory:
    """One run's folder. ``create`` makes a new one; ``open`` one that is there; both hold its lock until closed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None

    @classmethod
    def create(cls, path: str | Path) -> RunDirectory:
        """Raises :class:`UserError` when the folder cannot be written or already holds a run."""
        folder = Path(path).absolute()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / "run.json").exists():
                raise UserError(f"{folder}: already holds a run; choose another --output, or --resume it")
            return cls(folder)._locked()
        except OSError as error:
            raise cannot_write(folder, error) from None

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """Raises :class:`UserError` when there is no run, or another process is running it."""
        folder = Path(path).absolute()
        if not (folder / "run.json").is_file():
            raise UserError(f"{folder}: holds no run (no run.json)")
        try:
            return cls(folder)._locked()
        except OSError as error:
            raise cannot_write(folder, error) from None

    def _locked(self) -> RunDirectory:
        lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise UserError(f"{self.path}: another process is running this run") from None
        self._lock = lock
        return self

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def central_ledger(self) -> Path:
        return self.path / "central-ledger.jsonl"

    def site(self, name: str) -> Path:
        return self.path / "sites" / name

    def read_run(self) -> dict[str, Any]:
        """run.json. Raises :class:`UserError` when it is not one that this version reads."""
        return read_run(self.path)

    def config(self) -> RunConfig:
        return config_from_json(json.dumps(self.read_run()["config"]), str(self.path / "run.json"))

    def write_run(self, values: Mapping[str, Any]) -> None:
        write_json(self.path / "run.json", {"schema": SCHEMA, **values})

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        path = self.path / "metrics.jsonl"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise cannot_write(path, error) from None

    def read_metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.path)

    def forget_metrics_after(self, round: int) -> None:
        """Drop the lines of rounds after ``round``, which will be run again."""
        kept = (line for line in each_metric(self.path) if line["round"] <= round)
        write_parts(self.path / "metrics.jsonl", (json.dumps(line) + "\n" for line in kept))


def read_run(folder: Path) -> dict[str, Any]:
    """The run.json of ``folder``. Raises :class:`UserError` when it is missing, broken or of another schema."""
    path = Path(folder) / "run.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: holds no run (no run.json)") from None
    except (OSError, ValueError):
        raise UserError(f"{path}: is not readable JSON") from None
    if not isinstance(values, dict) or values.get("schema") != SCHEMA:
        found = values.get("schema") if isinstance(values, dict) else None
        raise UserError(f"{path}: schema {found}, this version reads {SCHEMA}")
    lacking = [key for key in ("run", "config", "status", "started", "resumed", "model") if key not in values]
    if lacking:
        raise UserError(f"{path}: has no `{lacking[0]}`; it was changed, or is not one of fedgraft's")
    return values


def read_profile(folder: Path) -> dict[str, Any] | None:
    """The profile.json of ``folder``; None where there is none. Raises :class:`UserError` for a broken one."""
    path = Path(folder) / "profile.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        raise UserError(f"{path}: is not readable JSON; delete it, or run with --profile again") from None
    return values if isinstance(values, dict) and values.get("schema") == SCHEMA else None


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All whole lines of the metrics.jsonl in ``folder``; one that a crash cut off is left out."""
    return list(each_metric(folder))


def each_metric(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of :func:`read_metrics` one by one: those of thousands of sites are long."""
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        return
    with path.open("rb") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            yield line
