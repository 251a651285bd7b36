"""A run's metrics for other tools: TensorBoard's event files, MLflow's tracking store. Exporting again adds nothing."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ...core.errors import UserError, one_line
from ...core.watching.follow import Follower
from ...core.watching.screen import moment
from ..rundir import read_run
from .snapshot import RunReader

_OVER = ("finished", "failed", "stopped")
#: The most that MLflow takes at a time.
_BATCH = 1000


@dataclass(frozen=True)
class Point:
    """One value of one curve: ``step`` is the round, ``at`` the time in seconds since 1970."""

    curve: str
    step: int
    value: float
    at: float


class Sink(Protocol):
    """Where the points of a run go."""

    def begin(self) -> None:
        """The run is read from its start, for the first time or because rounds were taken back."""

    def write(self, points: Iterable[Point]) -> None:
        """Add those that are not there yet."""

    def end(self, status: str) -> None:
        """The run has this ``status`` as the export ends."""


def export(folder: Path, sink: Sink, *, follow: bool, seconds: float = 2.0) -> int:
    """Bring the points of the run in ``folder`` to ``sink``; returns how many there were.

    ``follow``: until the run is over, with a look every ``seconds``.
    """
    lines, reader, begun, count = Follower(folder / "metrics.jsonl"), RunReader(folder), 0, 0
    sink.begin()
    while True:
        # In this order: what was written before the run ended is read.
        status = reader.look().status
        new = lines.new()
        if lines.begun != begun:
            count = 0
            if begun:
                sink.begin()
            begun = lines.begun
        points = [point for line in new for point in points_of(line)]
        sink.write(points)
        count += len(points)
        if not follow or status in _OVER:
            sink.end(status)
            return count
        time.sleep(seconds)


def points_of(line: Mapping[str, Any]) -> Iterator[Point]:
    """The points that a line of metrics.jsonl stands for."""
    kind, step, then = line["kind"], int(line["round"]), moment(line.get("time"))
    found: dict[str, Any] = {
        **{f"{key}/{kind}": line[key] for key in ("seconds", "bytes_up", "bytes_down")},
        f"missing/{kind}": len(line["missing"]),
        **{key: line[key] for key in ("accuracy", "loss") if key in line},
    }
    epsilons = []
    for name, told in line["sites"].items():
        if told.get("privacy"):
            epsilons.append(told["privacy"]["epsilon"])
            found[f"site/{name}/epsilon/{kind}"] = epsilons[-1]
        if told.get("examples"):
            found[f"site/{name}/accuracy"] = told["correct"] / told["examples"]
            found[f"site/{name}/loss"] = told["loss_sum"] / told["examples"]
    if epsilons:
        found[f"epsilon/{kind}"] = max(epsilons)
    at = then.timestamp() if then is not None else 0.0
    for curve, value in found.items():
        if isinstance(value, int | float) and math.isfinite(value):
            yield Point(curve, step, float(value), at)


class TensorBoard:
    """Event files in ``destination/NAME``, a folder that is this run's alone and is written anew each time."""

    def __init__(self, folder: Path, destination: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("TensorBoard is not installed: pip install 'fedgraft[tensorboard]'") from None
        run = read_run(folder)
        self.folder = destination / f"{run['name'] or 'run'}-{run['run']}"
        self._make: Callable[..., Any] = SummaryWriter
        self._writer: Any = None

    def begin(self) -> None:
        if self._writer is not None:
            self._writer.close()
        try:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._writer = self._make(str(self.folder))
        except OSError as error:
            raise self._cannot_write(error) from None

    def _cannot_write(self, error: OSError) -> UserError:
        return UserError(f"{self.folder}: cannot be written: {error.strerror or error}")

    def write(self, points: Iterable[Point]) -> None:
        try:
            for point in points:
                self._writer.add_scalar(point.curve, point.value, point.step, walltime=point.at)
            self._writer.flush()
        except OSError as error:
            raise self._cannot_write(error) from None

    def end(self, status: str) -> None:
        self._writer.close()


class MLflow:
    """A run of the experiment ``fedgraft`` in the tracking store at ``destination``: a URI, or a folder for one.

    MLflow forgets no point: a round that was run again has both.
    """

    def __init__(self, folder: Path, destination: str) -> None:
        # It would call home, and wants a git that nobody needs here.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
        # Of a server that is not there it should say so within seconds.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        try:
            import mlflow.entities
            from mlflow.exceptions import MlflowException
            from mlflow.tracking import MlflowClient
        except ImportError:
            raise UserError("MLflow is not installed: pip install 'fedgraft[mlflow]'") from None
        self._metric, self._entities, run = mlflow.entities.Metric, mlflow.entities, read_run(folder)
        self._known: dict[str, set[tuple[int, int, float]]] = {}
        self._where, self._failures = destination, (MlflowException, OSError)
        with self._told():
            if "://" not in destination:
                Path(destination).mkdir(parents=True, exist_ok=True)
                destination = f"sqlite:///{Path(destination).absolute() / 'mlflow.db'}"
            self._client = MlflowClient(tracking_uri=destination)
            self._run = self._of(run)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Raise :class:`UserError` where the store fails."""
        try:
            yield
        except self._failures as error:
            raise UserError(f"{self._where}: MLflow does not take it: {one_line(error)}") from None

    def _of(self, run: Mapping[str, Any]) -> str:
        """MLflow's name for ``run``, which it was given before or is given now."""
        client = self._client
        found = client.get_experiment_by_name("fedgraft")
        experiment = found.experiment_id if found is not None else client.create_experiment("fedgraft")
        mine = client.search_runs([experiment], f"tags.`fedgraft.run` = '{run['run']}'")
        if mine:
            return str(mine[0].info.run_id)
        began = moment(run["started"])
        config = run["config"]
        about = {"strategy": config["strategy"], "method": config["method"]["name"], "rank": config["method"]["rank"]}
        about |= {"model": config["model"], "seed": config["seed"], "config_digest": run["config_digest"]}
        about |= {f"train.{key}": config["train"][key] for key in ("local_steps", "batch_size", "lr", "optimizer")}
        about |= {f"privacy.{key}": config["privacy"][key] for key in ("enabled", "epsilon", "delta", "unit")}
        made = client.create_run(
            experiment,
            start_time=round(began.timestamp() * 1000) if began is not None else None,
            tags={"fedgraft.run": run["run"]},
            run_name=run["name"] or None,
        )
        params = [self._entities.Param(key, str(value)) for key, value in about.items()]
        client.log_batch(made.info.run_id, params=params)
        return str(made.info.run_id)

    def begin(self) -> None:
        self._known.clear()

    def write(self, points: Iterable[Point]) -> None:
        new = []
        with self._told():
            for point in points:
                at = (point.step, round(point.at * 1000), point.value)
                if at not in self._there(point.curve):
                    self._there(point.curve).add(at)
                    new.append(self._metric(point.curve, point.value, at[1], point.step))
            for start in range(0, len(new), _BATCH):
                self._client.log_batch(self._run, metrics=new[start : start + _BATCH])

    def end(self, status: str) -> None:
        said = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}.get(status)
        if said is not None:
            with self._told():
                self._client.set_terminated(self._run, said)

    def _there(self, curve: str) -> set[tuple[int, int, float]]:
        if curve not in self._known:
            history = self._client.get_metric_history(self._run, curve)
            self._known[curve] = {(point.step, point.timestamp, point.value) for point in history}
        return self._known[curve]
