"""The processes of the engine `workers`: started together, and gone when the run is, however it ends."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, cast

import torch

from ...core.config import RunConfig
from ...core.errors import UserError, one_line
from . import torchrun
from .channel import Channel

#: Seconds that a process which has closed its channel takes to be gone.
_GONE = 5.0
_MODULE = "fedgraft.simulations.engines.worker"


class Process:
    """A process of :mod:`.worker`, and those that it divides into; it serves the other end of each of ``ends``."""

    def __init__(self, config: RunConfig, ends: Sequence[socket.socket]) -> None:
        # Workers are ended, so they clean up nothing.
        self._scratch = tempfile.TemporaryDirectory(prefix="fedgraft-workers-", ignore_cleanup_errors=True)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._codes: dict[int, int] = {}
        settings = Path(self._scratch.name) / "config.json"
        settings.write_text(config.to_json(), encoding="utf-8")
        numbers = [end.fileno() for end in ends]
        self._process = subprocess.Popen(
            # A session of its own: Ctrl-C is for the server, which then ends its workers.
            [sys.executable, "-P", "-m", _MODULE, str(settings), *map(str, numbers)],
            bufsize=0,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            pass_fds=numbers,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "TMPDIR": self._scratch.name},
            start_new_session=True,
        )
        self._said = cast(IO[bytes], self._process.stdout)

    def why(self, end: int) -> str:
        """How the process came to its end that served the socket that was number ``end`` here."""
        deadline = time.monotonic() + _GONE
        while end not in self._codes and time.monotonic() < deadline:
            if select.select([self._said], [], [], 0.1)[0]:
                line = self._said.readline()
                if not line:
                    self._codes.setdefault(end, self._process.wait())
                    break
                number, code = json.loads(line)
                self._codes[number] = code
        code = self._codes.get(end, 0)
        if code < 0:
            hint = ", as happens when memory runs out" if -code == signal.SIGKILL else ""
            return f"was ended by {signal.Signals(-code).name}{hint}"
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        return f"ended by itself: {lines[-1][:300]}" if lines else "ended by itself"

    def stop(self) -> None:
        """End it and all that it divided into, in whatever they are doing: no more is asked of them."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        # Where it is gone already, the others have found their channels closed.
        self._process.wait()
        self._said.close()
        self._errors.close()
        self._scratch.cleanup()


class Member:
    """One worker of a pool: how to reach it, and how it ended if it did."""

    def __init__(self, channel: Channel, process: Process | None = None, end: int = -1, gpu: int | None = None) -> None:
        self.channel = channel
        self.gpu = gpu
        self._process = process
        self._end = end

    def why(self) -> str:
        return self._process.why(self._end) if self._process is not None else "was lost, or its machine was"


class Pool:
    """``count`` workers, each with ``threads`` of arithmetic; a context manager that leaves none of them behind.

    On CPUs one process loads what all need and divides. Where there are GPUs each has a process and a GPU of its own,
    for CUDA does not outlive a division. Under `torchrun` the other ranks are workers beside one of this process.
    Raises :class:`UserError` when the machine gives no process or no place for its files.
    """

    def __init__(self, config: RunConfig, count: int, threads: int) -> None:
        self.threads = threads
        self.members: list[Member] = []
        self._processes: list[Process] = []
        gpus = torch.cuda.device_count() if config.train.device in ("auto", "cuda") else 0
        local = 1 if torchrun.ranks() else count
        together = sys.platform == "linux" and not gpus
        try:
            for first in range(0, local, local if together else 1):
                pairs = [socket.socketpair() for _ in range(local if together else 1)]
                process = Process(config, [there for _, there in pairs])
                self._processes.append(process)
                for number, (here, there) in enumerate(pairs, first):
                    gpu = number % gpus if gpus else None
                    self.members.append(Member(Channel.of(here), process, there.fileno(), gpu))
                    there.close()
            if torchrun.ranks():
                gpu = 0 if gpus else None
                self.members += [Member(channel, gpu=gpu) for channel in torchrun.gather()]
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise UserError(f"the workers cannot be started: {one_line(error)}") from None
            raise

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every worker, at once if need be in the middle of what it does."""
        for member in self.members:
            member.channel.stop()
        for process in self._processes:
            process.stop()
        self.members, self._processes = [], []
