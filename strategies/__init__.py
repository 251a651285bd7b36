"""How updates become the next global adapter: pure rules over adapter states, and the Flower strategy hosting them."""

from . import (
    averaging,
    fedask,
    fednova,
    fedsvd,
    frozen_factor,
    hetlora,
    lowrank,
    proximal,
    refactoring,
    robust,
    scaffold,
    sketching,
)
from .aggregator import Aggregator, Capabilities, Options, create_aggregator, strategies, strategy
from .local import LocalRule, Training

__all__ = [
    "Aggregator",
    "Capabilities",
    "LocalRule",
    "Options",
    "Training",
    "averaging",
    "create_aggregator",
    "fedask",
    "fednova",
    "fedsvd",
    "frozen_factor",
    "hetlora",
    "lowrank",
    "proximal",
    "refactoring",
    "robust",
    "scaffold",
    "sketching",
    "strategies",
    "strategy",
]
