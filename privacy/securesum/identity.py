"""Who a site is: its long-term signing key, and the roster by which every site knows the others' public keys.

A roster comes with provisioning, not from the server: a server that puts its own keys in a site's place is found out.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias, cast

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ec import (
    ECDSA,
    SECP384R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from ...core.errors import PrivateError, UserError
from .parts import pack

#: Ed25519, or ECDSA on P-384 as the node keys of Flower are.
SigningKey: TypeAlias = Ed25519PrivateKey | EllipticCurvePrivateKey
PublicKey: TypeAlias = Ed25519PublicKey | EllipticCurvePublicKey
_KINDS = "an Ed25519 or an ECDSA P-384 key"


def sign(key: SigningKey, text: bytes) -> bytes:
    """The signature of ``text``."""
    return key.sign(text) if isinstance(key, Ed25519PrivateKey) else key.sign(text, ECDSA(hashes.SHA384()))


def signed(key: PublicKey, signature: bytes, text: bytes) -> bool:
    """Whether ``signature`` is one of ``text`` by the owner of ``key``."""
    try:
        if isinstance(key, Ed25519PublicKey):
            key.verify(signature, text)
        else:
            key.verify(signature, text, ECDSA(hashes.SHA384()))
    except InvalidSignature:
        return False
    return True


class Roster:
    """The public keys of the sites, by name. Raises :class:`UserError` where two sites have one key."""

    def __init__(self, keys: Mapping[str, PublicKey]) -> None:
        self._keys = dict(sorted(keys.items()))
        held: dict[bytes, str] = {}
        for site, key in self._keys.items():
            other = held.setdefault(_bytes(key), site)
            if other != site:
                raise UserError(f"the roster has one key for two sites, {other} and {site}; each signs with its own")

    def digest(self, sites: Iterable[str]) -> bytes:
        """SHA-256 over names and keys of ``sites``. Raises :class:`UserError` for one that is not known."""
        whole = hashlib.sha256()
        for site in sites:
            if site not in self._keys:
                raise UserError(f"site {site} is not in this site's roster; give every site the same roster")
            whole.update(pack(site.encode(), _bytes(self._keys[site])))
        return whole.digest()

    def signed(self, site: str, signature: bytes, text: bytes) -> bool:
        """Whether ``site``, by its key here, has signed ``text``."""
        return site in self._keys and signed(self._keys[site], signature, text)

    def owns(self, site: str, key: SigningKey) -> bool:
        """Whether ``key`` is the private key of ``site``."""
        return site in self._keys and _bytes(self._keys[site]) == _bytes(key.public_key())


def load_signing_key(path: Path) -> SigningKey:
    """A site's private key, in OpenSSH's or PEM form, without a passphrase.

    Raises :class:`PrivateError` that names the file.
    """
    try:
        data = path.read_bytes()
        load = serialization.load_ssh_private_key if b"OPENSSH" in data else serialization.load_pem_private_key
        key = load(data, None)
    except OSError as error:
        raise PrivateError(f"{path}: the site's signing key cannot be read: {error.strerror or error}") from None
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise PrivateError(f"{path}: is no private key without a passphrase: {error}") from None
    return cast(SigningKey, _of_a_kind(key, f"{path}:"))


def load_roster(path: Path) -> Roster:
    """The roster in a TOML file: ``[sites]``, and a line ``NAME = "PUBLIC KEY"`` for each, in OpenSSH's or PEM form.

    Raises :class:`PrivateError` that names the file and the site.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PrivateError(f"{path}: the roster cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise PrivateError(f"{path}: is not valid TOML: {error}") from None
    sites = values.get("sites")
    if set(values) != {"sites"} or not isinstance(sites, dict):
        raise PrivateError(f'{path}: a roster holds a section [sites] with lines NAME = "PUBLIC KEY", nothing else')
    try:
        return Roster({site: _public(text, f"{path}: site {site}") for site, text in sites.items()})
    except PrivateError:
        raise
    except UserError as error:
        raise PrivateError(f"{path}: {error}") from None


def _public(text: object, where: str) -> PublicKey:
    data = text.encode() if isinstance(text, str) else b""
    load = serialization.load_pem_public_key if b"BEGIN" in data else serialization.load_ssh_public_key
    try:
        key = load(data)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise PrivateError(f"{where} has no public key, in OpenSSH's or PEM form") from None
    return cast(PublicKey, _of_a_kind(key, f"{where}: its key"))


def _of_a_kind(key: object, what: str) -> object:
    """``key``, which is of a kind that sites sign with. Raises :class:`PrivateError` that calls it ``what``."""
    if isinstance(key, Ed25519PrivateKey | Ed25519PublicKey):
        return key
    if isinstance(key, EllipticCurvePrivateKey | EllipticCurvePublicKey) and isinstance(key.curve, SECP384R1):
        return key
    raise PrivateError(f"{what} is not {_KINDS}")


def _bytes(key: PublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
