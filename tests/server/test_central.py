"""Central privacy in a whole run: what is recorded, what a killed run remembers, whom it asks, what it refuses."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, Message

from fedgraft.core.adapter import AdapterState
from fedgraft.core.config import RunConfig
from fedgraft.core.errors import UserError
from fedgraft.core.progress import Watch
from fedgraft.core.update import Update
from fedgraft.privacy import Ledger, epsilon
from fedgraft.privacy.noise import RandomStream
from fedgraft.server.checkpoints import load_last
from fedgraft.server.report.central import central as told_in_report
from fedgraft.server.report.record import read_record
from fedgraft.server.rounds import check
from fedgraft.simulations import run as runs
from fedgraft.simulations.execution import Execution
from fedgraft.strategies import Aggregator, Capabilities, aggregator

DOCS = Path(__file__).resolve().parents[2] / "docs" / "run-directory.md"
ON = {"central.enabled": True}
SEEDED = {**ON, "central.seeded_noise_not_private": True, "central.clip_quantile": 0.5}


def spent(folder: Path) -> tuple[Any, ...]:
    return Ledger(folder / "central-ledger.jsonl", unit="site").events()


@pytest.fixture(scope="module")
def both(tiny_federation: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run in which the sites protect patients and the server protects sites."""
    folder = tmp_path_factory.mktemp("both") / "run"
    return folder, tiny_federation.run(tiny_federation.private(**ON, **{"central.clip_quantile": 0.5}), folder)


@pytest.fixture(scope="module")
def seeded(tiny_federation: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("seeded") / "run"
    return folder, tiny_federation.run(tiny_federation.config(**SEEDED), folder)


# What is recorded


def test_the_section_of_the_run_record_has_the_documented_keys(both: Any, tiny_federation: Any, tmp_path: Path) -> None:
    paragraph = re.search(r"^`central`: (.*?); null when", DOCS.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert paragraph is not None
    outside = re.sub(r"\([^()]*\)", "", paragraph[1])
    assert set(both[1]["central"]) == set(re.findall(r"`([a-z_]+)`", outside))
    plain = tiny_federation.run(tiny_federation.config(rounds=1), tmp_path / "run")
    assert plain["central"] is None
    assert not (tmp_path / "run" / "central-ledger.jsonl").exists()


def test_both_promises_stand_beside_each_other(both: Any, tinyfederation: ModuleType) -> None:
    folder, result = both
    told = result["central"]
    assert 0 < told["epsilon"] == epsilon(spent(folder), 1e-3) <= 8.0 == told["budget"]
    assert (told["neighbours"], told["trusted"], told["sites"], told["rounds"]) == ("add_remove site", "server", 3, 3)
    assert told["private_noise"] is True
    for site in result["sites"].values():
        assert 0 < site["epsilon"] <= 2.0 and site["unit"] == "patient"
    lines = tinyfederation.metrics(folder, "train")
    assert [line["central"]["clip"] for line in lines] == told["clips"]
    assert told["clips"][0] == 1.0 and len({*told["clips"], told["clip"]}) == 4
    assert all(line["central"]["noise_multiplier"] == told["noise_multiplier"] for line in lines)
    memory = load_last(folder / "checkpoints").memory["central"]
    assert (memory["clip"][0], memory["rounds"][0]) == (told["clip"], 3)


def test_few_sites_are_warned_at_the_start_in_the_record_and_in_numbers(
    tiny_federation: Any, tinyfederation: ModuleType, tmp_path: Path
) -> None:
    class Noting(tinyfederation.Notes):  # type: ignore[name-defined, misc]
        def run_started(self, **_: Any) -> None:
            self.texts.append("started")

    notes = Noting()
    result = tiny_federation.run(tiny_federation.config(**ON, rounds=1), tmp_path / "run", watch=notes)
    said, started = notes.texts[:2]
    assert started == "started"
    told, shared = result["central"], result["adapter"]["shared"]
    assert told["noise_norm"] == pytest.approx(shared**0.5 * told["noise_per_coordinate"])
    assert said.startswith(
        f"central privacy over 3 sites: every round adds noise of {told['noise_per_coordinate']:.2g}"
    )
    assert said in result["warnings"]
    assert (
        "the sites add no noise (privacy.enabled = false): the server sees each update as trained" in result["warnings"]
    )


def test_the_report_says_what_the_server_promises(both: Any, seeded: Any, tmp_path: Path) -> None:
    text = told_in_report(read_record(both[0]))
    assert "The server's promise" in text and "Whom one must trust" in text
    shown = re.search(r"ε = ([\d.]+), but for a chance of about δ = 0\.001", text)
    assert shown is not None and float(shown[1]) >= both[1]["central"]["epsilon"]
    assert "NOT private" not in text
    assert "NOT private" in told_in_report(read_record(seeded[0]))
    record = json.loads((both[0] / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**record, "central": None}))
    assert told_in_report(read_record(tmp_path)) == ""
    pages = [(run[0] / "report.html").read_text() for run in (both, seeded)]
    assert all("The server's promise" in page for page in pages)
    # The sites of one of them add no noise of their own.
    assert ["No differential privacy at the sites." in page for page in pages] == [False, True]


# Noise


def test_only_seeded_noise_repeats_itself_and_it_is_called_what_it_is(
    seeded: Any, tiny_federation: Any, tmp_path: Path
) -> None:
    result = seeded[1]
    again = tiny_federation.run(tiny_federation.config(**SEEDED), tmp_path / "again")
    assert again["digest"] == result["digest"]
    assert result["central"]["private_noise"] is False
    assert any("central.seeded_noise_not_private" in warning for warning in result["warnings"])
    digests = {
        tiny_federation.run(tiny_federation.config(**ON, rounds=1), tmp_path / name)["digest"]
        for name in ("one", "two")
    }
    assert len(digests) == 2


def test_the_noise_of_a_run_is_the_operating_systems_and_of_the_accounted_size(
    tiny_federation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[np.ndarray] = []

    class Kept(RandomStream):
        def normal(self, count: int) -> np.ndarray:
            drawn.append(super().normal(count))
            return drawn[-1]

    def unseeded(*_: object) -> RandomStream:
        raise AssertionError("a seeded stream")

    monkeypatch.setattr("fedgraft.server.rounds.RandomStream", Kept)
    monkeypatch.setattr(Kept, "seeded_not_private", unseeded)
    folder = tmp_path / "run"
    result = tiny_federation.run(tiny_federation.config(**ON, rounds=2, **{"central.clip": 1e-3}), folder)
    shared = result["adapter"]["shared"]
    assert [len(each) for each in drawn] == [shared, shared]
    states = [state_after(folder, number) for number in (0, 1, 2)]
    scale = result["central"]["noise_multiplier"] * 1e-3 / 3
    for (before, now), noise in zip(pairwise(states), drawn, strict=True):
        step = flat(now) - flat(before)
        # Without its noise it is the mean of three clipped changes: at most the clip long, but for the float32 of the
        # adapter; the noise is far longer.
        rounding = np.linalg.norm(flat(now)) * 2**-23
        assert np.linalg.norm(step - scale * noise) <= 1e-3 * (1 + 1e-6) + rounding
        assert np.linalg.norm(step) > 5e-3


def state_after(folder: Path, number: int) -> AdapterState:
    return AdapterState.load(folder / "checkpoints" / f"round-{number:04d}" / "adapter.safetensors")


def flat(state: AdapterState) -> np.ndarray:
    return np.concatenate([state[name].astype(float).ravel() for name in state.spec.select("share")])


# Killed and resumed


class Stop(Watch):
    """Ends a run from inside once it has come so far."""

    def __init__(self, error: type[BaseException], kind: str, round: int) -> None:
        self.error, self.at = error, (kind, round)

    def phase_finished(self, record: Any) -> None:
        if (record["kind"], record["round"]) == self.at:
            raise self.error


def stopped(
    tiny_federation: Any, tinyfederation: ModuleType, config: RunConfig, folder: Path, kind: str, at: int
) -> None:
    with pytest.raises(tinyfederation.Interrupted):
        tiny_federation.run(config, folder, watch=Stop(tinyfederation.Interrupted, kind, at))


def test_a_run_stopped_between_rounds_goes_on_as_if_nothing_had_happened(
    seeded: Any, tiny_federation: Any, tinyfederation: ModuleType, tmp_path: Path
) -> None:
    folder, config = tmp_path / "run", tiny_federation.config(**SEEDED)
    stopped(tiny_federation, tinyfederation, config, folder, "evaluate", 2)
    result = tiny_federation.resume(config, folder)
    assert result["digest"] == seeded[1]["digest"]
    assert result["central"] == seeded[1]["central"]


def test_a_round_lost_after_its_noise_stays_spent(
    tiny_federation: Any, tinyfederation: ModuleType, tmp_path: Path
) -> None:
    """Between the ledger and the checkpoint: what was released is not known, so it counts."""
    folder, config = tmp_path / "run", tiny_federation.config(**ON)
    stopped(tiny_federation, tinyfederation, config, folder, "train", 2)
    assert load_last(folder / "checkpoints").round == 1
    assert len(spent(folder)) == 2
    result = tiny_federation.resume(config, folder)
    events = spent(folder)
    noises = [event.noise_multiplier for event in events]
    assert result["central"]["rounds"] == len(events) == 4 and result["rounds"] == 3
    assert noises[0] == noises[1] < noises[2] == noises[3] == result["central"]["noise_multiplier"]
    assert result["central"]["epsilon"] == epsilon(events, 1e-3) <= 8.0
    assert len(result["central"]["clips"]) == 3


def test_a_round_lost_before_its_noise_costs_nothing(
    tiny_federation: Any, tinyfederation: ModuleType, tmp_path: Path
) -> None:
    folder, config = tmp_path / "run", tiny_federation.config(**ON)

    def interrupted(site: str, message: Message, answer: Any) -> Any:
        if message.metadata.message_type == "train" and message.metadata.group_id == "2" and site == "south":
            raise tinyfederation.Interrupted
        return answer()

    with pytest.raises(tinyfederation.Interrupted):
        tiny_federation.run(config, folder, interrupted)
    assert len(spent(folder)) == 1
    assert tiny_federation.resume(config, folder)["central"]["rounds"] == 3


def test_a_run_without_its_ledger_is_not_resumed(
    tiny_federation: Any, tinyfederation: ModuleType, tmp_path: Path
) -> None:
    folder, config = tmp_path / "run", tiny_federation.config(**ON)
    stopped(tiny_federation, tinyfederation, config, folder, "evaluate", 2)
    (folder / "central-ledger.jsonl").unlink()
    with pytest.raises(UserError, match="holds 0 rounds of central privacy, the checkpoint 2"):
        tiny_federation.resume(config, folder)


def test_a_run_that_spent_its_budget_is_not_extended_and_can_be_ended(tiny_federation: Any, tmp_path: Path) -> None:
    folder, config = tmp_path / "run", tiny_federation.config(**ON, rounds=1)
    first = tiny_federation.run(config, folder)
    with pytest.raises(UserError) as caught:
        tiny_federation.resume(config, folder, rounds=10)
    said = str(caught.value)
    assert said.startswith("central.epsilon 8 at central.delta 0.001 cannot be reached in 9 rounds at sampling rate 1 ")
    assert said.endswith("; or end the run as it is: --resume with --set rounds=1")
    assert len(spent(folder)) == 1
    again = tiny_federation.resume(config, folder, rounds=1)
    assert (again["digest"], again["central"]) == (first["digest"], first["central"])


# Whom it asks


def test_sites_that_are_not_drawn_rest_and_are_not_missing(
    tiny_federation: Any, tinyfederation: ModuleType, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    config = tiny_federation.config(**SEEDED, rounds=6, **{"central.sampling_rate": 0.5, "evaluate.every": 0})
    result = tiny_federation.run(config, folder)
    lines = tinyfederation.metrics(folder, "train")
    resting = [line.get("resting", []) for line in lines]
    assert {len(names) for names in resting} > {1}, "the seed drew no round in which some rest"
    for line in lines:
        assert line["missing"] == {}
        assert set(line["sites"]) == set(tinyfederation.SITES) - set(line.get("resting", []))
    assert {name: site["rounds"] for name, site in result["sites"].items()} == {
        site: sum(site not in names for names in resting) for site in tinyfederation.SITES
    }
    assert not [warning for warning in result["warnings"] if "answered in" in warning]
    assert {event.sampling_rate for event in spent(folder)} == {0.5}
    assert len(spent(folder)) == 6


def test_a_round_in_which_nobody_is_drawn_is_noise_and_counts(
    tiny_federation: Any, tinyfederation: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Nobody(RandomStream):
        def uniform(self, count: int) -> np.ndarray:
            return np.full(count, 0.9) if count == 3 else super().uniform(count)

    monkeypatch.setattr("fedgraft.server.rounds.RandomStream", Nobody)
    folder = tmp_path / "run"
    config = tiny_federation.config(**ON, rounds=1, **{"central.sampling_rate": 0.5})
    result = tiny_federation.run(config, folder)
    (line,) = tinyfederation.metrics(folder, "train")
    assert (line["sites"], line["missing"], line["resting"]) == ({}, {}, list(tinyfederation.SITES))
    assert result["status"] == "finished" and result["central"]["rounds"] == 1
    step = flat(state_after(folder, 1)) - flat(state_after(folder, 0))
    assert 0.9 < step.std() / result["central"]["noise_per_coordinate"] < 1.1


def failing(site: str, message: Message, answer: Any) -> Message:
    """A site whose process dies in every training."""
    if message.metadata.message_type == "train":
        return Message(Error(2, "boom"), reply_to=message)
    return answer()  # type: ignore[no-any-return]


def test_where_sites_are_drawn_a_round_stands_whoever_answers(
    tiny_federation: Any, tinyfederation: ModuleType, tmp_path: Path
) -> None:
    """Dropping it would tell who had been drawn."""
    folder = tmp_path / "run"
    config = tiny_federation.config(**SEEDED, rounds=2, **{"central.sampling_rate": 0.9})
    result = tiny_federation.run(config, folder, failing)
    assert result["status"] == "finished" and result["central"]["rounds"] == 2
    assert all(line["missing"] and not line["sites"] for line in tinyfederation.metrics(folder, "train"))


def test_without_drawing_the_quorum_is_of_answers_and_a_round_below_it_costs_nothing(
    tiny_federation: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(UserError, match="round 1: 0 of 3 sites answered, the quorum is 3"):
        tiny_federation.run(tiny_federation.config(**ON), folder, failing)
    assert spent(folder) == ()


def test_an_update_that_is_not_finite_is_left_out(
    tiny_federation: Any, tinyfederation: ModuleType, tmp_path: Path
) -> None:
    def broken(site: str, message: Any, answer: Any) -> Any:
        reply = answer()
        if message.metadata.message_type == "train" and site == "east":
            array = reply.content.array_records["adapter"]["float32"]
            numbers = array.numpy().copy()
            numbers[0] = np.nan
            reply.content.array_records["adapter"]["float32"] = type(array)(numbers)
        return reply

    folder = tmp_path / "run"
    config = tiny_federation.config(**ON, rounds=1, **{"server.quorum": 2})
    result = tiny_federation.run(config, folder, broken)
    (line,) = tinyfederation.metrics(folder, "train")
    assert "NaN" in line["missing"]["east"] and set(line["sites"]) == {"north", "south"}
    assert result["status"] == "finished"


@pytest.mark.slow
def test_flowers_engine_draws_and_noises_alike(
    tiny_federation: Any, tinyfederation: ModuleType, tmp_path: Path
) -> None:
    """The seed draws nobody in the first round, and not everybody in the second."""
    config = tiny_federation.config(**SEEDED, rounds=2, **{"seed": 15, "central.sampling_rate": 0.5})
    mine = tiny_federation.run(config, tmp_path / "inprocess")
    theirs = runs.simulate(config, tmp_path / "flower", execution=Execution("flower"))
    assert theirs["central"] == mine["central"]
    resting = [line["resting"] for line in tinyfederation.metrics(tmp_path / "flower", "train")]
    assert resting == [line["resting"] for line in tinyfederation.metrics(tmp_path / "inprocess", "train")]
    assert len(resting[0]) == 3 and 0 < len(resting[1]) < 3
    one, two = (state_after(tmp_path / name, 2) for name in ("inprocess", "flower"))
    assert max(float(np.abs(one[name] - two[name]).max()) for name in one) <= 1e-5


# What is refused


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"central.sampling_rate": 0.5}, r"central\.sampling_rate is 0\.5 but central\.enabled is false"),
        ({**ON, "central.delta": 0.4}, r"central\.delta 0\.4 is not below 1/3"),
        ({**ON, "central.epsilon": 1e-4, "central.delta": 1e-6}, r"central\.epsilon 0\.0001 .* cannot be reached"),
        ({**ON, "central.noise_multiplier": 0.5}, r"central noise multiplier 0\.5 spends epsilon .* more than"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_anything_is_loaded(
    changes: dict[str, Any], reason: str, tiny_federation: Any, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=reason):
        tiny_federation.run(tiny_federation.config(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_strategy_that_sees_single_updates_and_mixed_ranks_are_refused(
    tiny_federation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aggregator, "_STRATEGIES", dict(aggregator._STRATEGIES))

    class Choosy(Aggregator):
        capabilities = Capabilities(needs_individual=True, heterogeneous_ranks=True)

        def add(self, update: Update) -> None:
            raise NotImplementedError

        def result(self) -> Any:
            raise NotImplementedError

    aggregator.strategy("choosy")(Choosy)
    with pytest.raises(UserError, match="strategy `choosy` does more than add updates up"):
        check(tiny_federation.config(**ON, strategy="choosy"))
    Choosy.capabilities = Capabilities(linear_sum=True, heterogeneous_ranks=True)
    sites = [{"name": "east", "rank": 2}, {"name": "north"}, {"name": "south"}]
    check(tiny_federation.config(strategy="choosy", **{"data.sites": sites}))
    with pytest.raises(UserError, match=r"site east has rank 2, .* and central privacy cannot mix ranks"):
        check(tiny_federation.config(**ON, strategy="choosy", **{"data.sites": sites}))
