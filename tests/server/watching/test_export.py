"""What TensorBoard and MLflow read back is what metrics.jsonl says, once."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedgraft import cli
from fedgraft.core.errors import UserError
from fedgraft.server.watching.export import MLflow, Point, TensorBoard, export, points_of


@pytest.fixture(autouse=True)
def _site_log() -> Iterator[None]:
    """The command silences the sites' log for its process, which here is that of all tests."""
    log = logging.getLogger("fedgraft.site")
    before = log.propagate, list(log.handlers)
    yield
    log.propagate, log.handlers[:] = before


#: (curve, round) -> values, as a tool has them.
Curves = dict[tuple[str, int], list[float]]


@pytest.fixture(scope="module")
def finished(tiny_federation: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "run"
    tiny_federation.run(tiny_federation.private(rounds=2), folder)
    return folder


def expected(folder: Path) -> dict[tuple[str, int], float]:
    """The curves by hand."""
    found: dict[tuple[str, int], float] = {}
    for text in (folder / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        at, kind = line["round"], line["kind"]
        for key in ("seconds", "bytes_up", "bytes_down"):
            found[f"{key}/{kind}", at] = line[key]
        found[f"missing/{kind}", at] = 0
        if kind == "evaluate":
            found["accuracy", at], found["loss", at] = line["accuracy"], line["loss"]
            for site, told in line["sites"].items():
                found[f"site/{site}/accuracy", at] = told["correct"] / told["examples"]
                found[f"site/{site}/loss", at] = told["loss_sum"] / told["examples"]
        spent = {site: told["privacy"]["epsilon"] for site, told in line["sites"].items() if "privacy" in told}
        found |= {(f"site/{site}/epsilon/{kind}", at): value for site, value in spent.items()}
        if spent:
            found[f"epsilon/{kind}", at] = max(spent.values())
    return found


def in_tensorboard(place: Path) -> Curves:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    (folder,) = place.iterdir()
    events = accumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    found: Curves = {}
    for curve in events.Tags()["scalars"]:
        for event in events.Scalars(curve):
            found.setdefault((curve, event.step), []).append(event.value)
    return found


def test_tensorboard_reads_every_point_once_however_often_it_is_exported(finished: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    want = expected(finished)
    for _ in range(2):
        assert export(finished, TensorBoard(finished, tmp_path), follow=False) == len(want)
        found = in_tensorboard(tmp_path)
        assert set(found) == set(want)
        # TensorBoard keeps single precision.
        assert all(found[key] == [pytest.approx(value, rel=1e-6)] for key, value in want.items())


def test_mlflow_has_one_run_and_every_point_once_however_often_it_is_exported(finished: Path, tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    want, told = expected(finished), json.loads((finished / "run.json").read_text())
    for _ in range(2):
        assert export(finished, MLflow(finished, str(tmp_path)), follow=False) == len(want)
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("fedgraft").experiment_id])
    found: Curves = {}
    for curve in run.data.metrics:
        for point in client.get_metric_history(run.info.run_id, curve):
            found.setdefault((curve, point.step), []).append(point.value)
    assert found == {key: [value] for key, value in want.items()}
    assert (run.info.status, run.info.run_name) == ("FINISHED", "tiny")
    assert run.data.tags["fedgraft.run"] == told["run"]
    assert run.data.params["strategy"] == told["config"]["strategy"] and run.data.params["privacy.epsilon"] == "2.0"


class Kept:
    """A sink that keeps what it is told."""

    def __init__(self) -> None:
        self.points: list[Point] = []
        self.begun, self.status = 0, ""

    def begin(self) -> None:
        self.begun += 1
        self.points.clear()

    def write(self, points: Any) -> None:
        self.points += points

    def end(self, status: str) -> None:
        self.status = status


def test_a_run_is_followed_to_its_end_and_over_rounds_that_were_taken_back(finished: Path, tmp_path: Path) -> None:
    lines = (finished / "metrics.jsonl").read_text().splitlines(keepends=True)
    path, kept = tmp_path / "metrics.jsonl", Kept()
    path.write_text("".join(lines[:3]) + lines[3][:50])
    thread = threading.Thread(target=export, args=(tmp_path, kept), kwargs={"follow": True, "seconds": 0.01})
    thread.start()

    def wait_for(count: int) -> None:
        deadline = time.monotonic() + 30
        while len(kept.points) != count and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(kept.points) == count

    counts = [len(list(points_of(json.loads(line)))) for line in lines]
    wait_for(sum(counts[:3]))
    # A resumed run writes the file anew, without the lines of the round that it repeats.
    beside = tmp_path / "beside"
    beside.write_text(lines[0])
    beside.replace(path)
    wait_for(counts[0])
    with path.open("a") as file:
        file.write("".join(lines[1:]))
    wait_for(sum(counts))
    (tmp_path / "run.json").write_text((finished / "run.json").read_text())
    thread.join(30)
    assert not thread.is_alive() and (kept.begun, kept.status) == (2, "finished")


def test_a_value_that_is_none_or_not_finite_is_no_point() -> None:
    line = {"kind": "evaluate", "round": 1, "seconds": float("nan"), "bytes_up": 1, "bytes_down": 2, "missing": {}}
    line |= {"accuracy": None, "loss": float("inf"), "sites": {"north": {}}}
    assert {point.curve for point in points_of(line)} == {
        f"{key}/evaluate" for key in ("bytes_up", "bytes_down", "missing")
    }


@pytest.mark.parametrize(("tool", "library"), [("tensorboard", "tensorboard"), ("mlflow", "mlflow")])
def test_without_the_library_the_line_says_what_to_install(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str, library: str
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == library or name == "torch.utils.tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf"pip install 'fedgraft\[{tool}\]'"):
        TensorBoard(finished, tmp_path) if tool == "tensorboard" else MLflow(finished, str(tmp_path))


@pytest.mark.parametrize("tool", ["tensorboard", "mlflow"])
def test_a_destination_that_takes_nothing_is_one_line(finished: Path, tmp_path: Path, tool: str) -> None:
    pytest.importorskip(tool)
    (tmp_path / "file").write_text("no folder")
    place = tmp_path / "file" / "below"
    with pytest.raises(UserError, match=f"^{tmp_path / 'file'}.*: (cannot be written|MLflow does not take it)"):
        export(
            finished,
            TensorBoard(finished, place) if tool == "tensorboard" else MLflow(finished, str(place)),
            follow=False,
        )


def test_the_command_says_what_it_did_and_names_a_folder_without_a_run(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    for folder, code in ((finished, 0), (tmp_path / "nowhere", 2)):
        monkeypatch.setattr(sys, "argv", ["fedgraft", "export", str(folder), str(tmp_path), "--to", "tensorboard"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        assert int(ended.value.code or 0) == code
    assert said.err == f"fedgraft: {tmp_path / 'nowhere'}: holds no run (no run.json)\n"
