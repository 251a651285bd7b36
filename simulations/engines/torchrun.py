"""The engine `workers` over several machines: `torchrun` starts the same command on all, and here its ranks meet.

    torchrun --nnodes 2 --nproc-per-node gpu --rdzv-backend c10d --rdzv-endpoint HOST:PORT \\
        --no-python fedgraft simulate CONFIG --engine workers --output /shared/run

Rank 0 is the server and has a worker of its own; each other rank is a worker. The run directory, the configuration and
the data lie on a file system that all machines share. What crosses is neither encrypted nor signed: for a network of
your own. `torchrun` ends all ranks when one of them fails; `--resume` goes on.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import socket
import time
from datetime import timedelta
from multiprocessing.connection import wait
from typing import NoReturn

import torch
from torch.distributed import Store
from torch.distributed.rendezvous import rendezvous

from ...core.errors import UserError
from .channel import Channel, Closed
from .worker import quiet, serve

#: Seconds that the ranks wait for each other.
_MEET = 600.0
_GREET = 5.0


def ranks() -> int:
    """How many processes `torchrun` has started for this run; 0 without it."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def here(count: int) -> int:
    """How many of ``count`` workers are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", count)) if ranks() else count


def serves() -> bool:
    """Whether this process is to be a worker of another's run."""
    return ranks() > 1 and int(os.environ["RANK"]) > 0


def gather() -> list[Channel]:
    """In rank 0: a channel to each other rank. Raises :class:`UserError` when one does not come."""
    token, host = secrets.token_hex(16), os.environ["MASTER_ADDR"]
    channels: list[Channel] = []
    with socket.create_server((host, 0)) as door:
        _store().set(_key(), json.dumps([door.getsockname()[1], token]))
        deadline = time.monotonic() + _MEET
        while len(channels) < ranks() - 1:
            door.settimeout(max(0.1, deadline - time.monotonic()))
            try:
                channel = Channel.of(door.accept()[0])
            except TimeoutError:
                raise UserError(f"{len(channels) + 1} of {ranks()} ranks of torchrun came within {_MEET:g} s") from None
            if _knows(channel, token):
                channels.append(channel)
            else:
                channel.close()
    return channels


def _knows(channel: Channel, token: str) -> bool:
    try:
        return bool(wait([channel.connection], _GREET)) and hmac.compare_digest(channel.receive()[0]["token"], token)
    except (Closed, ValueError, KeyError, TypeError):
        return False


def join() -> NoReturn:
    """In any other rank: serve rank 0 until its run is over."""
    quiet()
    try:
        port, token = json.loads(_store().get(_key()))
        channel = Channel.of(socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=_MEET))
        channel.send({"token": token})
    except (OSError, RuntimeError, Closed):
        raise UserError(
            f"rank {os.environ['RANK']} of torchrun cannot reach rank 0 at {os.environ['MASTER_ADDR']}"
        ) from None
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    serve(channel)


def _store() -> Store:
    # Where `torchrun` keeps a store of its own, this is a client of it.
    store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=_MEET)))
    return store


def _key() -> str:
    # After a restart of all ranks the address of the attempt before must not be found.
    return f"fedgraft/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
