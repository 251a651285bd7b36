"""What is known of an instruction while it is answered."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Context

from ..core.profile import section
from ..core.watching import tracing
from ..core.wire import Job, Kind
from ..privacy.auditlog import AuditLog
from .policy import Dataset, Policy


@dataclass(frozen=True)
class Here:
    """The site that answers, and what it lets this job do; ``told``: what the audit log says beside the answer."""

    site: str
    folder: Path | None
    context: Context
    policy: Policy
    dataset: Dataset
    told: dict[str, Any] = field(default_factory=dict)


@dataclass
class Visit:
    """What is known of an instruction so far."""

    kind: Kind
    durable: bool
    site: str = "?"
    folder: Path | None = None
    job: Job | None = None
    digest: str = ""
    here: Here | None = None
    began: float = field(default_factory=time.monotonic)

    def log(self, event: str, **values: Any) -> None:
        """Write a line into the site's audit log. Raises :class:`UserError` when that cannot be."""
        job = self.job
        about = {"run": job.run, "round": job.round} if job is not None else {}
        about |= {"job": self.digest} if self.digest else {}
        with section("disk"):
            audit_log = AuditLog(self.folder, durable=self.durable)
            audit_log.write(event, site=self.site, kind=self.kind, **about, **values)

    def trace(self, event: str, seconds: float, error: str) -> None:
        """Make a span of the instruction, where the site asks for spans."""
        job = self.job
        about: dict[str, Any] = {"run": job.run, "round": job.round} if job is not None else {}
        span = tracing.begin(f"fedgraft.{self.kind}", seconds_ago=seconds, site=self.site, kind=self.kind, **about)
        tracing.end(span, error, event=event)
