"""The audit of a private training: does what was released show what the plan promises? Four layers, a signed answer."""

from __future__ import annotations

from .verdict import Verdict

__all__ = ["Verdict"]
