"""Bundles, what may be submitted, and what is fetched."""

from __future__ import annotations

import io
import json
import zipfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from flwr.common.config import get_fab_config

from fedgraft.client.site.keys import make_key
from fedgraft.core.config import RunConfig, config_from_json
from fedgraft.core.errors import UserError
from fedgraft.deployment import certificates, roster
from fedgraft.deployment.authority import Authority
from fedgraft.deployment.kits import ServerKit
from fedgraft.privacy.auditlog import audit_journal
from fedgraft.server.deployed import jobs
from fedgraft.server.deployed.control import Control, Run, TakenError
from fedgraft.server.deployed.pending import Pending
from fedgraft.server.deployed.serving import reconcile

TEXT = 'name = "x"\n[server]\naddress = "127.0.0.1:9092"\n[[site]]\nname = "east"\n[[site]]\nname = "north"\n'


class Link:
    """Stands for a SuperLink's control interface."""

    def __init__(self, runs: list[Run] | None = None) -> None:
        self.listed = runs or []
        self.known: dict[int, Any] = {}
        self.sent: list[Any] = []
        self.stopped: list[int] = []
        self.let_go: set[str] = set()

    def runs(self) -> list[Run]:
        return self.listed

    def submit(self, bundle: Any, settings: dict[str, str]) -> int:
        self.sent.append((bundle, settings))
        return len(self.sent)

    def stop(self, run: int) -> None:
        self.stopped.append(run)

    def nodes(self) -> list[Any]:
        return list(self.known.values())

    def register(self, name: str, public_key: str) -> int:
        from fedgraft.server.deployed.control import Node

        if public_key in self.let_go:
            raise TakenError(f"{name}: its key was let go before")
        number = 100 + len(self.known) + len(self.let_go)
        self.known[number] = Node(number, name, public_key, "registered")
        return number

    def unregister(self, node: int) -> None:
        self.let_go.add(self.known.pop(node).public_key)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    (tmp_path / "federation.toml").write_text(TEXT)
    found = Authority.create(tmp_path / "federation.toml", tmp_path / "kits")
    for name in ("east", "north"):
        make_key(found.kits / "sites" / name)
        found.sign(found.kits / "sites" / name / "site.csr")
    return found


@pytest.fixture
def kit(authority: Authority) -> ServerKit:
    opened = ServerKit.open(authority.kits / "server")
    for folder in (opened.state, opened.runs):
        folder.mkdir()
    return opened


@pytest.fixture
def config(tiny_federation: Any) -> RunConfig:
    return tiny_federation.config(**{"data.path": "", "data.sites": ["east", "north"]})


def test_a_bundle_holds_the_configuration_and_no_code(config: RunConfig) -> None:
    odd = config.model_copy(update={"name": 'a "b" \\ \x7f ü 🙂 \n \x01'})
    for given in (config, odd):
        found = jobs.bundle(given)
        with zipfile.ZipFile(io.BytesIO(found.content)) as archive:
            assert set(archive.namelist()) == {"pyproject.toml", ".info/CONTENT"}
        app = get_fab_config(found.content)["tool"]["flwr"]["app"]
        assert app["components"] == {"serverapp": "fedgraft.server.app:app", "clientapp": "fedgraft.client.app:app"}
        assert config_from_json(app["config"]["job"]) == given
        assert jobs.bundle(given).hash_str == found.hash_str, "the same job is the same bundle, to the bit"


def test_a_job_gets_a_name_and_starts(kit: ServerKit, config: RunConfig) -> None:
    link = Link()
    name, _ = jobs.submit(kit, link, config)  # type: ignore[arg-type]
    assert name.startswith("tiny-20")
    assert link.sent[0][1] == {"output": name}
    assert jobs.submit(kit, link, config, "second")[0] == "second"  # type: ignore[arg-type]
    link.listed.append(Run(2, "second", "running", "", "", ""))
    assert jobs.stop(kit, link, "second").id == 2 and link.stopped == [2]  # type: ignore[arg-type]
    log = audit_journal(kit.state / "audit.jsonl").entries()
    assert [(line["event"], line["run"]) for line in log] == [
        ("submitted", name),
        ("submitted", "second"),
        ("stopped", "second"),
    ]
    assert (log[0]["job"], log[0]["sites"]) == (config.digest(), ["east", "north"])
    assert log[0]["bundle"] == link.sent[0][0].hash_str


def test_what_the_audit_log_cannot_hold_is_not_done(kit: ServerKit, config: RunConfig) -> None:
    link: Any = Link([Run(2, "second", "running", "", "", "")])
    link.register("stranger", "a key that nobody signed")
    (kit.state / "audit.jsonl").mkdir()
    for act in (
        lambda: jobs.submit(kit, link, config),
        lambda: jobs.stop(kit, link, "second"),
        lambda: reconcile(kit, link, set()),
    ):
        with pytest.raises(UserError, match="the audit log cannot be written"):
            act()
    assert link.sent == [] and link.stopped == [] and [node.name for node in link.nodes()] == ["stranger"]


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "a b", "-x", "x" * 101])
def test_a_name_cannot_lead_out_of_the_folder_of_runs(kit: ServerKit, config: RunConfig, name: str) -> None:
    with pytest.raises(UserError, match="letters, digits"):
        jobs.submit(kit, Link(), config, name)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="letters, digits"):
        jobs.submit(kit, Link(), config, resume=name)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="has left anything"):
        jobs.fetch(kit, name, kit.folder / "out")


def test_a_job_for_sites_that_are_not_on_the_roster_is_refused(
    kit: ServerKit, authority: Authority, config: RunConfig
) -> None:
    authority.revoke("north")
    with pytest.raises(UserError, match=r"data.sites: north: not on the roster, or expired; on it are east"):
        jobs.submit(kit, Link(), config)  # type: ignore[arg-type]


def test_what_cannot_run_is_refused_before_it_is_sent(kit: ServerKit, config: RunConfig, tiny_federation: Any) -> None:
    link = Link([Run(7, "busy", "running", "", "", "")])
    values = {"data.path": "", "data.sites": ["east", "north"]}
    for changed, said in (
        (tiny_federation.config(**values, strategy="nonesuch"), "nonesuch"),
        (tiny_federation.config(**values, **{"simulation.latency": 1.0}), "is for simulations"),
    ):
        with pytest.raises(UserError, match=said):
            jobs.submit(kit, link, changed)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no such run to resume"):
        jobs.submit(kit, link, config, resume="never")  # type: ignore[arg-type]
    for name in ("done", "busy"):
        (kit.runs / name).mkdir()
        (kit.runs / name / "run.json").write_text("{}")
    with pytest.raises(UserError, match="a job had this name before"):
        jobs.submit(kit, link, config, "done")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="busy: is still running; stop it first"):
        jobs.submit(kit, link, config, resume="busy")  # type: ignore[arg-type]
    assert link.sent == []
    assert jobs.submit(kit, link, config, resume="done")[0] == "done"  # type: ignore[arg-type]
    assert link.sent[0][1] == {"output": "done", "resume": "done"}


def test_a_job_is_found_by_name_or_number_and_else_the_latest() -> None:
    link = Link([Run(1, "a", "failed", "", "", ""), Run(2, "a", "completed", "", "", ""), Run(3, "b", "", "", "", "")])
    assert jobs.find(link, "a").id == 2  # type: ignore[arg-type]
    assert jobs.find(link, "1").id == 1  # type: ignore[arg-type]
    assert jobs.find(link, "").id == 3  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no job `c`; there are a, a, b"):
        jobs.find(link, "c")  # type: ignore[arg-type]


def test_a_job_is_waited_for_until_the_server_says_that_it_is_over(kit: ServerKit, config: RunConfig) -> None:
    link = Link([Run(1, "a", "completed", "", "", ""), Run(2, "b", "failed", "why", "", "")])
    jobs.require_completed(kit, link, "a")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="b: failed: why"):
        jobs.require_completed(kit, link, "b")  # type: ignore[arg-type]
    Pending("b", config.to_json()).keep(kit)
    asked: list[int] = []

    def again() -> list[Run]:
        # It goes on as another run, which completes.
        asked.append(1)
        if len(asked) == 3:
            link.listed.append(Run(3, "b", "completed", "", "", ""))
            Pending("b", "").forget(kit)
        return link.listed

    link.runs = again  # type: ignore[method-assign]
    jobs.require_completed(kit, link, "b")  # type: ignore[arg-type]
    assert len(asked) > 3


def test_a_server_that_is_not_started_is_one_line(kit: ServerKit) -> None:
    control = Control(kit)
    with pytest.raises(UserError, match=r"127.0.0.1:\d+: the server does not answer; is it started"):
        control.runs()
    control.close()


def test_a_finished_job_is_fetched_without_its_checkpoints(kit: ServerKit, tmp_path: Path) -> None:
    run = kit.runs / "done"
    (run / "checkpoints").mkdir(parents=True)
    (run / "adapter").mkdir()
    (run / "adapter" / "adapter_config.json").write_text("{}")
    (run / "run.json").write_text('{"status": "running"}')
    with pytest.raises(UserError, match="done: is running"):
        jobs.fetch(kit, "done", tmp_path / "out")
    (run / "run.json").write_text('{"status": "finished"}')
    assert {path.name for path in jobs.fetch(kit, "done", tmp_path / "out").iterdir()} == {"adapter", "run.json"}
    with pytest.raises(UserError, match="is there already"):
        jobs.fetch(kit, "done", tmp_path / "out")
    with pytest.raises(UserError, match="no job `other` has left anything; there are done"):
        jobs.fetch(kit, "other", tmp_path / "other")


# Whom the SuperLink knows


def test_the_superlink_knows_the_roster_and_nobody_else(kit: ServerKit, authority: Authority) -> None:
    link: Any = Link()
    link.register("stranger", "a key that nobody signed")
    said = reconcile(kit, link, set())
    assert {node.name for node in link.nodes()} == {"east", "north"}
    assert sum("may connect" in line for line in said) == 2 and any("stranger: refused" in line for line in said)
    assert sorted(json.loads(kit.nodes.read_text()).values()) == ["east", "north"]
    assert reconcile(kit, link, set()) == []
    authority.revoke("east")
    assert [line.split(":")[0] for line in reconcile(kit, link, set())] == ["east"]
    assert list(json.loads(kit.nodes.read_text()).values()) == ["north"]
    log = audit_journal(kit.state / "audit.jsonl").entries()
    assert [(line["event"], line.get("site")) for line in log] == [
        ("unregistered", "stranger"),
        ("registered", "east"),
        ("registered", "north"),
        ("unregistered", "east"),
    ]
    assert (log[3]["why"], log[3]["key"]) == ("its key is not on the roster", log[1]["key"])


def test_a_site_whose_certificate_ends_is_registered_no_more(
    kit: ServerKit, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    link: Any = Link()
    reconcile(kit, link, set())
    monkeypatch.setattr(roster, "now", lambda: certificates.now() + timedelta(days=366))
    said = reconcile(kit, link, set())
    assert link.nodes() == [] and json.loads(kit.nodes.read_text()) == {}
    assert said == [f"{name}: refused from now on; its certificate has ended" for name in ("east", "north")]
    log = audit_journal(kit.state / "audit.jsonl").entries()
    assert [(line["event"], line["why"]) for line in log[2:]] == [("unregistered", "its certificate has ended")] * 2


def test_a_key_registered_under_another_s_name_stands_for_nobody_and_does_not_stop_the_others(kit: ServerKit) -> None:
    link: Any = Link()
    east, north = kit.roster().members
    link.register("north", east.public_key)
    taken: set[str] = set()
    said = reconcile(kit, link, taken)
    assert [(node.name, node.public_key) for node in link.nodes()] == [("north", north.public_key)]
    assert "east: its key was let go before" in said and taken == {east.public_key}
    lines = len(audit_journal(kit.state / "audit.jsonl").entries())
    assert reconcile(kit, link, taken) == [] and len(audit_journal(kit.state / "audit.jsonl").entries()) == lines


def test_a_roster_that_another_signed_changes_nothing(kit: ServerKit, authority: Authority, tmp_path: Path) -> None:
    link: Any = Link()
    reconcile(kit, link, set())
    other = Authority.create(tmp_path / "federation.toml", tmp_path / "others")
    (kit.folder / "roster.json").write_bytes((other.kits / "roster.json").read_bytes())
    with pytest.raises(UserError, match="was not signed by this federation's authority"):
        reconcile(kit, link, set())
    assert len(link.nodes()) == 2


def test_a_roster_from_before_a_revocation_lets_nobody_back_in(kit: ServerKit, authority: Authority) -> None:
    link: Any = Link()
    old = (kit.folder / "roster.json").read_bytes()
    authority.revoke("east")
    reconcile(kit, link, set())
    (kit.folder / "roster.json").write_bytes(old)
    with pytest.raises(UserError, match=r"is number 2, and number 3 was in force here already"):
        reconcile(kit, link, set())
    assert [node.name for node in link.nodes()] == ["north"]
