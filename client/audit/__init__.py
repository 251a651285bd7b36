"""The audit of a site's own training: the real trainer, sampler and engine, watched from outside and attacked."""

from __future__ import annotations

from .layers import Audit
from .subject import Subject

__all__ = ["Audit", "Subject"]
