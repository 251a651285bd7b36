"""What a site's own files say of it, and that a page shows no more than they do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedgraft.client.policy import unrestricted
from fedgraft.client.watching.page import site_page
from fedgraft.client.watching.snapshot import SiteReader, SiteView
from fedgraft.deployment.authority import Authority
from fedgraft.deployment.kits import SiteKit

TEXT = 'name = "x"\n[server]\naddress = "127.0.0.1:9092"\n[[site]]\nname = "east"\n'
LIMITS = {
    "max_epsilon = inf": "max_epsilon = 8.0",
    "max_epsilon_per_year = inf": "max_epsilon_per_year = 4.0",
    "max_delta = 0.999999999": "max_delta = 0.001",
}


def printed(view: SiteView) -> str:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(site_page(view))
    text = capture.get()
    assert all(len(line.rstrip()) <= 80 for line in text.splitlines())
    return text


@pytest.fixture(scope="module")
def finished(tiny_federation: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("site") / "run"
    return folder, tiny_federation.run(tiny_federation.private(), folder)


@pytest.fixture
def kit(tmp_path: Path) -> SiteKit:
    """The kit of a site that has not begun, with a policy that allows an epsilon of 8, and 4 a year."""
    (tmp_path / "federation.toml").write_text(TEXT)
    folder = Authority.create(tmp_path / "federation.toml", tmp_path / "kits").kits / "sites" / "east"
    policy = unrestricted().text
    for before, after in LIMITS.items():
        assert before in policy
        policy = policy.replace(before, after)
    (folder / "policy.toml").write_text(policy)
    return SiteKit.open(folder)


@pytest.fixture
def served(kit: SiteKit, finished: Any) -> SiteKit:
    """The same with the ledger and the audit log of a site that took part in a run."""
    shutil.copytree(finished[0] / "sites" / "east", kit.state)
    return kit


def test_a_site_that_has_not_begun_has_its_whole_budget(kit: SiteKit) -> None:
    view = SiteReader(kit).look()
    assert (view.name, view.worker, view.connected, view.last, dict(view.answered)) == ("east", 0, None, None, {})
    assert [(budget.left, budget.year) for budget in view.budgets] == [(8.0, False), (4.0, True)]
    text = printed(view)
    assert "no worker" in text and "nothing was asked yet" in text


def test_what_left_and_what_was_spent_is_what_audit_log_and_ledger_say(served: SiteKit, finished: Any) -> None:
    view = SiteReader(served).look()
    lines = [json.loads(text) for text in (served.state / "audit.jsonl").read_text().splitlines()]
    left = [line for line in lines if line["event"] == "left"]
    assert view.answered == Counter(line["kind"] for line in left) == {"hello": 1, "train": 3, "evaluate": 4}
    assert view.bytes_out == sum(line["bytes"] for line in left)
    assert view.last is not None and (view.last.kind, view.last.round) == ("evaluate", 3)
    # The run promised at the same delta what the policy's limit is counted at.
    told = finished[1]["sites"]["east"]["epsilon"]
    assert [budget.spent for budget in view.budgets] == pytest.approx([told, told], rel=1e-12)
    assert f"{8 - told:.2f} left of 8 in all" in printed(view) and f"{4 - told:.2f} left of 4 this year" in printed(
        view
    )


def test_refusals_are_counted_and_the_last_are_told_with_their_reason(served: SiteKit) -> None:
    reader = SiteReader(served)
    assert reader.look().refusals == ()
    with (served.state / "audit.jsonl").open("a") as file:
        for number in range(7):
            line = {"event": "refused", "kind": "train", "round": number, "why": f"reason {number}"}
            line |= {"rule": {"file": "policy.toml", "line": 3, "text": ""}} if number % 2 else {}
            file.write(json.dumps({**line, "time": "2026-11-23T12:00:00+00:00"}) + "\n")
        file.write('{"event": "refused", "kind": "tr')
    view = reader.look()
    assert view.refused == {("train", "policy"): 3, ("train", "other"): 4}
    assert [line.why for line in view.refusals] == [f"reason {number}" for number in range(2, 7)]
    assert "reason 6" in printed(view) and "reason 1" not in printed(view)


def test_a_server_cannot_write_to_the_terminal_of_a_site_or_make_up_kinds_without_end(served: SiteKit) -> None:
    with (served.state / "audit.jsonl").open("a") as file:
        for number in range(50):
            escape = f"\x1b[2J\x07\r\n{number}"
            line = {"event": "refused", "kind": f"query.{escape}", "run": escape * 100, "round": 1, "why": escape}
            file.write(json.dumps(line) + "\n")
    view = SiteReader(served).look()
    assert view.refused == {("other", "other"): 50}
    text = printed(view)
    assert "other of ?[2J" in text and not [c for c in text if not c.isprintable() and c != "\n"]
    assert len(text.splitlines()) < 20


def test_a_broken_policy_and_a_damaged_ledger_are_told_of(served: SiteKit) -> None:
    (ledger,) = (served.state / "ledgers").glob("*.jsonl")
    ledger.write_text(ledger.read_text().replace('"steps": 3', '"steps": 1', 1))
    view = SiteReader(served).look()
    assert all("line 1 was changed" in budget.trouble for budget in view.budgets)
    assert "unknown" in printed(view)
    served.policy.write_text("[[dataset]]")
    view = SiteReader(served).look()
    assert view.budgets == () and str(served.policy) in view.trouble and view.answered["train"] == 3
    assert "policy.toml" in printed(view).replace("\n", "")


def test_only_a_process_that_is_a_worker_is_one(served: SiteKit) -> None:
    lock = served.state / "worker.lock"
    for text in ("", "nobody", str(os.getpid()), "999999999"):
        lock.write_text(text)
        assert SiteReader(served).look().worker == 0
    # A process that was started as a worker is, by its command.
    command = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)", "fedgraft.client.warm"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline()
            lock.write_text(f"{process.pid}\n")
            logs = served.folder / "logs"
            logs.mkdir()
            assert SiteReader(served).look().connected is None
            for said, connected in (
                ("INFO : Starting Flower SuperNode", False),
                ("INFO : SuperNode ID: 17", True),
                ("WARNING : Connection attempt failed, retrying in 0.8 seconds", False),
                ("INFO : Connection successful after 3 seconds and 2 tries.\nINFO : ", True),
                ("INFO : SuperNode terminated gracefully.\nINFO: Shutting down", False),
                ("INFO : SuperNode ID: 17", True),
            ):
                with (logs / "supernode.log").open("a") as file:
                    file.write(f"{said}\n")
                view = SiteReader(served).look()
                assert (view.worker, view.connected) == (process.pid, connected)
            assert f"worker {process.pid}  connected" in printed(view)
        finally:
            process.kill()
