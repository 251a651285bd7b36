"""What `auto` picks, and why; what it never hangs on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedgraft.core.errors import UserError
from fedgraft.simulations import choice
from fedgraft.simulations import run as runs
from fedgraft.simulations.choice import Choice, arithmetic, choose, loads
from fedgraft.simulations.execution import Execution
from fedgraft.simulations.scenario import site_data


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``machine(cores, gpus, gigabytes)``: what the machine has; eight cores and no GPU to begin with."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def have(cores: int = 8, gpus: int = 0, gigabytes: float = 64) -> None:
        monkeypatch.setattr(choice, "cores", lambda: cores)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        memory = SimpleNamespace(total=gigabytes * 1e9)
        monkeypatch.setattr(choice, "psutil", SimpleNamespace(virtual_memory=lambda: memory))
        kind = "cuda" if gpus else "cpu"
        monkeypatch.setattr(choice, "device_of", lambda name: torch.device(kind if name == "auto" else name))

    have()
    return have


@pytest.fixture
def auto(tiny_federation: Any) -> Any:
    """``auto(execution, rounds=..., ...)``: the choice for the tiny federation, which by itself is nothing."""

    def pick(execution: Execution | None = None, before: Any = None, **changes: Any) -> Choice:
        config = tiny_federation.config(**changes)
        return choose(execution or Execution("auto"), config, site_data(config), before)

    return pick


LONG = {"rounds": 5000}


def test_little_arithmetic_stays_in_process_with_one_thread_for_small_steps(auto: Any) -> None:
    found = auto()
    assert (found.engine, found.workers, found.threads) == ("inprocess", 1, 1)
    assert found.why == "about 0 s of arithmetic for one core are not worth more processes"
    assert found.line == f"engine inprocess, 1 thread: {found.why}"


def test_much_arithmetic_takes_a_process_a_core_but_no_more_than_sites(auto: Any, machine: Any) -> None:
    found = auto(**LONG)
    assert (found.engine, found.workers, found.threads) == ("workers", 3, 2)
    assert found.why == "about 7 min of arithmetic for one core, and there are 8"
    assert found.line == f"engine workers, 3 processes, 2 threads each: {found.why}"
    machine(cores=2)
    assert (auto(**LONG).workers, auto(**LONG).threads) == (2, 1)
    assert auto(Execution("auto", workers=2), **LONG).workers == 2
    assert auto(Execution("auto", threads=2), **LONG).why == "there are cores for one process"


def test_the_environments_threads_are_kept(auto: Any, machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert (auto(**LONG).workers, auto(**LONG).threads) == (2, 4)
    # What --threads says goes before.
    assert (auto(Execution("auto", threads=3), **LONG).workers, auto(Execution("auto", threads=3), **LONG).threads) == (
        2,
        3,
    )


def test_little_memory_takes_fewer_workers_or_none(auto: Any, machine: Any) -> None:
    machine(gigabytes=4)
    assert (auto(**LONG).engine, auto(**LONG).workers) == ("workers", 2)
    machine(gigabytes=2)
    assert (auto(**LONG).engine, auto(**LONG).why) == ("inprocess", "there is memory for one base model")


def test_several_gpus_get_a_worker_each_and_one_gpu_stays_in_process(auto: Any, machine: Any) -> None:
    machine(gpus=2)
    found = auto(**{"train.device": "auto"})
    assert (found.engine, found.workers, found.why) == ("workers", 2, "there are 2 GPUs")
    machine(gpus=1)
    found = auto(**LONG, **{"train.device": "auto"})
    assert (found.engine, found.why) == ("inprocess", "there is one GPU")


def test_what_only_this_process_knows_stays_in_it(auto: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedgraft.strategies import aggregator
    from fedgraft.strategies.averaging import FedIT

    own = type("Own", (FedIT,), {"__module__": "__main__"})
    monkeypatch.setitem(aggregator._STRATEGIES, "own", own)
    found = auto(**LONG, strategy="own")
    assert (found.engine, found.why) == ("inprocess", "`own` is known to this process alone")


def test_a_choice_hangs_on_the_configuration_and_the_machine_alone(auto: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on how many threads some other code has set, nor on the time that anything took: bits hang on threads."""
    first = auto(**LONG)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert auto(**LONG) == first
    finally:
        torch.set_num_threads(before)


def test_a_run_that_goes_on_keeps_its_threads(auto: Any) -> None:
    assert auto(before={"engine": "workers", "threads": 5}, **LONG).threads == 5
    assert auto(Execution("workers", threads=1), {"threads": 5}, **LONG).threads == 1


def test_asked_for_workers_share_the_cores(auto: Any) -> None:
    found = auto(Execution("workers", workers=2))
    assert (found.workers, found.threads, found.why) == (2, 4, "asked for")
    assert auto(Execution("workers")).workers == 3


def test_the_arithmetic_is_that_of_a_naive_count(tiny_federation: Any) -> None:
    """Site by site and step by step, of what a tiny BERT multiplies."""
    config = tiny_federation.config(rounds=4, **{"evaluate.every": 2})
    data = site_data(config)
    model = choice._model(config)
    assert model is not None
    from transformers import AutoModel

    built = AutoModel.from_pretrained(config.model)
    layers = [p for name, p in built.named_parameters() if ".layer." in name and p.dim() == 2]
    assert model.parameters == sum(p.numel() for p in layers)
    seconds = steps = 0.0
    for site in data.values():
        lengths = [min(32, len(text) / 4 + 2) for text in site.train.inputs[:100]]
        tokens = sum(lengths) / len(lengths)
        for _ in range(4):
            for _ in range(3):
                seconds += 6 * model.parameters * 16 * tokens / 30e9 + 0.008
                steps += 1
        for _ in (0, 2, 4):
            seconds += 2 * model.parameters * len(site.held_out) * tokens / 30e9
    assert arithmetic(config, data, model) == pytest.approx((seconds, steps))


def test_a_site_weighs_what_it_trains_on_and_evaluates(tiny_federation: Any) -> None:
    config = tiny_federation.config()
    data = site_data(config)
    want = [3 * 16 + len(data[site].held_out) / 3 for site in config.site_names]
    assert loads(config, data) == pytest.approx(want)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"cohort": 4}, "--cohort is for the engines `inprocess` and `workers`: Flower's runtime asks each site alone"),
        ({"profile": True}, "--profile is for the engines `inprocess` and `workers`"),
        ({"workers": 2}, "--workers is for the engine `workers`, not `flower`"),
    ],
)
def test_what_flowers_runtime_cannot_do_is_refused(options: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        Execution("flower", **options)
    assert str(caught.value).startswith(line)


def test_flowers_runtime_is_not_asked_for_more_cores_than_there_are(auto: Any) -> None:
    assert (auto(Execution("flower", threads=2)).threads, auto(Execution("flower")).threads) == (2, 1)
    with pytest.raises(UserError, match=r"^--threads 9: Flower's runtime reserves as many cores for a site, and ther"):
        auto(Execution("flower", threads=9))


def test_auto_says_what_it_picked_and_run_json_keeps_it(
    tiny_federation: Any, tinyfederation: Any, tmp_path: Path
) -> None:
    notes = tinyfederation.Notes()
    run = runs.simulate(
        tiny_federation.config(rounds=1), tmp_path / "run", execution=Execution("auto", cohort=0), watch=notes
    )
    why = "about 0 s of arithmetic for one core are not worth more processes"
    alone = "cohort 1: too little is left to train for a measurement to pay"
    assert notes.texts[0] == f"engine inprocess, 1 thread: {why}"
    assert run["execution"] == {
        "engine": "inprocess",
        "workers": 1,
        "threads": 1,
        "cohort": 1,
        "why": why,
        "cohort_why": alone,
    }
