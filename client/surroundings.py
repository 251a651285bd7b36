"""What a site's own machine supplies to its side of the conversation, and no instruction can."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context

from ..core.config import RunConfig
from ..core.errors import UserError
from ..strategies import LocalRule, Training
from .data import SiteData
from .policy import Policy
from .securing import Identity


def _nobody(config: RunConfig, site: str, folder: Path | None, context: Context) -> Identity:
    raise UserError(f"site {site} has no signing key and no roster, which a secure sum needs")


@dataclass(frozen=True)
class Surroundings:
    """What a site's own machine supplies, and no instruction can.

    ``name``: which site it is (of the run, where there is a configuration); ``folder``: its own folder, for ledgers and
    audit log, None to keep none (for tests); ``policy``: what it lets out, from that folder; ``data``: its records, at
    the place that the policy names. ``rule`` gives a simulated attacker its own part in place of the strategy's.
    ``durable``: whether ledger and audit log survive a loss of power, see :mod:`fedgraft.privacy.journal`.
    ``identity``: the site's signing key and its roster of the others', for secure sums. ``keeps``: whether paid answers
    are kept in the folder, see :mod:`.keptanswers`; those of thousands of simulated sites would fill a disk.
    """

    name: Callable[[RunConfig | None, Context], str]
    folder: Callable[[str, Context], Path | None]
    policy: Callable[[Path | None, Context], Policy]
    data: Callable[[RunConfig, str, Path, Context], SiteData]
    rule: Callable[[LocalRule | None, RunConfig, Training], LocalRule | None] = lambda rule, config, training: rule
    durable: bool = True
    keeps: bool = False
    identity: Callable[[RunConfig, str, Path | None, Context], Identity] = _nobody
