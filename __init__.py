"""Federated, differentially private, parameter-efficient fine-tuning on Flower."""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # What a plugin begins with; loaded on demand, so that `import fedgraft` stays light.
    if name == "strategy":
        return getattr(import_module("fedgraft.strategies"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
