"""What the two ends of a secure sum say to each other: typed, and decoded strictly within bounds.

    site -> server   Advert, Envelopes, masked numbers (an array), Agreement, Reveal
    server -> site   Adverts, Envelopes, Survivors, Agreements

Every ``decode`` takes the bytes, the name of their sender for errors, and raises :class:`UserError` for what is not
exactly such a message.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

from ...core.errors import UserError
from .keys import KEY, TAG
from .parts import pack, unpack
from .shamir import SHARE
from .terms import MOST_SITES

_LONGEST_NAME = 200
_LONGEST_SIGNATURE = 200
#: Both shares for one site, sealed.
SEALED = 2 * SHARE + TAG


@dataclass(frozen=True)
class Advert:
    """A site's keys of the round: for sealing and for masks, and the commitment to its own seed; signed by the site."""

    site: str
    sealing: bytes
    masking: bytes
    commitment: bytes
    signature: bytes = b""

    def text(self, context: bytes) -> bytes:
        """What is signed."""
        return pack(b"advert", context, self.site.encode(), self.sealing, self.masking, self.commitment)

    def encode(self) -> bytes:
        return pack(b"advert", self.site.encode(), self.sealing, self.masking, self.commitment, self.signature)

    @classmethod
    def decode(cls, data: bytes, sender: str) -> Self:
        site, sealing, masking, commitment, signature = _parts(data, b"advert", sender, 5)
        for key in (sealing, masking, commitment):
            _require_length(key, KEY, "key", sender)
        return cls(_name(site, sender), sealing, masking, commitment, _signature(signature, sender))


@dataclass(frozen=True)
class Adverts:
    """The adverts of all sites that take part, in the order of their names."""

    adverts: tuple[Advert, ...]

    def encode(self) -> bytes:
        return pack(b"adverts", pack(*(advert.encode() for advert in self.adverts)))

    @classmethod
    def decode(cls, data: bytes, sender: str) -> Self:
        (listed,) = _parts(data, b"adverts", sender, 1)
        adverts = tuple(Advert.decode(part, sender) for part in unpack(listed, sender, most=MOST_SITES))
        _require_order([advert.site for advert in adverts], sender)
        return cls(adverts)


@dataclass(frozen=True)
class Envelopes:
    """Sealed shares by site: whom they are for, on the way to the server; who sealed them, on the way back."""

    sealed: Mapping[str, bytes]

    def encode(self) -> bytes:
        return pack(b"envelopes", _table(self.sealed))

    @classmethod
    def decode(cls, data: bytes, sender: str) -> Self:
        (listed,) = _parts(data, b"envelopes", sender, 1)
        sealed = _read_table(listed, sender)
        for text in sealed.values():
            _require_length(text, SEALED, "sealed shares", sender)
        return cls(sealed)


@dataclass(frozen=True)
class Survivors:
    """The sites whose masked numbers have arrived."""

    sites: tuple[str, ...]

    def encode(self) -> bytes:
        return pack(b"survivors", _names(self.sites))

    @classmethod
    def decode(cls, data: bytes, sender: str) -> Self:
        (listed,) = _parts(data, b"survivors", sender, 1)
        sites = tuple(_name(part, sender) for part in unpack(listed, sender, most=MOST_SITES))
        _require_order(sites, sender)
        return cls(sites)


def agreed(context: bytes, adverts: bytes, masking: Iterable[str], about: bytes, survivors: Iterable[str]) -> bytes:
    """What a site signs before it reveals anything: the whole course of the round so far, as it knows it.

    ``adverts``: the digest of the adverts that it was shown; ``masking``: whose masks are in its numbers; ``about``:
    the length of its vector and what it was computed from; ``survivors``: whose numbers are said to have arrived.
    """
    return pack(b"agreed", context, adverts, _names(masking), about, _names(survivors))


@dataclass(frozen=True)
class Agreement:
    """A site's signature of :func:`agreed`."""

    signature: bytes

    def encode(self) -> bytes:
        return pack(b"agreement", self.signature)

    @classmethod
    def decode(cls, data: bytes, sender: str) -> Self:
        (signature,) = _parts(data, b"agreement", sender, 1)
        return cls(_signature(signature, sender))


@dataclass(frozen=True)
class Agreements:
    """The signatures of all sites that agreed, by site."""

    signatures: Mapping[str, bytes]

    def encode(self) -> bytes:
        return pack(b"agreements", _table(self.signatures))

    @classmethod
    def decode(cls, data: bytes, sender: str) -> Self:
        (listed,) = _parts(data, b"agreements", sender, 1)
        return cls({site: _signature(text, sender) for site, text in _read_table(listed, sender).items()})


@dataclass(frozen=True)
class Reveal:
    """Shares of one site's holding: of the seeds of those who survived, of the masking keys of those who were lost."""

    seeds: Mapping[str, bytes]
    keys: Mapping[str, bytes]

    def encode(self) -> bytes:
        return pack(b"reveal", _table(self.seeds), _table(self.keys))

    @classmethod
    def decode(cls, data: bytes, sender: str) -> Self:
        tables = [_read_table(part, sender) for part in _parts(data, b"reveal", sender, 2)]
        for table in tables:
            for share in table.values():
                _require_length(share, SHARE, "share", sender)
        return cls(*tables)


def _parts(data: bytes, tag: bytes, sender: str, count: int) -> list[bytes]:
    parts = unpack(data, sender, most=count + 1)
    if len(parts) != count + 1 or parts[0] != tag:
        raise UserError(f"{sender}: its message of the secure sum is no {tag.decode()}")
    return parts[1:]


def _names(names: Iterable[str]) -> bytes:
    return pack(*(name.encode() for name in names))


def _table(values: Mapping[str, bytes]) -> bytes:
    return pack(*(part for name in sorted(values) for part in (name.encode(), values[name])))


def _read_table(data: bytes, sender: str) -> dict[str, bytes]:
    parts = unpack(data, sender, most=2 * MOST_SITES)
    if len(parts) % 2:
        raise UserError(f"{sender}: its message of the secure sum names a site and says nothing of it")
    names = [_name(part, sender) for part in parts[::2]]
    _require_order(names, sender)
    return dict(zip(names, parts[1::2], strict=True))


def _name(part: bytes, sender: str) -> str:
    try:
        name = part.decode()
    except UnicodeDecodeError:
        name = ""
    if not name or len(part) > _LONGEST_NAME:
        raise UserError(f"{sender}: its message of the secure sum names a site that cannot be")
    return name


def _signature(part: bytes, sender: str) -> bytes:
    if len(part) > _LONGEST_SIGNATURE:
        raise UserError(f"{sender}: a signature in its message of the secure sum is too long")
    return part


def _require_order(names: Iterable[str], sender: str) -> None:
    names = list(names)
    if names != sorted(set(names)):
        raise UserError(f"{sender}: its message of the secure sum names sites twice or out of order")


def _require_length(part: bytes, length: int, what: str, sender: str) -> None:
    if len(part) != length:
        raise UserError(f"{sender}: a {what} in its message of the secure sum has {len(part)} bytes, not {length}")
