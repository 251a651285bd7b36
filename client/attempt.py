"""One go at what is paid for. Whoever is killed in it leaves it behind, and the next does the very same, unpaid."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import UserError
from ..core.wire import Kind
from ..deployment.files import PRIVATE_FILE, private_folder
from ..privacy.ledger import Entry, Ledger
from .installed import installed_digest

_KEY_BYTES = 32
#: Changes when the machine starts anew, and is another one on every machine.
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class _Left:
    """What the file of an attempt holds: at which ``place`` it was made, see :func:`_place`, and what it was."""

    place: str
    name: str
    terms: str
    key: bytes


class Attempt:
    """One go at a training or an evaluation, which alone has the open file ``file``; None: nothing of it is kept.

    The file holds the ``key`` from which all randomness of the attempt is drawn, and ``terms``, a digest of all else
    that it hangs on. :meth:`begin` writes it, before the budget is reserved under the attempt's ``name``; :meth:`end`
    destroys it, before the reservation is settled, and so before anything is remembered, kept or sent.

    Guarantee
    ---------
    Trusted: the site, its kernel and its disk. What :meth:`resume` takes up again is one release, which its reservation
    has paid for:

    - *Nothing left.* Its reservation was never settled. Only after the settlement does a round reach the site's memory,
      the clip of the next round, the kept answers, a secure sum or the wire. What is there before hangs on no record:
      the reservation itself, the audit log's ``allowed``, the step and the epsilon on the site's own screen, the key of
      noise that is correlated over rounds.
    - *Nothing will leave.* Whoever was at it is dead: the file is locked for as long as its process lives, and the
      kernel, which is the one that gave the lock, has taken it back. Another boot or another machine proves nothing.
    - *It is done again, not drawn again.* Same key, same terms: the same samples, turns and noise, for the same
      function of the same records. So it does not matter either whether a death hangs on what was drawn (a sample that
      is too large for the memory): no draw is replaced by a luckier one, and noise that is correlated serves no second
      gradient. Nor can a copy of the site's folder that is put back release anything else (on a GPU, but for
      the last bits).

    Where any of this is not known, the attempt is paid for anew and the old reservation counts for good. That a process
    died, and when, others see as a longer wait; what the time of a training tells is not in any epsilon here.

    A key on the disk never belongs to what has left: :meth:`end` overwrites it first.
    """

    def __init__(self, file: int | None = None, path: Path = Path()) -> None:
        self._file, self._path = file, path
        self._place = _place() if file is not None else ""
        left = _read(file) if file is not None else None
        self._left = left if left is not None and left.place == self._place else None
        self.name = ""
        self.key: bytes | None = None

    @property
    def about(self) -> dict[str, str]:
        """What its reservation says of it."""
        return {"attempt": self.name} if self.name else {}

    def abandoned(self, ledger: Ledger) -> Entry | None:
        """The reservation of the attempt that was left behind here; None where there is none to be taken up again."""
        return ledger.unsettled(self._left.name) if self._left is not None else None

    def resume(self, terms: str) -> bool:
        """Go on as the attempt that was left behind, if it was on the same ``terms``: whether that is so."""
        left = self._left
        if left is None or left.terms != terms:
            return False
        self.name, self.key = left.name, left.key
        return True

    def begin(self, terms: Callable[[], str]) -> None:
        """Begin afresh: have a name and a key, and keep them. Raises :class:`UserError` when the disk is full."""
        if self._file is None or not self._place:
            return
        self.name, self.key = uuid.uuid4().hex, os.urandom(_KEY_BYTES)
        content = {"place": self._place, "name": self.name, "terms": terms(), "key": self.key.hex()}
        _write(self._file, self._path, json.dumps(content).encode())

    def end(self) -> None:
        """Nobody takes this attempt up again. Raises :class:`UserError` where that cannot be made sure of."""
        if self._file is not None and self.name:
            _write(self._file, self._path, b"")


@contextlib.contextmanager
def attempt(folder: Path | None, kind: Kind) -> Iterator[Attempt]:
    """The attempt at an instruction of ``kind`` in the site's ``folder``, which nobody else is at meanwhile.

    While another process is at one of the same kind, nothing is kept of this one. Raises :class:`UserError` when the
    folder cannot be written.
    """
    if folder is None:
        yield Attempt()
        return
    try:
        path = private_folder(folder / "attempts") / kind
        file = os.open(path, os.O_RDWR | os.O_CREAT, PRIVATE_FILE)
    except OSError as error:
        raise UserError(f"{folder}/attempts: cannot be written: {error.strerror or error}") from None
    try:
        begun = Attempt(file, path) if _alone_in(file) else Attempt()
        try:
            yield begun
        except BaseException:
            # One that failed is not taken up again: it has said so.
            with contextlib.suppress(UserError):
                begun.end()
            raise
    finally:
        os.close(file)


def _alone_in(file: int) -> bool:
    """Whether this process has ``file`` from now on, until it closes it or dies."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def digest_of(*parts: object) -> str:
    """SHA-256 of all that an attempt hangs on beside its randomness."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()


def _place() -> str:
    """This machine since its last start, and the code that runs; empty where that cannot be told."""
    try:
        return f"{_BOOT.read_text(encoding='ascii').strip()} {installed_digest()}"
    except (OSError, ValueError):
        return ""


def _write(file: int, path: Path, content: bytes) -> None:
    try:
        # Over what was there: a file that is only cut short leaves its old content on the disk.
        os.pwrite(file, bytes(os.fstat(file).st_size), 0)
        os.fsync(file)
        os.ftruncate(file, 0)
        os.pwrite(file, content, 0)
    except OSError as error:
        raise UserError(f"{path}: cannot be written, so nothing leaves: {error.strerror or error}") from None


def _read(file: int) -> _Left | None:
    try:
        content = json.loads(os.pread(file, 1 << 12, 0))
        left = _Left(content["place"], content["name"], content["terms"], bytes.fromhex(content["key"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    whole = all(isinstance(text, str) and text for text in (left.place, left.name, left.terms))
    return left if whole and len(left.key) == _KEY_BYTES else None
