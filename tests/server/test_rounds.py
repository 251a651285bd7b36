"""Whole runs: what they leave behind, and what they do when sites fail, lie, come late or never come."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Error, Message, RecordDict
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedgraft.client import trainer
from fedgraft.core.config import RunConfig
from fedgraft.core.errors import UserError
from fedgraft.core.progress import Watch
from fedgraft.core.update import PrivacyStatement
from fedgraft.core.wire import FAULTS
from fedgraft.privacy import Ledger
from fedgraft.privacy import epsilon as epsilon_of
from fedgraft.server.app import run_on
from fedgraft.simulations import run as runs
from fedgraft.simulations.engines import inprocess
from fedgraft.simulations.engines.local import FIRST_NODE
from fedgraft.simulations.scenario import site_data

DOCS = Path(__file__).resolve().parents[2] / "docs" / "run-directory.md"
Answer = Callable[[], Message]


@pytest.fixture(scope="module")
def finished(tiny_federation: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, tiny_federation.run(tiny_federation.config(), folder)


@pytest.fixture(scope="module")
def finished_private(tiny_federation: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("finished-private") / "run"
    return folder, tiny_federation.run(tiny_federation.private(), folder)


# What a run leaves behind


def documented(heading: str) -> set[str]:
    """The keys in the first column of the table under ``heading`` of docs/run-directory.md."""
    section = DOCS.read_text(encoding="utf-8").split(f"## {heading}", 1)[1].split("\n## ", 1)[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {key for cell in cells for key in re.findall(r"`([a-z_]+)`", cell)}


def entries(text: str, key: str) -> set[str]:
    """The names in backticks that the table's row of ``key`` lists, before any remark in brackets about one."""
    row = next(line for line in text.splitlines() if line.startswith("| ") and f"`{key}`" in line.split("|")[1])
    return set(re.findall(r"`([a-z_]+)`", row.split("|")[3]))


def test_the_run_record_has_the_documented_keys_and_no_others(finished: Any, finished_private: Any) -> None:
    keys = documented("run.json, schema 1")
    assert len(keys) > 25
    for folder, result in (finished, finished_private):
        saved = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        assert set(saved) == keys
        assert {**result, "schema": 1} == saved


def test_the_sections_of_the_run_record_have_the_documented_keys(finished: Any, finished_private: Any) -> None:
    text = DOCS.read_text(encoding="utf-8")
    for _, result in (finished, finished_private):
        for key in ("strategy", "method", "model", "adapter"):
            assert set(result[key]) == entries(text, key), key
        for site in result["sites"].values():
            assert set(site) == entries(text, "sites")
    privacy = finished_private[1]["sites"]["east"]["privacy"]
    paragraph = re.search(r"`privacy` of a site: (.*?);", text, re.DOTALL)
    assert paragraph is not None
    assert set(privacy) == set(re.findall(r"`([a-z_]+)`", paragraph[1]))


def test_the_documented_files_are_there_and_no_others(finished_private: Any) -> None:
    folder, result = finished_private
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == {
        *("run.json", "metrics.jsonl", "report.html", "adapter", "checkpoints", "sites"),
    }
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == [f"round-000{n}" for n in (1, 2, 3)]
    for site in result["sites"]:
        files = {str(p.relative_to(folder / "sites" / site)) for p in (folder / "sites" / site).rglob("*.*")}
        assert {re.sub("[0-9a-f]{16}", "FINGERPRINT", file) for file in files} == {
            *("audit.jsonl", "ledgers/FINGERPRINT.jsonl", "ledgers/.lock"),
        }
    assert not [path for path in folder.rglob(".*") if path.name != ".lock"], "something half written was left"


def test_the_run_record_says_what_happened(finished: Any, tinyfederation: ModuleType) -> None:
    folder, result = finished
    assert (result["status"], result["error"], result["rounds"], result["engine"]) == ("finished", "", 3, "inprocess")
    assert result["digest"] == result["adapter"]["digest"]
    assert result["resumed"] == []
    assert result["warnings"] == [
        "differential privacy was switched off (privacy.enabled = false): nothing is promised"
    ]
    assert sum(site["records"] + site["held_out"] for site in result["sites"].values()) == tinyfederation.RECORDS
    evaluations = tinyfederation.metrics(folder, "evaluate")
    trainings = tinyfederation.metrics(folder, "train")
    assert [line["round"] for line in evaluations] == [0, 1, 2, 3]
    assert [line["round"] for line in trainings] == [1, 2, 3]
    assert result["accuracy"] == {"before": evaluations[0]["accuracy"], "after": evaluations[-1]["accuracy"]}
    assert result["bytes_up"] == sum(line["bytes_up"] for line in (*evaluations, *trainings))
    for line in trainings:
        assert set(line["sites"]) == set(tinyfederation.SITES)
        assert all(set(site) == {"records", "steps", "loss"} for site in line["sites"].values())


def test_a_private_run_tells_no_training_loss_and_keeps_its_promise(finished_private: Any, tinyfederation: Any) -> None:
    folder, result = finished_private
    for line in tinyfederation.metrics(folder, "train"):
        assert all(set(site) == {"records", "steps", "privacy"} for site in line["sites"].values())
    for site in result["sites"].values():
        assert 0 < site["epsilon"] <= 2.0
        assert site["delta"] == 1e-3
        assert site["unit"] == "patient"
        assert site["units"] < site["records"]
        assert site["privacy"]["steps"] == 9
    assert result["warnings"] == []


def recomputed(folder: Path, config: RunConfig) -> tuple[int, int]:
    """Right answers and answers on all held-out records, from the files that the run left, without fedgraft's model."""
    model = AutoModelForSequenceClassification.from_pretrained(config.model, num_labels=len(config.task.labels))
    tuned = PeftModel.from_pretrained(model, str(folder)).eval()
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    right = count = 0
    for data in site_data(config).values():
        batch = tokenizer(list(data.held_out.inputs), return_tensors="pt", padding=True, truncation=True, max_length=32)
        with torch.no_grad():
            logits = tuned(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        right += int((logits.argmax(-1).numpy() == data.held_out.labels).sum())
        count += len(data.held_out)
    return right, count


@pytest.mark.parametrize("private", [False, True])
def test_the_adapter_folder_gives_the_accuracy_that_the_run_record_says(
    private: bool, finished: Any, finished_private: Any, tiny_federation: Any
) -> None:
    _, result = finished_private if private else finished
    config = tiny_federation.private() if private else tiny_federation.config()
    right, count = recomputed(Path(result["adapter_path"]), config)
    assert right / count == result["accuracy"]["after"]
    assert count == sum(site["held_out"] for site in result["sites"].values())


def test_training_teaches_something(finished: Any) -> None:
    """So that an adapter that was never written, sent or loaded would not pass for the trained one."""
    _, result = finished
    assert result["accuracy"]["after"] > result["accuracy"]["before"] + 0.2
    assert result["loss"]["after"] < 0.75 * result["loss"]["before"]


def test_an_adapter_is_started_from_and_kept(finished: Any, tiny_federation: Any, tmp_path: Path) -> None:
    _, result = finished
    config = tiny_federation.config(start_from=result["adapter_path"], rounds=1, **{"train.lr": 1e-12})
    again = tiny_federation.run(config, tmp_path / "run")
    assert again["accuracy"]["before"] == again["accuracy"]["after"] == result["accuracy"]["after"]


def test_nothing_is_released_where_evaluation_releases_nothing(tiny_federation: Any, tmp_path: Path) -> None:
    result = tiny_federation.run(tiny_federation.config(rounds=1, **{"evaluate.release": "none"}), tmp_path / "run")
    assert result["accuracy"] == result["loss"] == {"before": None, "after": None}
    assert {site["accuracy"] for site in result["sites"].values()} == {None}


def test_evaluation_is_as_rare_as_asked(tiny_federation: Any, tinyfederation: ModuleType, tmp_path: Path) -> None:
    for every, rounds in ((0, [0, 3]), (2, [0, 2, 3])):
        folder = tmp_path / str(every)
        tiny_federation.run(tiny_federation.config(**{"evaluate.every": every}), folder)
        assert [line["round"] for line in tinyfederation.metrics(folder, "evaluate")] == rounds


def test_as_many_checkpoints_are_kept_as_asked(tiny_federation: Any, tmp_path: Path) -> None:
    tiny_federation.run(tiny_federation.config(**{"server.keep_checkpoints": 1}), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["round-0003"]


def test_sixteen_bits_on_the_wire_halve_the_bytes_and_end_close(
    finished: Any, tiny_federation: Any, tmp_path: Path
) -> None:
    _, exact = finished
    for wire in ("bf16", "fp16"):
        result = tiny_federation.run(tiny_federation.config(**{"server.wire_dtype": wire}), tmp_path / wire)
        assert result["bytes_up"] < 0.7 * exact["bytes_up"]
        assert result["digest"] != exact["digest"]
        assert result["loss"]["after"] == pytest.approx(exact["loss"]["after"], rel=0.05)


# Same seed, same result


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(
    finished: Any, tiny_federation: Any, tmp_path: Path
) -> None:
    _, result = finished
    again = tiny_federation.run(tiny_federation.config(), tmp_path / "again")
    assert again["digest"] == result["digest"]
    assert again["accuracy"] == result["accuracy"]
    other = tiny_federation.run(tiny_federation.config(seed=4), tmp_path / "other")
    assert other["digest"] != result["digest"]


def test_the_order_in_which_sites_are_listed_changes_nothing(
    finished: Any, tiny_federation: Any, tmp_path: Path
) -> None:
    _, result = finished
    again = tiny_federation.run(tiny_federation.config(**{"data.sites": ["south", "north", "east"]}), tmp_path / "run")
    assert again["digest"] == result["digest"]
    assert list(again["sites"]) == list(result["sites"]) == ["east", "north", "south"]


def test_the_order_in_which_sites_run_changes_nothing(
    finished: Any, tiny_federation: Any, tinyfederation: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, result = finished

    def backwards(grid: Any, messages: Any, *, timeout: float | None = None) -> list[Message]:
        pushed = [grid.push_messages([message]) for message in messages]
        return [reply for ids in reversed(pushed) for reply in grid.pull_messages(ids)]

    monkeypatch.setattr(inprocess.InProcessGrid, "send_and_receive", backwards)
    again = tiny_federation.run(tiny_federation.config(), tmp_path / "run")
    assert again["digest"] == result["digest"]
    for kind in ("train", "evaluate"):
        pairs = zip(tinyfederation.metrics(folder, kind), tinyfederation.metrics(tmp_path / "run", kind), strict=True)
        assert all(mine["sites"] == theirs["sites"] for mine, theirs in pairs)


def test_seeded_noise_repeats_itself_and_is_called_what_it_is(tiny_federation: Any, tmp_path: Path) -> None:
    config = tiny_federation.private(rounds=1, **{"privacy.seeded_noise_not_private": True})
    one, two = (tiny_federation.run(config, tmp_path / name) for name in ("one", "two"))
    assert one["digest"] == two["digest"]
    assert one["warnings"] == [
        "the noise came from the run's seed (privacy.seeded_noise_not_private): it protects nobody"
    ]
    assert one["sites"]["east"]["privacy"]["private_noise"] is False
    real = [tiny_federation.run(tiny_federation.private(rounds=1), tmp_path / name) for name in ("three", "four")]
    assert len({one["digest"], real[0]["digest"], real[1]["digest"]}) == 3


# Sites that fail


def failing(site: str, rounds: set[int], fail: Callable[[Message, Answer], Message], kind: str = "train") -> Any:
    """South (or whoever) fails in ``rounds``."""

    def between(name: str, message: Message, answer: Answer) -> Message:
        number = int(message.content.config_records["job"]["round"])  # type: ignore[arg-type]
        if name == site and message.metadata.message_type == kind and number in rounds:
            return fail(message, answer)
        return answer()

    return between


def _crash(message: Message, answer: Answer) -> Message:
    return Message(Error(2, "RuntimeError"), reply_to=message)


def _raises(message: Message, answer: Answer) -> Message:
    plain = trainer.train
    trainer.train = lambda *args, **more: {}["a secret of the patient"]  # type: ignore[assignment]
    try:
        return answer()
    finally:
        trainer.train = plain


def _nan(message: Message, answer: Answer) -> Message:
    reply = answer()
    numbers = reply.content.array_records["adapter"]["float32"].numpy().copy()
    numbers[3] = np.nan
    reply.content["adapter"] = ArrayRecord({"float32": Array(numbers)})
    return reply


def _wrong_round(message: Message, answer: Answer) -> Message:
    reply = answer()
    reply.content.config_records["site"]["round"] = 1
    return reply


def _wrong_name(message: Message, answer: Answer) -> Message:
    reply = answer()
    reply.content.config_records["site"]["name"] = "north"
    return reply


def _garbage(message: Message, answer: Answer) -> Message:
    return Message(RecordDict(), reply_to=message)


FAILURES: dict[str, tuple[Callable[[Message, Answer], Message], str]] = {
    "its process dies": (_crash, "its process failed: RuntimeError"),
    "its training raises": (_raises, "KeyError at the site; the site's own log says more"),
    "it sends NaN": (
        _nan,
        "south: tensor base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.default.weight holds NaN or "
        "infinity",
    ),
    "it answers for another round": (_wrong_round, "south: answered for round 1, this is round 2"),
    "it answers in another's name": (_wrong_name, "north: answered from a node that is registered as south"),
    "it answers nothing": (_garbage, "south: the answer does not say which site it is"),
}


@pytest.fixture(scope="module")
def without_south(tiny_federation: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of a run in which south had no part in round 2."""
    config = tiny_federation.config(**{"server.quorum": 2})
    folder = tmp_path_factory.mktemp("without") / "run"
    return str(tiny_federation.run(config, folder, failing("south", {2}, _crash))["digest"])


@pytest.mark.parametrize("name", FAILURES)
def test_a_failing_site_is_named_and_the_others_go_on(
    name: str,
    tiny_federation: Any,
    tinyfederation: ModuleType,
    tmp_path: Path,
    without_south: str,
    finished: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fail, reason = FAILURES[name]
    notes = tinyfederation.Notes()
    config = tiny_federation.config(**{"server.quorum": 2})
    result = tiny_federation.run(config, tmp_path / "run", failing("south", {2}, fail), notes)
    one, two, three = tinyfederation.metrics(tmp_path / "run", "train")
    assert (one["missing"], two["missing"], three["missing"]) == ({}, {"south": reason}, {})
    assert set(two["sites"]) == {"east", "north"}
    assert f"round 2: south is missing: {reason.removeprefix('south: ')}" in notes.texts
    assert result["status"] == "finished"
    assert result["sites"]["south"]["rounds"] == 2
    fault = "crashed" if name == "its process dies" else "refused"
    assert two["faults"] == {"south": fault}
    assert result["sites"]["south"]["missed"] == {kind: int(kind == fault) for kind in FAULTS}
    assert f"south answered in 2 of 3 rounds (1 {fault})" in result["warnings"]
    # It had no part in round 2, whatever it sent, and all of its part in round 3.
    assert result["digest"] == without_south != finished[1]["digest"]
    # An exception may quote a record: it stays at the site.
    secret = "a secret of the patient"
    assert secret not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert secret not in (tmp_path / "run" / "run.json").read_text()
    if fail is _raises:
        assert any(secret in text for text in notes.texts)
        assert any(secret in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("quorum", [0, 3])
def test_below_the_quorum_the_run_stops_in_one_line_and_is_resumed(
    quorum: int, tiny_federation: Any, tinyfederation: ModuleType, tmp_path: Path, finished: Any
) -> None:
    folder = tmp_path / "run"
    config = tiny_federation.config(**{"server.quorum": quorum})
    with pytest.raises(UserError) as caught:
        tiny_federation.run(config, folder, failing("south", {2}, _raises))
    text = str(caught.value)
    assert text == (
        "round 2: 2 of 3 sites answered, the quorum is 3 (south: KeyError at the site; the site's own log says "
        f"more); --resume {folder} goes on from round 2"
    )
    run = json.loads((folder / "run.json").read_text())
    assert (run["status"], run["error"], run["rounds"], run["finished"]) == ("failed", text, 1, "")
    assert (folder / "report.html").is_file()
    assert not (folder / "adapter").exists()
    result = tiny_federation.resume(config, folder)
    assert result["digest"] == finished[1]["digest"]
    assert [again["from_round"] for again in result["resumed"]] == [1]
    assert [line["round"] for line in tinyfederation.metrics(folder, "train")] == [1, 2, 3]


def test_a_failed_evaluation_is_named_and_stops_nothing(
    tiny_federation: Any, tinyfederation: ModuleType, tmp_path: Path, finished: Any
) -> None:
    between = failing("south", {3}, _crash, "evaluate")
    result = tiny_federation.run(tiny_federation.config(), tmp_path / "run", between)
    assert result["digest"] == finished[1]["digest"]
    last = tinyfederation.metrics(tmp_path / "run", "evaluate")[-1]
    assert last["missing"] == {"south": "its process failed: RuntimeError"}
    assert last["examples"] == sum(site["examples"] for site in last["sites"].values())
    assert set(last["sites"]) == {"east", "north"}


class Clock:
    """The in-process engine's clock, which a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize(("late", "missing"), [("south", {"south"}), ("north", {"north", "south"})])
def test_a_site_that_comes_too_late_is_named(
    late: str,
    missing: set[str],
    tiny_federation: Any,
    tinyfederation: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr(inprocess, "time", SimpleNamespace(monotonic=clock.monotonic))

    def slow(message: Message, answer: Answer) -> Message:
        clock.now += 31
        return answer()

    config = tiny_federation.config(**{"server.quorum": 1, "server.round_timeout": 30})
    result = tiny_federation.run(config, tmp_path / "run", failing(late, {2}, slow))
    _, two, three = tinyfederation.metrics(tmp_path / "run", "train")
    assert two["missing"] == dict.fromkeys(missing, "no answer in 30 s")
    assert three["missing"] == {}
    assert result["status"] == "finished"
    # Sites whose turn never came were sent nothing, and afterwards everything.
    evaluated = tinyfederation.metrics(tmp_path / "run", "evaluate")
    assert evaluated[2]["missing"] == {}
    assert evaluated[2]["bytes_down"] >= evaluated[1]["bytes_down"]


def test_the_budget_of_a_lost_answer_is_told_with_the_next_one(
    tiny_federation: Any, tinyfederation: ModuleType, tmp_path: Path
) -> None:
    """South trains in the last round, but its answer is lost: those steps are spent all the same."""

    def lost(message: Message, answer: Answer) -> Message:
        answer()
        return _crash(message, answer)

    config = tiny_federation.private(**{"server.quorum": 2})
    result = tiny_federation.run(config, tmp_path / "run", failing("south", {3}, lost))
    assert {site: entry["privacy"]["steps"] for site, entry in result["sites"].items()} == dict.fromkeys(
        tinyfederation.SITES, 9
    )
    assert result["sites"]["south"]["rounds"] == 2


def test_a_restarted_site_gets_the_whole_adapter_in_the_same_round(
    tiny_federation: Any, tinyfederation: ModuleType, tmp_path: Path, finished: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its memory is empty when round 2 begins, as after a restart of its process."""
    seen: list[tuple[str, int, str]] = []
    plain = inprocess.InProcessGrid._answer

    def answer(grid: Any, message: Message) -> Message:
        job = message.content.config_records["job"]
        again = (str(job["site"]), int(job["round"]), message.metadata.message_type)  # type: ignore[arg-type]
        if again == ("north", 2, "train") and again not in seen:
            grid._contexts[message.metadata.dst_node_id].state = RecordDict()
        seen.append(again)
        return plain(grid, message)

    monkeypatch.setattr(inprocess.InProcessGrid, "_answer", answer)
    result = tiny_federation.run(tiny_federation.config(), tmp_path / "run")
    assert seen.count(("north", 2, "train")) == 2
    assert all(line["missing"] == {} for line in tinyfederation.metrics(tmp_path / "run", "train"))
    assert result["digest"] == finished[1]["digest"]
    two, three = tinyfederation.metrics(tmp_path / "run", "train")[1:]
    assert two["bytes_down"] > three["bytes_down"]


# Joining


class Changing:
    """A site's hello is changed on its way."""

    def __init__(self, site: str, change: Callable[[RecordDict], None], times: int = 10**6) -> None:
        self.site, self.change, self.times = site, change, times

    def __call__(self, site: str, message: Message, answer: Answer) -> Message:
        reply = answer()
        if message.metadata.message_type == "query.hello" and site == self.site and self.times > 0:
            self.times -= 1
            self.change(reply.content)
        return reply


class FourNodes(inprocess.InProcessGrid):
    """One more node than the run has sites."""

    def get_node_ids(self) -> list[int]:
        last = max(super().get_node_ids())
        return [*super().get_node_ids(), last + 1]


def test_a_registered_site_that_the_job_leaves_out_is_asked_for_nothing_and_named_once(
    tiny_federation: Any, tinyfederation: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, asked, notes = [*tinyfederation.SITES, "west"], [], tinyfederation.Notes()

    def between(site: str, message: Message, answer: Answer) -> Message:
        asked.append(message.metadata.dst_node_id)
        return answer()

    config = tiny_federation.config()
    monkeypatch.setattr(runs, "InProcessGrid", FourNodes)
    monkeypatch.setattr(runs, "run_on", partial(run_on, registered=lambda node: names[node - FIRST_NODE - 1]))
    run = tiny_federation.run(config, tmp_path / "run", between, notes)
    assert run["status"] == "finished" and sorted(run["sites"]) == list(tinyfederation.SITES)
    assert set(asked) == {FIRST_NODE + 1, FIRST_NODE + 2, FIRST_NODE + 3}
    assert [text for text in notes.texts if "west" in text] == [
        "site west is connected, and rests: data.sites does not list it"
    ]


def _named(name: str) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        content.config_records["site"]["name"] = name

    return change


def _other_adapter(content: RecordDict) -> None:
    content.config_records["facts"]["spec"] = "0" * 16


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_named("west"), "node 4 says it is site `west`, which data.sites does not list"),
        (_named("north"), "two nodes say they are site north; give each site its own name"),
        (
            _other_adapter,
            "site south trains another adapter than the run's lora of rank 4; "
            "use one method, rank and alpha everywhere",
        ),
    ],
)
def test_a_site_that_does_not_fit_ends_the_run_before_it_begins(
    change: Callable[[RecordDict], None], reason: str, tiny_federation: Any, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        tiny_federation.run(tiny_federation.config(), tmp_path / "run", Changing("south", change))
    assert str(caught.value) == reason
    assert not (tmp_path / "run").exists(), "a run that never began left a folder"


class Nodes:
    """The nodes that the grid knows: ``first``, and ``later`` from the first training on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, first: list[int], later: list[int]) -> None:
        self.now, self.later = first, later
        monkeypatch.setattr(inprocess.InProcessGrid, "get_node_ids", lambda grid: self.now)

    def __call__(self, site: str, message: Message, answer: Answer) -> Message:
        if message.metadata.message_type == "train":
            self.now = self.later
        return answer()


def test_without_a_quorum_of_sites_there_is_one_line(
    tiny_federation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Nodes(monkeypatch, [2], [2])
    config = tiny_federation.config(**{"server.quorum": 2, "server.join_timeout": 0.01})
    with pytest.raises(UserError) as caught:
        tiny_federation.run(config, tmp_path / "run")
    assert str(caught.value) == "1 of 3 sites joined within 0.01 s, the quorum is 2; missing: north, south"


def test_a_site_may_join_later(
    tiny_federation: Any, tinyfederation: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Nodes(monkeypatch, [2, 3], [2, 3, 4])
    notes = tinyfederation.Notes()
    config = tiny_federation.config(**{"server.quorum": 2, "server.join_timeout": 1})
    result = tiny_federation.run(config, tmp_path / "run", known, notes)
    missing = [line["missing"] for line in tinyfederation.metrics(tmp_path / "run", "train")]
    assert missing == [{"south": "not connected"}, {}, {}]
    assert notes.texts[0] == "site south did not join; the run goes on without it until it does"
    assert result["sites"]["south"]["records"] > 0


def test_a_late_joiner_that_does_not_fit_ends_no_run(
    tiny_federation: Any, tinyfederation: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Nodes(monkeypatch, [2, 3], [2, 3, 4])
    forge = Changing("south", _named("north"))
    notes = tinyfederation.Notes()
    config = tiny_federation.config(**{"server.quorum": 2, "server.join_timeout": 1})

    def between(site: str, message: Message, answer: Answer) -> Message:
        return known(site, message, lambda: forge(site, message, answer))

    result = tiny_federation.run(config, tmp_path / "run", between, notes)
    assert result["status"] == "finished"
    said = [text for text in notes.texts if "two nodes" in text]
    assert said == ["two nodes say they are site north; give each site its own name; the run goes on without it"]
    assert {line["missing"]["south"] for line in tinyfederation.metrics(tmp_path / "run", "train")} == {"not connected"}


def test_a_site_that_comes_back_on_another_node_is_known_again(
    tiny_federation: Any, tinyfederation: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Any
) -> None:
    """North's node 3 is gone after round 1 and a node 9 says it is north."""
    known = Nodes(monkeypatch, [2, 3, 4], [2, 4, 9])
    moved: list[int] = []

    def ids(grid: Any) -> list[int]:
        if 9 in known.now and 9 not in grid._contexts:
            context = grid._contexts.pop(3)
            context.node_id, context.state = 9, RecordDict()
            grid._contexts[9] = context
            moved.append(9)
        return known.now

    monkeypatch.setattr(inprocess.InProcessGrid, "get_node_ids", ids)
    result = tiny_federation.run(tiny_federation.config(), tmp_path / "run", known)
    assert moved == [9]
    assert all(line["missing"] == {} for line in tinyfederation.metrics(tmp_path / "run", "train"))
    assert result["digest"] == finished[1]["digest"]


# A full disk


@pytest.mark.parametrize(("where", "rounds"), [("checkpoint", 1), ("metrics", 1), ("adapter", 3)])
def test_a_full_disk_stops_the_run_in_one_line_and_it_is_resumed(
    where: str,
    rounds: int,
    tiny_federation: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    finished: Any,
) -> None:
    import errno

    from fedgraft.core.adapter import AdapterState
    from fedgraft.methods import AttachedAdapter
    from fedgraft.server.rundir import RunDirectory

    folder = tmp_path / "run"
    full = OSError(errno.ENOSPC, "No space left on device")
    save, append = AdapterState.save, RunDirectory.append_metrics

    def save_until(state: AdapterState, path: Path) -> None:
        if "round-0002" in str(path):
            raise full
        save(state, path)

    def append_until(rundir: RunDirectory, line: Any) -> None:
        if line["round"] == 2:
            rundir = RunDirectory(Path("/dev/full"))
        append(rundir, line)

    def save_peft(adapter: Any, path: Path, state: AdapterState) -> None:
        (path / "adapter_config.json").write_text("{")
        raise full

    with monkeypatch.context() as patch:
        if where == "checkpoint":
            patch.setattr(AdapterState, "save", save_until)
        elif where == "metrics":
            patch.setattr(RunDirectory, "append_metrics", append_until)
        else:
            patch.setattr(AttachedAdapter, "save_peft", save_peft)
        with pytest.raises(UserError, match=r": cannot be written: .*; free the disk or choose another --output$"):
            tiny_federation.run(tiny_federation.config(), folder)
    run = json.loads((folder / "run.json").read_text())
    assert (run["status"], run["rounds"]) == ("failed", rounds)
    assert not (folder / "adapter").exists()
    assert not list(folder.rglob("*.new"))
    result = tiny_federation.resume(tiny_federation.config(), folder)
    assert result["digest"] == finished[1]["digest"]
    assert result["accuracy"] == finished[1]["accuracy"]


def test_a_run_that_never_began_keeps_a_folder_that_was_there(tiny_federation: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError):
        tiny_federation.run(tiny_federation.config(), folder, Changing("south", _other_adapter))
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_promise_of_another_kind_is_refused_by_the_server(
    tiny_federation: Any, tinyfederation: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site that trains without noise cannot pass for one that has: it must say so, and then it is refused."""

    def open_handed(message: Message, answer: Answer) -> Message:
        reply = answer()
        del reply.content["privacy"]
        return reply

    config = tiny_federation.private(rounds=1, **{"server.quorum": 2})
    tiny_federation.run(config, tmp_path / "run", failing("south", {1}, open_handed))
    (line,) = tinyfederation.metrics(tmp_path / "run", "train")
    assert line["missing"] == {"south": "south: sent an update without the differential privacy that the run demands"}
    assert PrivacyStatement(**line["sites"]["east"]["privacy"]).enabled


class Steps(Watch):
    """Keeps what the terminal is told of each step."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, float | None, float | None]] = []

    def site_step(self, site: str, step: int, steps: int, loss: float | None, epsilon: float | None) -> None:
        self.seen.append((site, step, loss, epsilon))


def test_progress_tells_loss_without_privacy_and_epsilon_with_it(tiny_federation: Any, tmp_path: Path) -> None:
    for config, name in ((tiny_federation.config(rounds=1), "plain"), (tiny_federation.private(rounds=1), "private")):
        steps = Steps()
        tiny_federation.run(config, tmp_path / name, watch=steps)
        assert [(site, step) for site, step, _, _ in steps.seen] == [
            (site, step) for site in ("east", "north", "south") for step in (1, 2, 3)
        ]
        for _, _, loss, epsilon in steps.seen:
            assert (loss is None) == (name == "private")
            assert (epsilon is None) == (name == "plain")


def test_the_epsilon_of_a_site_is_that_of_whoever_paid_most_in_the_end(tiny_federation: Any, tmp_path: Path) -> None:
    """Evaluations go on after the last training, and held-out people pay for them."""
    config = tiny_federation.private(
        **{"privacy.noise_multiplier": 9.0, "evaluate.release": "noised", "evaluate.epsilon": 1.5, "rounds": 2}
    )
    run = tiny_federation.run(config, tmp_path / "run")
    for site, told in run["sites"].items():
        ledger = Ledger(tmp_path / "run" / "sites" / site / "ledgers")
        (split,) = {entry.split for entry in ledger.entries()}
        trained, evaluated = (epsilon_of(ledger.spent(part, split), 1e-3) for part in ("train", "held-out"))
        assert trained < evaluated == told["epsilon"] == told["privacy"]["epsilon"] <= 1.5


@pytest.mark.parametrize("first", [False, True], ids=["after the answers", "before them"])
def test_answers_that_come_twice_or_from_an_earlier_round_count_once(
    finished: tuple[Path, dict[str, Any]],
    tiny_federation: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    first: bool,
) -> None:
    plain = inprocess.InProcessGrid.send_and_receive
    earlier: list[Message] = []

    def again(grid: Any, messages: Any, *, timeout: float | None = None) -> list[Message]:
        answers = list(plain(grid, messages, timeout=timeout))
        old = earlier[-2 * len(tiny_federation.config().site_names) :]
        earlier.extend(answers)
        return [*old, *answers, *answers] if first else [*answers, *answers, *old]

    monkeypatch.setattr(inprocess.InProcessGrid, "send_and_receive", again)
    run = tiny_federation.run(tiny_federation.config(), tmp_path / "run")
    assert run["digest"] == finished[1]["digest"] and run["accuracy"] == finished[1]["accuracy"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["missing"] for line in lines] == [{}] * len(lines), "nobody was missing"
