"""Flower's processes: their surroundings, their ports, and how they are ended."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from ..core.errors import UserError
from .files import PRIVATE_FILE, private_folder

#: Tells a process in its surroundings the number of the one that it must not outlive.
PARENT = "FEDGRAFT_PARENT"
_POLL = 0.2
_GRACE = 10.0
_LONGER = 3 * _GRACE
_LAST_BYTES = 1 << 16
#: The colours in Flower's log, and what its lines begin with.
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_LEVEL = re.compile(r"^\s*(INFO|WARNING|ERROR|DEBUG)\s*:\s*")


def environment(home: Path, **more: str) -> dict[str, str]:
    """What Flower's processes see: their state in ``home``, this installation's commands, no word to the outside."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("FLWR_")}
    local = "127.0.0.1,localhost,::1"
    return own | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        # Without a way out it holds every start up for most of a minute.
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), own.get("PATH", ""))),
        # A hospital's proxy leads outside, not to this machine.
        "NO_PROXY": ",".join(filter(None, (own.get("NO_PROXY", ""), local))),
        "no_proxy": ",".join(filter(None, (own.get("no_proxy", ""), local))),
        "PYTHONUNBUFFERED": "1",
        # What libraries warn their programmers of has no place in a job's log.
        "PYTHONWARNINGS": own.get("PYTHONWARNINGS", "ignore"),
        **more,
    }


def require_free(host: str, port: int) -> None:
    """Raise :class:`UserError` unless this machine can listen at ``host`` and ``port``."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"cannot listen at {host}:{port}: {error.strerror}; end what uses it (`ss -ltnp`), or provision "
                "another server.address"
            ) from None


def free_port() -> int:
    """A port of the loopback interface that nobody listened at a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(command: Sequence[str], surroundings: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start ``command`` in a session of its own; what it and its children say goes to the end of ``log``."""
    private_folder(log.parent)
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, PRIVATE_FILE)
        with os.fdopen(handle, "ab") as file:
            return subprocess.Popen(
                command,
                env=surroundings,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    except OSError as error:
        raise UserError(f"{command[0]}: cannot be started: {error.strerror or error}") from None


def end(process: subprocess.Popen[bytes], *, patiently: bool = False) -> None:
    """End ``process`` and what it started: first by asking, then without.

    ``patiently``: it has processes of its own to end first.
    """
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except (ProcessLookupError, PermissionError):
            break
        try:
            process.wait(_LONGER if patiently else _GRACE)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def leave_with_parent(leave: Callable[[], object]) -> None:
    """Call ``leave`` once the process is gone that started this one and said so by :data:`PARENT`."""
    parent = os.environ.get(PARENT, "")
    if not parent:
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(_POLL)
        leave()

    threading.Thread(target=watch, daemon=True).start()


class Stopped(BaseException):
    """Somebody asked this process to end."""


@contextmanager
def ended_on_signals() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, so that what it started is ended too; leaves quietly after either."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except (Stopped, KeyboardInterrupt):
        pass
    finally:
        signal.signal(signal.SIGTERM, before)


def last_words(log: Path, since: int = 0) -> str:
    """Why a process ended, as it said in ``log`` after byte ``since``: Flower's reason, or else the last line."""
    try:
        with log.open("rb") as file:
            file.seek(max(since, log.stat().st_size - _LAST_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    lines = [_LEVEL.sub("", _COLOUR.sub("", line)).strip() for line in text.splitlines()]
    at = next((number for number, line in enumerate(lines) if line.startswith("Exit Code:")), None)
    if at is not None:
        end = lines.index("", at) if "" in lines[at:] else len(lines)
        return " ".join(lines[at + 1 : end])
    return next((line for line in reversed(lines) if line), "")
