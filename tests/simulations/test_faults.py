"""Sites that are away, late, crashing or lying: the run goes on, names them, and counts them."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedgraft.client.answering import SiteClient
from fedgraft.client.together import train_together
from fedgraft.core.config import RunConfig, parse_config
from fedgraft.core.errors import UserError
from fedgraft.core.wire import FAULTS, fault_of, no_answer
from fedgraft.server.app import app as deployed_server
from fedgraft.server.rounds import tell
from fedgraft.simulations import run as runs
from fedgraft.simulations.availability import Availability
from fedgraft.simulations.engines.inprocess import InProcessGrid
from fedgraft.simulations.execution import Execution
from fedgraft.simulations.fate import Fates, require_enough

#: The claim of the issue, on ten sites: three in ten rounds are missed by chance, one site straggles, one sends NaN.
FLAKY: dict[str, Any] = {
    "rounds": 4,
    "server.quorum": 1,
    "simulation.dropout": 0.3,
    "data.sites": [
        *(f"site-{number}" for number in range(8)),
        {"name": "slow", "straggler": True},
        {"name": "wrong", "attack": "nan"},
    ],
}


def _plain(**changes: Any) -> RunConfig:
    """A configuration that is never run."""
    sites = changes.pop("sites", ["a", "b", "c"])
    values = {"model": "m", "seed": 5, "server": {"quorum": 1}, "data": {"path": "p", "sites": sites}, "rounds": 9}
    return parse_config({**values, **changes})


# Who is away


def _away(simulation: dict[str, Any], sites: int = 40, rounds: int = 250) -> np.ndarray:
    """Whether each site (row) is away in each round (column)."""
    names = [f"s{number}" for number in range(sites)]
    found = Availability(_plain(simulation=simulation, sites=names))
    return np.array([[found.away(name, number) for number in range(1, rounds + 1)] for name in names])


@pytest.mark.parametrize(
    "simulation",
    [
        {"dropout": 0.3},
        {"dropout": 0.3, "availability": "markov", "period": 4},
        {"dropout": 0.3, "availability": "daily", "period": 10},
    ],
)
def test_a_site_is_away_in_the_share_of_rounds_that_is_asked_for(simulation: dict[str, Any]) -> None:
    away = _away(simulation)
    # Of 10,000 draws .0046 is one standard deviation; outages of 4 rounds on average make it sqrt(2 * 4 - 1) times that
    # at most.
    assert abs(away.mean() - 0.3) < 4 * 0.0046 * np.sqrt(7 if simulation.get("availability") == "markov" else 1)
    # Nobody is away before the first round, nor in a run that asks for none of it.
    assert not Availability(_plain(simulation=simulation)).away("a", 0)
    assert not Availability(_plain()).away("a", 3)


def test_outages_last_as_long_as_asked_for_and_begin_in_the_first_round_as_in_any_other() -> None:
    away = _away({"dropout": 0.4, "availability": "markov", "period": 5}, sites=400, rounds=60)
    assert abs(away[:, 0].mean() - 0.4) < 4 * np.sqrt(0.24 / 400)
    # An outage ends in a round with the chance 1 / 5.
    ends = ~away[:, 1:][away[:, :-1]]
    assert abs(ends.mean() - 1 / 5) < 4 * np.sqrt(0.16 / len(ends))
    begins = away[:, 1:][~away[:, :-1]]
    assert abs(begins.mean() - 0.4 / (0.6 * 5)) < 4 * np.sqrt(0.12 / len(begins))


def test_independent_rounds_are_outages_of_a_length_of_their_own() -> None:
    """With L = 1 / (1 - d) an outage ends with the chance 1 - d and begins with d: as if each round were drawn anew."""
    away = _away({"dropout": 0.5, "availability": "markov", "period": 2}, sites=100, rounds=100)
    after, before = away[:, 1:], away[:, :-1]
    assert abs(after[before].mean() - after[~before].mean()) < 4 * np.sqrt(0.25 / 5000 * 2)


def test_by_day_a_site_is_there_and_by_night_it_is_not_each_at_an_hour_of_its_own() -> None:
    away = _away({"dropout": 0.5, "availability": "daily", "period": 10}, sites=60, rounds=1000)
    by_hour = away.reshape(60, 100, 10).mean(axis=1)
    # d (1 + cos): between 0 and 1 for d = 1/2, and the mean of the whole day 1/2.
    assert (by_hour.max(axis=1) > 0.85).all() and (by_hour.min(axis=1) < 0.15).all()
    assert len(set(by_hour.argmax(axis=1).tolist())) > 5


def test_who_is_away_hangs_on_seed_site_and_round_alone() -> None:
    markov = {"dropout": 0.4, "availability": "markov", "period": 3}
    config = _plain(simulation=markov, sites=["a", "b"])
    forwards, backwards = Availability(config), Availability(config)
    there = {(site, number): forwards.away(site, number) for number in range(1, 40) for site in ("a", "b")}
    again = {(site, number): backwards.away(site, number) for number in range(39, 0, -1) for site in ("b", "a")}
    assert there == again
    # More sites, or other ones, change nothing.
    others = Availability(_plain(simulation=markov, sites=["a", "z"]))
    assert all(others.away("a", number) == there["a", number] for number in range(1, 40))
    anew = Availability(_plain(simulation=markov, seed=6))
    assert any(anew.away("a", number) != there["a", number] for number in range(1, 40))


@pytest.mark.parametrize(
    ("simulation", "message"),
    [
        ({"dropout": 0.9, "availability": "markov", "period": 2}, "give 9 rounds or more"),
        ({"dropout": 0.1, "availability": "markov"}, "give 1 rounds or more"),
        ({"dropout": 0.1, "period": 3}, "simulation.period is for"),
        ({"dropout": 0.6, "availability": "daily", "period": 4}, "at noon nobody is away"),
        ({"dropout": 1.0}, "less than 1"),
    ],
)
def test_a_pattern_that_cannot_be_is_refused(simulation: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _plain(simulation=simulation)


# What befalls a site


def test_a_site_is_there_from_the_round_it_joins_to_the_round_before_it_leaves() -> None:
    fates = Fates(_plain(sites=["a", {"name": "b", "joins": 3, "leaves": 5}]))
    found = {number: fates.of("train", "b", number) for number in range(1, 8)}
    assert {number for number, fate in found.items() if fate is None} == {3, 4}
    assert found[1] is not None and found[1].why == "site b joins in round 3"
    assert found[5] is not None and found[5].why == "site b left in round 5"
    assert {fate.fault for fate in found.values() if fate is not None} == {"absent"}
    # It greets nobody before, and is not scored before the first round either.
    assert fates.of("hello", "b", 2) is not None and fates.of("hello", "b", 3) is None
    assert fates.of("evaluate", "b", 0) is not None and fates.of("evaluate", "a", 0) is None


def test_a_crash_takes_the_rest_of_the_round_with_it() -> None:
    fates = Fates(_plain(sites=["a", {"name": "b", "crashes": [2, 4]}]))
    kinds = {(kind, number): fates.of(kind, "b", number) for kind in ("train", "evaluate") for number in (1, 2, 3, 4)}  # type: ignore[arg-type]
    assert {key: fate.fault for key, fate in kinds.items() if fate is not None} == {
        ("train", 2): "crashed",
        ("train", 4): "crashed",
        ("evaluate", 2): "absent",
        ("evaluate", 4): "absent",
    }


def test_a_straggler_is_late_with_every_training_and_scores_all_the_same() -> None:
    fates = Fates(_plain(sites=["a", {"name": "b", "straggler": True}]))
    found = fates.of("train", "b", 7)
    assert found is not None and (found.fault, found.why) == ("late", "no answer in time")
    assert fates.of("evaluate", "b", 7) is None and fates.of("train", "a", 7) is None


@pytest.mark.parametrize("fault", ["absent", "late", "crashed"])
def test_flowers_error_reply_says_which_fault_it_was(fault: Any) -> None:
    # A grid of this process says which task it is, without which Flower makes no message.
    message = InProcessGrid(ClientApp(), 1).create_message(RecordDict(), "train", 7, "1")
    reply = no_answer(message, fault, "why")
    assert reply.has_error() and reply.error.reason == "why" and fault_of(reply.error) == fault


# What is refused beforehand


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"simulation": {"dropout": 0.1}}, "simulation.dropout"),
        ({"simulation": {"deadline": 5}}, "simulation.deadline"),
        ({"sites": ["a", {"name": "b", "joins": 2}]}, r"data.sites\[\].joins of b"),
        ({"sites": ["a", {"name": "b", "leaves": 2}]}, r"data.sites\[\].leaves of b"),
        ({"sites": ["a", {"name": "b", "crashes": 2}]}, r"data.sites\[\].crashes of b"),
        ({"sites": ["a", {"name": "b", "straggler": True}]}, r"data.sites\[\].straggler of b"),
        ({"sites": ["a", {"name": "b", "attack": "nan"}]}, r"data.sites\[\].attack of b"),
    ],
)
def test_faults_with_a_quorum_of_all_sites_are_refused_with_the_mend(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=rf"{key} lets sites miss rounds.*set server.quorum to .* such as 1"):
        _plain(server={}, **changes)
    _plain(**changes)


def test_honest_sites_that_are_only_slow_need_no_quorum() -> None:
    _plain(server={}, simulation={"seconds_per_step": 2, "speed_spread": 0.5}, sites=["a", {"name": "b", "speed": 3}])


def test_a_run_that_is_bound_to_miss_its_quorum_is_refused_before_it_begins() -> None:
    config = _plain(simulation={"dropout": 0.4}, server={"quorum": 2})
    fates = Fates(config)
    present = {n: sum(fates.of("train", site, n) is None for site in config.site_names) for n in range(1, 10)}
    first = min(number for number, count in present.items() if count < 2)
    expected = rf"round {first}: {present[first]} of 3 sites would answer with this seed, and the quorum is 2; lower"
    with pytest.raises(UserError, match=expected):
        require_enough(config)
    require_enough(config.model_copy(update={"rounds": first - 1}))
    # One whose updates are refused does not help, and one whose arithmetic alone takes too long does not either.
    sites = ["a", {"name": "b", "attack": "nan"}, {"name": "c", "speed": 0.1}]
    slow = {"seconds_per_step": 1, "deadline": 20}
    with pytest.raises(UserError, match="round 1: 1 of 3 sites"):
        require_enough(_plain(sites=sites, simulation=slow, server={"quorum": 2}))
    require_enough(_plain(sites=sites, simulation=slow))


def test_who_is_drawn_to_train_is_not_foretold() -> None:
    """Below the quorum for want of sites, not of answers: sites_per_round and central sampling decide elsewhere."""
    require_enough(_plain(simulation={"dropout": 0.9}, server={"quorum": 3, "sites_per_round": 1}))


def test_a_deployment_refuses_a_configuration_with_simulated_faults(tiny_federation: Any, tmp_path: Path) -> None:
    for changes, key in (
        ({"simulation.dropout": 0.2, "server.quorum": 1}, r"simulation\.dropout"),
        ({"data.sites": ["east", {"name": "west", "straggler": True}], "server.quorum": 1}, r"straggler"),
        ({"data.sites": ["east", {"name": "west", "attack": "scale:2"}]}, r"data\.sites\[\]\.attack"),
    ):
        path = tmp_path / "run.json"
        path.write_text(json.dumps(tiny_federation.values(**changes)))
        settings = {"config": str(path), "output": str(tmp_path / "out")}
        context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=settings)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=rf"{key} is for simulations; these sites are real, so leave it out"):
            deployed_server(None, context)  # type: ignore[arg-type]
        assert not (tmp_path / "out").exists()


# Whole runs


def _trainings(tinyfederation: Any, folder: Path) -> dict[int, dict[str, Any]]:
    return {line["round"]: line for line in tinyfederation.metrics(folder, "train")}


def test_a_run_with_dropouts_a_straggler_and_a_liar_finishes_names_them_and_counts_them(
    tiny_federation: Any, tinyfederation: Any, tmp_path: Path
) -> None:
    config = tiny_federation.config(**FLAKY)
    run = tiny_federation.run(config, tmp_path / "run")
    assert (run["status"], run["rounds"]) == ("finished", 4)
    fates = Fates(config)
    lines = _trainings(tinyfederation, tmp_path / "run")
    counted: dict[str, Counter[str]] = {site: Counter() for site in config.site_names}
    for number in range(1, 5):
        expected: dict[str, str] = {}
        for site in config.site_names:
            fate = fates.of("train", site, number)
            if fate is not None:
                expected[site] = fate.fault
            elif site == "wrong":
                expected[site] = "refused"
        assert lines[number]["faults"] == expected
        assert set(lines[number]["missing"]) == set(expected)
        assert set(lines[number]["sites"]) == set(config.site_names) - set(expected)
        for site, fault in expected.items():
            counted[site][fault] += 1
    assert any(counted[f"site-{number}"]["absent"] for number in range(8))
    for site, of_site in run["sites"].items():
        assert of_site["missed"] == {fault: counted[site][fault] for fault in FAULTS}
        assert of_site["rounds"] + sum(of_site["missed"].values()) == 4
    assert run["missed"] == {fault: sum(count[fault] for count in counted.values()) for fault in FAULTS}
    assert run["missed"]["late"] >= 1 and run["missed"]["refused"] >= 1 and run["missed"]["crashed"] == 0
    # The server itself found the NaN; the site's gate, which would have, is behind the liar.
    reason = next(line["missing"]["wrong"] for line in lines.values() if line["faults"]["wrong"] == "refused")
    assert "holds NaN" in reason and "gate" not in reason
    warnings = " ".join(run["warnings"])
    assert "slow answered in 0 of 4 rounds" in warnings and "wrong answered in 0 of 4 rounds" in warnings
    page = (tmp_path / "run" / "report.html").read_text()
    assert "late" in page and "refused" in page and "away in this round" in page
    again = tiny_federation.run(config, tmp_path / "again")
    assert again["digest"] == run["digest"]


def test_the_missing_do_not_change_what_the_others_train(
    tiny_federation: Any, tinyfederation: Any, tmp_path: Path
) -> None:
    """A round without a site is the round of a federation that never had it: same answers, same aggregate."""
    files = [{"name": name, "path": str(tiny_federation.table)} for name in ("east", "north", "south")]
    small = {"data.path": "", "rounds": 1, "server.quorum": 1}
    away = [*files[:2], {**files[2], "straggler": True}]
    without = tiny_federation.run(tiny_federation.config(**{**small, "data.sites": files[:2]}), tmp_path / "two")
    late = tiny_federation.run(tiny_federation.config(**{**small, "data.sites": away}), tmp_path / "three")
    assert late["digest"] == without["digest"]


def test_a_site_that_is_away_costs_nothing(
    tiny_federation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even a look at its records: nothing of the site's own code runs."""
    asked: list[tuple[str, str]] = []
    plain = SiteClient.answer_together

    def together(self: SiteClient, kind: Any, calls: Any) -> Any:
        asked.extend((kind, str(message.content["job"]["site"])) for message, _ in calls)
        return plain(self, kind, calls)

    monkeypatch.setattr(SiteClient, "answer_together", together)
    sites = ["east", "north", {"name": "south", "leaves": 2}]
    config = tiny_federation.config(**{"data.sites": sites, "server.quorum": 1, "rounds": 3})
    run = tiny_federation.run(config, tmp_path / "run")
    of_south = [kind for kind, site in asked if site == "south"]
    assert of_south == ["evaluate", "train", "evaluate"]
    assert run["sites"]["south"]["missed"]["absent"] == 2


def test_what_is_late_or_lost_without_privacy_is_not_computed(
    tiny_federation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[str, int]] = []

    def watched(lessons: Any, cohort: Any) -> Any:
        trained.extend((lesson.site, lesson.round) for lesson in lessons)
        return train_together(lessons, cohort)

    monkeypatch.setattr("fedgraft.client.answering.train_together", watched)
    sites = ["east", {"name": "north", "straggler": True}, {"name": "south", "crashes": [1, 3]}]
    changes = {"data.sites": sites, "server.quorum": 1, "rounds": 3}
    tiny_federation.run(tiny_federation.config(**changes), tmp_path / "run")
    assert [pair for pair in trained if pair[0] != "east"] == [("south", 2)]
    # A site that remembers its training has to have had one: late, but not lost to the site itself.
    trained.clear()
    changes |= {"strategy": "scaffold"}
    tiny_federation.run(tiny_federation.config(**changes), tmp_path / "scaffold")
    assert [pair for pair in trained if pair[0] == "north"] == [("north", 1), ("north", 2), ("north", 3)]
    assert [pair for pair in trained if pair[0] == "south"] == [("south", 2)]


def _ledger(folder: Path, site: str) -> list[dict[str, Any]]:
    (path,) = (folder / "sites" / site / "ledgers").glob("*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_under_privacy_a_late_site_has_spent_all_its_steps_and_a_crashed_one_half_of_them(
    tiny_federation: Any, tinyfederation: Any, tmp_path: Path
) -> None:
    sites = ["east", {"name": "north", "straggler": True}, {"name": "south", "crashes": 2}]
    changes = {"data.sites": sites, "server.quorum": 1, "rounds": 3, "train.local_steps": 4}
    config = tiny_federation.private(**changes)
    run = tiny_federation.run(config, tmp_path / "run")
    settled = {
        site: [(line["outcome"], line["steps"]) for line in _ledger(tmp_path / "run", site) if "outcome" in line]
        for site in config.site_names
    }
    # Half of four steps were taken, and the one that broke off counts with them.
    assert settled["south"] == [("released", 4), ("failed", 3), ("released", 4)]
    assert settled["east"] == settled["north"] == [("released", 4)] * 3
    # What the late site spent is told with its evaluations.
    assert run["sites"]["north"]["epsilon"] == pytest.approx(run["sites"]["east"]["epsilon"], rel=0.1)
    assert run["sites"]["north"]["privacy"]["steps"] == 12 and run["sites"]["south"]["privacy"]["steps"] == 11
    lines = _trainings(tinyfederation, tmp_path / "run")
    assert [lines[number]["faults"].get("south") for number in (1, 2, 3)] == [None, "crashed", None]
    assert [lines[number]["faults"]["north"] for number in (1, 2, 3)] == ["late"] * 3
    log = (tmp_path / "run" / "sites" / "south" / "audit.jsonl").read_text()
    assert "it died in the middle of the training" in log


def test_who_dies_among_sites_that_train_together_takes_nobody_along(
    tiny_federation: Any, tinyfederation: Any, tmp_path: Path
) -> None:
    """Three sites in the same passes, one gone after half of them: the ledgers and the record are as one by one."""
    sites = ["east", {"name": "north", "straggler": True}, {"name": "south", "crashes": 1}]
    changes = {"data.sites": sites, "server.quorum": 1, "rounds": 1, "train.local_steps": 4}
    changes |= {"privacy.seeded_noise_not_private": True}
    config = tiny_federation.private(**changes)
    digests = {}
    for cohort in (1, 3):
        folder = tmp_path / str(cohort)
        run = runs.simulate(config, folder, execution=Execution("inprocess", cohort=cohort))
        digests[cohort] = run["digest"]
        outcomes = {site: _ledger(folder, site)[1] for site in config.site_names}
        assert {site: (line["outcome"], line["steps"]) for site, line in outcomes.items()} == {
            "east": ("released", 4),
            "north": ("released", 4),
            "south": ("failed", 3),
        }
        (line,) = tinyfederation.metrics(folder, "train")
        assert line["faults"] == {"north": "late", "south": "crashed"}
    assert digests[1] == digests[3]


def test_a_loss_that_nobody_heard_of_is_warned_of(tiny_federation: Any, tmp_path: Path) -> None:
    """South dies in the last round, so the server has only what it said in the one before."""
    sites = ["east", "north", {"name": "south", "crashes": 2}]
    config = tiny_federation.private(**{"data.sites": sites, "server.quorum": 1, "rounds": 2})
    run = tiny_federation.run(config, tmp_path / "run")
    (warning,) = [text for text in run["warnings"] if "nothing was heard since" in text]
    assert warning.startswith("south: a training was lost")
    spent = sum(line["steps"] for line in _ledger(tmp_path / "run", "south") if "outcome" in line)
    assert spent > run["sites"]["south"]["privacy"]["steps"]


def test_a_crashed_site_comes_back_without_what_it_held(
    tiny_federation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: dict[int, tuple[set[str], bool]] = {}
    plain = SiteClient.answer_together

    def together(self: SiteClient, kind: Any, calls: Any) -> Any:
        for message, context in calls:
            job = message.content["job"]
            if kind == "train" and job["site"] == "south":
                whole = json.loads(str(message.content["table"]["json"]))["rest"] == ""
                states[int(job["round"])] = (set(context.state), whole)
        return plain(self, kind, calls)

    monkeypatch.setattr(SiteClient, "answer_together", together)
    sites = ["east", "north", {"name": "south", "crashes": 2}]
    config = tiny_federation.config(**{"data.sites": sites, "server.quorum": 1, "rounds": 3})
    tiny_federation.run(config, tmp_path / "run")
    # It held the adapter that it was scored on; after the crash nothing, and is sent the whole again.
    assert states[2][0] and states[2][1] is False
    assert states[3] == (set(), True)


def test_a_late_join_is_waited_for_in_virtual_time_only(
    tiny_federation: Any, tinyfederation: Any, tmp_path: Path
) -> None:
    sites = ["east", "north", {"name": "south", "joins": 3}]
    config = tiny_federation.config(**{"data.sites": sites, "server.quorum": 1, "server.join_timeout": 300.0})
    notes = tinyfederation.Notes()
    began = time.monotonic()
    run = tiny_federation.run(config, tmp_path / "run", watch=notes)
    assert time.monotonic() - began < 60
    assert run["sites"]["south"]["rounds"] == 1 and run["sites"]["south"]["missed"]["absent"] == 2
    assert run["sites"]["south"]["records"] > 0
    lines = _trainings(tinyfederation, tmp_path / "run")
    assert [sorted(lines[number]["sites"]) for number in (1, 2, 3)] == [["east", "north"]] * 2 + [
        sorted(tinyfederation.SITES)
    ]
    assert lines[1]["missing"] == {"south": "not connected"}
    assert sum("south joins in round 3" in text for text in notes.texts) == 1


def test_a_run_resumes_with_a_site_that_joined_meanwhile_and_ends_as_if_uninterrupted(
    tiny_federation: Any, tinyfederation: Any, tmp_path: Path
) -> None:
    sites = ["east", {"name": "north", "leaves": 3}, {"name": "south", "joins": 2, "crashes": 3}]
    changes = {"data.sites": sites, "server.quorum": 1, "rounds": 4, "simulation.dropout": 0.2}
    config = tiny_federation.config(**changes)
    whole = tiny_federation.run(config, tmp_path / "whole")

    def between(site: str, message: Message, answer: Any) -> Message:
        if message.metadata.message_type == "train" and message.content["job"]["round"] == 3:
            raise tinyfederation.Interrupted
        return answer()

    with pytest.raises(tinyfederation.Interrupted):
        tiny_federation.run(config, tmp_path / "run", between=between)
    resumed = tiny_federation.resume(config, tmp_path / "run")
    assert resumed["digest"] == whole["digest"]
    assert {name: site["missed"] for name, site in resumed["sites"].items()} == {
        name: site["missed"] for name, site in whole["sites"].items()
    }


def test_below_the_quorum_a_run_ends_with_a_line_that_names_the_missing(tiny_federation: Any, tmp_path: Path) -> None:
    """Who is drawn is not foretold with sites_per_round, so this run is found wanting in its first round."""
    sites = [{"name": name, "straggler": True} for name in ("east", "north")]
    config = tiny_federation.config(
        **{"data.sites": [*sites, "south"], "server.quorum": 2, "server.sites_per_round": 2, "rounds": 1}
    )
    with pytest.raises(UserError, match=r"round 1: . of 2 sites answered, the quorum is 2 \(.*no answer in time"):
        tiny_federation.run(config, tmp_path / "run")


def test_thousands_of_missing_sites_are_counted_in_a_line_not_listed(tinyfederation: Any) -> None:
    notes = tinyfederation.Notes()
    missing = {f"s{number}": "away in this round" for number in range(12)}
    faults = dict.fromkeys(missing, "absent") | {"s3": "late"}
    tell(notes, {"round": 2, "missing": missing, "faults": faults})
    assert notes.texts == ["round 2: 12 sites are missing (11 absent, 1 late); metrics.jsonl names them"]


# Central privacy


def test_central_privacy_divides_by_the_sites_expected_and_pays_for_every_round_whoever_is_missing(
    tiny_federation: Any, tinyfederation: Any, tmp_path: Path
) -> None:
    """Who answers is not its secret: a missing site adds zero to a sum whose noise and divisor are as planned."""
    central = {
        "central.enabled": True,
        "central.clip": 0.05,
        "central.epsilon": 50.0,
        "central.delta": 0.01,
        "central.seeded_noise_not_private": True,
        "rounds": 3,
        "server.quorum": 1,
    }
    found: dict[str, dict[str, Any]] = {}
    for name, sites in (
        ("all", ["east", "north", "south"]),
        ("flaky", ["east", {"name": "north", "straggler": True}, {"name": "south", "crashes": [1], "leaves": 3}]),
    ):
        config = tiny_federation.config(**{**central, "data.sites": sites})
        found[name] = tiny_federation.run(config, tmp_path / name)
    whole, flaky = found["all"]["central"], found["flaky"]["central"]
    assert found["flaky"]["missed"] == {"absent": 1, "late": 3, "crashed": 1, "refused": 0}
    for key in ("epsilon", "rounds", "sites", "sum_noise", "noise_multiplier", "noise_per_coordinate", "clips"):
        assert flaky[key] == whole[key], key


def test_with_sampled_sites_a_round_stands_even_if_nobody_answers(
    tiny_federation: Any, tinyfederation: Any, tmp_path: Path
) -> None:
    """A round that were dropped for want of answers would tell who had been drawn."""
    sites = [{"name": name, "straggler": True} for name in ("east", "north", "south")]
    config = tiny_federation.config(
        **{
            "central.enabled": True,
            "central.sampling_rate": 0.5,
            "central.epsilon": 50.0,
            "central.delta": 0.01,
            "rounds": 2,
            "server.quorum": 1,
            "data.sites": sites,
        }
    )
    run = tiny_federation.run(config, tmp_path / "run")
    assert run["status"] == "finished" and run["central"]["rounds"] == 2
    assert all(not line["sites"] for line in tinyfederation.metrics(tmp_path / "run", "train"))


# Every engine


@pytest.mark.slow
def test_the_record_of_a_flaky_run_is_the_same_under_every_engine(
    tiny_federation: Any, tinyfederation: Any, tmp_path: Path
) -> None:
    config = tiny_federation.config(
        **{**FLAKY, "rounds": 3, "simulation.uplink": 5.0, "simulation.seconds_per_step": 1}
    )
    kept = ("kind", "round", "missing", "faults", "virtual_seconds", "virtual", "bytes_up", "bytes_down")
    found, digests = {}, {}
    for engine in ("inprocess", "workers", "flower"):
        execution = Execution(engine, workers=2 if engine == "workers" else 0, threads=1)  # type: ignore[arg-type]
        run = runs.simulate(config, tmp_path / engine, execution=execution)
        lines = [json.loads(line) for line in (tmp_path / engine / "metrics.jsonl").read_text().splitlines()]
        found[engine] = (
            {name: site["missed"] for name, site in run["sites"].items()},
            run["virtual"],
            [{key: line[key] for key in kept} | {"sites": sorted(line["sites"])} for line in lines],
        )
        digests[engine] = run["digest"]
    assert digests["workers"] == digests["inprocess"]
    assert found["workers"] == found["inprocess"]
    assert found["flower"] == found["inprocess"]
