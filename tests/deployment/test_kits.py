"""What a kit's owner is told before anything starts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from fedgraft.core.errors import UserError
from fedgraft.deployment import certificates
from fedgraft.deployment.authority import Authority
from fedgraft.deployment.kits import ServerKit, SiteKit, remember_roster


def _open(kit: Path) -> object:
    if kit.name == "server":
        return ServerKit.open(kit)
    opened = SiteKit.open(kit)
    return opened.identity(), opened.roster()


@pytest.mark.parametrize(
    ("kit", "file", "said"),
    [
        ("sites/east", "site.toml", "is .* a site's kit"),
        ("sites/east", "ca.crt", "ask the coordinator for this site's kit"),
        ("sites/east", "site.key", "run: fedgraft site init"),
        ("sites/east", "site.crt", "send site.csr to the coordinator"),
        ("sites/east", "roster.json", "ask the coordinator for the roster.json"),
        ("server", "server.toml", "is .* the server's kit"),
        ("server", "server.crt", "fedgraft provision rotate server"),
        ("server", "server.key", "fedgraft provision rotate server"),
        ("server", "roster.json", "ask the coordinator"),
    ],
)
def test_a_missing_or_broken_file_is_named_with_the_mend(signed: Authority, kit: str, file: str, said: str) -> None:
    path = signed.kits / kit / file
    _open(path.parent)
    path.write_bytes(b"\xff\x00")
    with pytest.raises(UserError) as error:
        _open(path.parent)
    assert str(path) in str(error.value)
    path.unlink()
    with pytest.raises(UserError, match=rf"{path}: .* is missing; .*{said}"):
        _open(path.parent)


@pytest.mark.parametrize(("kit", "file"), [("sites/east", "site.key"), ("server", "server.key")])
def test_what_others_may_read_does_not_open(signed: Authority, kit: str, file: str) -> None:
    path = signed.kits / kit / file
    path.chmod(0o604)
    with pytest.raises(UserError, match=f"chmod 600 {path}"):
        _open(path.parent)
    path.chmod(0o600)
    path.parent.chmod(0o711)
    with pytest.raises(UserError, match=f"chmod 700 {path.parent}"):
        _open(path.parent)


@pytest.mark.parametrize(
    ("kit", "mend"),
    [
        ("sites/east", "fedgraft site init --new-key"),
        ("server", "fedgraft provision rotate server"),
    ],
)
def test_an_expired_certificate_does_not_open(
    signed: Authority, kit: str, mend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = certificates.now() + timedelta(days=366)
    monkeypatch.setattr(certificates, "now", lambda: at)
    with pytest.raises(UserError, match=rf"\.crt: expired on .*{mend}"):
        _open(signed.kits / kit)


def test_files_of_another_site_or_another_federation_do_not_open(
    signed: Authority, found: Callable[..., Authority]
) -> None:
    kit = signed.kits / "sites" / "east"
    own = (kit / "site.crt").read_bytes()
    shutil.copy(signed.kits / "sites" / "north" / "site.crt", kit / "site.crt")
    with pytest.raises(UserError, match="is the certificate of north, not of east"):
        _open(kit)
    (kit / "site.crt").write_bytes(own)
    other = found(kits="others").kits / "server"
    shutil.copy(other / "ca.crt", kit / "ca.crt")
    with pytest.raises(UserError, match="was not signed by this federation's authority"):
        _open(kit)
    for file in ("server.crt", "server.key"):
        shutil.copy(other / file, signed.kits / "server" / file)
        with pytest.raises(UserError, match=r"was not signed|is not the certificate of the key"):
            _open(signed.kits / "server")


@pytest.mark.parametrize("kit", ["server", "sites/north"])
def test_a_roster_from_before_is_not_taken_for_the_newest(
    signed: Authority, found: Callable[..., Authority], kit: str
) -> None:
    folder = signed.kits / kit
    opened = ServerKit.open(folder) if kit == "server" else SiteKit.open(folder)
    opened.state.mkdir(exist_ok=True)
    old = (folder / "roster.json").read_bytes()
    assert opened.roster().member("east") is not None
    signed.revoke("east")
    assert opened.roster().member("east") is None
    remember_roster(opened, opened.roster())
    (folder / "roster.json").write_bytes(old)
    with pytest.raises(UserError, match=r"roster.json: is number 2, and number 3 was in force here already"):
        opened.roster()
    memory = opened.state / "roster-number.json"
    assert memory.stat().st_mode & 0o777 == 0o600
    memory.write_text("[]")
    with pytest.raises(UserError, match=r"roster-number.json: cannot be read; remove it once"):
        opened.roster()
    memory.unlink()
    opened.roster()
