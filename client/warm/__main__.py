"""`python -m fedgraft.client.warm`: a site's worker beside its SuperNode."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from ...core.errors import UserError
from ...core.watching import logs
from ...deployment.processes import leave_with_parent
from .worker import Options, serve


def main(
    folder: Annotated[Path, typer.Option(help="The site's folder: policy, ledgers, audit log.")],
    superexec_auth_secret_file: Annotated[Path, typer.Option(help="The secret that the SuperNode was started with.")],
    runtime_api_address: Annotated[str, typer.Option(help="HOST:PORT of the SuperNode.")] = "127.0.0.1:9094",
    root_certificates: Annotated[
        Path | None, typer.Option(help="Authority of the SuperNode's runtime certificate; without: no TLS.")
    ] = None,
    deadline: Annotated[float, typer.Option(min=1, help="Seconds that an answer may take.")] = 7200.0,
    poll: Annotated[float, typer.Option(min=0.01, help="Seconds between two looks for a task.")] = 0.1,
) -> None:
    """Answer a SuperNode's tasks with this installation of fedgraft, kept warm. docs/site-worker.md says how."""
    if not logs.begin(sys.stderr):
        logging.basicConfig(format="%(asctime)s %(name)s %(message)s", level=logging.WARNING)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # At once, whatever it is at: the answerer goes with it, and the next worker finds the folder free.
    leave_with_parent(lambda: os._exit(1))
    try:
        serve(Options(folder, runtime_api_address, superexec_auth_secret_file, root_certificates, deadline, poll))
    except UserError as error:
        sys.exit(f"fedgraft: {error}")
    except KeyboardInterrupt:
        sys.exit(0)


if __name__ == "__main__":
    typer.run(main)
