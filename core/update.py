"""What a site hands back: its adapter, its weight, its declared metrics, and what its people were promised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .adapter import AdapterState


@dataclass(frozen=True)
class PrivacyStatement:
    """A site's privacy guarantee so far, over every step it ever took on this data in this run.

    ``epsilon`` and ``delta`` hold for add/remove of one ``unit``. ``steps`` counts all noisy steps, also those of
    rounds that were lost. ``metrics``: how evaluation counts leave the site (noised, exact_not_private, none);
    ``ledger``: the hash of the last line of the site's ledger. ``enabled`` false: nothing is promised and the other
    fields mean nothing.
    """

    enabled: bool
    unit: str = "record"
    epsilon: float = 0.0
    delta: float = 0.0
    clip: float = 0.0
    noise_multiplier: float = 0.0
    sampling_rate: float = 0.0
    steps: int = 0
    sampler: str = "poisson"
    neighbours: str = "add_remove"
    accountant: str = "pld"
    private_noise: bool = True
    metrics: str = "none"
    ledger: str = ""


@dataclass(frozen=True)
class Update:
    """One site's contribution to a round: the trained ``state`` (shared tensors only), and its positive ``weight``."""

    site: str
    state: AdapterState
    weight: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    privacy: PrivacyStatement = PrivacyStatement(enabled=False)
