"""Jobs: a bundle that holds a configuration and no code, what became of it, and its results."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from flwr.cli.build import build_fab_from_files
from flwr.supercore.fab import Fab

from ... import __version__
from ...core.config import RunConfig
from ...core.errors import UserError
from ...deployment.kits import ServerKit
from ...privacy.auditlog import AuditLog
from ..files import cannot_write
from .control import Control, Run
from .pending import OVER, Pending

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_POLL = 0.5
_T = TypeVar("_T")
#: Seconds for which a server that does not answer is waited for: it may be on its way back.
_PATIENCE = 60.0


def bundle(config: RunConfig) -> Fab:
    """The Flower app of a job: it names the apps of the fedgraft that is installed, and carries ``config`` alone."""
    text = f"""[project]
name = "fedgraft-job"
version = "{__version__}"
description = "a configuration for the fedgraft that is installed"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedgraft"

[tool.flwr.app.components]
serverapp = "fedgraft.server.app:app"
clientapp = "fedgraft.client.app:app"

[tool.flwr.app.config]
job = {_toml(config.to_json())}
output = ""
resume = ""
"""
    content, _ = build_fab_from_files({"pyproject.toml": text.encode()})
    return Fab(hashlib.sha256(content).hexdigest(), content, {})


def submit(kit: ServerKit, control: Control, config: RunConfig, name: str = "", resume: str = "") -> tuple[str, int]:
    """Start the job ``config``; returns its name, which is that of its run directory, and Flower's number for it.

    ``resume``: the name of an earlier job that is to go on. Raises :class:`UserError` for what cannot run.
    """
    from ..rounds import check

    if config.simulated:
        raise UserError(f"{config.simulated[0]} is for simulations; these sites are real, so leave it out")
    check(config)
    members = {member.name for member in kit.roster().current()}
    strange = sorted(set(config.site_names) - members)
    if strange:
        known = ", ".join(sorted(members)) or "none"
        raise UserError(f"data.sites: {', '.join(strange)}: not on the roster, or expired; on it are {known}")
    name = resume or name or f"{_plain(config.name)}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    if not _NAME.fullmatch(name):
        raise UserError(f"--name {name}: letters, digits, `.`, `_` and `-` only")
    there = (kit.runs / name / "run.json").exists() or (kit.runs / name / "checkpoints").exists()
    if there != bool(resume):
        mend = (
            "there is no such run to resume" if resume else "a job had this name before; choose another, or --resume it"
        )
        raise UserError(f"{kit.runs / name}: {mend}")
    if any(run.name == name and run.status not in OVER for run in control.runs()):
        raise UserError(f"{name}: is still running; stop it first: fedgraft job stop {name}")
    AuditLog(kit.state).write(
        "submitted", run=name, job=config.digest(), bundle=bundle(config).hash_str, sites=list(config.site_names)
    )
    number = start(control, config, name, resume=bool(resume))
    # Afterwards: until Flower knows the run, the job would be taken for one whose process has died.
    Pending(name, config.to_json()).keep(kit)
    return name, number


def start(control: Control, config: RunConfig, name: str, *, resume: bool) -> int:
    """Have Flower run the job ``name``; returns Flower's number for it."""
    return control.submit(bundle(config), {"output": name} | ({"resume": name} if resume else {}))


def stop(kit: ServerKit, control: Control, which: str) -> Run:
    """End the job ``which`` (see :func:`find`); returns it. Raises :class:`UserError`."""
    run = find(control, which)
    AuditLog(kit.state).write("stopped", run=run.name, number=run.id)
    pending = Pending.of(kit, run.name)
    if pending is not None:
        # First, or it would be taken for one whose process has died.
        replace(pending, stopped=True).keep(kit)
    control.stop(run.id)
    return run


def find(control: Control, which: str) -> Run:
    """The run of this name or number, the latest of a name; the latest of all where ``which`` is empty.

    Raises :class:`UserError`.
    """
    runs = control.runs()
    found = [run for run in runs if not which or which in (run.name, str(run.id))]
    if not found:
        raise UserError(f"no job `{which}`; there are {', '.join(run.name for run in runs) or 'none'}")
    return found[-1]


def follow(kit: ServerKit, control: Control, name: str) -> Iterator[str]:
    """The lines of the job ``name`` until it is over, also of the runs in which it goes on after a crash.

    Raises :class:`UserError` where the server does not come back.
    """
    heard: set[int] = set()
    while True:
        over = Pending.of(kit, name) is None
        run = _patiently(lambda: find(control, name))
        if run.id not in heard:
            heard.add(run.id)
            try:
                yield from control.logs(run.id, follow=True)
            except UserError:
                # The server has died; whether it comes back, the next question tells.
                continue
        elif over:
            return
        else:
            time.sleep(_POLL)


def require_completed(kit: ServerKit, control: Control, name: str) -> None:
    """Wait until the job ``name`` is over. Raises :class:`UserError` unless it was completed."""
    while Pending.of(kit, name) is not None or _patiently(lambda: find(control, name)).status not in OVER:
        _patiently(control.runs)
        time.sleep(_POLL)
    run = _patiently(lambda: find(control, name))
    if run.status != "completed":
        raise UserError(f"{run.name}: {run.status}{f': {run.details}' if run.details else ''}")


def _patiently(ask: Callable[[], _T]) -> _T:
    """What ``ask`` gives, once the server answers. Raises :class:`UserError` where it does not for a minute."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            return ask()
        except UserError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_POLL)


def fetch(kit: ServerKit, which: str, output: Path) -> Path:
    """Copy what a job left, its report, records and adapter, to ``output``. Raises :class:`UserError`."""
    source = kit.runs / which
    if not _NAME.fullmatch(which) or not (source / "run.json").is_file():
        known = ", ".join(sorted(path.parent.name for path in kit.runs.glob("*/run.json")))
        raise UserError(f"{kit.runs}: no job `{which}` has left anything; there are {known or 'none'}")
    status = json.loads((source / "run.json").read_text(encoding="utf-8")).get("status")
    if status != "finished":
        raise UserError(f"{which}: is {status}; `fedgraft job status` says what became of it")
    if output.exists():
        raise UserError(f"{output}: is there already; choose another --output")
    try:
        shutil.copytree(source, output, ignore=shutil.ignore_patterns("checkpoints", ".lock"))
    except (OSError, shutil.Error) as error:
        raise cannot_write(output, OSError(str(error))) from None
    return output


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.")[:60] or "job"


def _toml(text: str) -> str:
    """``text`` as a TOML string: JSON's escapes are TOML's, but for what lies outside the first plane and DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
