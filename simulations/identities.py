"""The signing keys of simulated sites, which every process of a simulation makes alike from the seed: no secrets.

One machine plays the server and all sites, so a secure sum hides nothing there: it is run to see what it costs, and
that the result is the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ..client.securing import Identity
from ..core.config import RunConfig
from ..privacy.securesum import Roster


def simulated(config: RunConfig) -> Callable[[str], Identity]:
    """The identity of each site of ``config``, by name."""
    keys = {
        site: Ed25519PrivateKey.from_private_bytes(
            hashlib.sha256(f"{config.seed}|{site}|simulated signing key".encode()).digest()
        )
        for site in config.site_names
    }
    roster = Roster({site: key.public_key() for site, key in keys.items()})
    return lambda site: Identity(keys[site], roster)
