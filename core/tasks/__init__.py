"""Learning problems: sequence classification, causal language modelling, image classification."""

from . import causal_lm, image_classification, text_classification
from .base import Batch, Example, Predictions, Task, create_task, register

__all__ = [
    "Batch",
    "Example",
    "Predictions",
    "Task",
    "causal_lm",
    "create_task",
    "image_classification",
    "register",
    "text_classification",
]
