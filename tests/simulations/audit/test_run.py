"""`fedgraft audit`: from a configuration, a scenario or a run to a signed report and an exit code."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from fedgraft import cli
from fedgraft.client.audit import faults, layers, selftest
from fedgraft.core.errors import UserError
from fedgraft.privacy.audit.signature import Signer, verify
from fedgraft.simulations.audit import run
from fedgraft.simulations.audit.page import render

RARE = 1e-6


@pytest.fixture(autouse=True)
def _rarely_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hold honest noise at `RARE`, so that these tests fail by chance once in a hundred thousand times."""
    plain = layers.noise
    monkeypatch.setattr(layers, "noise", lambda *given, **more: plain(*given, **{**more, "alpha": RARE}))


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str


@pytest.fixture
def fedgraft(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Said]:
    """Run the command in this process, in an empty folder that is also the home of its key."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("COLUMNS", "200")

    def command(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["fedgraft", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return Said(int(ended.value.code or 0), said.out, said.err)

    return command


@pytest.fixture
def configuration(tiny_federation: Any, tmp_path: Path) -> Callable[..., Path]:
    def write(**changes: Any) -> Path:
        path = tmp_path / "tiny.json"
        path.write_text(tiny_federation.private(**changes).to_json(), encoding="utf-8")
        return path

    return write


def test_an_honest_configuration_gets_a_signed_report_and_exit_code_zero(
    fedgraft: Callable[..., Said], configuration: Callable[..., Path], tmp_path: Path
) -> None:
    said = fedgraft("audit", configuration(), "--site", "north", "--units", 32, "--output", "out", "--json")
    assert said.code == 0, said
    told = json.loads(said.out)
    assert told["good"] and told["site"] == "north" and [layer["good"] for layer in told["layers"]] == [True] * 4
    report, signature = verify(tmp_path / "out" / "audit.json")
    assert report is not None and signature["fingerprint"] == told["fingerprint"]
    assert (tmp_path / "config" / "fedgraft" / "audit-key").stat().st_mode & 0o777 == 0o600
    assert report["claim"] == {
        "epsilon": report["claim"]["epsilon"],
        "delta": 1e-3,
        "budget": 2.0,
        "unit": "patient",
        "neighbours": "add_remove",
        "accountant": "pld",
        "private_noise": True,
    }
    assert 1.9 < report["claim"]["epsilon"] <= 2.0
    assert report["data"]["source"] == "site" and len(report["data"]["fingerprint"]) == 64
    assert report["data"]["excerpt_units"] == 32 < report["data"]["units"]
    assert report["ledger"] is None and report["self_test"] is None
    assert report["plan"]["steps"] == 9 and report["plan"]["expected_batch"] == 16
    assert len(report["catches"]) >= 10 and report["versions"]["torch"]
    # No word of a record and no key of a patient is in it: each holds one of these.
    everything = (tmp_path / "out" / "audit.json").read_text() + (tmp_path / "out" / "audit.html").read_text()
    assert not re.search(r"zq\d{4}|pt-\d{4}-xj", everything)


def test_the_page_is_self_contained_and_carries_the_signed_report(
    fedgraft: Callable[..., Said], configuration: Callable[..., Path], tmp_path: Path
) -> None:
    assert fedgraft("audit", configuration(), "--units", 24, "--steps", 2, "--output", "out").code == 0
    page = (tmp_path / "out" / "audit.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=|url\(|@import|https?://(?!www\.w3\.org)""", page)
    (embedded,) = re.findall(r'<script type="application/json" id="fedgraft-audit">(.*?)</script>', page)
    assert json.loads(embedded) == json.loads((tmp_path / "out" / "audit.json").read_text())
    for text in ("Guessing who took part", "This bound is loose", "Not run.", "What it cannot catch", "<svg"):
        assert text in page
    for kind in ("audit.html", "audit.json"):
        said = fedgraft("audit", "--verify", tmp_path / "out" / kind)
        assert said.code == 0 and "whole, as it was signed" in said.out
        path = tmp_path / "out" / kind
        path.write_text(path.read_text(encoding="utf-8").replace("2.0", "1.0", 1), encoding="utf-8")
        said = fedgraft("audit", "--verify", path)
        assert said.code == 2 and "the signature does not hold" in said.err and said.err.count("\n") == 1


def test_a_failed_layer_ends_with_exit_code_one_and_says_so_at_the_top(
    fedgraft: Callable[..., Said], configuration: Callable[..., Path], tmp_path: Path
) -> None:
    """Seeded noise is the same when the site trains again: no guarantee, whatever its size."""
    path = configuration(**{"privacy.seeded_noise_not_private": True})
    said = fedgraft("audit", path, "--units", 24, "--output", "out")
    assert said.code == 1
    assert "failed" in said.out and "their noise correlates by 1" in said.out
    report, _ = verify(tmp_path / "out" / "audit.json")
    assert report is not None and not report["good"] and not report["claim"]["private_noise"]
    assert [layer["layer"] for layer in report["layers"] if not layer["good"]] == ["noise"]
    page = (tmp_path / "out" / "audit.html").read_text(encoding="utf-8")
    assert "Do not rely on the claimed" in page and "NOT private" in page


def test_a_bug_that_is_missed_ends_with_exit_code_one(
    fedgraft: Callable[..., Said], configuration: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    harmless = replace(faults.FAULTS[0], engine=faults.HONEST.engine)
    monkeypatch.setattr(selftest, "FAULTS", (faults.FAULTS[1], harmless))
    said = fedgraft("audit", configuration(), "--units", 24, "--self-test", "--json")
    told = json.loads(said.out)
    assert said.code == 1 and not told["good"]
    assert all(layer["good"] for layer in told["layers"])
    assert [caught["by"] for caught in told["self_test"]] == ["noise", ""]
    assert "The audit missed a known bug" in Path(told["html"]).read_text(encoding="utf-8")


def test_the_self_test_needs_no_configuration(fedgraft: Callable[..., Said], tmp_path: Path) -> None:
    said = fedgraft("audit", "--self-test", "--units", 64, "--output", "out")
    assert said.code == 0, said
    assert "missed" not in said.out
    report, _ = verify(tmp_path / "out" / "audit.json")
    assert report is not None and report["data"]["source"] == "canaries"
    assert len(report["self_test"]) == len(faults.FAULTS) and all(caught["by"] for caught in report["self_test"])


def test_canaries_stand_in_for_data(fedgraft: Callable[..., Said], configuration: Callable[..., Path]) -> None:
    path = configuration(**{"data.path": "nowhere.csv"})
    assert "nowhere.csv" in fedgraft("audit", path).err
    said = fedgraft("audit", path, "--canaries", 40, "--units", 24, "--json")
    assert said.code == 0, said
    report = json.loads(Path(json.loads(said.out)["json"]).read_text())["report"]
    assert report["data"]["source"] == "canaries" and report["data"]["fingerprint"] == ""
    # At least four batches of them, so that the site samples.
    assert report["data"]["units"] == 64


def test_a_run_is_audited_with_its_configuration_and_its_ledger(
    fedgraft: Callable[..., Said], tiny_federation: Any, tmp_path: Path
) -> None:
    config = tiny_federation.private(rounds=1)
    tiny_federation.run(config, tmp_path / "run")
    said = fedgraft("audit", tmp_path / "run", "--site", "south", "--units", 24, "--json")
    assert said.code == 0, said
    ledger = json.loads(said.out)["ledger"]
    assert Path(ledger["path"]).parent == tmp_path / "run" / "sites" / "south" / "ledgers"
    lines = Path(ledger["path"]).read_text().splitlines()
    assert ledger["head"] == json.loads(lines[-1])["sha256"]
    assert ledger["entries"] >= 1 and ledger["private_noise"] and ledger["epsilon"] > 0
    assert "--set changes a configuration" in fedgraft("audit", tmp_path / "run", "--set", "rounds=2").err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "say what to audit"),
        (("missing",), "no such file and no scenario of that name"),
        (("--self-test", "--site", "north"), "leave the other options out"),
        (("tiny.json", "--site", "nowhere"), "--site nowhere: there are east, north, south"),
        (("tiny.json", "--set", "privacy.enabled=false"), "nothing is promised, so there is nothing to audit"),
        (("tiny.json", "--ledger", "nowhere"), "--ledger nowhere: no such folder"),
        (("tiny.json", "--key", "tiny.json"), "others may read the audit key"),
        (("--verify", "tiny.json"), "not a signed fedgraft audit"),
    ],
)
def test_a_mistake_is_one_line(
    fedgraft: Callable[..., Said], configuration: Callable[..., Path], arguments: tuple[str, ...], said: str
) -> None:
    configuration().chmod(0o644)
    answer = fedgraft("audit", *arguments)
    assert answer.code == 2 and answer.out == "" and answer.err.count("\n") == 1
    assert said in answer.err


def test_what_comes_from_a_configuration_is_escaped(tiny_federation: Any, tmp_path: Path) -> None:
    config = tiny_federation.private(name="<script>alert(1)</script>")
    report = run.audit(run.Target(config, "north", None), units=16, steps=2)
    page = render(report, Signer.at(tmp_path / "key").sign_report(report))
    assert "alert(1)" in page and "<script>alert" not in page


def test_an_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        run.write({}, tmp_path / "file" / "out", Signer.at(tmp_path / "key"))
