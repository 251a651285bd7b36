"""`fedgraft site start`: the SuperNode of a site's kit, and the worker that answers what it receives."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from cryptography import x509

from ...core.errors import UserError, one_line
from ...deployment.certificates import SOON, day, now
from ...deployment.files import private_folder
from ...deployment.kits import SiteKit
from ...deployment.processes import PARENT, end, ended_on_signals, environment, free_port, last_words, launch
from ...deployment.reach import reach, require_clock
from ...privacy.auditlog import AuditLog, require_ledger_of_audit
from ..policy import load_policy
from ..warm.command import fresh_secret, supernode_options, worker_command
from .trust import write_roster

_POLL = 0.2
#: What Flower says to a SuperNode whose key the server does not know, or knows no longer.
_UNKNOWN = ("Failed to activate SuperNode", "does not recognize this SuperNode", "401 Unauthorized")
#: And what a SuperNode says that ends of itself: it was told in its heartbeat that its key is not taken any more.
_GAVE_UP = "SuperNode terminated gracefully"
#: And which number the server gave it.
_NUMBER = re.compile(r"SuperNode ID: (\d+)")
#: How a worker begins that ends of itself, and says why.
_OWN_WORDS = "fedgraft: "
#: Processes that die more than so often within so many seconds are not started again.
_DEATHS, _WITHIN = 5, 600.0
#: Seconds before the first restart, and more before each one that follows: the server sees in them who is gone.
_PAUSE = 2.0


def supernode_command(kit: SiteKit, port: int, secret: Path) -> list[str]:
    """How the site's SuperNode is started; it serves the site's worker at ``port`` of the loopback interface.

    It runs nothing itself: the worker, which knows the ``secret``, answers with the site's own installation.
    """
    return [
        *(sys.executable, "-m", f"{__package__}.process"),
        *("--root-certificates", str(kit.folder / "ca.crt")),
        *("--superlink", kit.settings.server.address),
        *("--auth-supernode-private-key", str(kit.key)),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--node-config", node_config(kit)),
        *supernode_options(secret),
    ]


def node_config(kit: SiteKit) -> str:
    """What the site tells its own client processes. Raises :class:`UserError` for a path that Flower cannot pass on."""
    values = {"site": kit.name, "site-folder": str(kit.state), "policy": str(kit.policy), "signing-key": str(kit.key)}
    for value in values.values():
        if re.search(r"[\"\\\n]", value):
            raise UserError(f"{value}: Flower takes no quotes or backslashes in a path; move the kit elsewhere")
    return " ".join(f'{key}="{value}"' for key, value in values.items())


def require_ready(kit: SiteKit) -> x509.Certificate:
    """The site's certificate. Raises :class:`UserError` for the first thing that keeps the site from taking part."""
    _, certificate = kit.identity()
    kit.require_member()
    load_policy(kit.policy)
    require_ledger_of_audit(kit.state)
    server = kit.settings.server
    require_clock(reach(server.host, server.port, kit.folder / "ca.crt"), server.address)
    return certificate


def start(kit: SiteKit, say: Callable[[str], None]) -> None:
    """Take part until Ctrl-C or SIGTERM, and end all that was started; what of it dies before is started again.

    Raises :class:`UserError` for what keeps the site from taking part, when the server refuses it, and when its
    processes do not stay up; all are in the site's audit log.
    """
    private_folder(kit.state)
    try:
        _take_part(kit, say)
    except UserError as error:
        # Where the audit log itself is what fails, that is the error.
        with contextlib.suppress(UserError):
            AuditLog(kit.state).write("refused", site=kit.name, kind="start", why=one_line(error))
        raise


def _take_part(kit: SiteKit, say: Callable[[str], None]) -> None:
    certificate = require_ready(kit)
    write_roster(kit)
    logs = kit.folder / "logs"
    surroundings = environment(kit.state / "flower", **{PARENT: str(os.getpid())})
    port, secret = free_port(), fresh_secret(kit.state)
    command = worker_command(kit.state, f"127.0.0.1:{port}", secret)
    worker = _Process("the site's worker", command, surroundings, logs / "worker.log")
    supernode = _Process("the SuperNode", supernode_command(kit, port, secret), surroundings, logs / "supernode.log")
    deaths: deque[float] = deque(maxlen=_DEATHS)
    try:
        with ended_on_signals():
            worker.start()
            supernode.start()
            say(f"site {kit.name} of {kit.settings.federation}: taking part; logs: {logs}")
            if certificate.not_valid_after_utc - now() < SOON:
                say(f"site.crt expires {day(certificate.not_valid_after_utc)}: send site.csr to the coordinator again")
            while True:
                if worker.ended():
                    _bring_back(kit, worker, deaths, say)
                if supernode.ended():
                    _require_not_refused(kit, supernode.said())
                    _bring_back(kit, supernode, deaths, say)
                time.sleep(_POLL)
    finally:
        supernode.end()
        worker.end()


class _Process:
    """One of a site's processes, and what it said since it was started last."""

    def __init__(self, name: str, command: Sequence[str], surroundings: dict[str, str], log: Path) -> None:
        self.name = name
        self._command = command
        self._surroundings = surroundings
        self._log = log
        self._begun = 0
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._begun = self._log.stat().st_size if self._log.exists() else 0
        self._process = launch(self._command, self._surroundings, self._log)

    def ended(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    def end(self) -> None:
        if self._process is not None:
            end(self._process)

    def said(self) -> str:
        return self._log.read_bytes()[self._begun :].decode(errors="replace")

    def words(self) -> str:
        return last_words(self._log, self._begun)

    def why(self) -> str:
        code = self._process.returncode if self._process is not None else None
        words = self.words()
        return f"{self.name} ended with code {code}{': ' if words else ''}{words} (log: {self._log})"


def _bring_back(kit: SiteKit, process: _Process, deaths: deque[float], say: Callable[[str], None]) -> None:
    """Start ``process`` again, which has ended. Raises :class:`UserError` where that would mend nothing."""
    if process.words().startswith(_OWN_WORDS):
        raise UserError(process.why())
    if len(deaths) == _DEATHS and time.monotonic() - deaths[0] < _WITHIN:
        raise UserError(f"{process.why()}; the site's processes died {_DEATHS + 1} times in {_WITHIN / 60:.0f} minutes")
    deaths.append(time.monotonic())
    say(f"{process.why()}; it is started again")
    # The rest of the group: what it started itself.
    process.end()
    pause = _PAUSE * len(deaths)
    if number := _NUMBER.search(process.said()):
        # Here, as it takes memory.
        from .leaving import PATIENCE, leave

        pause = pause if leave(kit, int(number[1])) else PATIENCE + pause
    time.sleep(pause)
    process.start()


def _require_not_refused(kit: SiteKit, text: str) -> None:
    """Raise :class:`UserError` when a SuperNode that said ``text`` ended because the server does not take the site."""
    if any(said in text for said in _UNKNOWN):
        raise UserError(
            f"{kit.settings.server.address} does not know this site's key: not signed yet, not on the server's roster, "
            "revoked or expired; ask the coordinator (after a power cut: wait a minute, try again)"
        )
    if _GAVE_UP in text:
        # A clock that has been set wrong meanwhile is refused as a strange key is.
        server = kit.settings.server
        require_clock(reach(server.host, server.port, kit.folder / "ca.crt"), server.address)
        raise UserError(
            f"{kit.settings.server.address} takes this site's key no more: revoked or expired; ask the coordinator "
            "(unless somebody here ended the SuperNode)"
        )
