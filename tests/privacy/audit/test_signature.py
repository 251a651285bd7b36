"""The signature under a report: every byte counts."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from fedgraft.core.errors import UserError
from fedgraft.privacy.audit.signature import Signer, canonical, verify

REPORT = {"claim": {"epsilon": 8.0, "unit": "patient"}, "good": True, "name": "Nørd", "values": [1, 2.5, None]}


def test_the_key_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "key"
    first = Signer.at(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()
    again = Signer.at(path)
    assert path.read_bytes() == before
    assert again.public_key == first.public_key and len(first.fingerprint) == 64
    assert Signer.at(tmp_path / "other").fingerprint != first.fingerprint


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    Signer.at(tmp_path / "key")
    (tmp_path / "key").chmod(0o640)
    with pytest.raises(UserError, match=r"key: others may read the audit key; chmod 600 it"):
        Signer.at(tmp_path / "key")


def test_what_is_no_ed25519_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    other = generate_private_key(SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for content in (b"", b"no key", other):
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(UserError, match=r"key: not an Ed25519 key"):
            Signer.at(path)
    with pytest.raises(UserError, match="cannot be used"):
        Signer.at(tmp_path)


def test_the_canonical_form_hangs_on_the_content_alone() -> None:
    assert (
        canonical({"b": 1, "a": [1.5, "ø"]}) == canonical({"a": [1.5, "ø"], "b": 1}) == b'{"a":[1.5,"\\u00f8"],"b":1}'
    )
    with pytest.raises(ValueError):
        canonical({"a": float("nan")})


@pytest.fixture
def signer(tmp_path: Path) -> Signer:
    return Signer.at(tmp_path / "key")


def test_a_report_is_read_back_with_its_signer(signer: Signer, tmp_path: Path) -> None:
    path = tmp_path / "audit.json"
    path.write_text(signer.signed_report(REPORT))
    report, signature = verify(path)
    assert report == REPORT
    assert signature["fingerprint"] == signer.fingerprint
    page = tmp_path / "audit.html"
    page.write_text(signer.signed_page("<html>\n<p>good</p></html>"))
    assert verify(page) == (None, json.loads(page.read_text().splitlines()[-1].split(" ")[2]))
    assert verify(page)[1]["fingerprint"] == signer.fingerprint


@pytest.mark.parametrize("kind", ["audit.json", "audit.html"])
def test_any_changed_byte_is_found(signer: Signer, tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    whole = (signer.signed_report(REPORT) if kind.endswith("json") else signer.signed_page("<p>good</p>\n")).encode()
    path.write_bytes(whole)
    verify(path)
    for at in range(len(whole)):
        here = whole[at : at + 1]
        other = (bytes([here[0] ^ 1]), b"", here * 2, here.swapcase())[at % 4]
        if other != here:
            path.write_bytes(whole[:at] + other + whole[at + 1 :])
            with pytest.raises(UserError):
                verify(path)


def test_a_report_signed_anew_shows_another_signer(signer: Signer, tmp_path: Path) -> None:
    path = tmp_path / "audit.json"
    path.write_text(Signer.at(tmp_path / "forger").signed_report({**REPORT, "good": False}))
    assert verify(path)[1]["fingerprint"] != signer.fingerprint


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff", b'{"report": {}, "signature": {}}\n', b"[" * 5000])
def test_another_file_is_no_report(tmp_path: Path, content: bytes) -> None:
    for name in ("audit.json", "audit.html"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            verify(tmp_path / name)
    with pytest.raises(UserError, match="cannot be read"):
        verify(tmp_path / "missing.json")
