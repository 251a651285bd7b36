"""`fedgraft site`: what a site does with its kit."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ...core.errors import UserError
from ...core.watching.logs import LogFormat, speaker
from ...core.watching.options import LogForm, MetricsAddress, MetricsPort
from ...core.watching.prometheus import ADDRESS, endpoint

if TYPE_CHECKING:
    from prometheus_client import Metric

app = typer.Typer(help="Take part in a federation, from the folder of the site's kit.", no_args_is_help=True)
_Kit = Annotated[Path, typer.Option("--kit", help="The folder of the site's kit.")]
_HERE = Path()


@app.command()
def init(
    kit: _Kit = _HERE,
    new_key: Annotated[bool, typer.Option("--new-key", help="Make a second key to replace the first.")] = False,
) -> None:
    """Make the site's private key, which stays here, and the request that the coordinator signs."""
    from ...deployment import certificates
    from .keys import make_key

    opened, fingerprint = make_key(kit, new_key=new_key)
    anchor = certificates.key_fingerprint(certificates.public_of(opened.authority))
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(f"site {opened.name} of {opened.settings.federation}")
    console.print(f"  send to the coordinator: {opened.folder / 'site.csr'}")
    console.print(f"  read to the coordinator: {fingerprint}")
    console.print(f"  have the coordinator read the authority's to you: {anchor}")
    console.print(f"  then fill in {opened.policy}")


@app.command()
def start(
    kit: _Kit = _HERE,
    metrics_port: MetricsPort = 0,
    metrics_address: MetricsAddress = ADDRESS,
    log_format: LogForm = LogFormat.text,
) -> None:
    """Take part until Ctrl-C."""
    from ...deployment.kits import SiteKit
    from ..watching.snapshot import SiteReader
    from .supernode import start as take_part

    opened = SiteKit.open(kit)
    reader = SiteReader(opened)

    def collect() -> Iterable[Metric]:
        from ..watching.prometheus import site_metrics

        return site_metrics(reader.look())

    with endpoint(metrics_port, metrics_address, collect):
        take_part(opened, speaker("supernode", log_format))


@app.command()
def check(
    kit: _Kit = _HERE,
    job: Annotated[Path | None, typer.Option(help="A run's configuration, to check it against this site.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check all that could keep the site from taking part, and show what it would send. Sends nothing."""
    from ...core.config import load_config
    from ...deployment.kits import SiteKit
    from .check import findings

    opened = SiteKit.open(kit)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    found = []
    for finding in findings(opened, load_config(job) if job is not None else None):
        found.append(finding)
        if not as_json:
            console.print(f"{'ok' if finding.good else 'NO':3} {finding.what}: {finding.text}")
    if as_json:
        print(json.dumps([vars(finding) for finding in found]))
    failed = sum(not finding.good for finding in found)
    if failed:
        raise UserError(f"{failed} of {len(found)} checks failed; site {opened.name} would not be able to take part")
    if not as_json:
        console.print(f"site {opened.name} is ready; nothing was sent")
