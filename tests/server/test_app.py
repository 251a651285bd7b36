"""The two Flower apps, called as Flower calls them: a deployment, where each site knows itself, and `flwr run .`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict

from fedgraft.client.app import app as client_app
from fedgraft.client.policy import unrestricted
from fedgraft.core.config import parse_config
from fedgraft.core.errors import UserError
from fedgraft.deployment.kits import SERVER_KIT
from fedgraft.privacy import Ledger
from fedgraft.server.app import app as server_app
from fedgraft.server.rundir import read_run
from fedgraft.simulations import app as simulated
from fedgraft.simulations.engines.inprocess import InProcessGrid


def context(**settings: str) -> Context:
    return Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=dict(settings))


@pytest.fixture
def deployed(tiny_federation: Any, tinyfederation: Any, tmp_path: Path) -> tuple[dict[str, Any], InProcessGrid]:
    """A configuration that names sites alone, and a grid of three nodes that know their own data and folder."""
    names = tinyfederation.SITES
    grid = InProcessGrid(client_app, len(names))
    for number, (name, node) in enumerate(zip(names, grid._contexts.values(), strict=True)):
        rows = list(tiny_federation.rows[200 * number : 200 * number + 200])
        path = tinyfederation.write_csv(tmp_path / f"{name}.csv", rows)
        at = tmp_path / "at" / name
        at.mkdir(parents=True)
        policy = unrestricted().text.replace('"the scenario\'s"', json.dumps(str(path)))
        (at / "policy.toml").write_text(policy, encoding="utf-8")
        node.node_config = {"site": name, "site-folder": str(at)}
    return tiny_federation.values(**{"data.path": "", "rounds": 2}), grid


def test_a_deployment_gives_what_a_simulation_of_it_gives(
    deployed: tuple[dict[str, Any], InProcessGrid], tiny_federation: Any, tmp_path: Path
) -> None:
    values, grid = deployed
    (tmp_path / "run.json").write_text(json.dumps(values))
    output = tmp_path / "run"
    settings = {"config": str(tmp_path / "run.json"), "set": "train.lr=0.05\ntrain.momentum=0.1", "output": str(output)}
    server_app(grid, context(**settings, resume=""))
    run = read_run(output)
    assert (run["status"], run["engine"], run["rounds"]) == ("finished", "flower", 2)
    assert run["config"]["train"]["lr"] == 0.05
    sites = [{"name": name, "path": str(tmp_path / f"{name}.csv")} for name in run["sites"]]
    config = tiny_federation.config(
        rounds=2, **{"data.path": "", "data.sites": sites, "train.lr": 0.05, "train.momentum": 0.1}
    )
    simulation = tiny_federation.run(config, tmp_path / "simulation")
    assert simulation["digest"] == run["digest"]
    assert simulation["accuracy"] == run["accuracy"]


def test_a_deployed_site_keeps_its_ledger_and_a_run_its_folder(
    deployed: tuple[dict[str, Any], InProcessGrid], tmp_path: Path
) -> None:
    values, grid = deployed
    values["privacy"] = {"delta": 1e-3, "noise_multiplier": 2.0}
    values["evaluate"] = {"epsilon": 3.0}
    (tmp_path / "run.json").write_text(json.dumps(values))
    settings = {"config": str(tmp_path / "run.json"), "set": "rounds=1"}
    server_app(grid, context(**settings, output=str(tmp_path / "run")))
    run = read_run(tmp_path / "run")
    assert not (tmp_path / "run" / "sites").exists(), "what belongs to a site lies at the site"
    for site, told in run["sites"].items():
        entries = Ledger(tmp_path / "at" / site / "ledgers").entries()
        assert sum(entry.steps for entry in entries if entry.part == "train") == told["privacy"]["steps"] == 3
    # The same sites in a second run: what they spent in the first counts.
    values["evaluate"] = {"epsilon": 6.0}
    (tmp_path / "run.json").write_text(json.dumps(values))
    server_app(grid, context(**settings, output=str(tmp_path / "second")))
    for site, told in read_run(tmp_path / "second")["sites"].items():
        assert told["privacy"]["steps"] == 6
        assert told["epsilon"] > run["sites"][site]["epsilon"]


def test_a_job_of_the_kit_s_server_runs_in_its_folder_and_takes_no_site_for_another(
    deployed: tuple[dict[str, Any], InProcessGrid], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    values, grid = deployed
    job = parse_config({**values, "rounds": 1}).to_json()
    (tmp_path / "state").mkdir()
    monkeypatch.setenv(SERVER_KIT, str(tmp_path))
    names = {str(node): str(context.node_config["site"]) for node, context in grid._contexts.items()}
    (tmp_path / "state" / "nodes.json").write_text(json.dumps(names))
    server_app(grid, context(job=job, output="first"))
    assert read_run(tmp_path / "runs" / "first")["status"] == "finished"
    assert "round 1 train: " in capsys.readouterr().out
    swapped = dict(zip(names, reversed(names.values()), strict=True))
    (tmp_path / "state" / "nodes.json").write_text(json.dumps(swapped))
    with pytest.raises(UserError, match=r"says it is site \w+, but its key stands for \w+; nothing of it is taken"):
        server_app(grid, context(job=job, output="second"))
    assert "fedgraft: node " in capsys.readouterr().out
    (tmp_path / "state" / "nodes.json").write_text("{}")
    with pytest.raises(UserError, match="but its key stands for no site"):
        server_app(grid, context(job=job, output="third"))
    for name in ("../out", "/tmp/out", "..", "a/b"):
        with pytest.raises(UserError, match="is not the name of a run"):
            server_app(grid, context(job=job, output=name))


@pytest.mark.parametrize("settings", [{}, {"config": "x.toml"}, {"output": "run"}, {"resume": "run"}])
def test_a_server_without_its_settings_says_which(settings: dict[str, str]) -> None:
    with pytest.raises(UserError) as caught:
        server_app(InProcessGrid(client_app, 1), context(**settings))
    assert str(caught.value) == ("give config=FILE and output=FOLDER (or resume=FOLDER) in the run configuration")


def test_flwr_run_gives_what_the_command_gives(
    tiny_federation: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = tiny_federation.values()
    (tmp_path / "tiny.json").write_text(json.dumps(values))
    output = tmp_path / "run"
    settings = context(config=str(tmp_path / "tiny.json"), set="rounds=2; train.lr=0.05", output=str(output), resume="")
    grid = InProcessGrid(simulated.client, 3)
    for node in grid._contexts.values():
        node.run_config = settings.run_config
    simulated.server(grid, settings)
    run = read_run(output)
    want = tiny_federation.run(tiny_federation.config(rounds=2, **{"train.lr": 0.05}), tmp_path / "command")
    assert run["digest"] == want["digest"]
    printed = capsys.readouterr().out
    assert "tiny: 2 rounds of fedit, lora" in printed
    assert str(output / "report.html") in printed
    # And goes on where `resume` says, as it was begun.
    settings.run_config.update(set="rounds=3; train.lr=0.05", output="", resume=str(output))
    simulated.server(grid, settings)
    assert read_run(output)["rounds"] == 3
    settings.run_config.update(set="rounds=4; train.lr=0.06")
    with pytest.raises(UserError) as caught:
        simulated.server(grid, settings)
    assert str(caught.value) == f"{output}: was begun with another `train`; only rounds may change"
    assert read_run(output)["config"]["train"]["lr"] == 0.05


def test_flwr_run_tells_a_mistake_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError):
        simulated.server(
            InProcessGrid(simulated.client, 1), context(config="hospital-icd10", output=str(tmp_path / "x"))
        )
    assert capsys.readouterr().out == (
        "fedgraft: hospital-icd10: no such file and no scenario of that name; did you mean `hospitals-icd10`?\n"
    )


def test_a_grid_that_goes_through_the_messages_twice_sends_them_all(
    deployed: tuple[dict[str, Any], InProcessGrid], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, grid = deployed
    send = grid.send_and_receive

    def twice(messages: Any, *, timeout: float | None = None) -> Any:
        """As Flower's grid over HTTP does: once to check them, once to send them."""
        checked, sent = list(messages), list(messages)
        assert sent == checked, "nothing is left to send"
        return send(sent, timeout=timeout)

    monkeypatch.setattr(grid, "send_and_receive", twice)
    (tmp_path / "run.json").write_text(json.dumps({**values, "rounds": 1}))
    server_app(grid, context(config=str(tmp_path / "run.json"), output=str(tmp_path / "run")))
    assert read_run(tmp_path / "run")["status"] == "finished"
