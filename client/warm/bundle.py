"""What an app bundle may hold: configuration, and nothing that could be run.

Nothing of a bundle is ever run, unpacked or imported at a site; one that brings code all the same is refused, since
whoever made it expected otherwise.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import PurePosixPath

from ...core.errors import UserError
from ..policy import Policy, PolicyError

_KNOWN = {"pyproject.toml", ".info/CONTENT", "LICENSE"}
_TEXTS = {".toml", ".json", ".md", ".txt"}
_MOST_FILES = 1000


def bundle_hash(content: bytes) -> str:
    """SHA-256 of a bundle, by which a policy allows it and `flwr run` tells it."""
    return hashlib.sha256(content).hexdigest()


def require_configuration(content: bytes, policy: Policy) -> None:
    """Raise :class:`PolicyError` for a bundle that holds more than configuration, unless the policy lists its hash.

    Raises :class:`UserError` for one that is none. Only its table of contents is read.
    """
    if bundle_hash(content) in policy.code.bundles:
        return
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = archive.namelist()
    except Exception as error:  # a foreign archive is broken in many ways
        raise UserError(f"the app bundle cannot be read: {type(error).__name__}") from None
    if len(names) > _MOST_FILES:
        raise UserError(f"the app bundle holds {len(names)} files, more than {_MOST_FILES}")
    for name in names:
        if not name.endswith("/") and name not in _KNOWN and PurePosixPath(name).suffix not in _TEXTS:
            raise PolicyError(
                f"the app bundle {bundle_hash(content)} holds {name}, and a site takes configuration only",
                policy.rule("code", "bundles"),
            )
