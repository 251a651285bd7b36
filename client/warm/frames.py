"""Bytes between the two processes of a site's worker: each frame with its length before it."""

from __future__ import annotations

import socket

from ...core.errors import UserError
from ...core.packing import LIMIT

_HEAD = 8


def send_frames(channel: socket.socket, *frames: bytes) -> None:
    """Send ``frames`` whole. Raises :class:`OSError` when the other process is gone or slower than the timeout."""
    for frame in frames:
        channel.sendall(len(frame).to_bytes(_HEAD, "big"))
        channel.sendall(frame)


def receive_frame(channel: socket.socket) -> bytes:
    """The next frame.

    Raises :class:`EOFError` when the other process is gone, and :class:`UserError` for a frame beyond twice what a
    message may be: a site's memory of the run travels beside it.
    """
    size = int.from_bytes(_exactly(channel, _HEAD), "big")
    if size > 2 * LIMIT:
        raise UserError(f"a frame of {size} bytes between worker and answerer, which no message makes")
    return bytes(_exactly(channel, size))


def _exactly(channel: socket.socket, size: int) -> bytearray:
    content = bytearray()
    while len(content) < size:
        part = channel.recv(min(size - len(content), 1 << 20))
        if not part:
            raise EOFError("the other process is gone")
        content += part
    return content
