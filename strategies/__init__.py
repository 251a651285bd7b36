"""How updates become the next global adapter: pure rules over adapter states, and the Flower strategy hosting them."""

from . import averaging, frozen_factor
from .aggregator import Aggregator, Capabilities, create_aggregator, strategies, strategy

__all__ = [
    "Aggregator",
    "Capabilities",
    "averaging",
    "create_aggregator",
    "frozen_factor",
    "strategies",
    "strategy",
]
