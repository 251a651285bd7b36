"""The roster: who takes part in a federation, with which key and until when, signed by the authority.

The server registers these sites and no others, and every site can tell from it which key another site signs with: a
server cannot slip in a key of its own. Who is revoked is not on it. Its number rises with every change.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from ..core.errors import UserError
from .certificates import Signer, load_public, now, public_of
from .files import read

_PURPOSE = b"fedgraft roster v1\n"
_ALGORITHM = ec.ECDSA(hashes.SHA384())
_MEND = "ask the coordinator for the roster.json of this federation"


@dataclass(frozen=True)
class Member:
    """A site: its name, its long-term public key (PEM, ECDSA on P-384), and when its certificate ends."""

    name: str
    public_key: str
    until: datetime

    @cached_property
    def key(self) -> ec.EllipticCurvePublicKey:
        return load_public(self.public_key)


@dataclass(frozen=True)
class Roster:
    """The members of ``federation`` as of change ``number``, in the order of their names."""

    federation: str
    number: int
    members: tuple[Member, ...]

    def member(self, name: str) -> Member | None:
        return next((member for member in self.members if member.name == name), None)

    def current(self) -> tuple[Member, ...]:
        """The members whose certificates have not ended."""
        return tuple(member for member in self.members if member.until > now())

    def signed(self, signer: Signer) -> str:
        """The roster as the text of a file, with the authority's signature over its body."""
        body = json.dumps(
            {
                "federation": self.federation,
                "number": self.number,
                "members": [
                    {"name": m.name, "public_key": m.public_key, "until": m.until.astimezone(UTC).isoformat()}
                    for m in self.members
                ],
            },
            sort_keys=True,
        )
        signature = signer.key.sign(_PURPOSE + body.encode(), _ALGORITHM)
        return json.dumps({"body": body, "signature": base64.b64encode(signature).decode()}, indent=1) + "\n"


def roster(federation: str, number: int, members: Iterable[Member]) -> Roster:
    """A roster of ``members`` in any order."""
    return Roster(federation, number, tuple(sorted(members, key=lambda member: member.name)))


def verify_roster(text: str | bytes, authority: x509.Certificate, where: object = "the roster") -> Roster:
    """The roster in ``text``, once the authority's signature over it was checked.

    Raises :class:`UserError` that names ``where``, for a text that is no roster or that ``authority`` did not sign.
    """
    try:
        outer = json.loads(text)
        body, signature = outer["body"].encode(), base64.b64decode(outer["signature"], validate=True)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{where}: is no roster; {_MEND}") from None
    try:
        public_of(authority).verify(signature, _PURPOSE + body, _ALGORITHM)
    except InvalidSignature:
        raise UserError(f"{where}: was not signed by this federation's authority, or was changed; {_MEND}") from None
    inner = json.loads(body)
    members = (Member(m["name"], m["public_key"], datetime.fromisoformat(m["until"])) for m in inner["members"])
    return roster(inner["federation"], inner["number"], members)


def read_roster(path: Path, authority: x509.Certificate) -> Roster:
    """The roster in ``path``, checked. Raises :class:`UserError`."""
    return verify_roster(read(path, "the roster", _MEND), authority, path)
