"""Flower's own simulation runtime (Ray), run in child processes that end with the run.

`flwr run` by itself starts a SuperLink that stays behind, keeps the environment of its first launch and, before each
run, installs the app's dependencies anew. Here the SuperLink is a child on ports of its own, installs nothing, and is
ended, with all it started, by its process id.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from ... import __version__
from ...core.config import RunConfig
from ...core.errors import UserError
from ...core.progress import SILENT, Watch
from ...server.files import write_text
from ...server.rounds import tell
from ...server.rundir import read_metrics, read_run

_APP = f"""\
[project]
name = "fedgraft-simulation"
version = "{__version__}"
dependencies = []
[tool.flwr.app]
publisher = "fedgraft"
[tool.flwr.app.components]
serverapp = "fedgraft.simulations.app:server"
clientapp = "fedgraft.simulations.app:client"
[tool.flwr.app.config]
config = ""
set = ""
output = ""
resume = ""
threads = 1
"""
_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
#: What Flower's runtime said, kept in the run directory when it ended before the run did.
LOG = "flower.log"
_START_TIMEOUT = 60.0
_STOP_TIMEOUT = 15.0


def run_flower(
    config: RunConfig, output: Path, *, threads: int = 1, resume: bool, watch: Watch = SILENT
) -> dict[str, Any]:
    """Run ``config`` on Flower's simulation runtime into ``output`` and return its run.json.

    ``threads``: cores that the runtime gives a site at work, which computes with as many threads.
    Raises :class:`UserError` when Ray is not installed, or with the run's own error.
    """
    if shutil.which("flower-superlink", path=_path()) is None or not _has_ray():
        raise UserError("the flower engine needs Flower's simulation runtime: pip install 'fedgraft[simulation]'")
    output = output.absolute()
    with tempfile.TemporaryDirectory(prefix="fedgraft-flower-") as scratch:
        home = Path(scratch)
        app = home / "fedgraft-simulation"
        app.mkdir()
        (app / "pyproject.toml").write_text(_APP, encoding="utf-8")
        (app / "README.md").write_text("A simulated federation.\n", encoding="utf-8")
        settings = home / "config.json"
        write_text(settings, config.to_json())
        key = "resume" if resume else "output"
        before = read_run(output).get("resumed", []) if resume else None
        with _superlink(home, threads) as address:
            (home / "config.toml").write_text(
                f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{address}"\ninsecure = true\n',
                encoding="utf-8",
            )
            gpus = 1 if torch.cuda.is_available() else 0
            command = [
                *("flwr", "run", str(app), "here", "--stream"),
                *("--run-config", f'config="{settings}" {key}="{output}" threads={threads}'),
                "--federation-config",
                f"num-supernodes={len(config.site_names)} client-resources-num-cpus={threads} "
                f"client-resources-num-gpus={gpus}",
            ]
            log = _follow(command, home, output, before, threads, watch)
        return _outcome(output, before, log, watch)


def _path() -> str:
    """PATH with this interpreter's own folder first: the environment may not be activated."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


def _has_ray() -> bool:
    import importlib.util

    return importlib.util.find_spec("ray") is not None


def _environment(home: Path, threads: int) -> dict[str, str]:
    own = {"FLWR_HOME": str(home), "PATH": _path(), "OMP_NUM_THREADS": str(threads)}
    return {**os.environ, **_ENVIRONMENT, **own}


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def _superlink(home: Path, threads: int) -> Iterator[str]:
    """A SuperLink in simulation mode for one run; yields its address, and ends it with all its children."""
    control, http = _free_ports(2)
    log = home / "superlink.log"
    command = [
        *("flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"),
        *("--control-api-address", f"127.0.0.1:{control}", "--host", "127.0.0.1", "--port", str(http)),
        *("--log-file", str(log)),
    ]
    process = subprocess.Popen(
        command,
        env=_environment(home, threads),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + _START_TIMEOUT
        while not _listens(http):
            if process.poll() is not None or time.monotonic() > deadline:
                raise UserError(f"flower-superlink did not start: {_last_line(log)}")
            time.sleep(0.2)
        yield f"127.0.0.1:{http}"
    finally:
        _end(process.pid)
        process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _end(pid: int) -> None:
    """Ask a process and all its descendants to end, then make them."""
    try:
        root = psutil.Process(pid)
        family = [*root.children(recursive=True), root]
    except psutil.NoSuchProcess:
        return
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(family, timeout=_STOP_TIMEOUT)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _follow(command: list[str], home: Path, output: Path, before: list[Any] | None, threads: int, watch: Watch) -> Path:
    """Run `flwr run`, pass on each line of metrics.jsonl as it appears, and return its log."""
    log = home / "run.log"
    seen = len(read_metrics(output))
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            env=_environment(home, threads),
            cwd=home,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                time.sleep(0.5)
                lines = read_metrics(output)
                # A resumed run drops the lines of the round that it repeats.
                seen = min(seen, len(lines))
                for line in lines[seen:]:
                    tell(watch, line)
                seen = len(lines)
                if _failed(output, before):
                    break
            for line in read_metrics(output)[seen:]:
                tell(watch, line)
        finally:
            _end(process.pid)
            process.wait()
    return log


def _failed(output: Path, before: list[Any] | None) -> bool:
    """Whether this attempt has failed; the run.json of an earlier one still lists ``before`` as what was resumed."""
    if not output.joinpath("run.json").exists():
        return False
    run = read_run(output)
    return run["status"] == "failed" and run["resumed"] != before


def _outcome(output: Path, before: list[Any] | None, log: Path, watch: Watch) -> dict[str, Any]:
    if output.joinpath("run.json").exists():
        run = read_run(output)
        if run["resumed"] != before:
            if run["resumed"] and run["resumed"][-1]["note"]:
                watch.note(run["resumed"][-1]["note"])
            if run["status"] == "finished":
                return run
            if run["status"] == "failed":
                raise UserError(run["error"])
    kept = output / LOG
    with contextlib.suppress(OSError):
        output.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(log, kept)
    raise UserError(f"Flower's runtime ended before the run did: {_last_line(log)} (whole log: {kept})")


def _last_line(log: Path) -> str:
    try:
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return "no log"
    telling = [line for line in lines if "Error" in line] or [line for line in lines if line]
    return telling[-1][:300] if telling else "no log"
