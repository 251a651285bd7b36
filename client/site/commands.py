"""`fedgraft site`: what a site does with its kit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

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
def start(kit: _Kit = _HERE) -> None:
    """Take part until Ctrl-C."""
    from ...deployment.kits import SiteKit
    from .supernode import start as take_part

    take_part(SiteKit.open(kit), lambda line: print(line, flush=True))
