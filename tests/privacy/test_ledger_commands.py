"""`fedgraft privacy ledger`: what a site has spent, told to people and to programs, and whether its record is whole."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from fedgraft import cli
from fedgraft.privacy.accounting import Event, epsilon
from fedgraft.privacy.auditlog import AuditLog
from fedgraft.privacy.journal import Journal
from fedgraft.privacy.ledger import Ledger

DATA, CHANGED = "ab" * 32, "cd" * 32
EVENT, HELD_OUT = Event(1.25, 0.1, 6), Event(4.0, 1.0, 1)


@pytest.fixture
def fedgraft(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """``fedgraft(*arguments)``: the exit code, what was printed, and what was complained."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedgraft", "privacy", "ledger", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site of a run directory that was trained twice, the second time not to the end, and evaluated once."""
    folder = tmp_path / "run" / "sites" / "north"
    ledger = Ledger(folder / "ledgers", DATA, dataset="letters", unit="patient")
    about: dict[str, Any] = {"split": "s", "run": "r", "delta": 1e-4}
    ledger.settle(ledger.reserve(EVENT, round=1, **about), 6, "released")
    ledger.settle(ledger.reserve(EVENT, round=2, **about), 4, "failed")
    ledger.reserve(HELD_OUT, part="held-out", round=2, **about)
    return folder


def told(site: Path) -> list[dict[str, Any]]:
    (file,) = (site / "ledgers").glob("*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("part", ["", "ledgers", "ledgers/abababababababab.jsonl", "../.."])
def test_what_was_spent_is_shown_with_the_epsilon_that_it_comes_to(
    fedgraft: Callable[..., Any], site: Path, part: str
) -> None:
    code, out, err = fedgraft("show", site / part)
    assert (code, err) == (0, "")
    rows = [[cell.strip() for cell in row.strip("│").split("│")] for row in out.splitlines() if row.startswith("│")]
    assert rows == [
        ["r", "1", "train", "1.25", "0.1", "6", "released"],
        ["r", "2", "train", "1.25", "0.1", "4 of 6", "failed"],
        ["r", "2", "held-out", "4", "1", "1", "not settled: all of it counts"],
    ]
    want = max(epsilon((Event(1.25, 0.1, 10),), 1e-4), epsilon((HELD_OUT,), 1e-4))
    assert f"epsilon {want:.4g} at delta 0.0001, add_remove, for each patient" in out
    assert "(letters)" in out and "NOT private" not in out


def test_a_reservation_that_was_taken_up_again_says_so(fedgraft: Callable[..., Any], site: Path) -> None:
    ledger = Ledger(site / "ledgers", DATA, dataset="letters", unit="patient")
    before = json.loads(fedgraft("show", site, "--json")[1])["ledgers"][0]
    reserved = ledger.resume(ledger.entries()[-1].id, split="s")
    assert "not settled: all of it counts, taken up again │" in " ".join(fedgraft("show", site)[1].split())
    ledger.resume(reserved.id, split="s")
    ledger.settle(reserved, 1, "released")
    assert "released, taken up again 2 times" in " ".join(fedgraft("show", site)[1].split())
    (account,) = json.loads(fedgraft("show", site, "--json")[1])["ledgers"]
    assert [entry["resumed"] for entry in account["entries"]] == [0, 0, 2]
    assert account["epsilon"] == before["epsilon"]
    code, out, _ = fedgraft("verify", site)
    assert code == 0 and "8 lines, each as it was written" in out


def test_programs_are_told_the_same(fedgraft: Callable[..., Any], site: Path) -> None:
    code, out, _ = fedgraft("show", site, "--json", "--delta", "1e-6", "--neighbours", "replace_one")
    (account,) = json.loads(out)["ledgers"]
    want = max(epsilon((Event(1.25, 0.1, 10),), 1e-6, "replace_one"), epsilon((HELD_OUT,), 1e-6, "replace_one"))
    assert code == 0
    assert (account["epsilon"], account["delta"], account["neighbours"]) == (want, 1e-6, "replace_one")
    assert (account["dataset"], account["unit"], account["private_noise"]) == ("letters", "patient", True)
    assert account["last"] == told(site)[-1]["sha256"]
    first, second, third = account["entries"]
    assert (first["steps"], first["taken"], first["outcome"], first["run"], first["round"]) == (
        6,
        6,
        "released",
        "r",
        1,
    )
    assert (second["taken"], third["taken"], third["part"]) == (4, None, "held-out")
    assert [Event.from_dict(event) for event in first["events"]] == [EVENT]


def test_each_dataset_has_an_account_of_its_own_and_all_of_its_files(fedgraft: Callable[..., Any], site: Path) -> None:
    Ledger(site / "ledgers", CHANGED, dataset="letters", unit="patient").reserve(EVENT, split="s")
    Ledger(site / "ledgers", "ef" * 32, dataset="scans", unit="record").reserve(HELD_OUT, private_noise=False)
    letters, scans = json.loads(fedgraft("show", site, "--json")[1])["ledgers"]
    assert letters["epsilon"] == epsilon((Event(1.25, 0.1, 16),), 1e-4)
    assert (scans["dataset"], scans["unit"], scans["private_noise"]) == ("scans", "record", False)
    assert "noise from a seed is among it: NOT private" in fedgraft("show", site)[1]


def test_a_servers_ledger_is_shown_with_those_of_the_sites(fedgraft: Callable[..., Any], site: Path) -> None:
    run = site.parents[1]
    Ledger(run / "central-ledger.jsonl", unit="site").reserve(HELD_OUT)
    central, north = json.loads(fedgraft("show", run, "--json")[1])["ledgers"]
    assert (central["unit"], north["unit"]) == ("site", "patient")
    assert "central-ledger.jsonl: 1 line," in fedgraft("verify", run)[1]


def test_a_site_that_has_refused_all_so_far_has_an_audit_log_and_spent_nothing(
    fedgraft: Callable[..., Any], tmp_path: Path
) -> None:
    AuditLog(tmp_path).write("refused", why="the policy")
    code, out, err = fedgraft("verify", tmp_path)
    assert (code, err) == (0, "") and f"{tmp_path / 'audit.jsonl'}: 1 line," in out
    assert fedgraft("show", tmp_path)[:2] == (0, f"{tmp_path}: nothing was spent\n")
    AuditLog(tmp_path).write("left", privacy={"ledger": "ab" * 32})
    code, _, err = fedgraft("verify", tmp_path)
    assert code == 2 and "line 2 says that an answer left under ledger line abab" in err


@pytest.mark.parametrize("command", ["show", "verify"])
def test_where_there_is_no_ledger_it_is_said(fedgraft: Callable[..., Any], tmp_path: Path, command: str) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        code, out, err = fedgraft(command, place)
        assert (code, out) == (2, "")
        assert err == f"fedgraft: {place}: holds no ledger; give a ledger file, a site's folder or a run directory\n"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(["--delta", "1"], "--delta 1 is not between 0 and 1"), (["--neighbours", "all"], "neighbours is `all`")],
)
def test_a_question_that_makes_no_sense_is_one_line(
    fedgraft: Callable[..., Any], site: Path, arguments: list[str], reason: str
) -> None:
    code, out, err = fedgraft("show", site, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert reason in err


# Verify


def test_a_whole_record_is_said_to_be_whole_and_what_that_does_not_mean(
    fedgraft: Callable[..., Any], site: Path
) -> None:
    for place in (site, site / "ledgers", site / "ledgers" / f"{DATA[:16]}.jsonl", site.parents[1]):
        code, out, err = fedgraft("verify", place)
        assert (code, err) == (0, "")
        assert f"{DATA[:16]}.jsonl: 5 lines, each as it was written, last {told(site)[-1]['sha256']}" in out
        assert "Whoever may write a file could have written it anew." in out


@pytest.mark.parametrize("line", [1, 3, 5])
def test_a_changed_line_is_named_and_the_exit_code_is_2(fedgraft: Callable[..., Any], site: Path, line: int) -> None:
    file = site / "ledgers" / f"{DATA[:16]}.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    lines[line - 1] = lines[line - 1].replace(b'"steps": ', b'"steps": 1')
    file.write_bytes(b"".join(lines))
    for place in (site, file, site.parents[1]):
        code, _, err = fedgraft("verify", place)
        assert code == 2
        assert err.startswith(f"fedgraft: {file}: line {line} was changed or lost; ") and err.count("\n") == 1


def test_a_line_that_a_crash_cut_off_is_no_damage(fedgraft: Callable[..., Any], site: Path) -> None:
    file = site / "ledgers" / f"{DATA[:16]}.jsonl"
    file.write_bytes(file.read_bytes()[:-9])
    code, out, _ = fedgraft("verify", site)
    assert code == 0 and "4 lines" in out


def _log(site: Path) -> Journal:
    return Journal(site / "audit.jsonl", name="log", stop="", damage="")


def test_the_audit_log_is_verified_with_the_ledger(fedgraft: Callable[..., Any], site: Path) -> None:
    log = _log(site)
    log.append({"time": datetime.now(UTC).isoformat(), "event": "left", "privacy": {"ledger": told(site)[1]["sha256"]}})
    log.append({"event": "refused"})
    code, out, _ = fedgraft("verify", site.parents[1])
    assert code == 0 and f"{site / 'audit.jsonl'}: 2 lines" in out
    log.path.write_text(log.path.read_text().replace("refused", "allowed"))
    code, _, err = fedgraft("verify", site)
    assert code == 2 and f"{site / 'audit.jsonl'}: line 2 was changed or lost" in err


def test_a_ledger_put_back_from_an_old_copy_is_found_by_the_audit_log(fedgraft: Callable[..., Any], site: Path) -> None:
    file = site / "ledgers" / f"{DATA[:16]}.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    _log(site).append({"event": "left", "privacy": {"ledger": told(site)[-1]["sha256"]}})
    assert fedgraft("verify", site)[0] == 0
    file.write_bytes(b"".join(lines[:2]))
    code, out, err = fedgraft("verify", site)
    assert code == 2 and "2 lines, each as it was written" in out
    assert f"{site / 'audit.jsonl'}: line 1 says that an answer left under ledger line" in err
    assert "more was spent than it says" in err
