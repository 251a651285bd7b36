"""Where the time of a run went: every second in one round, no result changed, and the same figures in all places."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fedgraft.cli import app
from fedgraft.core.errors import UserError
from fedgraft.core.profile import SECTIONS, current
from fedgraft.core.progress import Watch
from fedgraft.server.report import write_report
from fedgraft.simulations import run as runs
from fedgraft.simulations.execution import Execution
from fedgraft.simulations.timing import profile_of, profile_table, rest, rounds_table, summed

PROFILED = Execution(engine="inprocess", profile=True)


@pytest.fixture(scope="module")
def profiled(tiny_federation: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("profiled") / "run"
    config = tiny_federation.private(**{"privacy.seeded_noise_not_private": True})
    return runs.simulate(config, folder, execution=PROFILED), folder


def shown(thing: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(thing)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_a_profile_changes_no_result(
    tiny_federation: Any, profiled: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    config = tiny_federation.private(**{"privacy.seeded_noise_not_private": True})
    plain = tiny_federation.run(config, tmp_path / "plain")
    assert plain["digest"] == profiled[0]["digest"]
    assert not (tmp_path / "plain" / "profile.json").exists()
    assert current() is None


def test_every_second_is_in_one_round(profiled: tuple[dict[str, Any], Path]) -> None:
    run, folder = profiled
    profile = profile_of(folder)
    assert [row["round"] for row in profile["rounds"]] == [0, 1, 2, 3]
    assert [row["trainings"] for row in profile["rounds"]] == [0, 3, 3, 3]
    assert profile["engine"] == "inprocess" and profile["processes"] == 1
    assert profile["seconds"] == pytest.approx(sum(row["seconds"] for row in profile["rounds"]))
    assert profile["seconds"] >= run["seconds"] - 0.01
    for row in profile["rounds"]:
        inside = sum(spent["seconds"] for spent in row["sections"].values())
        assert 0 < inside <= row["seconds"]
        assert rest(row) == pytest.approx(row["seconds"] - inside)
    # Who trained what is known: three steps of three sites, a forward pass each, and one release of noise.
    for row in profile["rounds"][1:]:
        calls = {name: spent["calls"] for name, spent in row["sections"].items()}
        assert calls["forward"] >= 9 and calls["noise"] == 9 and calls["optimizer"] == 9
        assert calls["evaluation"] == 3
    assert set(profile["rounds"][0]["sections"]) & {"forward", "backward", "noise"} == set()
    assert "load" in profile["rounds"][0]["sections"]
    assert set(SECTIONS) - set(profile["sections"]) <= {"clip"} and "clip" in profile["sections"]


def test_the_tables_add_up(profiled: tuple[dict[str, Any], Path]) -> None:
    profile = profile_of(profiled[1])
    lines = [line.split("│")[1:-1] for line in shown(profile_table(profile)).splitlines() if line.startswith("│")]
    cells = {row[0].strip(): [float(cell) for cell in row[1:]] for row in lines}
    assert list(cells) == [*profile["sections"], "rest", "wall"]
    total = cells.pop("wall")
    assert total[1] == 100.0
    assert total[2] == pytest.approx(1000 * profile["seconds"] / 9, abs=0.01)
    for column in range(3):
        assert sum(row[column] for row in cells.values()) == pytest.approx(
            total[column], abs=0.005 * 15 if column != 1 else 0.05 * 15
        )
    assert f"Where {profile['seconds']:.1f} s went" in shown(profile_table(profile))
    rounds = [line.split("│")[1:-1] for line in shown(rounds_table(profile)).splitlines() if line.startswith("│")]
    assert len(rounds) == 4
    for row, told in zip(rounds, profile["rounds"], strict=True):
        numbers = [float(cell) for cell in row]
        assert numbers[0] == told["round"]
        assert sum(numbers[1:-1]) == pytest.approx(numbers[-1], abs=0.005 * len(numbers))


def test_the_sum_over_several_processes_says_so() -> None:
    row = {"round": 1, "seconds": 2.0, "trainings": 4, "sections": {"forward": {"seconds": 3.0, "calls": 8}}}
    profile = summed([row, {**row, "round": 2}], "workers", 2)
    assert profile["sections"] == {"forward": {"seconds": 6.0, "calls": 16}}
    assert (profile["seconds"], profile["trainings"]) == (4.0, 8)
    text = shown(profile_table(profile))
    assert "Where 4.0 s went, seconds added up over 2 processes" in text
    assert "150.0" in text and "750.00" in text
    assert "rest" not in text and "rest" not in shown(rounds_table(profile)), "a wall clock of one, seconds of two"


def test_the_report_shows_it(profiled: tuple[dict[str, Any], Path]) -> None:
    folder = profiled[1]
    page = (folder / "report.html").read_text()
    assert "<h2>Where the time went</h2>" in page
    assert "Seconds by round" in page and "clip and noise" in page
    again = write_report(folder).read_text()
    profile = profile_of(folder)
    assert f"<td>wall</td><td>{profile['seconds']:.2f}</td>" in again
    path = folder / "profile.json"
    kept = path.read_text()
    try:
        several = json.loads(kept) | {"processes": 3}
        path.write_text(json.dumps(several))
        assert "Seconds of 3 processes are added up" in write_report(folder).read_text()
        path.write_text("{half")
        with pytest.raises(UserError, match=r"profile\.json: is not readable JSON; delete it"):
            write_report(folder)
        path.unlink()
        assert "Where the time went" not in write_report(folder).read_text()
        with pytest.raises(UserError, match=r"holds no profile\.json; run it with --profile$"):
            profile_of(folder)
    finally:
        path.write_text(kept)


def test_a_run_that_fails_or_goes_on_is_profiled_too(tiny_federation: Any, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    class Stopping(Watch):
        def phase_finished(self, record: Any) -> None:
            if record["kind"] == "train" and record["round"] == 2:
                raise Stop

    config = tiny_federation.config()
    with pytest.raises(Stop):
        runs.simulate(config, tmp_path / "run", execution=PROFILED, watch=Stopping())
    assert [row["round"] for row in profile_of(tmp_path / "run")["rounds"]] == [0, 1, 2]
    assert current() is None
    runs.resume(tmp_path / "run", execution=PROFILED)
    assert [row["round"] for row in profile_of(tmp_path / "run")["rounds"]] == [1, 2, 3]


def test_a_run_that_never_began_leaves_no_profile(tiny_federation: Any, tmp_path: Path) -> None:
    config = tiny_federation.config(**{"model": str(tmp_path / "nowhere")})
    with pytest.raises(UserError):
        runs.simulate(config, tmp_path / "run", execution=PROFILED)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_workers_measure_too(tiny_federation: Any, profiled: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    config = tiny_federation.private(**{"privacy.seeded_noise_not_private": True})
    execution = Execution(engine="workers", workers=2, threads=1, profile=True)
    run = runs.simulate(config, tmp_path / "run", execution=execution)
    assert run["digest"] == profiled[0]["digest"]
    here, there = profile_of(profiled[1]), profile_of(tmp_path / "run")
    assert (there["engine"], there["processes"]) == ("workers", 2)
    for name in ("forward", "clip", "noise", "optimizer", "evaluation"):
        assert there["sections"][name]["calls"] == here["sections"][name]["calls"]
        assert there["sections"][name]["seconds"] > 0


def test_the_command_tells_it_again(profiled: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    folder, runner = str(profiled[1]), CliRunner()
    plain = runner.invoke(app, ["profile", folder])
    assert plain.exit_code == 0 and "of wall" in plain.output and "Seconds by round" not in plain.output
    assert "Seconds by round" in runner.invoke(app, ["profile", folder, "--rounds"]).output
    assert json.loads(runner.invoke(app, ["profile", folder, "--json"]).output) == profile_of(profiled[1])
    assert isinstance(runner.invoke(app, ["profile", str(tmp_path)]).exception, UserError)
