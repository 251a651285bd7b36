"""Options that several commands have alike."""

from __future__ import annotations

from typing import Annotated

import typer

from .logs import ENVIRONMENT, LogFormat

MetricsPort = Annotated[
    int, typer.Option("--metrics-port", min=0, max=65535, help="Serve Prometheus metrics here; 0: do not.")
]
MetricsAddress = Annotated[
    str, typer.Option("--metrics-address", help="Which of this machine's addresses serves them.")
]
LogForm = Annotated[
    LogFormat, typer.Option("--log-format", envvar=ENVIRONMENT, help="What is said: text, or a JSON object a line.")
]
