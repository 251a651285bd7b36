"""Long-term keys and rosters: the files that people give, and what is wrong with them in one line."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedgraft.core.errors import PrivateError, UserError
from fedgraft.privacy.securesum.identity import Roster, load_roster, load_signing_key, sign, signed

PLAIN = serialization.NoEncryption()
FORMS = {
    "openssh": (
        serialization.PrivateFormat.OpenSSH,
        serialization.Encoding.OpenSSH,
        serialization.PublicFormat.OpenSSH,
    ),
    "pem": (
        serialization.PrivateFormat.PKCS8,
        serialization.Encoding.PEM,
        serialization.PublicFormat.SubjectPublicKeyInfo,
    ),
}
MAKE = {"ed25519": Ed25519PrivateKey.generate, "p384": lambda: ec.generate_private_key(ec.SECP384R1())}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", MAKE)
def test_keys_are_read_as_ssh_keygen_and_openssl_write_them(tmp_path, kind, form):
    key, (private, encoding, public) = MAKE[kind](), FORMS[form]
    (tmp_path / "key").write_bytes(key.private_bytes(serialization.Encoding.PEM, private, PLAIN))
    text = key.public_key().public_bytes(encoding, public).decode().strip()
    (tmp_path / "roster.toml").write_text(f'[sites]\neast = """{text}"""\n', encoding="utf-8")
    roster, read = load_roster(tmp_path / "roster.toml"), load_signing_key(tmp_path / "key")
    assert roster.owns("east", read)
    assert roster.signed("east", sign(read, b"text"), b"text")
    assert not roster.signed("east", sign(read, b"text"), b"another")
    assert not roster.signed("west", sign(read, b"text"), b"text")
    assert not signed(MAKE[kind]().public_key(), sign(read, b"text"), b"text")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "a section .sites. with lines"),
        ("[sites]\n[more]\n", "nothing else"),
        ("sites = 3\n", "a section .sites."),
        ("[sites\n", "not valid TOML"),
        ('[sites]\neast = "ssh-ed25519 nonsense"\n', "site east has no public key"),
        ("[sites]\neast = 3\n", "site east has no public key"),
    ],
)
def test_a_roster_that_is_none_is_told_of_with_its_file(tmp_path, text, why):
    (tmp_path / "roster.toml").write_text(text, encoding="utf-8")
    with pytest.raises(PrivateError, match=why) as caught:
        load_roster(tmp_path / "roster.toml")
    assert str(tmp_path) in str(caught.value)


def test_files_that_are_not_there_or_hold_no_key_are_told_of(tmp_path):
    with pytest.raises(PrivateError, match="cannot be read"):
        load_roster(tmp_path / "none")
    with pytest.raises(PrivateError, match="cannot be read"):
        load_signing_key(tmp_path / "none")
    (tmp_path / "key").write_text("nonsense", encoding="utf-8")
    with pytest.raises(PrivateError, match="no private key"):
        load_signing_key(tmp_path / "key")
    weak = rsa.generate_private_key(65537, 2048)
    (tmp_path / "key").write_bytes(weak.private_bytes(serialization.Encoding.PEM, FORMS["pem"][0], PLAIN))
    with pytest.raises(PrivateError, match="is not an Ed25519"):
        load_signing_key(tmp_path / "key")
    locked = serialization.BestAvailableEncryption(b"word")
    (tmp_path / "key").write_bytes(MAKE["p384"]().private_bytes(serialization.Encoding.PEM, FORMS["pem"][0], locked))
    with pytest.raises(PrivateError, match="without a passphrase"):
        load_signing_key(tmp_path / "key")


def test_other_kinds_of_public_keys_are_refused(tmp_path):
    text = rsa.generate_private_key(65537, 2048).public_key().public_bytes(FORMS["openssh"][1], FORMS["openssh"][2])
    (tmp_path / "roster.toml").write_text(f'[sites]\neast = "{text.decode()}"\n', encoding="utf-8")
    with pytest.raises(PrivateError, match="site east: its key is not an Ed25519"):
        load_roster(tmp_path / "roster.toml")


def test_two_sites_with_one_key_are_refused():
    key = Ed25519PrivateKey.generate().public_key()
    with pytest.raises(UserError, match="one key for two sites, east and west"):
        Roster({"west": key, "east": key})


def test_the_digest_is_of_the_names_and_keys_that_take_part():
    a, b, c = (Ed25519PrivateKey.generate().public_key() for _ in range(3))
    both = ("a", "b")
    assert Roster({"a": a, "b": b}).digest(both) == Roster({"b": b, "c": c, "a": a}).digest(both)
    assert len({Roster(keys).digest(both) for keys in ({"a": a, "b": b}, {"a": b, "b": a}, {"a": a, "b": c})}) == 3
    assert Roster({"a": a, "b": b}).digest(("a",)) != Roster({"a": a, "b": b}).digest(both)
    with pytest.raises(UserError, match="site c is not in this site's roster"):
        Roster({"a": a, "b": b}).digest(("a", "c"))
