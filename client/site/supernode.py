"""`fedgraft site start`: the SuperNode of a site's kit, and the worker that answers what it receives."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

from cryptography import x509

from ...core.errors import UserError, one_line
from ...deployment.certificates import SOON, day, now
from ...deployment.files import private_folder
from ...deployment.kits import SiteKit
from ...deployment.processes import end, ended_on_signals, environment, free_port, last_words, launch
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
    """Take part until Ctrl-C or SIGTERM, and end all that was started.

    Raises :class:`UserError` for what keeps the site from taking part, and when the server refuses it; both are in the
    site's audit log.
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
    log, worker_log = (kit.folder / "logs" / f"{name}.log" for name in ("supernode", "worker"))
    begun, worker_begun = (file.stat().st_size if file.exists() else 0 for file in (log, worker_log))
    surroundings, port, secret = environment(kit.state / "flower"), free_port(), fresh_secret(kit.state)
    worker = launch(worker_command(kit.state, f"127.0.0.1:{port}", secret), surroundings, worker_log)
    process = None
    try:
        process = launch(supernode_command(kit, port, secret), surroundings, log)
        with ended_on_signals():
            say(f"site {kit.name} of {kit.settings.federation}: taking part; logs: {log.parent}")
            if certificate.not_valid_after_utc - now() < SOON:
                say(f"site.crt expires {day(certificate.not_valid_after_utc)}: send site.csr to the coordinator again")
            while process.poll() is None:
                if worker.poll() is not None:
                    why = last_words(worker_log, worker_begun)
                    raise UserError(f"the site's worker ended with code {worker.returncode}: {why} (log: {worker_log})")
                time.sleep(_POLL)
            raise UserError(_why(kit, log, begun, process.returncode))
    finally:
        if process is not None:
            end(process)
        end(worker)


def _why(kit: SiteKit, log: Path, begun: int, code: int) -> str:
    text = log.read_bytes()[begun:].decode(errors="replace")
    if any(said in text for said in _UNKNOWN):
        return (
            f"{kit.settings.server.address} does not know this site's key: not signed yet, not on the server's roster, "
            "revoked or expired; ask the coordinator"
        )
    if _GAVE_UP in text:
        # A clock that has been set wrong meanwhile is refused as a strange key is.
        server = kit.settings.server
        require_clock(reach(server.host, server.port, kit.folder / "ca.crt"), server.address)
        return (
            f"{kit.settings.server.address} takes this site's key no more: revoked or expired; ask the coordinator "
            "(unless somebody here ended the SuperNode)"
        )
    return f"the SuperNode ended with code {code}: {last_words(log, begun)} (log: {log})"
