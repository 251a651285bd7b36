"""`fedgraft site check`: each thing that would stop a site is found, and nothing is sent or written."""

from __future__ import annotations

import json
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from fedgraft import cli
from fedgraft.client.policy import unrestricted
from fedgraft.client.resident import resident
from fedgraft.client.site import check
from fedgraft.client.site.keys import make_key
from fedgraft.core.config import RunConfig
from fedgraft.core.errors import UserError
from fedgraft.deployment.authority import Authority
from fedgraft.deployment.kits import SiteKit

TEXT = 'name = "x"\n[server]\naddress = "127.0.0.1:9092"\n[[site]]\nname = "east"\n'


@pytest.fixture
def kit(tiny_federation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SiteKit:
    (tmp_path / "federation.toml").write_text(TEXT)
    authority = Authority.create(tmp_path / "federation.toml", tmp_path / "kits")
    folder = authority.kits / "sites" / "east"
    make_key(folder)
    authority.sign(folder / "site.csr")
    policy = unrestricted().text.replace('"the scenario\'s"', json.dumps(str(tiny_federation.table)))
    (folder / "policy.toml").write_text(policy)
    monkeypatch.setattr(check, "reach", lambda host, port, authority: 1.0)
    return SiteKit.open(folder)


@pytest.fixture
def config(tiny_federation: Any) -> RunConfig:
    return tiny_federation.private(**{"data.path": "", "data.sites": ["east"]})


def _failed(kit: SiteKit, config: RunConfig | None = None) -> dict[str, str]:
    return {finding.what: finding.text for finding in check.findings(kit, config) if not finding.good}


def test_a_site_that_is_ready_is_told_what_it_would_send(kit: SiteKit, config: RunConfig) -> None:
    before = sorted(kit.folder.rglob("*"))
    found = {finding.what: finding for finding in check.findings(kit, config)}
    assert [finding.text for finding in found.values() if not finding.good] == []
    assert list(found) == [
        *("certificate", "roster", "network", "policy", "data simulated", "ledger", "disk", "device", "job", "answer")
    ]
    model = resident(config)
    for name in model.adapter.fresh.names:
        assert name in found["job"].text
    told = json.loads(found["answer"].text.split("send ", 1)[1])
    assert told["metrics"]["records"] + told["metrics"]["held_out"] == 600
    assert told["facts"]["fingerprint"] == model.base.fingerprint
    assert "privacy" not in told, "nothing was spent yet"
    assert "zq0" not in found["answer"].text and "pt-0" not in found["answer"].text, "no record, no patient"
    assert sorted(kit.folder.rglob("*")) == before, "neither the ledger nor the audit log knows of it"


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("site.key", {"certificate", "roster"}),
        ("site.crt", {"certificate", "roster"}),
        ("roster.json", {"roster"}),
        ("policy.toml", {"policy"}),
    ],
)
def test_a_missing_file_fails_its_own_checks_alone(kit: SiteKit, file: str, said: set[str]) -> None:
    (kit.folder / file).unlink()
    failed = _failed(kit)
    assert set(failed) == said
    assert all(file in text for text in failed.values())


def test_network_and_clock_are_told_apart(kit: SiteKit, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(host: str, port: int, authority: Path) -> float:
        raise UserError("nobody listens there")

    monkeypatch.setattr(check, "reach", away)
    assert _failed(kit) == {"network": "nobody listens there"}
    monkeypatch.setattr(check, "reach", lambda host, port, authority: -4000.0)
    assert "clock is 4000 s ahead" in _failed(kit)["network"]


def test_a_full_disk_and_a_damaged_ledger_are_found(kit: SiteKit, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(check.shutil, "disk_usage", lambda path: usage(10, 10, 1 << 20))
    (kit.state / "ledgers").mkdir()
    (kit.state / "ledgers" / "0123456789abcdef.jsonl").write_text('{"kind": "reserve"}\n')
    failed = _failed(kit)
    assert set(failed) == {"disk", "ledger"}
    assert "0.00 GiB are free" in failed["disk"] and "line 1" in failed["ledger"]


def test_data_that_are_not_there_are_found(kit: SiteKit) -> None:
    policy = kit.policy.read_text()
    line = next(line for line in policy.splitlines() if line.startswith("path"))
    kit.policy.write_text(policy.replace(line, 'path = "gone.csv"'))
    assert "gone.csv: is not there; mend `path` in the policy" in _failed(kit)["data simulated"]
    (kit.folder / "gone.csv").touch()
    assert "gone.csv: is empty" in _failed(kit)["data simulated"]


@pytest.mark.parametrize(
    ("changes", "what", "said"),
    [
        ({"data.text_column": "note"}, "answer", "note"),
        ({"task.labels": ["a", "b"]}, "answer", "class-"),
        ({"data.sites": ["north"]}, "job", "data.sites: does not list east"),
        ({"model": "/nowhere/at/all"}, "job", "/nowhere/at/all"),
        ({"train.device": "cuda:77"}, "device", "train.device"),
    ],
)
def test_what_a_job_would_run_into_is_found(
    kit: SiteKit, tiny_federation: Any, changes: dict[str, Any], what: str, said: str
) -> None:
    config = tiny_federation.config(**{"data.path": "", "data.sites": ["east"], **changes})
    assert said in _failed(kit, config)[what]


def test_a_policy_that_forbids_the_job_is_found_with_its_line(kit: SiteKit, config: RunConfig) -> None:
    kit.policy.write_text(kit.policy.read_text().replace('base_models = ["*"]', "base_models = []"))
    failed = _failed(kit, config)
    assert "the site's policy forbids it, line " in failed["job"] and "base_models" in failed["job"]


def test_the_command_ends_with_the_number_of_failures(
    kit: SiteKit, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def typed(*more: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedgraft", "site", "check", "--kit", str(kit.folder), *more])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = capsys.readouterr()
        return int(stop.value.code or 0), said.out, said.err

    code, out, _ = typed()
    assert code == 0 and out.endswith("site east is ready; nothing was sent\n") and "\nNO " not in out
    kit.key.chmod(0o644)
    code, out, err = typed()
    assert code == 2 and out.count("NO ") == 2 and f"chmod 600 {kit.key}" in out
    assert err == "fedgraft: 2 of 8 checks failed; site east would not be able to take part\n"
    code, out, _ = typed("--json")
    assert code == 2 and sum(not finding["good"] for finding in json.loads(out)) == 2
