"""Cohort batching: several sites of one process train in the same passes through the frozen base model."""

from .decision import Cohort, Decision
from .fitting import why_alone
from .training import CannotShareError, train_in_one

__all__ = ["CannotShareError", "Cohort", "Decision", "train_in_one", "why_alone"]
