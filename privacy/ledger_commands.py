"""`fedgraft privacy ledger`: what a site has spent, and whether its record is whole."""

from __future__ import annotations

import typer

app = typer.Typer(help="Show or verify a site's ledger.", no_args_is_help=True)
