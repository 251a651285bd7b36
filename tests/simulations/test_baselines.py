"""Baselines: the same trainer, promise and run directory, without the federation."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedgraft.client.prepared import encode
from fedgraft.client.resident import resident
from fedgraft.client.trainer import train
from fedgraft.core.adapter import AdapterState
from fedgraft.core.config import RunConfig
from fedgraft.core.errors import UserError
from fedgraft.privacy.ledger import Ledger
from fedgraft.server import checkpoints
from fedgraft.simulations.baselines import BASELINES, POOLED, applied, matters
from fedgraft.simulations.scenario import complete, site_data


def baseline(config: RunConfig, name: str) -> RunConfig:
    simulation = config.simulation.model_copy(update={"baseline": name})
    return complete(config.model_copy(update={"simulation": simulation}))


def reached(folder: Path) -> AdapterState:
    return checkpoints.load_last(folder / "checkpoints").state


def _words(records: Any) -> Counter[str]:
    return Counter(records.inputs)


def test_no_training_leaves_the_start_and_spends_nothing(tiny_federation: Any, tmp_path: Path) -> None:
    federated = tiny_federation.run(tiny_federation.private(rounds=1), tmp_path / "federated")
    run = tiny_federation.run(baseline(tiny_federation.private(), "none"), tmp_path / "none")
    assert run["engine"] == "baseline:none" and run["status"] == "finished" and run["rounds"] == 0
    assert run["accuracy"]["before"] == run["accuracy"]["after"] == federated["accuracy"]["before"]
    assert all(site["epsilon"] is None for site in run["sites"].values())
    assert not list((tmp_path / "none").rglob("ledgers/*.jsonl"))
    assert (tmp_path / "none" / "report.html").exists()


def test_noised_counts_of_no_training_are_paid_for(tiny_federation: Any, tmp_path: Path) -> None:
    config = baseline(tiny_federation.private(**{"evaluate.release": "noised"}), "none")
    run = tiny_federation.run(config, tmp_path / "none")
    assert all(0 < site["epsilon"] <= 2.0 for site in run["sites"].values())


@pytest.mark.parametrize("private", [False, True])
def test_a_site_alone_does_what_a_federation_of_it_alone_would(
    tiny_federation: Any, tinyfederation: Any, tmp_path: Path, private: bool
) -> None:
    """Twin: for each site a run in which it is the only one."""
    sites = []
    for name, part in zip(("a", "b"), (tiny_federation.rows[::2], tiny_federation.rows[1::2]), strict=True):
        sites.append({"name": name, "path": str(tinyfederation.write_csv(tmp_path / f"{name}.csv", list(part)))})
    make = tiny_federation.private if private else tiny_federation.config
    more = {"data.path": "", "rounds": 2, **({"privacy.seeded_noise_not_private": True} if private else {})}
    run = tiny_federation.run(baseline(make(**more, **{"data.sites": sites}), "local"), tmp_path / "local")
    assert run["engine"] == "baseline:local"
    for site in sites:
        alone = tiny_federation.run(make(**more, **{"data.sites": [site]}), tmp_path / f"alone-{site['name']}")
        ours, theirs = run["sites"][site["name"]], alone["sites"][site["name"]]
        assert ours["accuracy"] == theirs["accuracy"] and ours["accuracy_before"] == theirs["accuracy_before"]
        assert ours["epsilon"] == theirs["epsilon"]
        kept = max(
            (tmp_path / "local" / "sites" / site["name"] / "memory").glob("*/*"), key=lambda path: int(path.name)
        )
        own, want = AdapterState.load(kept / "site-local.safetensors"), reached(tmp_path / f"alone-{site['name']}")
        assert set(own) == set(want) and all(np.array_equal(own[name], want[name]) for name in want)


def test_no_tensor_leaves_a_site_that_is_alone(tiny_federation: Any, tmp_path: Path) -> None:
    sent: list[int] = []

    def between(site: str, message: Any, answer: Any) -> Any:
        reply = answer()
        sent.append(sum(len(record) for record in reply.content.array_records.values()))
        return reply

    config = baseline(tiny_federation.config(), "local")
    run = tiny_federation.run(config, tmp_path / "run", between)
    assert sent and not any(sent)
    assert run["adapter"]["shared"] == 0
    assert reached(tmp_path / "run") == checkpoints._load(tmp_path / "run" / "checkpoints" / "round-0003").state


def test_the_pool_holds_every_record_on_its_side(tiny_federation: Any) -> None:
    config = tiny_federation.private()
    apart, together = site_data(config), site_data(baseline(config, "central"))
    assert list(together) == [POOLED]
    for side in ("train", "held_out"):
        parts = [getattr(data, side) for data in apart.values()]
        whole = getattr(together[POOLED], side)
        assert _words(whole) == sum(map(_words, parts), Counter())
        labels = {text: label for part in parts for text, label in zip(part.inputs, part.labels, strict=True)}
        assert all(labels[text] == label for text, label in zip(whole.inputs, whole.labels, strict=True))
        units = [len(part.units(by_patient=True)[0]) for part in parts]
        assert len(whole.units(by_patient=True)[0]) == sum(units)


def test_one_key_at_two_sites_is_two_patients_in_the_pool(
    tiny_federation: Any, tinyfederation: Any, tmp_path: Path
) -> None:
    rows = [{"text": f"heart {n}", "label": "class-zebra", "patient": f"p{n % 20}"} for n in range(80)]
    paths = [tinyfederation.write_csv(tmp_path / f"{name}.csv", rows) for name in ("a", "b")]
    sites = [{"name": path.stem, "path": str(path)} for path in paths]
    config = tiny_federation.config(**{"data.path": "", "data.sites": sites})
    (pooled,) = site_data(baseline(config, "central")).values()
    assert len({*pooled.train.patients, *pooled.held_out.patients}) == 40


def test_central_takes_as_many_steps_with_the_batches_of_all_sites(tiny_federation: Any, tmp_path: Path) -> None:
    """Twin: the trainer alone, round after round, over the records of all sites."""
    plain = tiny_federation.config(rounds=2)
    config = baseline(plain, "central")
    assert config.train.batch_size == 3 * plain.train.batch_size
    assert config.total_steps == plain.total_steps
    run = tiny_federation.run(config, tmp_path / "central")
    assert run["engine"] == "baseline:central" and list(run["sites"]) == [POOLED]
    model = resident(config)
    state = checkpoints._load(tmp_path / "central" / "checkpoints" / "round-0000").state
    model.adapter.write(state)
    prepared = encode(config, site_data(config)[POOLED], model)
    for number in (1, 2):
        state = train(model, state, prepared.train, prepared.groups, config, site=POOLED, round=number, plan=None).state
    assert reached(tmp_path / "central") == state


def test_central_keeps_the_sites_promise_to_the_pooled_patients(tiny_federation: Any, tmp_path: Path) -> None:
    config = baseline(tiny_federation.private(), "central")
    run = tiny_federation.run(config, tmp_path / "central")
    units = len(site_data(config)[POOLED].train.units(by_patient=True)[0])
    told = run["sites"][POOLED]["privacy"]
    assert told["epsilon"] <= 2.0 and told["unit"] == "patient"
    assert told["sampling_rate"] == pytest.approx(48 / units)
    spent = Ledger(tmp_path / "central" / "sites" / POOLED / "ledgers").events()
    assert sum(event.steps for event in spent) == 9


def test_full_trains_the_whole_model(tiny_federation: Any, tmp_path: Path) -> None:
    run = tiny_federation.run(baseline(tiny_federation.config(rounds=1), "full"), tmp_path / "full")
    assert run["method"]["name"] == "full" and run["engine"] == "baseline:full"
    assert run["adapter"]["parameters"] == run["model"]["parameters"]
    assert (Path(run["adapter_path"]) / "model.safetensors").exists()


def test_all_weights_can_be_federated_too_and_cost_their_bytes(tiny_federation: Any, tmp_path: Path) -> None:
    small = tiny_federation.run(tiny_federation.config(rounds=1), tmp_path / "lora")
    whole = tiny_federation.run(tiny_federation.config(rounds=1, **{"method.name": "full"}), tmp_path / "full")
    assert whole["bytes_up_round"] > whole["bytes_full_model"] > 5 * small["bytes_up_round"]


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_of_a_baseline_is_itself_and_reads_back(tiny_federation: Any, name: str) -> None:
    config = baseline(tiny_federation.config(), name)
    assert applied(config) == config
    assert applied(type(config).model_validate_json(config.to_json())).digest() == config.digest()


@pytest.mark.parametrize("name", BASELINES)
def test_what_belongs_to_a_federation_falls_away(tiny_federation: Any, name: str) -> None:
    sites = [{"name": "a", "attack": "scale:10", "rank": 2, "straggler": True}, "b", "c"]
    odd = {
        "strategy": "flora",
        "server.optimizer": "adam",
        "server.quorum": 1,
        "server.upload": "int8",
        "simulation.dropout": 0.2,
        "data.sites": sites,
        "data.partition": "iid",
    }
    config, same = (baseline(tiny_federation.config(**changes), name) for changes in (odd, _plain_sites(odd)))
    assert config.digest() == same.digest()
    assert not any(matters(name, key) for key in odd if not key.startswith("data."))


def _plain_sites(odd: dict[str, Any]) -> dict[str, Any]:
    return {"data.sites": ["a", "b", "c"], "data.partition": odd["data.partition"]}


def test_frozen_tensors_stay_frozen_where_there_is_an_adapter(tiny_federation: Any) -> None:
    config = tiny_federation.config(**{"tensor_policy": {"*lora_A*": "freeze", "*classifier*": "local"}})
    assert baseline(config, "local").tensor_policy == {"*lora_A*": "freeze", "*classifier*": "local", "*": "local"}
    assert baseline(config, "central").tensor_policy == {"*lora_A*": "freeze", "*classifier*": "share"}
    assert baseline(config, "full").tensor_policy == {}


def test_sites_that_take_turns_give_central_the_batches_of_those_at_work(tiny_federation: Any) -> None:
    config = baseline(tiny_federation.config(**{"server.sites_per_round": 2}), "central")
    assert config.train.batch_size == 2 * 16


def test_pooled_sites_are_not_for_a_person_to_write(tiny_federation: Any) -> None:
    with pytest.raises(UserError, match=r"simulation\.pooled is written by the baselines"):
        tiny_federation.config(**{"simulation.pooled": [{"name": "a"}]})


def test_a_baseline_goes_on_where_it_was_interrupted(tiny_federation: Any, tinyfederation: Any, tmp_path: Path) -> None:
    config = baseline(tiny_federation.config(rounds=2), "central")
    whole = tiny_federation.run(config, tmp_path / "whole")
    calls = 0

    def stop(site: str, message: Any, answer: Any) -> Any:
        nonlocal calls
        calls += message.metadata.message_type == "train"
        if calls == 2:
            raise tinyfederation.Interrupted
        return answer()

    with pytest.raises(tinyfederation.Interrupted):
        tiny_federation.run(config, tmp_path / "cut", stop)
    again = tiny_federation.resume(config, tmp_path / "cut")
    assert again["digest"] == whole["digest"] and again["engine"] == "baseline:central"
    assert again["resumed"][0]["from_round"] == 1
