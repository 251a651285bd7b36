"""How updates become the next global adapter: pure rules over adapter states, and the Flower strategy hosting them."""

from . import averaging, fednova, frozen_factor, lowrank, proximal, robust, scaffold
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
    "fednova",
    "frozen_factor",
    "lowrank",
    "proximal",
    "robust",
    "scaffold",
    "strategies",
    "strategy",
]
