"""The two kits as their owners open them: every file there, of this federation, valid today, with a private mode."""

from __future__ import annotations

import json
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from ..core.config import Section
from ..core.errors import UserError
from . import certificates
from .federation import Server, read_toml
from .files import PRIVATE_FILE, read, require_private, write
from .roster import Roster, read_roster

#: The environment variable by which the ServerApp finds the folder of the server's kit.
SERVER_KIT = "FEDGRAFT_SERVER_KIT"
_ASK = "ask the coordinator for this site's kit"
_SEND = "send site.csr to the coordinator and put the site.crt that comes back here"
_INIT = "run: fedgraft site init"
_ENDED = "run fedgraft site init --new-key and send site.csr; the coordinator runs before: fedgraft provision rotate"
_ROTATE = "the coordinator runs: fedgraft provision rotate server"


class ServerSettings(Section):
    """server.toml."""

    federation: str
    server: Server


class SiteSettings(Section):
    """site.toml."""

    federation: str
    site: str
    server: Server


@dataclass(frozen=True)
class ServerKit:
    """The server's folder."""

    folder: Path
    settings: ServerSettings
    authority: x509.Certificate
    certificate: x509.Certificate

    @classmethod
    def open(cls, folder: Path) -> ServerKit:
        """Raises :class:`UserError` for what is missing, wrong, out of date, or readable by others."""
        folder = folder.absolute()
        path = folder / "server.toml"
        settings = read_toml(
            ServerSettings, _text(path, "the server's settings", f"is {folder} the server's kit?"), path
        )
        require_private(folder)
        authority = _authority(folder, _ROTATE)
        crt = folder / "server.crt"
        certificate = certificates.read_certificate(crt, _ROTATE)
        certificates.require_issued(certificate, authority, crt)
        certificates.require_current(certificate, crt, _ROTATE)
        _require_pair(certificates.read_key(folder / "server.key", _ROTATE), certificate, crt, _ROTATE)
        kit = cls(folder, settings, authority, certificate)
        kit.roster()
        return kit

    def roster(self) -> Roster:
        """The sites that may take part, as the file says now. Raises :class:`UserError`."""
        return _roster(self.folder, self.authority, self.settings.federation, self.state)

    @property
    def own_address(self) -> str:
        """By which address processes on the server's machine reach it."""
        listen = ip_address(self.settings.server.listen)
        return str(listen) if not listen.is_unspecified else "127.0.0.1" if listen.version == 4 else "::1"

    @property
    def state(self) -> Path:
        """Where the SuperLink keeps what it must not forget."""
        return self.folder / "state"

    @property
    def nodes(self) -> Path:
        """Which of Flower's nodes is which site, as JSON."""
        return self.state / "nodes.json"

    @property
    def runs(self) -> Path:
        """Where run directories lie."""
        return self.folder / "runs"


@dataclass(frozen=True)
class SiteKit:
    """A site's folder."""

    folder: Path
    settings: SiteSettings
    authority: x509.Certificate

    @classmethod
    def open(cls, folder: Path) -> SiteKit:
        """What the coordinator handed out. Raises :class:`UserError`."""
        folder = folder.absolute()
        path = folder / "site.toml"
        settings = read_toml(SiteSettings, _text(path, "the site's settings", f"is {folder} a site's kit?"), path)
        return cls(folder, settings, _authority(folder, _ASK))

    @property
    def name(self) -> str:
        return self.settings.site

    @property
    def key(self) -> Path:
        return self.folder / "site.key"

    @property
    def next_key(self) -> Path:
        """The key that takes over once its certificate is here."""
        return self.folder / "site.key.next"

    @property
    def state(self) -> Path:
        """Where ledger and audit log lie."""
        return self.folder / "state"

    @property
    def policy(self) -> Path:
        return self.folder / "policy.toml"

    def identity(self) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
        """The site's key and its certificate; a new key whose certificate came takes the old one's place here.

        Raises :class:`UserError` for what is missing, wrong, out of date, or readable by others.
        """
        crt = self.folder / "site.crt"
        require_private(self.folder)
        key = certificates.read_key(self.key, _INIT)
        certificate = certificates.read_certificate(crt, _SEND)
        certificates.require_issued(certificate, self.authority, crt)
        subject = certificate.subject.rfc4514_string()
        if subject != f"CN={self.name}":
            raise UserError(f"{crt}: is the certificate of {subject.removeprefix('CN=')}, not of {self.name}; {_SEND}")
        if self.next_key.is_file():
            following = certificates.read_key(self.next_key, _INIT)
            if certificates.public_pem(following.public_key()) == _public(certificate):
                self.next_key.replace(self.key)
                key = following
        _require_pair(key, certificate, crt, _SEND)
        certificates.require_current(certificate, crt, _ENDED)
        return key, certificate

    def roster(self) -> Roster:
        """Who takes part, as the coordinator last told this site. Raises :class:`UserError`."""
        return _roster(self.folder, self.authority, self.settings.federation, self.state)

    def require_member(self) -> Roster:
        """The roster, once it was found to list this site's key. Raises :class:`UserError`."""
        found, (key, _) = self.roster(), self.identity()
        member = found.member(self.name)
        if member is None or member.public_key != certificates.public_pem(key.public_key()):
            raise UserError(
                f"{self.folder / 'roster.json'}: does not list this site's key; put the roster.json that came with "
                "site.crt there, unless the site was revoked"
            )
        return found


def _public(certificate: x509.Certificate) -> str:
    return certificates.public_pem(certificates.public_of(certificate))


def _require_pair(key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate, path: Path, mend: str) -> None:
    if certificates.public_pem(key.public_key()) != _public(certificate):
        raise UserError(f"{path}: is not the certificate of the key beside it; {mend}")


def _authority(folder: Path, mend: str) -> x509.Certificate:
    path = folder / "ca.crt"
    certificate = certificates.read_certificate(path, mend)
    certificates.require_current(certificate, path, "the coordinator runs: fedgraft provision rotate authority")
    return certificate


def _roster(folder: Path, authority: x509.Certificate, federation: str, state: Path) -> Roster:
    path = folder / "roster.json"
    found = read_roster(path, authority)
    if found.federation != federation:
        raise UserError(f"{path}: is of the federation {found.federation}, not of {federation}")
    last = _number_in_force(authority, _memory(state))
    if found.number < last:
        # A site that was revoked since may stand on it.
        raise UserError(
            f"{path}: is number {found.number}, and number {last} was in force here already; put the newest there "
            f"(remove {_memory(state)} if the coordinator went back to a backup)"
        )
    return found


def remember_roster(kit: ServerKit | SiteKit, found: Roster) -> None:
    """Write down that ``found`` was in force, so that no earlier one is again. Raises :class:`UserError`."""
    if found.number > _number_in_force(kit.authority, _memory(kit.state)):
        known = {"authority": _signer(kit.authority), "number": found.number}
        write(_memory(kit.state), json.dumps(known), PRIVATE_FILE)


def _memory(state: Path) -> Path:
    return state / "roster-number.json"


def _number_in_force(authority: x509.Certificate, memory: Path) -> int:
    """The number of the newest roster of ``authority`` that was in force here; -1 where none was."""
    try:
        before = json.loads(memory.read_bytes())
        return int(before["number"]) if before["authority"] == _signer(authority) else -1
    except FileNotFoundError:
        return -1
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{memory}: cannot be read; remove it once roster.json is known to be the newest") from None


def _signer(authority: x509.Certificate) -> str:
    return certificates.key_fingerprint(certificates.public_of(authority))


def _text(path: Path, what: str, mend: str) -> str:
    try:
        return read(path, what, mend).decode()
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not text") from None
