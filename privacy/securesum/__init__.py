"""A sum of the sites' numbers of which the server learns nothing but the sum: Bonawitz et al. 2017, double masking.

Pure code: it knows neither Flower nor models, and sends nothing. :class:`SecureSite` and :class:`SecureServer` are the
two ends of the protocol, :mod:`.messages` what they say to each other; docs/secure-sum.md tells it in words.
"""

from .identity import Roster
from .ring import Ring
from .server import SecureServer, Sum
from .site import SecureSite
from .terms import Terms

__all__ = ["Ring", "Roster", "SecureServer", "SecureSite", "Sum", "Terms"]
