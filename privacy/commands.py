"""`fedgraft privacy`: the trade-off before a run, and the ledger after it."""

from __future__ import annotations

import typer

from .ledger_commands import app as ledger

app = typer.Typer(help="Plan a privacy budget, and look at what was spent.", no_args_is_help=True)
app.add_typer(ledger, name="ledger")
