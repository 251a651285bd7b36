"""A tally against the same sums made of all lines at once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from fedgraft.core.wire import FAULTS
from fedgraft.server.tally import Tally

SITES = [f"s{number}" for number in range(7)]


def made_up(seed: int, private: bool) -> list[dict[str, Any]]:
    """Lines as a run writes them: two a round, with sites that rest, are missing, or release no counts."""
    rng = np.random.default_rng(seed)
    lines: list[dict[str, Any]] = []
    steps = dict.fromkeys(SITES, 0)
    for number in range(8):
        for kind in ("train", "evaluate") if number else ("evaluate",):
            line: dict[str, Any] = {"kind": kind, "round": number, "seconds": 1.0, "bytes_up": int(rng.integers(9))}
            line |= {"bytes_down": 1, "missing": {}, "faults": {}, "sites": {}, "resting": [], "late": []}
            for name in SITES:
                fate = rng.random()
                if fate < 0.15:
                    line["resting"].append(name)
                elif fate < 0.35:
                    line["missing"][name] = "why"
                    line["faults"][name] = str(rng.choice(FAULTS))
                else:
                    told: dict[str, Any] = {"records": int(rng.integers(1, 50)), "steps": 3}
                    if kind == "evaluate":
                        told = {"examples": 10, "correct": int(rng.integers(11))} if rng.random() < 0.8 else {}
                    if private:
                        steps[name] += int(rng.integers(0, 4))
                        told["privacy"] = {"steps": steps[name], "epsilon": steps[name] / 7, "delta": 1e-5, "unit": "x"}
                    line["sites"][name] = told
                if kind == "train" and rng.random() < 0.2:
                    late: dict[str, Any] = {"site": name, "round": number - 1, "age": int(rng.integers(1, 4))}
                    late["why"] = str(rng.choice(["", "too old"]))
                    if private and not late["why"]:
                        steps[name] += 1
                        late["privacy"] = {"steps": steps[name], "epsilon": steps[name] / 7, "delta": 1e-5, "unit": "x"}
                    line["late"].append(late)
            lines.append(line)
    return lines


def naive(name: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
    answered = [line["sites"][name] for line in lines if line["kind"] == "train" and name in line["sites"]]
    scored = [line["sites"][name] for line in lines if line["kind"] == "evaluate" and name in line["sites"]]
    missed = [line["faults"].get(name) for line in lines if line["kind"] == "train"]
    accuracies = [told["correct"] / told["examples"] if told.get("examples") else None for told in scored]
    late = [entry for line in lines for entry in line["late"] if entry["site"] == name and not entry["why"]]
    spent = []
    for line in lines:
        told = [line["sites"].get(name, {}), *(entry for entry in line["late"] if entry["site"] == name)]
        spent += [each["privacy"] for each in told if "privacy" in each]
    # The last of those that count the most.
    privacy = max(reversed(spent), key=lambda told: (told["steps"], told["epsilon"]), default=None)
    return {
        "records": answered[-1]["records"] if answered else 0,
        "units": 0,
        "held_out": 0,
        "accuracy_before": accuracies[0] if accuracies else None,
        "accuracy": accuracies[-1] if accuracies else None,
        "epsilon": privacy["epsilon"] if privacy else None,
        "delta": privacy["delta"] if privacy else None,
        "unit": privacy["unit"] if privacy else None,
        "rounds": len(answered),
        "missed": {fault: missed.count(fault) for fault in FAULTS},
        "late": {str(age): count for age, count in sorted(Counter(entry["age"] for entry in late).items())},
        "privacy": privacy,
    }


def silent(lines: list[dict[str, Any]]) -> list[str]:
    found = []
    for name in SITES:
        last = False
        for line in lines:
            if name in line["sites"]:
                last = False
            elif line["kind"] == "train" and line["faults"].get(name, "absent") != "absent":
                last = True
        found += [name] if last else []
    return found


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_the_sums_are_those_of_all_lines_at_once_after_every_line(seed: int, private: bool) -> None:
    lines, tally = made_up(seed, private), Tally()
    for count, line in enumerate(lines, 1):
        tally.add(line)
        so_far = lines[:count]
        trainings = [line for line in so_far if line["kind"] == "train"]
        assert {name: tally.site(name, {}) for name in SITES} == {name: naive(name, so_far) for name in SITES}
        assert tally.silent() == silent(so_far)
        late = [entry for line in trainings for entry in line["late"] if not entry["why"]]
        assert tally.updates == sum(len(line["sites"]) for line in trainings) + len(late)
        asked = {name: sum(name not in line["resting"] for line in trainings) for name in SITES}
        assert {name: tally.asked(name) for name in SITES} == asked
        assert [line["round"] for line in tally.of_kind("train")] == [line["round"] for line in trainings]
    again = Tally(lines)
    assert {name: again.site(name, {}) for name in SITES} == {name: tally.site(name, {}) for name in SITES}


def test_a_line_is_kept_without_its_sites() -> None:
    (line, *_), tally = made_up(0, True), Tally()
    tally.add(line)
    assert tally.lines == [{key: line[key] for key in ("kind", "round", "seconds", "bytes_up", "bytes_down")}]


def test_what_a_site_says_on_joining_counts_where_it_is_more() -> None:
    tally = Tally()
    statements = [{"steps": steps, "epsilon": steps / 2, "delta": 1e-5, "unit": "record"} for steps in (4, 2, 6)]
    told = []
    for statement in statements:
        tally.promised("s0", statement)
        told.append(tally.site("s0", {"records": 9.0, "units": 8.0, "held_out": 7.0}))
    assert [site["epsilon"] for site in told] == [2.0, 2.0, 3.0]
    assert (told[0]["records"], told[0]["units"], told[0]["held_out"]) == (9, 8, 7)
