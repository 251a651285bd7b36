"""The audit of one site of a configuration: its data or canaries, the four layers, the self-test, the report."""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ... import __version__
from ...client.audit import Audit, Subject
from ...client.audit.canaries import canary_config, synthetic_records
from ...client.audit.layers import LAYERS
from ...client.audit.selftest import applicable, self_test
from ...client.audit.subject import subject
from ...client.data import SiteData
from ...client.job import own_version
from ...core.config import RunConfig, config_from_json
from ...core.errors import UserError
from ...privacy.audit.signature import Signer
from ...privacy.ledger import Ledger
from ...server.files import cannot_write, write_text
from ...server.rundir import now, read_run
from ..scenario import complete, load_scenario, site_data
from .page import render

SCHEMA = 1
_PACKAGES = ("torch", "transformers", "peft", "opacus", "dp-accounting", "numpy", "scipy", "cryptography")
#: A site of canaries is this many times its expected batch, so that it samples.
_CANARY_BATCHES = 4

#: Told before each part of the audit: what begins, and how many parts there are in all.
Watch = Callable[[str, int], None]


@dataclass(frozen=True)
class Target:
    """What to audit. ``run``: the run directory it comes from, or None; ``data``: None for canaries."""

    config: RunConfig
    site: str
    data: SiteData | None
    ledgers: Path | None = None


def target(
    name: str, overrides: list[str], *, site: str = "", canaries: int = 0, ledgers: Path | None = None
) -> Target:
    """The site ``site`` (the first where none is named) of a configuration, a scenario or a run directory ``name``.

    ``canaries``: so many made-up privacy units in place of the site's data. Raises :class:`UserError` in one line.
    """
    folder = Path(name)
    if (folder / "run.json").is_file():
        if overrides:
            raise UserError("--set changes a configuration; a run is audited as it was")
        config = complete(config_from_json(json.dumps(read_run(folder)["config"]), f"{folder}/run.json"))
    else:
        folder, config = Path(), load_scenario(name, overrides)
    site = site or config.site_names[0]
    if site not in config.site_names:
        raise UserError(f"--site {site}: there are {', '.join(config.site_names)}")
    if ledgers is None and (folder / "sites" / site / "ledgers").is_dir():
        ledgers = folder / "sites" / site / "ledgers"
    if ledgers is not None and not ledgers.is_dir():
        raise UserError(f"--ledger {ledgers}: no such folder")
    return Target(config, site, None if canaries else site_data(config)[site], ledgers)


def own_canaries(folder: Path) -> Target:
    """A small model and plan made up in ``folder``, for a self-test without a configuration."""
    config = canary_config(folder)
    return Target(config, config.site_names[0], None)


def audit(
    target: Target,
    *,
    canaries: int = 0,
    units: int = 256,
    steps: int = 6,
    test_itself: bool = False,
    watch: Watch = lambda part, parts: None,
) -> dict[str, Any]:
    """The report on ``target``, not signed yet (docs/audit.md says what its keys mean).

    ``units``: privacy units of the excerpt; ``steps``: noisy steps in each watched training; ``test_itself``: also put
    every known fault into the same path.
    """
    began = time.monotonic()
    config, site, data = own_version(target.config, target.site), target.site, target.data
    if data is None:
        records = synthetic_records(config, max(canaries, units, _CANARY_BATCHES * config.train.batch_size))
    else:
        records = data.train
    watch("reading the plan", len(LAYERS) + 1)
    one = subject(config, site, records, units=units)
    parts = len(LAYERS) + 1 + (len(applicable(one)) if test_itself else 0)
    verdicts = Audit(one, steps=steps, canaries=units).run(watch=lambda layer: watch(layer, parts))
    tested = None
    if test_itself:
        found = self_test(one, steps=steps, canaries=units, watch=lambda fault: watch(f"known bug: {fault}", parts))
        tested = [caught.to_dict() for caught in found]
    good = all(verdict.good for verdict in verdicts) and all(caught["by"] for caught in tested or [])
    return {
        "schema": SCHEMA,
        "kind": "fedgraft audit",
        "fedgraft": __version__,
        "time": now(),
        "seconds": round(time.monotonic() - began, 1),
        "good": good,
        "site": site,
        "name": config.name,
        "claim": _claim(one),
        "plan": _plan(one),
        "data": _data(one, data),
        "model": {
            "name": config.model if data is not None or config.name != "canary" else "a small model of random weights",
            "fingerprint": one.resident.base.fingerprint,
            "parameters": one.resident.base.parameters,
            "trained": one.reference.size,
            "tensors": len(one.reference.tensors),
        },
        "method": config.method.name,
        "strategy": config.strategy,
        "engine": config.privacy.engine,
        "config_digest": config.digest(),
        "ledger": _ledger(target, one),
        "layers": [verdict.to_dict() for verdict in verdicts],
        "self_test": tested,
        "catches": [fault.text for fault in applicable(one)],
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
    }


def self_test_alone(**options: Any) -> dict[str, Any]:
    """The audit of the built-in canaries, with the self-test."""
    with tempfile.TemporaryDirectory() as folder:
        return audit(own_canaries(Path(folder)), test_itself=True, **options)


def write(report: dict[str, Any], folder: Path, signer: Signer) -> tuple[Path, Path]:
    """Write ``audit.json`` and ``audit.html``, both signed, into ``folder``. Returns their paths."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from None
    told, page = folder / "audit.json", folder / "audit.html"
    write_text(told, signer.signed_report(report))
    write_text(page, signer.signed_page(render(report, signer.sign_report(report))))
    return told, page


def _claim(one: Subject) -> dict[str, Any]:
    plan = one.plan
    return {
        "epsilon": plan.final_epsilon,
        "delta": plan.delta,
        "budget": plan.epsilon,
        "unit": plan.unit,
        "neighbours": plan.neighbours,
        "accountant": plan.accountant,
        "private_noise": not plan.seeded_noise_not_private,
    }


def _plan(one: Subject) -> dict[str, Any]:
    plan = one.plan
    return {
        "units": plan.units,
        "expected_batch": plan.expected_batch,
        "sampler": plan.sampler,
        "sampling_rate": plan.sampling_rate,
        "max_batch": plan.max_batch,
        "bands": plan.bands,
        "steps": plan.steps,
        "clip": plan.clip,
        "clip_quantile": plan.clip_quantile,
        "noise_multiplier": plan.noise_multiplier,
        "records_per_patient": plan.records_per_patient,
        "patient_gradient": plan.patient_gradient,
    }


def _data(one: Subject, data: SiteData | None) -> dict[str, Any]:
    return {
        "source": "canaries" if data is None else "site",
        "fingerprint": "" if data is None else data.fingerprint,
        "records": one.records,
        "units": one.plan.units,
        "excerpt_records": len(one.examples),
        "excerpt_units": len(one.groups),
    }


def _ledger(target: Target, one: Subject) -> dict[str, Any] | None:
    """What the site's ledger says was spent on these data, and its last line's hash."""
    if target.ledgers is None or target.data is None:
        return None
    plan, data = one.plan, target.data
    ledger = Ledger(target.ledgers, data.fingerprint, unit=plan.unit)
    entries = ledger.entries()
    return {
        "path": str(ledger.path),
        "head": ledger.head,
        "entries": len(entries),
        # As if every unit had paid for every entry: an upper bound, whatever parts the units were in.
        "epsilon": ledger.total(plan.delta, "", neighbours=plan.neighbours, accountant=plan.accountant),
        "private_noise": ledger.private_noise(),
    }
