"""What a federation is compared with: no training, every site alone, all records in one place, all weights trained.

A baseline is a configuration like any other, so that trainer, privacy plan, ledger and run directory are the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from ..client.data import Records, SiteData
from ..core.config import FATES, RunConfig, parse_config

BASELINES = ("none", "local", "central", "full")
#: The one site of the baselines that have all records together.
POOLED = "pooled"

#: Sections and keys that mean nothing to a baseline, beside those that :func:`applied` works out.
_IGNORED = {
    "none": (
        "strategy",
        "strategy_options",
        "central",
        "secure_sum",
        "server",
        "simulation",
        "train",
        "rounds",
        "tensor_policy",
    ),
    "local": ("strategy", "strategy_options", "central", "secure_sum", "server", "simulation"),
    "central": ("strategy", "strategy_options", "central", "secure_sum", "server", "simulation"),
    "full": (
        "strategy",
        "strategy_options",
        "central",
        "secure_sum",
        "server",
        "simulation",
        "method",
        "start_from",
        "tensor_policy",
    ),
}
#: Of the server's section: what concerns the machine and not the mathematics.
_KEPT = ("round_timeout", "join_timeout", "keep_checkpoints")


def matters(baseline: str, key: str) -> bool:
    """Whether the dotted ``key`` of a configuration changes what ``baseline`` does."""
    return not any(key == ignored or key.startswith(f"{ignored}.") for ignored in _IGNORED[baseline])


def applied(config: RunConfig) -> RunConfig:
    """``config`` as its `simulation.baseline` has it run; itself where it names none.

    - ``none``: the start is evaluated, nothing trains.
    - ``local``: every tensor stays at its site, which trains, spends and evaluates as it would in the federation.
    - ``central``: one site holds the training records of all, and the held-out ones; it takes as many steps as a site
      of the federation with a batch as large as those of all sites that train in a round, so that it sees as many
      records, and keeps the same promise to each of the pooled units.
    - ``full``: ``central``, with every weight of the base model trained in place of an adapter.

    Strategy, server optimiser, compression, central privacy, ranks by site, faults and attackers are a federation's and
    fall away. Raises :class:`UserError` for what cannot be.
    """
    baseline = config.simulation.baseline
    if not baseline or config.simulation.pooled:
        return config
    values = config.model_dump(mode="json")
    sites = [_plain(site) for site in values["data"]["sites"]]
    at_work = config.server.sites_per_round or len(sites)
    for key in ("strategy", "strategy_options", "central", "secure_sum"):
        del values[key]
    values["server"] = {key: values["server"][key] for key in _KEPT}
    values["simulation"] = {"baseline": baseline}
    values["data"]["sites"] = sites
    policies = values["tensor_policy"]
    if baseline == "none":
        values["rounds"] = 0
        values["tensor_policy"] = {}
        values["train"] = {key: values["train"][key] for key in ("precision", "device")}
        if config.evaluation_release != "noised":
            values["privacy"] = {"enabled": False}
            values["evaluate"]["release"] = config.evaluation_release
            values["evaluate"]["epsilon"] = 0
    elif baseline == "local":
        values["tensor_policy"] = {**_frozen(policies, "local"), "*": "local"}
    else:
        for site in sites:
            site.pop("local_steps", None)
        values["simulation"]["pooled"] = sites
        values["data"]["sites"] = [{"name": POOLED}]
        values["train"]["batch_size"] *= at_work
        values["privacy"]["max_batch"] *= at_work
        values["tensor_policy"] = _frozen(policies, "share")
    if baseline == "full":
        values["method"] = {"name": "full"}
        values["tensor_policy"], values["start_from"] = {}, ""
    return parse_config(values, f"simulation.baseline {baseline}")


def _plain(site: dict[str, Any]) -> dict[str, Any]:
    """The entry of a site without what makes it another than the rest in a federation."""
    return {key: value for key, value in site.items() if key not in ("rank", "memory", "attack", *FATES)}


def _frozen(policies: dict[str, str], otherwise: str) -> dict[str, str]:
    return {pattern: policy if policy == "freeze" else otherwise for pattern, policy in policies.items()}


def pool(sites: Iterable[SiteData]) -> SiteData:
    """The records of all ``sites`` at one, held out where they were.

    A patient key counts within its site: under one key two sites may know two people, on different sides.
    """
    parts = list(sites)
    train = _together([(part.site, part.train) for part in parts])
    held_out = _together([(part.site, part.held_out) for part in parts])
    rules = sorted({part.split for part in parts})
    return SiteData(POOLED, train, held_out, f"{'; '.join(rules)}, of {len(parts)} sites")


def _together(parts: list[tuple[str, Records]]) -> Records:
    labels = [records.labels for _, records in parts if records.labels is not None]
    patients = [
        f"{site}/{patient}" for site, records in parts if records.patients is not None for patient in records.patients
    ]
    inputs = [each for _, records in parts for each in records.inputs]
    return Records(
        inputs,
        np.concatenate(labels) if len(labels) == len(parts) else None,
        patients if len(patients) == len(inputs) else None,
    )
