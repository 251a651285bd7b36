"""The coordinator's own folder: the authority's key, which keys were signed, and what follows from both for the kits.

kits/authority/     ca.key, ca.crt, federation.toml, registry.json: never leaves the coordinator
kits/server/        what the server needs
kits/sites/NAME/    what is handed to site NAME; its private key is made there and is never here
kits/roster.json    who takes part, signed
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal, cast

from cryptography.hazmat.primitives.asymmetric import ec

from ..core.errors import UserError
from . import certificates
from .certificates import Signer
from .federation import FederationFile, load_federation
from .files import PRIVATE_FILE, private_folder, read, require_private, write
from .guides import compose_file, readme, settings, systemd_unit
from .roster import Member, roster

State = Literal["active", "awaits a new key", "revoked"]
_BACKUP = "restore the folder from its backup, or provision a new federation"


@dataclass(frozen=True)
class Entry:
    """What is known of a site: its signed key, until when, and every key of it that was given up."""

    public_key: str
    until: str
    state: State = "active"
    given_up: tuple[str, ...] = ()

    @property
    def ends(self) -> datetime:
        return datetime.fromisoformat(self.until)


class Authority:
    """The folder ``kits``, opened. Raises :class:`UserError` where it is not whole, or others may read its keys."""

    def __init__(self, kits: Path) -> None:
        self.kits = kits
        self.folder = kits / "authority"
        if not self.folder.is_dir():
            raise UserError(
                f"{kits}: holds no federation; begin with: fedgraft provision federation.toml --output {kits}"
            )
        require_private(self.folder)
        self.federation = load_federation(self.folder / "federation.toml")
        certificate = certificates.read_certificate(self.folder / "ca.crt", _BACKUP)
        certificates.require_current(certificate, self.folder / "ca.crt", "provision a new federation")
        self.signer = Signer(certificates.read_key(self.folder / "ca.key", _BACKUP), certificate)
        self.number, self.sites = self._registry()

    @classmethod
    def create(cls, source: Path, kits: Path) -> Authority:
        """Found the federation that the file ``source`` describes, in the folder ``kits``; or, where it was founded
        before, take the file's changes over: sites that joined, another address."""
        federation = load_federation(source)
        folder = kits / "authority"
        if folder.is_dir():
            before = cls(kits)
            if before.federation.name != federation.name:
                raise UserError(f"{source}: is of `{federation.name}`, but {kits} holds `{before.federation.name}`")
            gone = [name for name, entry in before.sites.items() if name not in federation.sites]
            if live := next((name for name in gone if before.sites[name].state != "revoked"), ""):
                raise UserError(f"{source}: leaves out the site {live}; first: fedgraft provision revoke {live}")
        else:
            private_folder(kits)
            _new_authority(private_folder(folder), federation)
            write(folder / "registry.json", json.dumps({"number": 0, "sites": {}}), PRIVATE_FILE)
        write(folder / "federation.toml", read(source, "the federation", "give its path"), PRIVATE_FILE)
        opened = cls(kits)
        if not (kits / "server" / "server.key").is_file():
            opened.rotate_server()
        opened.write_kits()
        return opened

    # Sites

    def sign(self, path: Path, expected: str = "") -> tuple[str, Entry]:
        """Sign the request in ``path``, put the site on the roster, and write its certificate into its kit.
        Returns the name and what is now known of it.

        ``expected``: the key's fingerprint, as the site told it by another way. Raises :class:`UserError`, for a name
        that is not in the federation or a key that may not stand for it.
        """
        name, request = certificates.read_request(path)
        if name not in self.federation.sites:
            known = ", ".join(self.federation.sites)
            raise UserError(f"{path}: is of a site `{name}`, which is not in the federation; there are {known}")
        key = cast(ec.EllipticCurvePublicKey, request.public_key())
        public, fingerprint = certificates.public_pem(key), certificates.key_fingerprint(key)
        if expected and expected.replace("-", "").lower() != fingerprint.replace("-", ""):
            raise UserError(f"{path}: the key's fingerprint is {fingerprint}, not the one given; sign nothing, and ask")
        before = self.sites.get(name)
        given_up = before.given_up if before is not None else ()
        if any(public in entry.given_up for entry in self.sites.values()):
            raise UserError(
                f"{path}: this key was given up; the site must make a new one: fedgraft site init --new-key"
            )
        if any(public == entry.public_key for other, entry in self.sites.items() if other != name):
            raise UserError(f"{path}: this key stands for another site already; each site makes its own")
        if before is not None and before.public_key == public and before.ends < certificates.now():
            raise UserError(
                f"{path}: the certificate of site {name} ended on {certificates.day(before.ends)}, and a server that "
                f"let its key go takes it no more; first: fedgraft provision rotate {name}, and the site runs: "
                "fedgraft site init --new-key"
            )
        if before is not None and before.public_key != public:
            if before.state != "awaits a new key":
                why = "is revoked" if before.state == "revoked" else "has another key already"
                raise UserError(
                    f"{path}: site {name} {why}; if this key is to stand for it, first: "
                    f"fedgraft provision rotate {name}"
                )
            given_up = tuple(dict.fromkeys((*given_up, before.public_key)))
        signed = certificates.site(key, name, self.federation.certificates.site_days, self.signer)
        entry = Entry(public, signed.not_valid_after_utc.isoformat(), given_up=given_up)
        self._change(name, entry)
        write(self.kits / "sites" / name / "site.crt", certificates.certificate_pem(signed))
        return name, entry

    def rotate(self, name: str) -> None:
        """Let site ``name`` have a new key signed; until then its present one goes on, unless it was revoked."""
        entry = self._entry(name)
        self._change(name, replace(entry, state="awaits a new key"))

    def revoke(self, name: str) -> None:
        """Take site ``name`` off the roster; its key never stands for it again."""
        entry = self._entry(name)
        given_up = tuple(dict.fromkeys((*entry.given_up, entry.public_key)))
        self._change(name, replace(entry, state="revoked", given_up=given_up))

    def rotate_server(self) -> datetime:
        """Make a new key and certificate for the server; returns when that ends."""
        server = self.federation.server
        key = certificates.new_key()
        days = self.federation.certificates.server_days
        # Its own processes reach a server that listens at one address there.
        hosts = (server.host, *server.names, *(() if ip_address(server.listen).is_unspecified else (server.listen,)))
        certificate = certificates.server(self.federation.name, key.public_key(), hosts, days, self.signer)
        folder = private_folder(self.kits / "server")
        certificates.write_key(folder / "server.key", key)
        write(folder / "server.crt", certificates.certificate_pem(certificate))
        return certificate.not_valid_after_utc

    def rotate_authority(self) -> list[str]:
        """Make a new authority: sign the keys of server and sites anew, and write all kits; returns the sites signed.

        What the one before signed, its rosters included, is worth nothing to who holds the new ca.crt. A site whose
        certificate has ended is not signed. After a crash in the middle of it, to be run again.
        """
        self.signer = _new_authority(self.folder, self.federation)
        self.rotate_server()
        signed = [name for name, entry in self.sites.items() if self._stands(entry) and entry.ends > certificates.now()]
        for name in signed:
            entry = self.sites[name]
            key = certificates.load_public(entry.public_key)
            certificate = certificates.site(key, name, self.federation.certificates.site_days, self.signer)
            self.sites[name] = replace(entry, until=certificate.not_valid_after_utc.isoformat())
            write(self.kits / "sites" / name / "site.crt", certificates.certificate_pem(certificate))
        self._save()
        self.write_kits()
        return signed

    # Kits

    def write_kits(self) -> None:
        """Write into the kits what follows from the federation: settings, guides, units, the authority, the roster."""
        anchor = certificates.certificate_pem(self.signer.certificate)
        fingerprint = certificates.key_fingerprint(certificates.public_of(self.signer.certificate))
        private_folder(self.kits / "sites")
        for site in ("", *self.federation.sites):
            folder = private_folder(self.kits / "sites" / site if site else self.kits / "server")
            write(folder / "ca.crt", anchor)
            write(folder / ("site.toml" if site else "server.toml"), settings(self.federation, site))
            write(folder / "README.md", readme(self.federation, site, fingerprint))
            write(folder / "compose.yaml", compose_file(self.federation, site))
            unit = "fedgraft-site.service" if site else "fedgraft-server.service"
            write(folder / unit, systemd_unit(self.federation, site))
        self._write_roster()

    def _write_roster(self) -> None:
        members = [
            Member(name, entry.public_key, entry.ends) for name, entry in self.sites.items() if self._stands(entry)
        ]
        text = roster(self.federation.name, self.number, members).signed(self.signer)
        folders = (self.kits, self.kits / "server", *(self.kits / "sites" / name for name in self.federation.sites))
        for folder in folders:
            write(folder / "roster.json", text)

    def _entry(self, name: str) -> Entry:
        if name not in self.sites:
            signed = ", ".join(self.sites) or "none yet"
            raise UserError(f"{self.kits}: no key of a site `{name}` was ever signed; signed are {signed}")
        return self.sites[name]

    @staticmethod
    def _stands(entry: Entry) -> bool:
        """Whether the present key of a site stands for it still."""
        return entry.public_key not in entry.given_up

    def _change(self, name: str, entry: Entry) -> None:
        self.sites[name] = entry
        self._save()
        self._write_roster()

    def _save(self) -> None:
        self.number += 1
        known = {"number": self.number, "sites": {name: asdict(entry) for name, entry in self.sites.items()}}
        write(self.folder / "registry.json", json.dumps(known, indent=1), PRIVATE_FILE)

    def _registry(self) -> tuple[int, dict[str, Entry]]:
        path = self.folder / "registry.json"
        try:
            known: Mapping[str, Any] = json.loads(read(path, "the list of signed keys", _BACKUP))
            sites = {
                name: Entry(**{**entry, "given_up": tuple(entry["given_up"])}) for name, entry in known["sites"].items()
            }
            return int(known["number"]), sites
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: is damaged; {_BACKUP}") from None


def _new_authority(folder: Path, federation: FederationFile) -> Signer:
    key = certificates.new_key()
    certificate = certificates.authority(federation.name, key, federation.certificates.authority_days)
    certificates.write_key(folder / "ca.key", key)
    write(folder / "ca.crt", certificates.certificate_pem(certificate))
    return Signer(key, certificate)
