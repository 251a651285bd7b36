"""FedBuff: who is done when, from which version each trained, and how much late work counts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, Message

from fedgraft.core.adapter import AdapterState
from fedgraft.core.errors import UserError
from fedgraft.core.update import Update
from fedgraft.server.checkpoints import Checkpoint, load_last, save
from fedgraft.strategies import create_aggregator
from fedgraft.strategies.buffered import FedBuff

SITES = tuple("pqrstu")


def six(play: Any) -> list[Any]:
    return [play.site(name, 20 + k, weight=float(1 + k % 3), steps=2) for k, name in enumerate(SITES)]


def timeline(rule: FedBuff, state: AdapterState, rounds: int, sites: Sequence[str] = SITES) -> list[tuple[str, ...]]:
    """Who is asked in each round, with updates that say nothing."""
    asked = []
    for _ in range(rounds):
        rule.start_round(state)
        asked.append(tuple(rule.asked(sites)))
        for site in asked[-1]:
            rule.add(Update(site, rule.for_site(state, site).only(state.spec.select("share")), 1.0))
        state = rule.result()
    return asked


@pytest.mark.parametrize("buffer", [1, 2, 4])
def test_ten_rounds_are_the_published_sum_over_past_versions(toy: Callable[..., Any], buffer: int) -> None:
    play = toy(create_aggregator("fedbuff", {"buffer": buffer, "max_staleness": 5, "speeds": {"p": 4.0, "u": 0.3}}))
    play.sites = six(play)
    versions = [play.draw(0)]
    given = dict.fromkeys(SITES, 0)
    latest = 0
    for number in range(1, 11):
        x = versions[-1]
        after = play.one(x)
        here = [site for site in play.sites if site.name in {update.site for update in play.sent}]
        assert len(here) >= buffer
        want = {name: array.astype(np.float64) for name, array in x.items()}
        total = sum(site.weight for site in here)
        for site in here:
            late = number - 1 - given[site.name]
            latest = max(latest, late)
            for name in want:
                old = versions[given[site.name]][name]
                y = old
                for step in range(site.steps):
                    y = y - site.lr * site.gradient(name, y, number, step)
                want[name] = want[name] + site.weight / total / math.sqrt(1 + late) * (y - old)
            given[site.name] = number
        for name in want:
            np.testing.assert_allclose(after[name], want[name], rtol=1e-12, atol=1e-13)
        versions.append(after)
    assert latest >= 2, "somebody was late, or nothing was tested"


@pytest.mark.parametrize("buffer", [2, 3])
def test_who_is_asked_is_the_order_in_which_work_is_done(toy: Callable[..., Any], buffer: int) -> None:
    """A clock of its own, event by event: the site that is done first of all goes first."""
    rule = FedBuff(FedBuff.Options(buffer=buffer, max_staleness=1000, speeds={"q": 3.0}))
    got = timeline(rule, toy(rule).draw(0), 12)
    twin = FedBuff(FedBuff.Options(buffer=buffer, max_staleness=1000, speeds={"q": 3.0}))
    done: dict[str, float] = {}
    clock = 0.0
    for version, asked in enumerate(got):
        twin._version = version
        for site in SITES:
            if site not in done:
                done[site] = clock + twin._duration(site)
        finished: list[str] = []
        while len(finished) < buffer:
            first = min((site for site in SITES if site not in finished), key=lambda site: done[site])
            finished.append(first)
            clock = max(clock, done[first])
        assert set(finished) == set(asked)
        for site in finished:
            del done[site]


def test_durations_are_half_normal_over_the_speed() -> None:
    rule = FedBuff(FedBuff.Options(speeds={"fast": 4.0}))
    drawn: dict[str, list[float]] = {"fast": [], "plain": []}
    for version in range(4000):
        rule._version = version
        for site, durations in drawn.items():
            durations.append(rule._duration(site))
    for site, speed in (("fast", 4.0), ("plain", 1.0)):
        # The mean of 4000 draws of |N(0, 1)|, whose deviation is 0.60: five deviations of the mean.
        assert np.mean(drawn[site]) == pytest.approx(math.sqrt(2 / math.pi) / speed, abs=5 * 0.603 / 63 / speed)
        assert min(drawn[site]) >= 0


def test_fast_sites_are_asked_more_often(toy: Callable[..., Any]) -> None:
    rule = FedBuff(FedBuff.Options(buffer=2, max_staleness=50, speeds={"p": 10.0, "u": 0.1}))
    asked = Counter(site for here in timeline(rule, toy(rule).draw(0), 60) for site in here)
    assert asked["p"] > 2 * asked["q"] > 4 * asked["u"] > 0


@pytest.mark.parametrize("most", [0, 1, 3])
def test_nobody_is_later_than_allowed_and_few_versions_are_kept(toy: Callable[..., Any], most: int) -> None:
    rule = FedBuff(FedBuff.Options(buffer=1, max_staleness=most, speeds={"u": 0.001}))
    state = toy(rule).draw(0)
    last = dict.fromkeys(SITES, -1)
    for number in range(20):
        rule.start_round(state)
        assert len(rule._versions) <= most + 1
        for site in rule.asked(SITES):
            assert number - 1 - last[site] <= most
            last[site] = number
            rule.add(Update(site, rule.for_site(state, site), 1.0))
        state = rule.result()
    assert all(number >= 20 - 1 - most for number in last.values()), "no site is left out"


def test_a_buffer_of_all_is_fedit(toy: Callable[..., Any]) -> None:
    rules = [create_aggregator("fedit"), create_aggregator("fedbuff", {"buffer": 6})]
    rules.append(create_aggregator("fedbuff", {"buffer": 1, "max_staleness": 0}))
    ends = []
    for rule in rules:
        play = toy(rule)
        play.sites = six(play)
        ends.append([*play.rounds(play.draw(0), 3)][-1])
    for end in ends[1:]:
        for name in end:
            np.testing.assert_allclose(end[name], ends[0][name], rtol=1e-13, atol=1e-14)


def test_one_site_is_the_identity_to_the_bit(toy: Callable[..., Any]) -> None:
    play = toy(create_aggregator("fedbuff", {"buffer": 1}))
    play.sites = play.sites[:1]
    now = play.draw(0)
    for _ in range(3):
        now = play.one(now)
        assert all(np.allclose(now[name], play.sent[0].state[name], rtol=1e-15, atol=1e-16) for name in now)


def test_for_an_evaluation_everybody_gets_the_newest(toy: Callable[..., Any]) -> None:
    play = toy(create_aggregator("fedbuff", {"buffer": 2}))
    play.sites = six(play)
    now = play.draw(0)
    for _ in range(4):
        assert all(play.rule.for_site(now, site) == now for site in SITES)
        now = play.one(now)
    play.rule.start_round(now)
    older = [site for site in play.rule.asked(SITES) if play.rule.for_site(now, site) != now]
    waiting = [site for site in SITES if play.rule.for_site(now, site) != now]
    assert set(older) <= set(waiting) and waiting, "in a round a site goes on from what it was given"


def test_asking_again_changes_nothing(toy: Callable[..., Any]) -> None:
    rule = create_aggregator("fedbuff", {"buffer": 2})
    state = toy(rule).draw(0)
    rule.start_round(state)
    first = rule.asked(SITES)
    assert rule.asked(SITES) == first
    rule.start_round(state)
    assert rule.asked(SITES) == first, "nor does beginning a round anew"


@pytest.mark.parametrize("stop", [1, 3, 7])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(toy: Callable[..., Any], tmp_path: Path, stop: int) -> None:
    options = {"buffer": 2, "max_staleness": 3, "speeds": {"p": 3.0}}
    whole, broken = (toy(create_aggregator("fedbuff", options)) for _ in range(2))
    whole.sites = broken.sites = six(whole)
    *_, want = whole.rounds(whole.draw(0), 9)
    *_, now = broken.rounds(broken.draw(0), stop)
    save(tmp_path, Checkpoint(stop, now, broken.rule.memory()), "digest", keep=1)
    held = load_last(tmp_path)
    broken.rule = create_aggregator("fedbuff", options)
    broken.rule.recall(held.memory)
    *_, got = broken.rounds(held.state, 9 - stop)
    assert got == want


def test_speeds_of_unknown_sites_and_impossible_ones_are_refused(toy: Callable[..., Any]) -> None:
    rule = create_aggregator("fedbuff", {"speeds": {"nowhere": 2.0}})
    rule.start_round(toy(rule).draw(0))
    with pytest.raises(UserError, match=r"strategy_options\.speeds: there is no site nowhere; there are p, q"):
        rule.asked(SITES)
    for speed in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(UserError, match=r"strategy_options\.speeds: .*the speed of p is"):
            create_aggregator("fedbuff", {"speeds": {"p": speed}})


def test_a_foreign_memory_is_refused(toy: Callable[..., Any]) -> None:
    rule = create_aggregator("fedbuff")
    with pytest.raises(UserError, match="memory of fedbuff is not one"):
        rule.recall({"clock": toy(rule).draw(0)})


@pytest.mark.slow
def test_a_whole_run_asks_its_buffer_and_goes_on_after_a_stop(tiny_federation: Any, tmp_path: Path) -> None:
    settings = {"strategy": "fedbuff", "strategy_options": {"buffer": 2}}
    whole = tiny_federation.run(tiny_federation.config(rounds=5, **settings), tmp_path / "whole")
    assert whole["status"] == "finished"
    assert sum(site["rounds"] for site in whole["sites"].values()) == 10
    tiny_federation.run(tiny_federation.config(rounds=2, **settings), tmp_path / "parts")
    config = tiny_federation.config(rounds=5, **settings)
    again = tiny_federation.resume(config, tmp_path / "parts", rounds=5)
    assert again["digest"] == whole["digest"]


def test_a_site_of_the_buffer_that_does_not_answer_is_below_the_quorum(tiny_federation: Any, tmp_path: Path) -> None:
    """The quorum is of the sites that were asked: all of them, unless server.quorum says fewer."""
    config = tiny_federation.config(rounds=2, strategy="fedbuff", strategy_options={"buffer": 2})
    whole = tiny_federation.run(config, tmp_path / "whole")
    assert whole["status"] == "finished"
    asked = next(site for site, told in sorted(whole["sites"].items()) if told["rounds"])

    def silent(site: str, message: Any, answer: Callable[[], Any]) -> Any:
        if site == asked and message.metadata.message_type == "train":
            return Message(Error(code=0, reason="gone"), reply_to=message)
        return answer()

    with pytest.raises(UserError, match="sites answered, the quorum is"):
        tiny_federation.run(config, tmp_path / "silent", silent)
