"""Rules that make one adapter of several that were trained apart: one file a family of rules, found by name."""

from . import adaptersoup, arithmetic, dare, knots, lorahub, soup, ties, transport, weighted
from .merger import Adapter, Context, Merged, Merger, Needs, create_merger, merger, mergers

__all__ = [
    "Adapter",
    "Context",
    "Merged",
    "Merger",
    "Needs",
    "adaptersoup",
    "arithmetic",
    "create_merger",
    "dare",
    "knots",
    "lorahub",
    "merger",
    "mergers",
    "soup",
    "ties",
    "transport",
    "weighted",
]
