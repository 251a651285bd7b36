"""The keys of one round: ephemeral X25519 pairs, what two sites derive from them, and sealed shares."""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from ...core.errors import UserError
from .parts import pack

KEY = 32
#: What sealing adds.
TAG = 16


def fresh() -> bytes:
    """A private key from the operating system's entropy."""
    return X25519PrivateKey.generate().private_bytes_raw()


def public(private: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def derive(secret: bytes, purpose: bytes, context: bytes, *names: bytes) -> bytes:
    """A key of 32 bytes by HKDF-SHA256, for one purpose, in one context, between those who are named."""
    return HKDF(hashes.SHA256(), KEY, salt=None, info=pack(purpose, context, *names)).derive(secret)


def shared(private: bytes, other: bytes, site: str) -> bytes:
    """The secret that ``private`` has in common with the owner of the public key ``other``, which is ``site``'s.

    Raises :class:`UserError` for a key that has the same secret with everybody.
    """
    try:
        return X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(other))
    except ValueError:
        raise UserError(f"{site}: its key of the secure sum is none that can be used") from None


def mask_key(private: bytes, context: bytes, own: tuple[str, bytes], other: tuple[str, bytes]) -> bytes:
    """The key of the mask between two sites, given as (name, public key), the same from either side."""
    names = [part for name, key in sorted((own, other)) for part in (name.encode(), key)]
    return derive(shared(private, other[1], other[0]), b"mask", context, *names)


def seed_key(seed: bytes, context: bytes, site: str) -> bytes:
    """The key of the mask that ``site`` has for itself."""
    return derive(seed, b"own mask", context, site.encode())


def _seal_key(private: bytes, context: bytes, other: tuple[str, bytes], way: tuple[tuple[str, bytes], ...]) -> bytes:
    names = [part for name, key in way for part in (name.encode(), key)]
    return derive(shared(private, other[1], other[0]), b"shares", context, *names)


def seal(private: bytes, context: bytes, own: tuple[str, bytes], to: tuple[str, bytes], text: bytes) -> bytes:
    """``text`` for ``to`` alone (AES-256-GCM). The key is for one direction and seals once: the nonce may be zero."""
    return AESGCM(_seal_key(private, context, to, (own, to))).encrypt(bytes(12), text, None)


def unseal(private: bytes, context: bytes, own: tuple[str, bytes], sender: tuple[str, bytes], sealed: bytes) -> bytes:
    """The inverse of :func:`seal`. Raises :class:`UserError` that names the sender for what it did not seal so."""
    try:
        return AESGCM(_seal_key(private, context, sender, (sender, own))).decrypt(bytes(12), sealed, None)
    except InvalidTag:
        raise UserError(f"{sender[0]}: the shares that came in its name are not what it sealed for this site") from None
