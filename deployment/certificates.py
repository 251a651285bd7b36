"""X.509 as a federation uses it: one authority, the server's certificate, the sites' certificates.

Keys are ECDSA on P-384, which Flower's node authentication takes, and private ones are never encrypted: what guards
them is the mode of their file.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ..core.errors import UserError
from .files import PRIVATE_FILE, read, require_private, write

_CURVE = ec.SECP384R1
_HASH = hashes.SHA384()
#: What a certificate is valid before its making: clocks differ a little.
_BACKDATED = timedelta(minutes=5)
#: Reminders begin this long before an end.
SOON = timedelta(days=30)
#: By what names the server's own processes reach it.
LOCAL = ("localhost", "127.0.0.1", "::1")


def now() -> datetime:
    return datetime.now(UTC)


# Keys


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(_CURVE())


def write_key(path: Path, key: ec.EllipticCurvePrivateKey, *, ssh: bool = False) -> None:
    """Write ``key`` unencrypted, mode 0600; ``ssh``: in OpenSSH's format, which Flower asks of a site."""
    form = serialization.PrivateFormat.OpenSSH if ssh else serialization.PrivateFormat.PKCS8
    write(path, key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()), PRIVATE_FILE)


def read_key(path: Path, mend: str) -> ec.EllipticCurvePrivateKey:
    """The private key in ``path``, whose mode must be private. Raises :class:`UserError`."""
    content = read(path, "the private key", mend)
    require_private(path)
    load = serialization.load_ssh_private_key if b"OPENSSH" in content else serialization.load_pem_private_key
    try:
        key = load(content, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise UserError(f"{path}: holds no private key that can be read; {mend}") from None
    _require_curve(key, f"{path}: the key", mend)
    return cast(ec.EllipticCurvePrivateKey, key)


def public_pem(key: ec.EllipticCurvePublicKey) -> str:
    """The public key as PEM (SubjectPublicKeyInfo), byte for byte what Flower keeps of a registered node."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()


def load_public(pem: str) -> ec.EllipticCurvePublicKey:
    """The inverse of :func:`public_pem`. Raises :class:`UserError`."""
    try:
        key = serialization.load_pem_public_key(pem.encode())
    except (ValueError, UnsupportedAlgorithm):
        raise UserError("a public key that is none") from None
    _require_curve(key, "a public key", "only P-384 keys take part")
    return cast(ec.EllipticCurvePublicKey, key)


def key_fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 of the public key, as people compare it over the telephone: ``ab12-cd34-...`` (64 digits)."""
    return pem_fingerprint(public_pem(key))


def pem_fingerprint(pem: str | bytes) -> str:
    """The same for what says that it is a public key as PEM."""
    digest = hashlib.sha256(pem.encode() if isinstance(pem, str) else pem).hexdigest()
    return "-".join(digest[at : at + 8] for at in range(0, len(digest), 8))


def _require_curve(key: object, what: str, mend: str) -> None:
    kinds = (ec.EllipticCurvePrivateKey, ec.EllipticCurvePublicKey)
    if not isinstance(key, kinds) or not isinstance(key.curve, _CURVE):
        raise UserError(f"{what} is not an ECDSA key on P-384; {mend}")


# Certificates


def authority(name: str, key: ec.EllipticCurvePrivateKey, days: int) -> x509.Certificate:
    """The certificate of a federation's own authority, signed by itself."""
    usage = _usage(key_cert_sign=True, crl_sign=True, digital_signature=True)
    limits = x509.BasicConstraints(ca=True, path_length=0)
    return _certificate(f"{name} authority", key.public_key(), key, None, days, usage, limits, [])


def server(
    name: str, key: ec.EllipticCurvePublicKey, hosts: Iterable[str], days: int, signer: Signer
) -> x509.Certificate:
    """The server's certificate for ``hosts`` (names or addresses) and for its own processes."""
    names = x509.SubjectAlternativeName([_host(host) for host in dict.fromkeys((*hosts, *LOCAL))])
    use = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    limits = x509.BasicConstraints(ca=False, path_length=None)
    usage = _usage(digital_signature=True)
    return _certificate(f"{name} server", key, signer.key, signer, days, usage, limits, [names, use])


def site(key: ec.EllipticCurvePublicKey, name: str, days: int, signer: Signer) -> x509.Certificate:
    """The certificate of site ``name`` for its key."""
    use = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
    limits = x509.BasicConstraints(ca=False, path_length=None)
    return _certificate(name, key, signer.key, signer, days, _usage(digital_signature=True), limits, [use])


class Signer:
    """An authority that can sign: its key and its certificate, which must belong together."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        if public_pem(key.public_key()) != public_pem(public_of(certificate)):
            raise UserError("the authority's key does not belong to its certificate; restore both from one backup")
        self.key = key
        self.certificate = certificate


def public_of(certificate: x509.Certificate) -> ec.EllipticCurvePublicKey:
    """The public key in ``certificate``. Raises :class:`UserError` for one of another kind."""
    _require_curve(certificate.public_key(), "the certificate's key", "only P-384 keys take part")
    return cast(ec.EllipticCurvePublicKey, certificate.public_key())


def certificate_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def read_certificate(path: Path, mend: str) -> x509.Certificate:
    """The certificate in ``path``. Raises :class:`UserError`."""
    try:
        return x509.load_pem_x509_certificate(read(path, "the certificate", mend))
    except (ValueError, UnsupportedAlgorithm):
        raise UserError(f"{path}: holds no certificate that can be read; {mend}") from None


def require_issued(certificate: x509.Certificate, by: x509.Certificate, path: Path) -> None:
    """Raise :class:`UserError` unless the authority ``by`` signed ``certificate``."""
    try:
        certificate.verify_directly_issued_by(by)
    except (InvalidSignature, ValueError, TypeError):
        raise UserError(f"{path}: was not signed by this federation's authority; copy the one made for it") from None


def require_current(certificate: x509.Certificate, path: Path, mend: str) -> None:
    """Raise :class:`UserError` unless ``certificate`` is valid today by this machine's clock."""
    begin, end, at = certificate.not_valid_before_utc, certificate.not_valid_after_utc, now()
    if at < begin:
        raise UserError(f"{path}: is not valid before {day(begin)}, and here it is {day(at)}; set this machine's clock")
    if at > end:
        raise UserError(f"{path}: expired on {day(end)} (here it is {day(at)}); {mend}")


def day(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M} UTC"


# Signing requests


def new_request(name: str, key: ec.EllipticCurvePrivateKey) -> bytes:
    """What site ``name`` sends to have its key signed, as PEM. The key signs it too, which proves that it is held."""
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(_subject(name))
        .sign(key, _HASH)
        .public_bytes(serialization.Encoding.PEM)
    )


def read_request(path: Path) -> tuple[str, x509.CertificateSigningRequest]:
    """The site's name and the request in ``path``, whose signature is checked. Raises :class:`UserError`."""
    mend = "have the site run `fedgraft site init` again and send site.csr"
    content = read(path, "the signing request", mend)
    try:
        found = x509.load_pem_x509_csr(content)
        good = found.is_signature_valid
        names = found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except (ValueError, UnsupportedAlgorithm, InvalidSignature):
        raise UserError(f"{path}: holds no signing request that can be read; {mend}") from None
    _require_curve(found.public_key(), f"{path}: the key", mend)
    if not good:
        raise UserError(f"{path}: is not signed by the key in it, so nobody has shown to hold that key; {mend}")
    if len(names) != 1:
        raise UserError(f"{path}: names no site; {mend}")
    return str(names[0].value), found


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _host(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _usage(*, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _certificate(
    name: str,
    key: ec.EllipticCurvePublicKey,
    by: ec.EllipticCurvePrivateKey,
    signer: Signer | None,
    days: int,
    usage: x509.KeyUsage,
    limits: x509.BasicConstraints,
    more: list[x509.ExtensionType],
) -> x509.Certificate:
    begin = now()
    end = begin + timedelta(days=days)
    if signer is not None:
        # Nothing outlives its authority.
        end = min(end, signer.certificate.not_valid_after_utc)
    issuer = signer.certificate.subject if signer is not None else _subject(name)
    builder = (
        x509.CertificateBuilder()
        .subject_name(_subject(name))
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin - _BACKDATED)
        .not_valid_after(end)
        .add_extension(limits, critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(by.public_key()), critical=False)
    )
    for extension in more:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(by, _HASH)
