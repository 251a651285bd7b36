"""`fedgraft embed` and `fedgraft route`: what an adapter takes with it, and adapters kept side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ...core.errors import UserError


def embed(
    configuration: Annotated[Path, typer.Argument(help="The run's configuration.", show_default=False)],
    adapter: Annotated[Path, typer.Argument(help="The adapter's PEFT folder, or run directory.", show_default=False)],
    site_folder: Annotated[Path, typer.Option(help="The site's folder: policy, ledgers.", show_default=False)],
    site: Annotated[str, typer.Option(help="The site's name in that run (default: the first).")] = "",
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, such as privacy.epsilon=9.")
    ] = None,
    texts: Annotated[int, typer.Option(help="Units sampled on average (0: all, which is the most accurate).")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Give an adapter the mean embedding of the site's texts, under differential privacy, for rule adaptersoup.

    Run it at the site. The mean is noised so that it and all that the ledger holds stay within privacy.epsilon and the
    site's policy; without privacy.enabled it is exact, which a policy that requires privacy refuses.
    """
    from ...core.config import load_config
    from ...methods.peftfolder import locate
    from ...privacy.auditlog import AuditLog
    from ...privacy.ledger import Ledger
    from ..data import load_site
    from ..job import own_version
    from ..policy import load_policy
    from ..resident import resident
    from . import embeddings
    from .scoring import encode

    place = locate(adapter)
    config = load_config(configuration, assignments or [])
    site = site or config.site_names[0]
    if site not in config.site_names:
        raise UserError(f"{configuration}: has no site `{site}`; there are {', '.join(config.site_names)}")
    policy = load_policy(site_folder / "policy.toml")
    dataset = policy.dataset_of(config, site)
    own = own_version(config, site)
    model = resident(own)
    policy.admit(own, model.base.fingerprint, dataset)
    data = load_site(own, site, str(policy.data_path(dataset)))
    by_patient = own.privacy.enabled and own.privacy.unit == "patient"
    if by_patient and data.train.patients is None:
        raise UserError(f"site {site}: the privacy unit is the patient, but its records name none")
    policy.require_units(len(data.train), len(set(data.train.patients or ())), dataset)
    vectors = embeddings.embed(model, encode(model, data.train), own)
    log = AuditLog(site_folder)
    if own.privacy.enabled:
        groups, _ = data.train.units(by_patient=by_patient)
        ledger = Ledger(site_folder / "ledgers", data.fingerprint, dataset=dataset.name, unit=own.privacy.unit)
        # Under no split: whoever is at the site pays, whichever part a run of the future deals them to.
        profile = embeddings.private_profile(
            vectors, groups, own, model.base.fingerprint, ledger, limits=tuple(policy.limits(dataset)), texts=texts
        )
    else:
        profile = embeddings.plain_profile(vectors, model.base.fingerprint, texts or embeddings.TEXTS, own.seed)
    log.write("released", site=site, kind="embedding", epsilon=profile.epsilon, delta=profile.delta)
    path = profile.save(place)
    if as_json:
        values = {"path": str(path), "units": profile.units, "noise": profile.noise}
        print(json.dumps({**values, "epsilon": profile.epsilon, "delta": profile.delta}))
        return
    promise = (
        f"epsilon {profile.epsilon:.3g} at delta {profile.delta:g} with all that was spent before"
        if own.privacy.enabled
        else "NOT private"
    )
    Console(soft_wrap=True, highlight=False).print(f"{path}: of {profile.units} units, {promise}", markup=False)


def route(
    folders: Annotated[
        list[Path], typer.Argument(help="PEFT adapter folders, or run directories.", show_default=False)
    ],
    output: Annotated[Path, typer.Option(help="The folder for all of them.", show_default=False)],
    most: Annotated[int, typer.Option(min=1, help="Adapters that a token goes to in each layer.")] = 3,
    temperature: Annotated[float, typer.Option(help="Of the softmax over their responses.")] = 1.0,
) -> None:
    """Keep adapters side by side, each token routed to those that respond to it most (Arrow).

    Load it with fedgraft.methods.arrow.load_set(base, folder): no single PEFT folder can hold it.
    """
    from ...methods.arrow import write_set
    from ...methods.experts import require_experts
    from ...methods.peftfolder import read_folder

    if temperature <= 0:
        raise UserError(f"--temperature {temperature:g}: must be positive")
    read = [read_folder(folder) for folder in folders]
    require_experts([held.state for held in read])
    names = [held.path.parent.name if held.path.name == "adapter" else held.path.name for held in read]
    if len(set(names)) != len(names):
        raise UserError(f"two adapters are called {next(n for n in names if names.count(n) > 1)}; rename a folder")
    place = write_set(
        output, dict(zip(names, (held.path for held in read), strict=True)), most=most, temperature=temperature
    )
    Console(soft_wrap=True, highlight=False).print(f"{place}: {len(read)} adapters, each token to {most}", markup=False)
