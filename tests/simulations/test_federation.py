"""Every site's data, made when it is asked for: always the same, few at a time, dealt once for a run."""

from __future__ import annotations

from typing import Any

import pytest

from fedgraft.client.data import SiteData
from fedgraft.client.job import own_version
from fedgraft.core.config import config_from_json
from fedgraft.core.errors import UserError
from fedgraft.simulations import federation, scenario
from fedgraft.simulations.federation import Federation
from fedgraft.simulations.scenario import site_data


def test_a_site_is_the_same_whenever_it_is_asked_for(tiny_federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"data.shift": {"kind": "typos", "strength": 0.8}, "data.label_noise": {"kind": "symmetric", "rate": 0.3}}
    config = tiny_federation.config(**changes)
    first = {name: site.fingerprint for name, site in site_data(config).items()}
    monkeypatch.setattr(federation, "_KEEP", 1)
    monkeypatch.setattr(scenario, "_made", [])
    again = site_data(config)
    for name in ("south", "east", "south", "north"):
        assert again[name].fingerprint == first[name]


def test_few_sites_stay_in_memory(tiny_federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    config = tiny_federation.config(**{"data.sites": 12, "data.partition": "iid"})
    plain = site_data(config)

    def dealt(number: int) -> SiteData:
        made.append(number)
        return plain[config.site_names[number]]

    monkeypatch.setattr(federation, "_KEEP", 3)
    sites = Federation(config, dealt)
    assert (list(sites), len(sites)) == (list(config.site_names), 12)
    for name in sites:
        assert sites[name] is sites[name]
    assert made == list(range(12))
    assert len(sites._kept) == 3
    with pytest.raises(KeyError):
        sites["nowhere"]


def test_one_run_is_dealt_once_whatever_its_sites_have_of_their_own(
    tiny_federation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    deals: list[object] = []
    plain = scenario._make
    monkeypatch.setattr(scenario, "_made", [])
    monkeypatch.setattr(scenario, "_make", lambda config: (deals.append(config), plain(config))[1])
    sites = [{"name": "east", "local_steps": 9}, {"name": "north", "rank": 2}, "south"]
    config = tiny_federation.config(**{"data.sites": sites, "strategy": "flexlora"})
    known = site_data(config)
    # As it reaches a site over the wire, and as the site has it for itself.
    received = config_from_json(config.to_json())
    for name in received.site_names:
        assert site_data(own_version(received, name)) is known
    assert len(deals) == 1
    assert site_data(tiny_federation.config(**{"data.sites": sites, "seed": 99})) is not known
    assert site_data(tiny_federation.config(**{"data.sites": sites, "data.test_fraction": 0.3})) is not known


def test_a_site_without_held_out_records_is_named(tiny_federation: Any) -> None:
    config = tiny_federation.config()
    whole = site_data(config)["east"]
    bare = SiteData("east", whole.train, whole.held_out.take([]))
    with pytest.raises(UserError, match=r"^site east has no held-out records"):
        Federation(config, lambda number: bare)["east"]
