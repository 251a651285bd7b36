"""Who gets signed, who does not, and what the kits hold afterwards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import yaml

from fedgraft.client.site.keys import make_key
from fedgraft.core.errors import UserError
from fedgraft.deployment import certificates
from fedgraft.deployment.authority import Authority
from fedgraft.deployment.kits import ServerKit, SiteKit
from fedgraft.deployment.roster import Member, Roster, read_roster, roster, verify_roster


def _site(authority: Authority, name: str = "east") -> Path:
    return authority.kits / "sites" / name


def _members(authority: Authority) -> list[str]:
    """Who is on the roster that the server holds."""
    return [
        m.name for m in read_roster(authority.kits / "server" / "roster.json", authority.signer.certificate).members
    ]


def test_no_private_key_of_a_site_is_ever_in_what_the_coordinator_makes(authority: Authority) -> None:
    keys = {path.relative_to(authority.kits) for path in authority.kits.rglob("*") if b"PRIVATE KEY" in _bytes(path)}
    assert keys == {Path("authority/ca.key"), Path("server/server.key")}


def _bytes(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def test_folders_and_keys_are_closed_to_others(signed: Authority) -> None:
    for path in (signed.kits, *signed.kits.rglob("*")):
        mode = path.stat().st_mode & 0o777
        if path.is_dir():
            assert mode == 0o700, path
        elif b"PRIVATE KEY" in path.read_bytes() or path.name == "registry.json":
            assert mode == 0o600, path


def test_signed_sites_open_their_kits_and_stand_on_the_roster_of_all(signed: Authority) -> None:
    assert _members(signed) == ["east", "north"]
    ServerKit.open(signed.kits / "server")
    for name in ("east", "north"):
        kit = SiteKit.open(_site(signed, name))
        key, certificate = kit.identity()
        member = kit.roster().member(name)
        assert member is not None and member.public_key == certificates.public_pem(key.public_key())
        assert member.until == certificate.not_valid_after_utc


def test_every_kit_has_a_guide_of_three_commands_and_its_units(authority: Authority) -> None:
    for folder, role in ((authority.kits / "server", "server"), (_site(authority), "site")):
        commands = [
            line for line in (folder / "README.md").read_text().splitlines() if line.startswith("    fedgraft ")
        ]
        assert len(commands) == 3
        service = yaml.safe_load((folder / "compose.yaml").read_text())["services"][f"fedgraft-{role}"]
        assert service["command"] == ["fedgraft", role, "start"]
        assert f"fedgraft {role} start" in (folder / f"fedgraft-{role}.service").read_text()


def test_a_request_for_a_name_that_is_not_in_the_federation_is_refused(authority: Authority, tmp_path: Path) -> None:
    path = tmp_path / "site.csr"
    path.write_bytes(certificates.new_request("west", certificates.new_key()))
    with pytest.raises(UserError, match="a site `west`, which is not in the federation; there are east, north"):
        authority.sign(path)


def test_a_fingerprint_that_differs_stops_the_signing(authority: Authority) -> None:
    _, fingerprint = make_key(_site(authority))
    with pytest.raises(UserError, match="not the one given; sign nothing"):
        authority.sign(_site(authority) / "site.csr", "0" * 64)
    assert _members(authority) == []
    authority.sign(_site(authority) / "site.csr", fingerprint.upper())
    assert _members(authority) == ["east"]


def test_a_second_key_for_a_site_needs_the_coordinator_s_word(signed: Authority) -> None:
    request = signed.kits / "thief.csr"
    request.write_bytes(certificates.new_request("east", certificates.new_key()))
    with pytest.raises(UserError, match=r"east has another key already; .*: fedgraft provision rotate east"):
        signed.sign(request)


def test_one_key_cannot_stand_for_two_sites(signed: Authority) -> None:
    key = certificates.read_key(_site(signed) / "site.key", "")
    request = signed.kits / "site.csr"
    request.write_bytes(certificates.new_request("north", key))
    with pytest.raises(UserError, match="stands for another site already"):
        signed.sign(request)


def test_signing_the_same_key_again_renews_its_certificate(signed: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signed.sites["east"].ends
    at = certificates.now() + timedelta(days=300)
    monkeypatch.setattr(certificates, "now", lambda: at)
    _, entry = signed.sign(_site(signed) / "site.csr")
    assert timedelta(days=299) < entry.ends - before < timedelta(days=301)
    SiteKit.open(_site(signed)).identity()


def test_a_key_whose_certificate_has_ended_is_not_signed_again_but_a_new_one_is(
    signed: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = certificates.now() + timedelta(days=366)
    monkeypatch.setattr(certificates, "now", lambda: at)
    with pytest.raises(UserError, match=r"the certificate of site east ended on .*; first: fedgraft provision rotate"):
        signed.sign(_site(signed) / "site.csr")
    with pytest.raises(UserError, match=r"site.crt: expired on .*; run fedgraft site init --new-key"):
        SiteKit.open(_site(signed)).identity()
    signed.rotate("east")
    make_key(_site(signed), new_key=True)
    signed.sign(_site(signed) / "site.csr")
    SiteKit.open(_site(signed)).identity()


def test_a_site_rotates_its_key_and_the_old_one_is_never_taken_again(signed: Authority) -> None:
    kit, old = _site(signed), (_site(signed) / "site.key").read_bytes()
    shutil.copy(kit / "site.csr", kit / "old.csr")
    signed.rotate("east")
    assert _members(signed) == ["east", "north"], "until the new key is signed, the old one goes on"
    make_key(kit, new_key=True)
    assert (kit / "site.key").read_bytes() == old
    SiteKit.open(kit).identity()
    signed.sign(kit / "site.csr")
    key, _ = SiteKit.open(kit).identity()
    assert (kit / "site.key").read_bytes() != old and not (kit / "site.key.next").exists()
    member = SiteKit.open(kit).roster().member("east")
    assert member is not None and member.public_key == certificates.public_pem(key.public_key())
    with pytest.raises(UserError, match="this key was given up"):
        signed.sign(kit / "old.csr")


def test_a_revoked_site_is_off_the_roster_until_a_new_key_is_signed(signed: Authority) -> None:
    kit = _site(signed)
    signed.revoke("east")
    signed.revoke("east")
    assert _members(signed) == ["north"]
    with pytest.raises(UserError, match="this key was given up"):
        signed.sign(kit / "site.csr")
    make_key(kit, new_key=True)
    with pytest.raises(UserError, match=r"east is revoked; .*: fedgraft provision rotate east"):
        signed.sign(kit / "site.csr")
    signed.rotate("east")
    assert _members(signed) == ["north"], "the revoked key does not come back"
    signed.sign(kit / "site.csr")
    assert _members(signed) == ["east", "north"]
    with pytest.raises(UserError, match="no key of a site `west`"):
        signed.revoke("west")


def test_what_was_done_is_there_when_the_folder_is_opened_again(signed: Authority) -> None:
    signed.revoke("north")
    again = Authority(signed.kits)
    assert (again.number, again.sites) == (signed.number, signed.sites)


def test_the_server_gets_a_new_key_under_the_same_authority(signed: Authority) -> None:
    before = (signed.kits / "server" / "server.key").read_bytes()
    signed.rotate_server()
    assert (signed.kits / "server" / "server.key").read_bytes() != before
    ServerKit.open(signed.kits / "server")


def test_a_new_authority_signs_all_anew_and_what_the_old_one_signed_is_worth_nothing(
    signed: Authority, tmp_path: Path
) -> None:
    signed.revoke("north")
    shutil.copytree(signed.kits, tmp_path / "before")
    keys = {entry.public_key for entry in signed.sites.values()}
    assert signed.rotate_authority() == ["east"]
    again = Authority(signed.kits)
    assert _members(again) == ["east"] and {entry.public_key for entry in again.sites.values()} == keys
    ServerKit.open(signed.kits / "server")
    kit = SiteKit.open(_site(signed))
    kit.require_member()
    assert (kit.folder / "site.key").read_bytes() == (tmp_path / "before/sites/east/site.key").read_bytes()
    assert certificates.key_fingerprint(certificates.public_of(kit.authority)) in (kit.folder / "README.md").read_text()
    for file, said in (
        ("site.crt", "was not signed by this federation's authority"),
        ("roster.json", "was not signed by this federation's authority"),
    ):
        new = (kit.folder / file).read_bytes()
        shutil.copy(tmp_path / "before/sites/east" / file, kit.folder / file)
        with pytest.raises(UserError, match=f"{file}: {said}"):
            kit.require_member()
        (kit.folder / file).write_bytes(new)
    # Nor does who has the old ca.crt still take what the new one signed.
    shutil.copy(kit.folder / "roster.json", tmp_path / "before/sites/east/roster.json")
    with pytest.raises(UserError, match="was not signed by this federation's authority"):
        SiteKit.open(tmp_path / "before/sites/east").roster()


def test_a_new_authority_signs_no_site_whose_certificate_has_ended(
    signed: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = certificates.now() + timedelta(days=366)
    monkeypatch.setattr(certificates, "now", lambda: at)
    assert signed.rotate_authority() == []


def test_an_authority_that_broke_off_in_the_middle_is_made_again(
    signed: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise UserError("no space left")

    with monkeypatch.context() as broken, pytest.raises(UserError, match="no space left"):
        broken.setattr(Authority, "write_kits", full)
        signed.rotate_authority()
    again = Authority(signed.kits)
    assert again.rotate_authority() == ["east", "north"]
    for name in ("east", "north"):
        SiteKit.open(_site(again, name)).require_member()


def test_provisioning_again_adds_sites_and_keeps_what_was_signed(
    signed: Authority, found: Callable[..., Authority]
) -> None:
    text = (signed.folder / "federation.toml").read_text()
    key = (signed.folder / "ca.key").read_bytes()
    wider = found(text + '[[site]]\nname = "west"\n')
    assert (wider.folder / "ca.key").read_bytes() == key
    assert _members(wider) == ["east", "north"] and (_site(wider, "west") / "site.toml").is_file()
    with pytest.raises(UserError, match="leaves out the site north; first: fedgraft provision revoke north"):
        found(text.replace("north", "south"))
    with pytest.raises(UserError, match="is of `other`, but"):
        found(text.replace("oncology", "other"))


def test_the_authority_s_folder_must_be_closed_and_whole(signed: Authority, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no federation; begin with"):
        Authority(tmp_path / "nowhere")
    (signed.folder / "ca.key").chmod(0o644)
    with pytest.raises(UserError, match="chmod 600"):
        Authority(signed.kits)
    (signed.folder / "ca.key").chmod(0o600)
    signed.folder.chmod(0o750)
    with pytest.raises(UserError, match="chmod 700"):
        Authority(signed.kits)
    signed.folder.chmod(0o700)
    (signed.folder / "registry.json").write_text("{}")
    with pytest.raises(UserError, match=r"registry.json: is damaged"):
        Authority(signed.kits)


# The roster


def test_a_roster_that_was_changed_or_is_another_authority_s_is_refused(
    signed: Authority, found: Callable[..., Authority]
) -> None:
    text, anchor = (signed.kits / "roster.json").read_text(), signed.signer.certificate
    outer = json.loads(text)
    changed = json.dumps({**outer, "body": outer["body"].replace("north", "south")})
    for bad in (changed, "{}", "[]", '{"body": 1, "signature": ""}', "\x00", '{"body": "", "signature": "%"}'):
        with pytest.raises(UserError, match="roster"):
            verify_roster(bad, anchor)
    with pytest.raises(UserError, match="was not signed by this federation's authority"):
        verify_roster(text, found(kits="others").signer.certificate)


def test_every_change_has_a_higher_number_and_order_does_not_matter(signed: Authority) -> None:
    anchor = signed.signer.certificate
    before = read_roster(signed.kits / "roster.json", anchor)
    signed.revoke("east")
    assert read_roster(signed.kits / "roster.json", anchor).number == before.number + 1
    assert roster("oncology", 1, reversed(before.members)) == Roster("oncology", 1, before.members)


def test_a_member_whose_certificate_ended_is_not_current(authority: Authority) -> None:
    past, future = (certificates.now() + timedelta(days=days) for days in (-1, 1))
    listed = roster("oncology", 1, [Member("a", "", past), Member("b", "", future)])
    again = verify_roster(listed.signed(authority.signer), authority.signer.certificate)
    assert again == listed
    assert [member.name for member in again.current()] == ["b"]
