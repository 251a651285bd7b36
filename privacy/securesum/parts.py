"""Byte strings one after the other, each with its length before it: one way to write a list, one way to read it.

What is signed, derived from and sent is written so: two different lists never have the same bytes.
"""

from __future__ import annotations

from ...core.errors import UserError

_LENGTH = 4


def pack(*parts: bytes) -> bytes:
    """``parts`` as one byte string."""
    return b"".join(len(part).to_bytes(_LENGTH, "big") + part for part in parts)


def unpack(data: bytes, sender: str, *, most: int) -> list[bytes]:
    """The inverse of :func:`pack`. Raises :class:`UserError` that names ``sender`` for bytes that are no such list, or
    for one of more than ``most`` parts."""
    parts: list[bytes] = []
    at = 0
    while at < len(data):
        end = at + _LENGTH + int.from_bytes(data[at : at + _LENGTH], "big")
        if at + _LENGTH > len(data) or end > len(data):
            raise UserError(f"{sender}: its message of the secure sum is cut off")
        if len(parts) == most:
            raise UserError(f"{sender}: its message of the secure sum has more than {most} parts")
        parts.append(data[at + _LENGTH : end])
        at = end
    return parts
