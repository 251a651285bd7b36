"""`fedgraft server start`: the SuperLink of a kit, and the sites of the roster as the only ones it knows."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from ...core.errors import UserError
from ...deployment.certificates import SOON, day, now, pem_fingerprint
from ...deployment.files import private_folder, write
from ...deployment.kits import SERVER_KIT, ServerKit, remember_roster
from ...deployment.processes import end, ended_on_signals, environment, last_words, launch, require_free
from ...deployment.reach import reach
from ...deployment.roster import Member
from ...privacy.auditlog import AuditLog
from .control import Control, TakenError
from .pending import revive

_POLL = 0.2
_ROSTER_POLL = 2.0
_STARTUP = 90.0
#: Seconds for which a port is waited for.
_FREED = 10.0
#: A SuperLink that dies more than so often within so many seconds is not started again.
_DEATHS, _WITHIN = 5, 600.0


def superlink_command(kit: ServerKit) -> list[str]:
    """How the SuperLink is started: with TLS, sites known by key, memory on the disk; jobs install nothing."""
    return [
        *(sys.executable, "-m", f"{__package__}.superlink"),
        *("--ssl-ca-certfile", str(kit.folder / "ca.crt")),
        *("--ssl-certfile", str(kit.folder / "server.crt")),
        *("--ssl-keyfile", str(kit.folder / "server.key")),
        *("--host", kit.settings.server.listen, "--port", str(kit.settings.server.port)),
        *("--database", str(kit.state / "superlink.db")),
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
    ]


def serve(kit: ServerKit, say: Callable[[str], None]) -> None:
    """Run the server of ``kit`` until Ctrl-C or SIGTERM, and end all that was started.

    A SuperLink that dies is started again, and jobs that died go on, see :func:`~.pending.revive`. Raises
    :class:`UserError` for what keeps it from starting, or when the SuperLink does not stay up.
    """
    for folder in (kit.runs, kit.state):
        private_folder(folder)
    deaths: deque[float] = deque(maxlen=_DEATHS)
    with ended_on_signals():
        while True:
            try:
                _serve_once(kit, say, again=bool(deaths))
            except _DiedError as error:
                if len(deaths) == _DEATHS and time.monotonic() - deaths[0] < _WITHIN:
                    raise UserError(f"{error}; it died {_DEATHS + 1} times in {_WITHIN / 60:.0f} minutes") from None
                deaths.append(time.monotonic())
                say(f"{error}; it is started again")
                time.sleep(len(deaths))


class _DiedError(UserError):
    """The SuperLink was up, and has ended."""


def _serve_once(kit: ServerKit, say: Callable[[str], None], *, again: bool) -> None:
    server = kit.settings.server
    _require_port(server.listen, server.port)
    log = kit.folder / "logs" / "superlink.log"
    begun = log.stat().st_size if log.exists() else 0
    surroundings = environment(kit.state / "flower", **{SERVER_KIT: str(kit.folder)})
    process = launch(superlink_command(kit), surroundings, log)
    try:
        _wait(kit, process, log, begun)
        say(f"serving {kit.settings.federation} at {server.address}; log: {log}")
        if not again and kit.certificate.not_valid_after_utc - now() < SOON:
            say(f"server.crt expires {day(kit.certificate.not_valid_after_utc)}: fedgraft provision rotate server")
        _keep(kit, process, say)
        raise _DiedError(_last(process, log, begun))
    finally:
        end(process)


def _require_port(host: str, port: int) -> None:
    """Raise :class:`UserError` unless the port is free, or becomes so: one that was killed leaves it in a moment."""
    deadline = time.monotonic() + _FREED
    while True:
        try:
            return require_free(host, port)
        except UserError:
            if time.monotonic() > deadline:
                raise
        time.sleep(_POLL)


def _wait(kit: ServerKit, process: subprocess.Popen[bytes], log: Path, begun: int) -> None:
    deadline = time.monotonic() + _STARTUP
    while True:
        if process.poll() is not None:
            raise UserError(_last(process, log, begun))
        try:
            reach(kit.own_address, kit.settings.server.port, kit.folder / "ca.crt")
            return
        except UserError:
            if time.monotonic() > deadline:
                raise
        time.sleep(_POLL)


def _last(process: subprocess.Popen[bytes], log: Path, begun: int) -> str:
    return f"the SuperLink ended with code {process.returncode}: {last_words(log, begun)} (log: {log})"


def _keep(kit: ServerKit, process: subprocess.Popen[bytes], say: Callable[[str], None]) -> None:
    control, told, due = Control(kit), "", 0.0
    taken: set[str] = set()
    alone = True
    try:
        while process.poll() is None:
            if time.monotonic() >= due:
                due = time.monotonic() + _ROSTER_POLL
                try:
                    for line in reconcile(kit, control, taken):
                        say(line)
                    for line in revive(kit, control, alone=alone):
                        say(line)
                    told, alone = "", False
                except UserError as error:
                    # A roster that is being copied is whole in a moment; until then the last one stands.
                    if process.poll() is None and str(error) != told:
                        say(told := str(error))
            time.sleep(_POLL)
    finally:
        control.close()


def reconcile(kit: ServerKit, control: Control, taken: set[str]) -> list[str]:
    """Have the SuperLink know exactly the roster's members whose certificates have not ended; returns what changed.

    ``taken``: keys that the SuperLink does not take a second time, to which such a key is added.
    Also writes down which node is which site, for the jobs. What is about to change is in the audit log first.
    """
    members = kit.roster()
    remember_roster(kit, members)
    wanted: dict[str, Member] = {member.public_key: member for member in members.current()}
    audit_log = AuditLog(kit.state)
    said, nodes = [], {}
    for node in control.nodes():
        if node.public_key in wanted and wanted[node.public_key].name == node.name:
            nodes[node.id] = wanted.pop(node.public_key).name
            continue
        ended = any(member.public_key == node.public_key and member.name == node.name for member in members.members)
        why = "its certificate has ended" if ended else "its key is not on the roster"
        audit_log.write("unregistered", site=node.name, key=pem_fingerprint(node.public_key), why=why)
        control.unregister(node.id)
        said.append(f"{node.name}: refused from now on; {why}")
    for key, member in wanted.items():
        if key in taken:
            continue
        until = member.until.isoformat()
        audit_log.write("registered", site=member.name, key=pem_fingerprint(key), until=until, roster=members.number)
        try:
            nodes[control.register(member.name, key)] = member.name
        except TakenError as error:
            taken.add(key)
            audit_log.write("refused", site=member.name, key=pem_fingerprint(key), why=str(error))
            said.append(str(error))
            continue
        said.append(f"{member.name}: may connect; its certificate expires {day(member.until)}")
    text = json.dumps({str(node): name for node, name in sorted(nodes.items())})
    if not kit.nodes.is_file() or kit.nodes.read_text(encoding="utf-8") != text:
        write(kit.nodes, text)
    return said
