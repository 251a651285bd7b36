"""What a site's SuperNode is started with, and what keeps it from being started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flwr.supernode.cli.flower_supernode import _parse_supernode_lifespan_config

from fedgraft.client.site import supernode
from fedgraft.client.site.keys import make_key
from fedgraft.client.site.trust import write_roster
from fedgraft.core.errors import UserError
from fedgraft.deployment.authority import Authority
from fedgraft.deployment.kits import SiteKit
from fedgraft.privacy.auditlog import audit_journal
from fedgraft.privacy.securesum.identity import load_roster, load_signing_key, sign

TEXT = 'name = "x"\n[server]\naddress = "127.0.0.1:9092"\n[[site]]\nname = "east"\n'


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    (tmp_path / "federation.toml").write_text(TEXT)
    found = Authority.create(tmp_path / "federation.toml", tmp_path / "kits of x")
    make_key(found.kits / "sites" / "east")
    found.sign(found.kits / "sites" / "east" / "site.csr")
    return found


@pytest.fixture
def kit(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> SiteKit:
    monkeypatch.setattr(supernode, "reach", lambda host, port, authority: 0.0)
    return SiteKit.open(authority.kits / "sites" / "east")


def test_flower_reads_the_command_as_it_is_meant(kit: SiteKit, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = kit.folder / "secret"
    secret.write_bytes(b"known to both")
    command = supernode.supernode_command(kit, 18101, secret)
    monkeypatch.setattr("sys.argv", ["flower-supernode", *command[3:]])
    config = _parse_supernode_lifespan_config()
    assert (config.insecure, config.server_address, config.port) == (False, "127.0.0.1:9092", 18101)
    assert (config.isolation, config.superexec_auth_secret) == ("process", b"known to both"), "it runs nothing itself"
    assert config.root_certificates == (kit.folder / "ca.crt").read_bytes()
    assert config.authentication_keys is not None
    assert not config.runtime_dependency_install
    assert config.node_config == {
        "site": "east",
        "site-folder": str(kit.state),
        "policy": str(kit.policy),
        "signing-key": str(kit.key),
    }
    assert " " in str(kit.folder), "blanks are passed on"


def test_a_secure_sum_knows_the_members_of_the_roster_and_signs_with_the_sites_key(
    kit: SiteKit, authority: Authority
) -> None:
    roster = load_roster(write_roster(kit))
    key = load_signing_key(kit.key)
    assert roster.owns("east", key) and roster.signed("east", sign(key, b"text"), b"text")
    with pytest.raises(UserError, match="site west is not in this site's roster"):
        roster.digest(["east", "west"])
    authority.revoke("east")
    assert not load_roster(write_roster(kit)).owns("east", key)


def test_a_path_that_flower_would_misread_is_refused(authority: Authority, tmp_path: Path) -> None:
    folder = tmp_path / 'a "kit"'
    (authority.kits / "sites" / "east").rename(folder)
    with pytest.raises(UserError, match="Flower takes no quotes or backslashes"):
        supernode.node_config(SiteKit.open(folder))


def test_a_site_that_is_ready_is_let_through_and_one_that_is_not_starts_nothing(
    kit: SiteKit, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(supernode, "launch", lambda *a: started.append(a))
    supernode.require_ready(kit)
    monkeypatch.setattr(supernode, "reach", lambda host, port, authority: 3600.0)
    with pytest.raises(UserError, match=r"this machine's clock is 3600 s behind that of 127.0.0.1:9092"):
        supernode.start(kit, print)
    kit.policy.write_text("nonsense")
    with pytest.raises(UserError, match=r"policy.toml"):
        supernode.start(kit, print)
    authority.revoke("east")
    with pytest.raises(UserError, match="does not list this site's key"):
        supernode.start(kit, print)
    kit.key.chmod(0o666)
    with pytest.raises(UserError, match="chmod 600"):
        supernode.start(kit, print)
    assert started == []
    log = audit_journal(kit.state / "audit.jsonl").entries()
    assert [(line["event"], line["site"], line["kind"]) for line in log] == [("refused", "east", "start")] * 4
    for line, why in zip(log, ("clock is 3600 s behind", "policy.toml", "does not list", "chmod 600"), strict=True):
        assert why in line["why"] and "\n" not in line["why"]
