"""The site's own key: made at the site, and never anywhere else."""

from __future__ import annotations

from pathlib import Path

from ...core.errors import UserError
from ...deployment import certificates
from ...deployment.files import private_folder, write
from ...deployment.kits import SiteKit
from ..policy import TEMPLATE


def make_key(folder: Path, *, new_key: bool = False) -> tuple[SiteKit, str]:
    """Make the site's key and its signing request; returns the kit and the key's fingerprint.

    Where the key is there already the request is written anew from it. ``new_key``: a second key, which takes over
    once its certificate is here. Writes a policy to fill in, which lets nothing out, where there is none. Raises
    :class:`UserError`.
    """
    kit = SiteKit.open(folder)
    private_folder(kit.folder)
    path = kit.key
    if new_key:
        if not kit.key.is_file():
            raise UserError(f"{kit.key}: there is no key yet, so leave out --new-key")
        path = kit.next_key
    if path.is_file():
        key = certificates.read_key(path, "move it away if it is not the site's key")
    else:
        key = certificates.new_key()
        certificates.write_key(path, key, ssh=True)
    write(kit.folder / "site.csr", certificates.new_request(kit.name, key))
    private_folder(kit.state)
    if not kit.policy.exists():
        write(kit.policy, TEMPLATE)
    return kit, certificates.key_fingerprint(key.public_key())
