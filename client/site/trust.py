"""What a secure sum at this site knows the others by: their keys, as the authority's roster has them."""

from __future__ import annotations

import json
from pathlib import Path

from ...deployment.files import PRIVATE_FILE, write
from ...deployment.kits import SiteKit, remember_roster


def write_roster(kit: SiteKit) -> Path:
    """The keys of all members with a current certificate, in the site's own folder; never those that a server names.

    Raises :class:`UserError` where the kit's roster is not the authority's.
    """
    path, found = kit.state / "roster.toml", kit.roster()
    remember_roster(kit, found)
    # A JSON text is a TOML text too.
    lines = (f"{json.dumps(m.name)} = {json.dumps(m.public_key)}\n" for m in found.current())
    write(path, "[sites]\n" + "".join(lines), PRIVATE_FILE)
    return path
