"""`fedgraft policy`: write a site's policy, and see what it lets a job do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .. import __version__
from ..core.config import load_config
from ..core.errors import UserError
from .installed import installed_digest
from .policy import TEMPLATE, Policy, PolicyError, load_policy

app = typer.Typer(help="Write and check the policy of a site.", no_args_is_help=True)


@app.command()
def template() -> None:
    """Print a policy to fill in: fedgraft policy template > policy.toml"""
    print(TEMPLATE, end="")


@app.command()
def code() -> None:
    """Print what is installed, as the lines of a policy's [code] that pin it."""
    print(f'version = "{__version__}"\nsha256 = "{installed_digest()}"')


@app.command()
def check(
    path: Annotated[Path, typer.Argument(help="The site's policy.toml.", show_default=False)],
    job: Annotated[Path | None, typer.Option(help="A run's configuration: would this site take part?")] = None,
    site: Annotated[str, typer.Option(help="The site's name in that run (default: the first).")] = "",
) -> None:
    """Check that a policy is whole and valid, and what it says to a job.

    With --job the base model is loaded from where the job says, for its fingerprint and the names of the tensors; the
    data are not read, so min_units and what is left of the budget are not looked at.
    """
    policy = load_policy(path)
    console = Console(soft_wrap=True, highlight=False)
    if job is None:
        for line in _summary(policy):
            console.print(line, markup=False)
        return
    objections = _objections(policy, job, site)
    for objection in objections:
        console.print(f"{policy.file}:{objection.rule.line}: {objection}", markup=False)
    if objections:
        raise UserError(f"{job}: {policy.file} forbids it in {len(objections)} places")
    console.print(f"{job}: {policy.file} lets it train", markup=False)


def _summary(policy: Policy) -> list[str]:
    lines = [f"{policy.file}: valid (SHA-256 {policy.digest[:16]})"]
    for dataset in policy.datasets:
        place = policy.data_path(dataset)
        lines.append(
            f"  {dataset.name}: {place}{'' if place.exists() else ' (NOT THERE)'}; each {dataset.min_unit}, at least "
            f"{dataset.min_units}; epsilon {dataset.max_epsilon:g} in all, {dataset.max_epsilon_per_year:g} a year, at "
            f"delta {dataset.max_delta:g}"
        )
    for name, listed in policy.allow:
        lines.append(f"  {name}: {', '.join(listed) or 'NONE, so every job is refused'}")
    for name, value in policy.metrics:
        lines.append(f"  {name}: {value}")
    for name, value in policy.require:
        lines.append(f"  {name}: {'required' if value else 'NOT required'}")
    lines.append(f"  version: {policy.code.version or 'any'}")
    lines.append(f"  files: {policy.code.sha256 or 'any'}")
    lines.append(f"  bundles with code: {', '.join(policy.code.bundles) or 'none'}")
    return lines


def _objections(policy: Policy, job: Path, site: str) -> list[PolicyError]:
    from .job import own_version, shared_tensors
    from .resident import resident

    config = load_config(job)
    site = site or config.site_names[0]
    if site not in config.site_names:
        raise UserError(f"{job}: has no site `{site}`; there are {', '.join(config.site_names)}")
    found: list[PolicyError] = []
    try:
        dataset = policy.dataset_of(config, site)
        model = resident(own_version(config, site))
        found += policy.objections(config, model.base.fingerprint, dataset)
        policy.require_tensors(shared_tensors(config, model, site))
    except PolicyError as objection:
        found.append(objection)
    return found
