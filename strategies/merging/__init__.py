"""Rules that make one adapter of several that were trained apart: one file a family of rules, found by name."""

from .merger import Adapter, Context, Merged, Merger, Needs, create_merger, merger, mergers

__all__ = ["Adapter", "Context", "Merged", "Merger", "Needs", "create_merger", "merger", "mergers"]
