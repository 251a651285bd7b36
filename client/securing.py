"""A site's part in secure sums: who it is, and what it keeps of a round from one message to the next."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flwr.app import RecordDict

from ..core.adapter import AdapterState
from ..core.config import RunConfig
from ..core.errors import UserError
from ..core.vector import flat
from ..core.wire import Job, Kind, decode_secure, encode_secure
from ..privacy.journal import locked, sync_folders
from ..privacy.securesum import Roster, SecureSite, Terms
from ..privacy.securesum.identity import SigningKey
from ..privacy.securesum.messages import Adverts, Agreements, Envelopes, Survivors
from ..privacy.securesum.parts import pack
from ..privacy.securesum.site import Progress

_SERVER = "the server"


@dataclass(frozen=True)
class Identity:
    """The site's signing key, and the roster by which it knows the others."""

    key: SigningKey
    roster: Roster


class SecureSums:
    """What the sites of this process keep of their secure sums: secret, in their folders, before an answer leaves.

    ``durable``: whether it is on the disk, so that a loss of power cannot undo it.
    """

    def __init__(self, *, durable: bool) -> None:
        self._durable = durable
        self._loose: dict[tuple[str, str], Progress] = {}

    def open(self, job: Job, config: RunConfig, site: str, folder: Path | None, identity: Identity) -> SecureSite:
        """The site's side of the round of ``job``, as far as it has come."""
        terms = Terms.of(config, job.run, job.round)
        return SecureSite(terms, site, identity.key, identity.roster, self._kept(job.run, site, folder))

    def answer(self, kind: Kind, secure: SecureSite, content: RecordDict, folder: Path | None) -> RecordDict:
        """The ``secure`` record that answers the instruction ``content`` of ``kind``."""
        if kind == "keys":
            answer = secure.advertise().encode()
        else:
            message = decode_secure(content, _SERVER)
            if kind == "shares":
                answer = secure.share(Adverts.decode(message, _SERVER)).encode()
            elif kind == "agree":
                answer = secure.agree(Survivors.decode(message, _SERVER)).encode()
            else:
                answer = secure.reveal(Agreements.decode(message, _SERVER)).encode()
        self.keep(secure, folder)
        return encode_secure(answer)

    def keep(self, secure: SecureSite, folder: Path | None) -> None:
        """Keep how far ``secure`` has come, before its answer leaves.

        Raises :class:`UserError` when the disk is full or read-only, and when another process of the site has gone on
        in the meantime: of two answers at one stage the first leaves alone.
        """
        progress = secure.progress
        if folder is None:
            self._require_unchanged(secure, folder)
            self._loose[secure.site, progress.run] = progress
            return
        path = _path(folder, progress.run)
        try:
            with locked(path.with_name(".lock"), durable=self._durable):
                self._require_unchanged(secure, folder)
                beside = path.with_suffix(".new")
                file = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
                with os.fdopen(file, "wb") as stream:
                    stream.write(progress.encode())
                    stream.flush()
                    if self._durable:
                        os.fsync(stream.fileno())
                beside.replace(path)
                if self._durable:
                    sync_folders(path.parent)
        except OSError as error:
            raise UserError(
                f"{path}: what the site must keep of a secure sum cannot be written, so nothing leaves: "
                f"{error.strerror or error}"
            ) from None

    def _require_unchanged(self, secure: SecureSite, folder: Path | None) -> None:
        if self._kept(secure.terms.run, secure.site, folder) != secure.before:
            raise UserError(f"site {secure.site} has gone on with the secure sum in another process; nothing is sent")

    def _kept(self, run: str, site: str, folder: Path | None) -> Progress | None:
        if folder is None:
            return self._loose.get((site, run))
        path = _path(folder, run)
        try:
            return Progress.decode(path.read_bytes(), f"site {site}")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"{path}: what the site keeps of a secure sum cannot be read: {error.strerror}") from None


def envelopes_of(content: RecordDict) -> Envelopes:
    """The sealed shares that an instruction to train carries."""
    return Envelopes.decode(decode_secure(content, _SERVER), _SERVER)


def mask(
    secure: SecureSite, content: RecordDict, state: AdapterState, received: AdapterState, weight: int, job: bytes
) -> tuple[np.ndarray, int]:
    """What ``state`` changed of ``received``, under ``weight``, masked as the instruction ``content`` asks, and how
    many of its numbers were clipped.

    All sites must have trained the same adapter on the same terms, of which ``job`` is a digest, or none reveals.
    """
    names = received.spec.select("share")
    about = hashlib.sha256(pack(received.only(names).digest.encode(), job)).digest()
    numbers = flat(state, names) - flat(received, names)
    return secure.mask(envelopes_of(content), numbers, weight, about), secure.terms.ring.clipped(numbers)


def _path(folder: Path, run: str) -> Path:
    # The server chose the run's name, so no path is made of it.
    return folder / "secure-sum" / hashlib.sha256(run.encode()).hexdigest()[:16]
