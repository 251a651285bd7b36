"""Cohort batching: several sites of one process train in the same passes through the frozen base model."""

from .fitting import why_alone
from .training import train_in_one

__all__ = ["train_in_one", "why_alone"]
