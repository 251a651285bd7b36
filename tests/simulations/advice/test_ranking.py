"""Which method to take: what is counted, what is out of the question, and the order."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from typer.testing import CliRunner

from fedgraft.methods import Method, create_method
from fedgraft.privacy.accounting import Event, epsilon
from fedgraft.server.traffic import Skeleton, skeleton
from fedgraft.simulations.advice import ranking
from fedgraft.simulations.advice.commands import app
from fedgraft.simulations.advice.ranking import Federation, advise

MEASURED = {
    "what": "a test",
    "federation": {"sites": 4, "epsilon": 8.0, "uplink": 20.0, "memory": 8.0},
    "methods": {
        "lora": {"none": 0.6, "epsilon 8": 0.4, "trainable": 40000},
        "bitfit": {"none": 0.5, "epsilon 8": 0.45, "trainable": 10000},
    },
}


@pytest.fixture
def on() -> Skeleton:
    return skeleton("")


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "measured", lambda: MEASURED)


def known(*names: str) -> list[Method]:
    return [create_method(name) for name in names]


def test_the_noise_is_what_the_budget_takes() -> None:
    federation = Federation(sites=4, epsilon=2.0, uplink=20, memory=8, units=1000, batch=125, steps=40)
    assert epsilon((Event(federation.noise, 0.125, 40),), 1e-4) <= 2.0
    assert epsilon((Event(federation.noise - 0.02, 0.125, 40),), 1e-4) > 2.0
    want = federation.noise * math.sqrt(900) / 125 / 2
    assert federation.noise_to_signal(900) == pytest.approx(want, rel=1e-12)
    assert Federation(sites=4, epsilon=0.0, uplink=20, memory=8).noise == 0


def test_without_privacy_the_order_is_what_was_measured(on: Skeleton) -> None:
    found = advise(known("bitfit", "ln", "lora"), on, Federation(4, 0.0, 20, 8))
    assert [advice.method for advice in found] == ["lora", "bitfit", "ln"]
    assert [advice.expected for advice in found] == [0.6, 0.5, None]
    assert "not measured" in found[2].reasons and "averages exactly" in found[1].reasons


def test_a_smaller_budget_favours_the_method_that_noise_hurts_less(on: Skeleton) -> None:
    found = advise(known("lora", "bitfit"), on, Federation(4, 1.0, 20, 8))
    assert found[0].method == "bitfit"
    lora = found[1]
    then = Federation(**MEASURED["federation"]).noise_to_signal(40000)  # type: ignore[arg-type]
    assert lora.expected == pytest.approx(max(0.0, 0.6 - 0.2 * lora.noise / then))


@pytest.mark.parametrize(
    ("method", "federation", "why"),
    [
        ("full", Federation(4, 0.0, 1.0, 64), "a round's upload takes"),
        ("full", Federation(4, 0.0, 1e4, 2), "GiB at a site"),
        ("fish", Federation(4, 0.0, 20, 8), "set method.mask"),
    ],
)
def test_what_is_out_of_the_question_comes_last_with_its_reason(
    method: str, federation: Federation, why: str, on: Skeleton
) -> None:
    found = advise(known(method, "bitfit"), on, federation)
    assert [advice.method for advice in found] == ["bitfit", method]
    assert why in found[1].against and not found[0].against


def test_the_upload_is_what_the_uplink_makes_of_the_bytes(on: Skeleton) -> None:
    (found,) = advise(known("lora"), on, Federation(4, 0.0, 10.0, 8))
    numbers = 294_912 + 2 * 768 + 2
    assert found.count.shared == 4 * numbers
    assert found.seconds_up == pytest.approx(numbers * 32 / 10e6)


def test_the_command_prints_a_table_and_json(tiny_model: Any) -> None:
    arguments = ["advise", "--model", tiny_model("bert"), "--epsilon", "4"]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["federation"]["epsilon"] == 4 and found["noise"] > 0
    assert found["methods"][0]["method"] in ("bitfit", "lora")
    table = CliRunner().invoke(app, arguments, env={"COLUMNS": "100"}).stdout
    assert "accuracy on a test, by the noise here" in table and "--all" in table
