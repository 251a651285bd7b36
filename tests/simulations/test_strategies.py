"""Every strategy through the whole system: server, wire, gate, site and its rule, checkpoint, PEFT folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedgraft.core.adapter import AdapterState
from fedgraft.core.errors import UserError
from fedgraft.strategies import strategies

#: What a strategy needs to be set beside its name.
NEEDS: dict[str, dict[str, Any]] = {
    "fed-sb": {"method": {"name": "lora-sb", "rank": 4, "alpha": 8}},
    "ravan": {"method": {"name": "ravan", "rank": 2, "alpha": 8, "heads": 2}},
    "fltrust": {"strategy_options": {"root": "north"}},
    "krum": {"strategy_options": {"attackers": 0}},
    "multi-krum": {"strategy_options": {"attackers": 0}},
    "bulyan": {"strategy_options": {"attackers": 0}},
    "trimmed-mean": {"strategy_options": {"attackers": 0}},
    "fedbn": {"method": {"name": "ln"}},
    "fedbuff": {"strategy_options": {"buffer": 2}},
}
ALL = sorted(name for name in strategies() if not name.startswith("flwr:"))


def _settings(name: str, federation: Any) -> dict[str, Any]:
    settings = {"strategy": name, "rounds": 2, "train.lr": 0.02, **NEEDS.get(name, {})}
    if strategies()[name].capabilities.needs_validation:
        settings["server.validation"] = str(federation.table)
    return settings


@pytest.mark.parametrize("name", ALL)
def test_a_strategy_runs_from_end_to_end(tiny_federation: Any, tmp_path: Path, name: str) -> None:
    config = tiny_federation.config(**_settings(name, tiny_federation))
    run = tiny_federation.run(config, tmp_path / "run")
    assert run["status"] == "finished" and run["rounds"] == 2
    assert run["loss"]["after"] is not None and np.isfinite(run["loss"]["after"])
    assert run["warnings"] == ["differential privacy was switched off (privacy.enabled = false): nothing is promised"]
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").exists()
    first, last = (
        AdapterState.load(tmp_path / "run" / "checkpoints" / f"round-{number:04d}" / "adapter.safetensors")
        for number in (0, 2)
    )
    moved = [n for n in last if n not in first or first[n].tobytes() != last[n].tobytes()]
    assert moved


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_a_strategy_keeps_the_promise_of_privacy_or_refuses(tiny_federation: Any, tmp_path: Path, name: str) -> None:
    settings = _settings(name, tiny_federation)
    config = tiny_federation.private(**settings)
    try:
        run = tiny_federation.run(config, tmp_path / "run")
    except UserError as error:
        assert strategies()[name].capabilities.needs_loss or "second adapter" in str(error), str(error)
        return
    assert run["status"] == "finished"
    trained = [site for site in run["sites"].values() if site["rounds"]]
    assert len(trained) >= 2
    for site in trained:
        assert 0 < site["epsilon"] <= config.privacy.epsilon * (1 + 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_a_strategy_goes_on_after_a_stop_as_if_nothing_had_been(
    tiny_federation: Any, tmp_path: Path, name: str
) -> None:
    settings = _settings(name, tiny_federation) | {"rounds": 3}
    whole = tiny_federation.run(tiny_federation.config(**settings), tmp_path / "whole")
    short = tiny_federation.config(**{**settings, "rounds": 2})
    tiny_federation.run(short, tmp_path / "parts")
    again = tiny_federation.resume(short, tmp_path / "parts", rounds=3)
    assert again["digest"] == whole["digest"]


@pytest.mark.parametrize("form", ["int8", "topk"])
@pytest.mark.parametrize("coding", [False, True])
def test_a_lossy_upload_learns_nearly_the_same_with_fewer_bytes(
    tiny_federation: Any, tmp_path: Path, form: str, coding: bool
) -> None:
    plain = tiny_federation.run(tiny_federation.config(rounds=2), tmp_path / "plain")
    changes = {"server.upload": form, "server.top_fraction": 0.1, "server.entropy_coding": coding}
    lossy = tiny_federation.run(tiny_federation.config(rounds=2, **changes), tmp_path / "lossy")
    assert lossy["bytes_up"] < (0.75 if form == "int8" else 0.7) * plain["bytes_up"]
    assert lossy["loss"]["after"] == pytest.approx(plain["loss"]["after"], rel=0.2)
    assert lossy["digest"] != plain["digest"]


def test_lossless_coding_changes_nothing_but_bytes(tiny_federation: Any, tmp_path: Path) -> None:
    plain = tiny_federation.run(tiny_federation.config(rounds=1), tmp_path / "plain")
    coded = tiny_federation.run(tiny_federation.config(rounds=1, **{"server.entropy_coding": True}), tmp_path / "coded")
    assert coded["digest"] == plain["digest"]
    assert coded["bytes_up"] < plain["bytes_up"] and coded["bytes_down"] < plain["bytes_down"]


def test_sites_of_different_rank_and_steps_train_together(tiny_federation: Any, tmp_path: Path) -> None:
    sites = [
        {"name": "east", "rank": 2, "local_steps": 5},
        {"name": "north", "memory": 16.0},
        {"name": "south", "memory": 4.0},
    ]
    config = tiny_federation.config(strategy="flexlora", rounds=2, **{"data.sites": sites, "train.lr": 0.02})
    run = tiny_federation.run(config, tmp_path / "run")
    trained = run["sites"]
    assert run["status"] == "finished" and {name: site["rounds"] for name, site in trained.items()} == {
        "east": 2,
        "north": 2,
        "south": 2,
    }


def test_a_site_rank_that_the_strategy_cannot_mix_is_refused(tiny_federation: Any, tmp_path: Path) -> None:
    sites = [{"name": "east", "rank": 2}, {"name": "north"}, {"name": "south"}]
    with pytest.raises(UserError, match="strategy `fedit` cannot mix ranks"):
        tiny_federation.run(tiny_federation.config(**{"data.sites": sites}), tmp_path / "run")


@pytest.mark.parametrize("name", ["rolora", "la-lora"])
def test_correlated_noise_is_refused_where_tensors_rest(tiny_federation: Any, tmp_path: Path, name: str) -> None:
    settings = {"privacy.sampler": "cyclic", "privacy.bands": 2, "privacy.epsilon": 50.0, "strategy": name}
    with pytest.raises(UserError, match="lets tensors rest in some rounds or steps"):
        tiny_federation.run(tiny_federation.private(**settings), tmp_path / "run")


def test_a_site_refuses_what_is_not_private_whatever_the_server_says(
    tiny_federation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that does not check is answered by sites that do, and nothing is spent."""
    monkeypatch.setattr("fedgraft.strategies.compose.refusal", lambda config, can: None)
    config = tiny_federation.private(strategy="ifca", rounds=1)
    with pytest.raises(UserError, match="choose by its training loss, which is not private"):
        tiny_federation.run(config, tmp_path / "run")
