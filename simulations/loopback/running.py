"""Starts a loopback federation, waits until all sites are connected, and ends what it started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from ...client.site.keys import make_key
from ...core.config import RunConfig
from ...core.errors import UserError
from ...deployment.authority import Authority
from ...deployment.files import private_folder, write
from ...deployment.kits import ServerKit
from ...deployment.processes import end, free_port, last_words, launch
from ...server.deployed.control import Control
from .policies import policy_for

_POLL = 0.3
_JOIN = 300.0
_GRACE = 30.0
#: Seconds within which two readings of when a process was made are of the same one.
_SAME = 1.0


class Loopback:
    """The federation in ``folder``, made of the sites of ``config`` by :meth:`provision`."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.folder = folder.absolute()
        self.config = config
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def kits(self) -> Path:
        return self.folder / "kits"

    @property
    def server(self) -> ServerKit:
        return ServerKit.open(self.kits / "server")

    def site(self, name: str) -> Path:
        """The kit of site ``name``."""
        return self.kits / "sites" / name

    def provision(self, port: int = 0) -> None:
        """Found the federation, or take up one that is there; write each site's policy anew. Raises :class:`UserError`.

        ``port``: where the server listens; 0: at a free port, or where it did before.
        """
        policies = {name: policy_for(self.config, name) for name in self.config.site_names}
        private_folder(self.folder)
        source = self.folder / "federation.toml"
        if not source.exists() or port:
            sites = "".join(f'\n[[site]]\nname = "{name}"\n' for name in self.config.site_names)
            server = f'[server]\naddress = "127.0.0.1:{port or free_port()}"\nlisten = "127.0.0.1"\n'
            write(source, f'name = "development"\n\n{server}{sites}')
        authority = Authority.create(source, self.kits)
        for name in self.config.site_names:
            if name not in authority.federation.sites:
                raise UserError(f"{self.folder}: was made without the site {name}; choose another folder")
            make_key(self.site(name))
            authority.sign(self.site(name) / "site.csr")
            write(self.site(name) / "policy.toml", policies[name])

    @contextmanager
    def running(self, say: Callable[[str], None]) -> Iterator[None]:
        """The server and all sites, connected; ended when the block is left. Raises :class:`UserError`."""
        try:
            self.up(say)
            yield
        finally:
            self.end()

    def up(self, say: Callable[[str], None]) -> None:
        """Start the server and the sites, each as its owner would, and wait until all are connected."""
        self._start("server", "server", self.kits / "server")
        self._wait("the server", lambda: self._said("server", "serving "))
        for name in self.config.site_names:
            self._start(name, "site", self.site(name))
        self._note()
        control = Control(self.server)
        try:
            self._wait("the sites", lambda: self._online(control))
        finally:
            control.close()
        say(f"{', '.join(self.config.site_names)} are connected to {self.server.settings.server.address}")

    def require_alive(self) -> None:
        """Raise :class:`UserError` with the last words of the first process that has ended."""
        for who, process in self.processes.items():
            if process.poll() is not None:
                raise UserError(f"{who} ended: {last_words(self._log(who)).removeprefix('fedgraft: ')}")

    def end(self) -> None:
        """End what :meth:`up` started, the sites first."""
        if self.processes:
            for who in reversed(list(self.processes)):
                end(self.processes.pop(who), patiently=True)
            _processes(self.folder).unlink(missing_ok=True)

    def leave(self) -> None:
        """Let the processes go on after this one: :func:`down` ends them."""
        self.processes.clear()

    def _start(self, who: str, role: str, kit: Path) -> None:
        from ..choice import cores

        log = self._log(who)
        log.unlink(missing_ok=True)
        command = [sys.executable, "-m", "fedgraft", role, "start", "--kit", str(kit)]
        # Sites of one machine share its cores: threads of one that wait for another's cost more than they give.
        threads = str(max(1, cores() // len(self.config.site_names)))
        self.processes[who] = launch(command, {"OMP_NUM_THREADS": threads, **os.environ, "PYTHONUNBUFFERED": "1"}, log)

    def _log(self, who: str) -> Path:
        return self.folder / "logs" / f"{who}.log"

    def _said(self, who: str, text: str) -> bool:
        return text in self._log(who).read_text(encoding="utf-8", errors="replace")

    def _online(self, control: Control) -> bool:
        return {node.name for node in control.nodes() if node.status == "online"} >= set(self.config.site_names)

    def _wait(self, who: str, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _JOIN
        while not done():
            self.require_alive()
            if time.monotonic() > deadline:
                raise UserError(f"{who} did not come up in {_JOIN:g} s; see {self.folder / 'logs'}")
            time.sleep(_POLL)

    def _note(self) -> None:
        """Write down which processes these are, so that :func:`down` ends them and no others."""
        known = {who: [p.pid, psutil.Process(p.pid).create_time()] for who, p in self.processes.items()}
        write(_processes(self.folder), json.dumps(known))


def down(folder: Path) -> list[str]:
    """End the processes of the federation in ``folder``; returns who was running. Raises :class:`UserError`."""
    path = _processes(folder)
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: nothing of it is running") from None
    except (OSError, ValueError):
        raise UserError(f"{path}: cannot be read; end the processes by hand") from None
    found = []
    for who, (pid, created) in reversed(list(known.items())):
        try:
            process = psutil.Process(pid)
            # The number may stand for somebody else's process by now.
            if abs(process.create_time() - created) > _SAME:
                continue
            process.terminate()
            found.append((who, process))
        except psutil.NoSuchProcess:
            continue
    _, alive = psutil.wait_procs([process for _, process in found], timeout=_GRACE)
    for process in alive:
        process.kill()
    path.unlink(missing_ok=True)
    return [who for who, _ in found]


def _processes(folder: Path) -> Path:
    return folder / "processes.json"
