"""A whole run with cohort batching: the same digest, the same records of it, whatever the cohort's size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedgraft.client.cohort import train_in_one
from fedgraft.core.progress import Watch
from fedgraft.simulations import run as runs
from fedgraft.simulations.execution import Execution

SITES = [f"s{number:02d}" for number in range(7)]


def configuration(federation: Any, private: bool, **changes: Any) -> Any:
    values: dict[str, Any] = {
        "data.sites": SITES,
        "data.partition": "iid",
        "rounds": 1,
        "train.batch_size": 8,
        **changes,
    }
    if private:
        values |= {"privacy.seeded_noise_not_private": True, "privacy.unit": "record"}
    return (federation.private if private else federation.config)(**values)


def simulated(config: Any, folder: Path, cohort: int, **execution: Any) -> dict[str, Any]:
    return runs.simulate(config, folder, execution=Execution(cohort=cohort, threads=1, **execution))


@pytest.mark.parametrize("private", [False, True])
def test_one_digest_whatever_the_cohort(
    tiny_federation: Any, tmp_path: Path, private: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration(tiny_federation, private)
    fused: list[int] = []

    def watched(lessons: Any) -> Any:
        fused.append(len(lessons))
        return train_in_one(lessons)

    monkeypatch.setattr("fedgraft.client.together.train_in_one", watched)
    digests = set()
    for cohort, want in ((1, []), (2, [2, 2, 2]), (3, [3, 3]), (10, [7])):
        fused.clear()
        digests.add(simulated(config, tmp_path / str(cohort), cohort)["digest"])
        assert fused == want
    assert len(digests) == 1


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fedprox", "scaffold", "ditto", "rolora", "fedrep", "fed-sb"])
def test_one_digest_under_strategies_with_a_part_at_the_site(
    tiny_federation: Any, tmp_path: Path, strategy: str
) -> None:
    method = {"method.name": "lora-sb"} if strategy == "fed-sb" else {}
    config = configuration(tiny_federation, False, strategy=strategy, rounds=3, **method)
    one, other = (simulated(config, tmp_path / str(cohort), cohort)["digest"] for cohort in (1, 10))
    assert one == other


@pytest.mark.slow
def test_workers_batch_their_cohorts_to_the_same_digest(tiny_federation: Any, tmp_path: Path) -> None:
    config = configuration(tiny_federation, False, rounds=3)
    digests = {
        simulated(config, tmp_path / f"{workers}-{cohort}", cohort, engine="workers", workers=workers)["digest"]
        for workers, cohort in ((1, 1), (2, 3), (2, 0))
    }
    assert len(digests) == 1


def test_a_measurement_is_told_and_kept_with_the_run(tiny_federation: Any, tmp_path: Path) -> None:
    told: list[tuple[int, str]] = []

    class Hearing(Watch):
        def cohort_found(self, size: int, text: str) -> None:
            told.append((size, text))

    config = configuration(tiny_federation, False)
    execution = Execution(cohort=0, threads=1)
    run = runs.simulate(config, tmp_path / "auto", execution=execution, watch=Hearing())
    ((size, text),) = told
    assert text.startswith(f"cohort {size}: ")
    assert (run["execution"]["cohort"], run["execution"]["cohort_why"]) == (size, text)
    assert run["digest"] == simulated(config, tmp_path / "one", 1)["digest"]


@pytest.mark.slow
@pytest.mark.parametrize("private", [False, True])
def test_a_site_that_dies_in_the_middle_costs_its_cohort_nothing(
    tiny_federation: Any, tmp_path: Path, private: bool
) -> None:
    sites: list[Any] = [*SITES[:4], {"name": "s04", "crashes": [1]}, {"name": "s05", "attack": "nan"}]
    config = configuration(tiny_federation, private, **{"rounds": 2, "data.sites": sites, "server.quorum": 4})
    one, other = (simulated(config, tmp_path / str(cohort), cohort) for cohort in (1, 10))
    assert one["digest"] == other["digest"]
    for run in (one, other):
        for site in run["sites"].values():
            (site["privacy"] or {}).pop("ledger", None)  # its seal tells the run
    assert one["sites"] == other["sites"]
    assert other["sites"]["s04"]["missed"]["crashed"] == 1
