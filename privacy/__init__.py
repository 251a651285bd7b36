"""Differential privacy at a site and at the server: plans, the accountant, the ledger, exact clipping, noise.

Imported here is only what needs no model library: strategies, which know none, use it too.
"""

from .accounting import Event, calibrate_noise, epsilon
from .ledger import Ledger

__all__ = ["Event", "Ledger", "calibrate_noise", "epsilon"]
