"""How a SuperNode and its worker are started beside each other: what each is told, and the secret that they share."""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

from ...core.errors import UserError

#: The secret's name in the site's folder.
SECRET = "worker.secret"
_BYTES = 32


def fresh_secret(folder: Path) -> Path:
    """A new secret in the site's ``folder``, for its owner alone. Raises :class:`UserError` where it cannot be written.

    Made anew at each start: it need not outlive the two processes.
    """
    path = folder / SECRET
    try:
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(_BYTES))
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None
    return path


def supernode_options(secret: Path) -> list[str]:
    """What `flower-supernode` is told beside the rest, so that it runs nothing itself and knows its worker."""
    return ["--isolation", "process", "--superexec-auth-secret-file", str(secret)]


def worker_command(folder: Path, address: str, secret: Path, certificates: Path | None = None) -> list[str]:
    """The worker's command; ``folder``: the site's; ``address`` (host:port) and ``certificates``: of the SuperNode."""
    command = [sys.executable, "-P", "-m", "fedgraft.client.warm", "--folder", str(folder)]
    command += ["--runtime-api-address", address, "--superexec-auth-secret-file", str(secret)]
    return command + (["--root-certificates", str(certificates)] if certificates is not None else [])
