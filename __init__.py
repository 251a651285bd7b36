"""Federated, differentially private, parameter-efficient fine-tuning on Flower."""

from __future__ import annotations

__version__ = "0.1.0"
