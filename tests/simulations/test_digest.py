"""One scenario, one seed, one digest: whatever computes it, in whatever order, resumed or not.

The generators of a site and a round hang on the seed, the site and the round alone; a result that leaned on anything
else (a process's own random state, the order of a dictionary, what another site did before) would differ here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedgraft.core.config import RunConfig
from fedgraft.core.errors import UserError
from fedgraft.server.checkpoints import load_last
from fedgraft.simulations import run as runs
from fedgraft.simulations.engines.pool import Pool
from fedgraft.simulations.execution import Execution

SEEDED = {"privacy.seeded_noise_not_private": True}


def plain(lab: Any) -> RunConfig:
    return lab.config()


def private(lab: Any) -> RunConfig:
    return lab.private(**SEEDED)


def adaptive(lab: Any) -> RunConfig:
    """The clipping bound of a site goes on from round to round."""
    return lab.private(**SEEDED, **{"privacy.clip_quantile": 0.5})


def remembering(strategy: str) -> Any:
    """Strategies for which a site keeps tensors of its own between rounds."""
    return lambda lab: lab.config(strategy=strategy)


def mixed(lab: Any) -> RunConfig:
    """Sites of several ranks: more than one instruction in a round."""
    sites = [{"name": "east", "rank": 2}, {"name": "north"}, {"name": "south", "rank": 1}]
    return lab.config(**{"strategy": "hetlora", "data.sites": sites})


def owing(lab: Any) -> RunConfig:
    """What an upload leaves out, a site owes."""
    return lab.config(**{"server.upload": "topk"})


def dropping(lab: Any) -> RunConfig:
    """Random numbers in the model's own layers, from PyTorch's global generator."""
    return lab.config(**{"method.dropout": 0.3})


def missing(lab: Any) -> RunConfig:
    """Sites that are away by the scenario's seed."""
    return lab.config(**{"simulation.dropout": 0.3, "server.quorum": 1})


FAST = {"plain": plain, "private": private}
SLOW = {
    "adaptive": adaptive,
    "mixed": mixed,
    "owing": owing,
    "dropping": dropping,
    "missing": missing,
    **{name: remembering(name) for name in ("scaffold", "fedsa", "ditto", "fedask", "fedper", "fedbuff", "lora-a2")},
}


@pytest.fixture(scope="module")
def three(tiny_federation: Any) -> Iterator[Pool]:
    with Pool(tiny_federation.config(), 3, 1) as pool:
        yield pool


@pytest.mark.parametrize("make", FAST.values(), ids=FAST)
def test_two_workers_give_the_bits_of_one_process(
    make: Any, tiny_federation: Any, on_workers: Any, tmp_path: Path
) -> None:
    config = make(tiny_federation)
    mine = tiny_federation.run(config, tmp_path / "inprocess")
    assert on_workers(config, tmp_path / "workers")["digest"] == mine["digest"]
    # Same numbers, not only the same end: losses, counts and bytes of every round.
    for one, two in zip(lines(tmp_path / "inprocess"), lines(tmp_path / "workers"), strict=True):
        assert one == two


def lines(output: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what is measured, and without the heads of ledgers, which hold the time."""
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    for line in found:
        del line["seconds"], line["time"]
        for site in line["sites"].values():
            site.get("privacy", {}).pop("ledger", None)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("make", [*FAST.values(), *SLOW.values()], ids=[*FAST, *SLOW])
def test_every_engine_gives_the_same_bits(
    make: Any, tiny_federation: Any, on_workers: Any, three: Pool, tmp_path: Path
) -> None:
    config = make(tiny_federation)
    want = tiny_federation.run(config, tmp_path / "inprocess")["digest"]
    together = runs.simulate(config, tmp_path / "cohort", execution=Execution(cohort=3))
    # An engine, a number of workers and a cohort are no part of the configuration.
    assert together["config_digest"] == json.loads((tmp_path / "inprocess" / "run.json").read_text())["config_digest"]
    found = {
        "cohort": together["digest"],
        "two workers": on_workers(config, tmp_path / "two")["digest"],
        "two workers, cohort": on_workers(config, tmp_path / "two-cohort", cohort=2)["digest"],
        "three workers": on_workers(config, tmp_path / "three", pool=three)["digest"],
    }
    assert found == dict.fromkeys(found, want)


class Stop(BaseException):
    """Ends a run from inside."""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fedit", "scaffold", "fedsa"])
def test_a_run_goes_on_under_another_engine_as_if_it_had_begun_there(
    strategy: str, tiny_federation: Any, on_workers: Any, tmp_path: Path
) -> None:
    config = tiny_federation.private(**SEEDED, strategy=strategy) if strategy != "scaffold" else None
    config = config or tiny_federation.config(strategy=strategy)
    want = tiny_federation.run(config, tmp_path / "whole")["digest"]

    class Stopping(runs.Watch):
        def phase_finished(self, record: Any) -> None:
            if (record["kind"], record["round"]) == ("evaluate", 1):
                raise Stop

    with pytest.raises(Stop):
        on_workers(config, tmp_path / "run", watch=Stopping())
    run = runs.resume(tmp_path / "run")
    assert (run["engine"], run["digest"]) == ("inprocess", want)
    with pytest.raises(Stop):
        tiny_federation.run(config, tmp_path / "other", watch=Stopping())
    run = on_workers(config, tmp_path / "other", resume=True)
    assert (run["engine"], run["digest"]) == ("workers", want)


PROGRAM = """
import random, sys
from pathlib import Path
import numpy, torch
from fedgraft.core.config import config_from_json
from fedgraft.simulations.execution import Execution
from fedgraft.simulations.run import simulate

text, output, noise = sys.argv[1:]
random.seed(noise), numpy.random.seed(int(noise)), torch.manual_seed(int(noise))
simulate(config_from_json(Path(text).read_text(), "x"), Path(output), execution=Execution(threads=1))
"""


@pytest.mark.slow
def test_nothing_leans_on_the_random_state_of_a_process_or_its_hash_seed(tiny_federation: Any, tmp_path: Path) -> None:
    config = tiny_federation.private(**SEEDED, **{"method.dropout": 0.2})
    (tmp_path / "config.json").write_text(config.to_json())
    want = tiny_federation.run(config, tmp_path / "run")["digest"]
    for seed in ("0", "1"):
        output = tmp_path / seed
        subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path / "config.json"), str(output), seed],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            timeout=120,
        )
        assert json.loads((output / "run.json").read_text())["digest"] == want


@pytest.mark.slow
def test_a_run_leaves_the_process_its_threads(tiny_federation: Any, tmp_path: Path) -> None:
    seen = []

    class Looking(runs.Watch):
        def phase_started(self, kind: str, round: int, sites: int) -> None:
            seen.append(torch.get_num_threads())

    before = torch.get_num_threads()
    config = tiny_federation.config(rounds=1)
    run = runs.simulate(config, tmp_path / "run", execution=Execution(threads=2), watch=Looking())
    assert run["execution"]["threads"] == 2 and set(seen) == {2}
    with pytest.raises(UserError):
        runs.simulate(config, tmp_path / "run", execution=Execution(threads=2))
    assert torch.get_num_threads() == before
    # A run that goes on keeps its threads, for they are part of what fixes its bits.
    again = runs.resume(tmp_path / "run", rounds=2, watch=Looking())
    assert again["execution"]["threads"] == 2 and set(seen) == {2}
    assert torch.get_num_threads() == before


@pytest.mark.slow
def test_flowers_engine_differs_by_rounding_at_most(tiny_federation: Any, on_workers: Any, tmp_path: Path) -> None:
    config = tiny_federation.private(**SEEDED)
    on_workers(config, tmp_path / "workers")
    runs.simulate(config, tmp_path / "flower", execution=Execution("flower"))
    one, two = (load_last(tmp_path / name / "checkpoints").state for name in ("workers", "flower"))
    assert max(float(np.abs(one[name] - two[name]).max()) for name in one) <= 1e-5
