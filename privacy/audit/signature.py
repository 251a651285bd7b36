"""The signature under an audit report: Ed25519 (RFC 8032) with a key that the site keeps.

A report is signed over its canonical JSON, and its page over its bytes. Whoever may read the key can sign anything, so
its file is the owner's alone; whoever checks a report must know the key's fingerprint from elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from ...core.errors import UserError

ALGORITHM = "Ed25519"
_MARK = "<!-- fedgraft-audit-signature "
_END = " -->\n"


def canonical(value: Any) -> bytes:
    """``value`` as the bytes that are signed: JSON, keys sorted, no blanks, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


class Signer:
    """Signs with one site's key."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public_key = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()
        self.fingerprint = fingerprint(self.public_key)

    @classmethod
    def at(cls, path: Path) -> Signer:
        """The key in the file ``path``, made there on first use for its owner alone (0600).

        Raises :class:`UserError` for a file that others may read, or that holds no such key.
        """
        try:
            if not path.exists():
                _create(path)
            if stat.S_IMODE(path.stat().st_mode) & 0o077:
                raise UserError(f"{path}: others may read the audit key; chmod 600 it, or make a new one")
            key = load_pem_private_key(path.read_bytes(), password=None)
        except OSError as error:
            raise UserError(f"{path}: the audit key cannot be used: {error.strerror or error}") from None
        except (ValueError, TypeError):
            raise UserError(f"{path}: not an Ed25519 key in PEM form; give another --key") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise UserError(f"{path}: not an Ed25519 key; give another --key")
        return cls(key)

    def sign(self, content: bytes) -> dict[str, str]:
        """The signature over ``content``, with the public key to check it by."""
        return {
            "algorithm": ALGORITHM,
            "public_key": self.public_key,
            "fingerprint": self.fingerprint,
            "signature": self._key.sign(content).hex(),
        }

    def sign_report(self, report: Mapping[str, Any]) -> dict[str, str]:
        """The signature over a report's canonical JSON."""
        return self.sign(canonical(report))

    def signed_report(self, report: Mapping[str, Any]) -> str:
        """The text of the JSON file: the report and its signature."""
        return _file_text({"report": report, "signature": self.sign_report(report)})

    def signed_page(self, page: str) -> str:
        """``page`` with a last line that signs every byte before it."""
        if not page.endswith("\n"):
            page += "\n"
        return page + _MARK + canonical(self.sign(page.encode())).decode() + _END


def fingerprint(public_key: str) -> str:
    """SHA-256 of a public key, by which people name it."""
    return hashlib.sha256(bytes.fromhex(public_key)).hexdigest()


def verify(path: Path) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """The report in the file ``path`` (None for a page) and its signature, once that holds for every byte.

    Raises :class:`UserError` that says what was changed.
    """
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or 'not a text'}") from None
    if path.suffix.lower() in (".html", ".htm"):
        page, mark, rest = text.rpartition(_MARK)
        given = _parsed(rest.removesuffix(_END), path) if mark and rest.endswith(_END) else None
        if given is None or rest != canonical(given).decode() + _END:
            raise UserError(f"{path}: its last line is not the signature of a fedgraft audit; it was changed")
        return None, _checked(path, page.encode(), given)
    whole = _parsed(text, path)
    if not isinstance(whole, dict) or set(whole) != {"report", "signature"} or text != _file_text(whole):
        raise UserError(f"{path}: not a signed fedgraft audit as it was written; it was changed")
    return whole["report"], _checked(path, canonical(whole["report"]), whole["signature"])


def _checked(path: Path, content: bytes, given: Any) -> dict[str, str]:
    try:
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(given["public_key"]))
        public.verify(bytes.fromhex(given["signature"]), content)
        whole = (
            set(given) == {"algorithm", "public_key", "fingerprint", "signature"}
            and given["algorithm"] == ALGORITHM
            and given["fingerprint"] == fingerprint(given["public_key"])
            and given["public_key"] == given["public_key"].lower()
            and given["signature"] == given["signature"].lower()
        )
    except (InvalidSignature, ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise UserError(f"{path}: the signature does not hold; the report was changed after it was signed")
    return dict(given)


def _parsed(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{path}: holds no signed fedgraft audit; it was changed, or is another file") from None


def _file_text(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"


def _create(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return  # another process made it in the meantime
    try:
        os.write(file, content)
        os.fsync(file)
    finally:
        os.close(file)
