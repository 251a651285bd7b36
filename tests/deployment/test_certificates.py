"""Certificates, held against the strict verifier of `cryptography`, and keys, against Flower's own readers."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509 import verification
from flwr.cli.supernode.register import try_load_public_key
from flwr.supercore.primitives.asymmetric import uses_nist_ec_curve

from fedgraft.core.errors import UserError
from fedgraft.deployment import certificates
from fedgraft.deployment.certificates import Signer


@pytest.fixture(scope="module")
def signer() -> Signer:
    key = certificates.new_key()
    return Signer(key, certificates.authority("oncology", key, 100))


def _server(signer: Signer, days: int = 10) -> x509.Certificate:
    key = certificates.new_key().public_key()
    return certificates.server("oncology", key, ["fed.example.org", "10.0.0.7"], days, signer)


@pytest.mark.parametrize("host", ["fed.example.org", "10.0.0.7", "localhost", "127.0.0.1", "::1"])
def test_a_strict_verifier_accepts_the_server_under_each_of_its_names(signer: Signer, host: str) -> None:
    store = verification.Store([signer.certificate])
    verifier = verification.PolicyBuilder().store(store).build_server_verifier(certificates._host(host))
    certificate = _server(signer)
    assert verifier.verify(certificate, []) == [certificate, signer.certificate]


def test_it_refuses_another_name_another_authority_and_another_time(signer: Signer) -> None:
    key = certificates.new_key()
    other = Signer(key, certificates.authority("oncology", key, 100))
    store, certificate = verification.Store([signer.certificate]), _server(signer)
    builder = verification.PolicyBuilder().store(store)
    with pytest.raises(verification.VerificationError):
        builder.build_server_verifier(x509.DNSName("evil.example.org")).verify(certificate, [])
    mine = builder.build_server_verifier(x509.DNSName("fed.example.org"))
    with pytest.raises(verification.VerificationError):
        mine.verify(_server(other), [])
    later = builder.time(certificates.now() + timedelta(days=11)).build_server_verifier(x509.DNSName("fed.example.org"))
    with pytest.raises(verification.VerificationError):
        later.verify(certificate, [])


def test_a_site_cannot_pass_for_the_server_nor_sign_for_others(signer: Signer, tmp_path: Path) -> None:
    key = certificates.new_key()
    (tmp_path / "site.csr").write_bytes(certificates.new_request("east", key))
    name, _ = certificates.read_request(tmp_path / "site.csr")
    certificate = certificates.site(key.public_key(), name, 10, signer)
    store = verification.Store([signer.certificate])
    verifier = verification.PolicyBuilder().store(store).build_server_verifier(x509.DNSName("east"))
    with pytest.raises(verification.VerificationError):
        verifier.verify(certificate, [])
    assert certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert certificate.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign is False
    with pytest.raises(UserError, match="was not signed by this federation's authority"):
        certificates.require_issued(_server(Signer(key, certificate)), signer.certificate, tmp_path)


def test_nothing_outlives_its_authority(signer: Signer) -> None:
    assert _server(signer, days=3000).not_valid_after_utc == signer.certificate.not_valid_after_utc


def test_dates_are_told_with_the_clock_that_was_read(
    signer: Signer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, at = _server(signer), certificates.now()
    certificates.require_current(certificate, tmp_path, "mend it")
    monkeypatch.setattr(certificates, "now", lambda: at + timedelta(days=11))
    with pytest.raises(UserError, match=r"expired on .*; mend it"):
        certificates.require_current(certificate, tmp_path, "mend it")
    monkeypatch.setattr(certificates, "now", lambda: at - timedelta(hours=1))
    with pytest.raises(UserError, match=r"is not valid before .* set this machine's clock"):
        certificates.require_current(certificate, tmp_path, "mend it")


def test_flower_reads_a_site_s_key_and_keeps_the_public_part_as_we_do(tmp_path: Path) -> None:
    key = certificates.new_key()
    certificates.write_key(tmp_path / "site.key", key, ssh=True)
    assert (tmp_path / "site.key").stat().st_mode & 0o777 == 0o600
    read = serialization.load_ssh_private_key((tmp_path / "site.key").read_bytes(), None)
    assert isinstance(read, ec.EllipticCurvePrivateKey) and uses_nist_ec_curve(read.public_key())
    public = read.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    (tmp_path / "site.pub").write_bytes(public)
    assert try_load_public_key(tmp_path / "site.pub").decode() == certificates.public_pem(key.public_key())


@pytest.mark.parametrize("ssh", [True, False])
def test_a_key_that_others_may_read_is_refused_with_the_mend(tmp_path: Path, ssh: bool) -> None:
    path = tmp_path / "a.key"
    key = certificates.new_key()
    certificates.write_key(path, key, ssh=ssh)
    assert certificates.read_key(path, "").private_numbers() == key.private_numbers()
    path.chmod(0o640)
    with pytest.raises(UserError, match=rf"others may use it \(mode 0640\); run: chmod 600 {path}"):
        certificates.read_key(path, "")


def test_a_key_of_another_kind_or_none_at_all_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.key"
    path.touch(mode=0o600)
    with pytest.raises(UserError, match="holds no private key"):
        certificates.read_key(path, "")
    for other in (rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP256R1())):
        form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        path.write_bytes(other.private_bytes(*form))
        with pytest.raises(UserError, match="not an ECDSA key on P-384"):
            certificates.read_key(path, "")


def test_a_request_that_its_key_did_not_sign_proves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "site.csr"
    mine, theirs = certificates.new_key(), certificates.new_key()
    one = x509.load_pem_x509_csr(certificates.new_request("east", mine))
    two = x509.load_pem_x509_csr(certificates.new_request("east", theirs))
    body, foreign = one.public_bytes(serialization.Encoding.DER), two.tbs_certrequest_bytes
    # The other's request, with my signature under it.
    assert one.tbs_certrequest_bytes in body and len(one.tbs_certrequest_bytes) == len(foreign)
    forged = body.replace(one.tbs_certrequest_bytes, foreign)
    path.write_bytes(x509.load_der_x509_csr(forged).public_bytes(serialization.Encoding.PEM))
    with pytest.raises(UserError, match="nobody has shown to hold that key"):
        certificates.read_request(path)
    path.write_text("no request")
    with pytest.raises(UserError, match="holds no signing request"):
        certificates.read_request(path)
