"""Differential privacy at a site: the plan, the accountant, the ledger, exact clipping, noise."""

from .accounting import Event, calibrate_noise, epsilon
from .ledger import Ledger
from .plan import PrivacyPlan

__all__ = ["Event", "Ledger", "PrivacyPlan", "calibrate_noise", "epsilon"]
