"""The in-process engine and Flower's own: the same messages, the same result, nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import pytest
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedgraft.core.errors import UserError
from fedgraft.server.checkpoints import load_last
from fedgraft.simulations import run as runs
from fedgraft.simulations.app import run_folder
from fedgraft.simulations.engines import flower, inprocess
from fedgraft.simulations.engines.flower import run_flower
from fedgraft.simulations.engines.inprocess import InProcessGrid
from fedgraft.simulations.execution import Execution

# In process


def counting_app() -> ClientApp:
    """Answers with how often the site was asked before, and breaks what it was sent."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        seen = context.state.metric_records.get("seen", MetricRecord({"times": 0}))
        context.state["seen"] = MetricRecord({"times": int(seen["times"]) + 1})  # type: ignore[arg-type]
        message.content["job"] = ConfigRecord({"broken": True})
        answer = RecordDict({"seen": MetricRecord(dict(seen)), "node": MetricRecord(dict(_node(context)))})
        return Message(answer, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        raise ValueError("a record's content")

    return app


def _node(context: Context) -> dict[str, int]:
    return {"number": int(context.node_config["partition-id"]), "of": int(context.node_config["num-partitions"])}


def messages(grid: InProcessGrid, kind: str = "train") -> Iterator[Message]:
    for node in grid.get_node_ids():
        yield grid.create_message(RecordDict({"job": ConfigRecord({"round": 1})}), kind, node, "1")


def test_every_site_answers_for_itself_and_remembers() -> None:
    grid = InProcessGrid(counting_app(), 3)
    for times in (0, 1):
        replies = list(grid.send_and_receive(messages(grid)))
        assert [reply.metadata.src_node_id for reply in replies] == list(grid.get_node_ids())
        assert [dict(reply.content["seen"]) for reply in replies] == [{"times": times}] * 3
        assert [dict(reply.content["node"]) for reply in replies] == [{"number": n, "of": 3} for n in range(3)]


def test_a_site_gets_a_copy_and_gives_one() -> None:
    grid = InProcessGrid(counting_app(), 1)
    (sent,) = messages(grid)
    (reply,) = grid.send_and_receive([sent])
    assert dict(sent.content["job"]) == {"round": 1}
    reply.content["seen"]["times"] = 99  # type: ignore[index]
    (again,) = grid.send_and_receive(messages(grid))
    assert dict(again.content["seen"]) == {"times": 1}


def test_answers_are_made_one_at_a_time() -> None:
    """So that the server never holds two updates, however many sites there are."""
    grid = InProcessGrid(counting_app(), 4)
    taken: list[int] = []

    def listening() -> Iterator[Message]:
        for message in messages(grid):
            taken.append(message.metadata.dst_node_id)
            yield message

    replies = iter(grid.send_and_receive(listening()))
    assert taken == []
    next(replies)
    assert len(taken) == 1
    next(replies)
    assert len(taken) == 2


def test_what_a_site_raises_is_an_error_without_its_words() -> None:
    grid = InProcessGrid(counting_app(), 2)
    replies = list(grid.send_and_receive(messages(grid, "evaluate")))
    assert [reply.error.reason for reply in replies] == ["ValueError", "ValueError"]
    assert [reply.metadata.src_node_id for reply in replies] == list(grid.get_node_ids())


def test_after_the_time_is_up_no_site_is_asked_and_no_answer_given(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 2.0, 3.0, 11.0, 12.0, 13.0])
    clock = type("Clock", (), {"monotonic": staticmethod(lambda: next(now))})
    monkeypatch.setattr(inprocess, "time", clock)
    grid = InProcessGrid(counting_app(), 4)
    replies = list(grid.send_and_receive(messages(grid), timeout=10))
    # Asked at 1, answered at 2; asked at 3, answered at 11, which is too late; nobody after that.
    assert len(replies) == 1
    asked = [context.state.metric_records.get("seen") is not None for context in grid._contexts.values()]
    assert asked == [True, True, False, False]


def test_pulling_gives_what_was_pushed_once() -> None:
    grid = InProcessGrid(counting_app(), 2)
    ids = list(grid.push_messages(messages(grid)))
    assert len(list(grid.pull_messages(ids))) == 2
    assert list(grid.pull_messages(ids)) == []
    assert list(grid.pull_messages(["unknown"])) == []


@pytest.mark.slow
def test_memory_stays_flat_from_ten_sites_to_two_hundred(
    tiny_federation: Any, tinyfederation: ModuleType, tmp_path: Path
) -> None:
    """The records are the same and dealt to more sites; adapters that each site kept for itself would show."""
    rows = [{"text": row["text"], "label": row["label"]} for row in tiny_federation.rows] * 4
    table = tinyfederation.write_csv(tmp_path / "records.csv", rows)

    def peak(sites: int, folder: str) -> tuple[int, int]:
        config = tiny_federation.config(
            **{
                "rounds": 1,
                "method.rank": 64,
                "train.local_steps": 1,
                "train.batch_size": 2,
                "data.path": str(table),
                "data.partition": "iid",
                "data.sites": [f"s{number:03d}" for number in range(sites)],
            }
        )
        tracemalloc.start()
        try:
            result = tiny_federation.run(config, tmp_path / folder)
            return tracemalloc.get_traced_memory()[1], 4 * result["adapter"]["parameters"]
        finally:
            tracemalloc.stop()

    peak(10, "warm")
    (few, adapter), (many, _) = peak(10, "few"), peak(200, "many")
    assert many - few < 190 * adapter, (few, many, adapter)


# Flower's


RUNTIME = ("flower-superlink", "flwr-simulation", "flower-superexec", "raylet", "gcs_server")


def ours() -> set[int]:
    """Processes that this one started, and Flower's or Ray's that lost their parent."""
    mine = {process.pid for process in psutil.Process().children(recursive=True)}
    for process in psutil.process_iter(["pid", "cmdline"]):
        words = " ".join(process.info["cmdline"] or ())
        if any(
            word in words
            for word in ("flower-superlink", "flwr-simulation", "flower-superexec", "raylet", "gcs_server")
        ):
            mine.add(process.info["pid"])
    return mine


def wait_until_gone(before: set[int]) -> set[int]:
    deadline = time.monotonic() + 20
    while (left := ours() - before) and time.monotonic() < deadline:
        time.sleep(0.5)
    return left


@pytest.mark.slow
def test_flowers_engine_gives_the_same_adapter_and_leaves_nothing_behind(
    tiny_federation: Any, tinyfederation: ModuleType, tmp_path: Path
) -> None:
    config = tiny_federation.config()
    mine = tiny_federation.run(config, tmp_path / "inprocess")
    before = ours()
    threads = os.environ.get("OMP_NUM_THREADS")
    theirs = runs.simulate(config, tmp_path / "flower", execution=Execution("flower"))
    assert theirs["execution"] == {"engine": "flower", "workers": 0, "threads": 1, "cohort": 1, "why": "asked for"}
    assert os.environ.get("OMP_NUM_THREADS") == threads
    assert (theirs["status"], theirs["engine"], theirs["rounds"]) == ("finished", "flower", 3)
    one, two = (load_last(tmp_path / name / "checkpoints").state for name in ("inprocess", "flower"))
    assert one.spec == two.spec
    assert max(float(np.abs(one[name] - two[name]).max()) for name in one) <= 1e-5
    assert theirs["accuracy"]["before"] == mine["accuracy"]["before"]
    assert theirs["loss"]["after"] == pytest.approx(mine["loss"]["after"], rel=1e-4)
    # Whether the last answers changed which site came first or not, the record is by name.
    for kind in ("train", "evaluate"):
        for line, other in zip(
            tinyfederation.metrics(tmp_path / "inprocess", kind),
            tinyfederation.metrics(tmp_path / "flower", kind),
            strict=True,
        ):
            assert (line["round"], list(line["sites"])) == (other["round"], list(other["sites"]))
            assert other["missing"] == {}
    assert wait_until_gone(before) == set()


@pytest.mark.slow
def test_flowers_engine_resumes_a_run_that_failed(tiny_federation: Any, tmp_path: Path) -> None:
    """Its run.json says `failed` until the new attempt has begun; that is not the new attempt's failure."""
    config = tiny_federation.config(rounds=2)
    whole = tiny_federation.run(config, tmp_path / "whole")
    folder = tmp_path / "run"
    tiny_federation.run(config, folder)
    shutil.rmtree(folder / "checkpoints" / "round-0002")
    values = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**values, "status": "failed", "error": "an earlier failure"}))
    before = ours()
    result = runs.resume(folder, execution=Execution("flower"))
    assert (result["status"], result["rounds"], result["engine"]) == ("finished", 2, "flower")
    one, two = (load_last(place / "checkpoints").state for place in (tmp_path / "whole", folder))
    assert max(float(np.abs(one[name] - two[name]).max()) for name in one) <= 1e-5
    assert whole["run"] != result["run"] == values["run"]
    assert wait_until_gone(before) == set()


@pytest.mark.slow
def test_a_mistake_under_flowers_engine_is_the_same_line(tiny_federation: Any, tmp_path: Path) -> None:
    config = tiny_federation.private(**{"privacy.noise_multiplier": 0.3})
    before = ours()
    with pytest.raises(
        UserError, match=r"^site \w+: noise multiplier 0\.3 spends epsilon .* raise privacy\.noise_mult"
    ):
        runs.simulate(config, tmp_path / "run", execution=Execution("flower"))
    assert not (tmp_path / "run").exists()
    assert wait_until_gone(before) == set()


def test_without_ray_the_line_says_what_to_install(
    tiny_federation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flower, "_has_ray", lambda: False)
    with pytest.raises(UserError) as caught:
        run_flower(tiny_federation.config(), tmp_path / "run", resume=False)
    assert str(caught.value) == (
        "the flower engine needs Flower's simulation runtime: pip install 'fedgraft[simulation]'"
    )
    assert not (tmp_path / "run").exists()


def test_when_flowers_runtime_dies_its_last_word_is_told_and_its_log_kept(
    tiny_federation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(command: list[str], home: Path, *more: Any) -> Path:
        (home / "run.log").write_text("starting\nSomeError: out of memory\nbye\n")
        return home / "run.log"

    monkeypatch.setattr(flower, "_superlink", lambda home, threads: contextlib.nullcontext("127.0.0.1:1"))
    monkeypatch.setattr(flower, "_follow", dies)
    with pytest.raises(UserError) as caught:
        runs.simulate(tiny_federation.config(), tmp_path / "run", execution=Execution("flower"))
    kept = tmp_path / "run" / "flower.log"
    assert str(caught.value) == (
        f"Flower's runtime ended before the run did: SomeError: out of memory (whole log: {kept})"
    )
    assert kept.read_text().startswith("starting")
    assert tiny_federation.run(tiny_federation.config(rounds=1), tmp_path / "run")["status"] == "finished"


@pytest.mark.parametrize(
    ("settings", "folder"),
    [
        ({"output": "/a/b", "resume": ""}, Path("/a/b")),
        ({"output": "", "resume": "/c"}, Path("/c")),
        ({"output": "", "resume": ""}, Path.home() / "fedgraft-runs" / "flower-7"),
    ],
)
def test_server_and_sites_derive_the_same_folder(settings: dict[str, str], folder: Path) -> None:
    context = Context(run_id=7, node_id=1, node_config={}, state=RecordDict(), run_config=dict(settings))
    assert run_folder(context) == folder
