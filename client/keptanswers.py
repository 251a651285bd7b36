"""Answers that a site has paid for, kept so that the same question again costs its people nothing.

A server that dies after the sites have trained a round, and before its checkpoint, asks for the round again. A network
may deliver a question twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as PackedRecordDict

from ..core.adapter import AdapterState
from ..core.config import RunConfig
from ..core.errors import UserError
from ..core.wire import Job, Kind
from ..deployment.files import PRIVATE_FILE, private_folder, write
from ..privacy.journal import sync_folders

#: Rounds of a run that are kept: a server whose last checkpoint is damaged goes back by one.
_ROUNDS = 2
#: Runs whose answers are kept: hardly ever are more under way at once.
_RUNS = 4
#: What may change when a run goes on, and changes no answer that was given.
_FREE = {"rounds", "name"}
#: Bytes of an answer beside its tensors, generously.
_BESIDE = 1 << 16


class KeptAnswer:
    """The answer to one instruction, in the site's ``folder``; None: nothing is kept.

    ``data``: what tells the site's records, and how they are split, from others.

    Guarantee
    ---------
    :meth:`find` gives what :meth:`keep` was given, and only to the same instruction: to none of another run, round,
    kind, configuration (but ``rounds`` and ``name``), base model, adapter or state of the data. Sending it again is
    post-processing of what the ledger has paid for, so it takes no reservation. What was kept is on the disk, with mode
    0600, when :meth:`keep` returns. A damaged file is no answer: the instruction is then carried out, and paid for,
    anew.
    """

    def __init__(self, folder: Path | None, kind: Kind, job: Job, config: RunConfig, site: str, data: str) -> None:
        self._round = job.round
        self._path: Path | None = None
        if folder is not None:
            terms = [job.run, job.fingerprint, site, data, config.model_dump(mode="json", exclude=_FREE)]
            self._terms = _sha256(json.dumps(terms, sort_keys=True).encode())
            # The server chose the run's name, so no path is made of it.
            self._path = folder / "answers" / _sha256(job.run.encode())[:16] / f"{kind}-{job.round}"

    @property
    def given(self) -> bool:
        """Whether the instruction was answered before, about whatever adapter."""
        return self._read() is not None

    def find(self, about: AdapterState) -> RecordDict | None:
        """The answer that was given about the adapter ``about``; None where there is none."""
        found = self._read()
        if found is None or found[0] != _digest(about):
            return None
        return recorddict_from_proto(PackedRecordDict.FromString(found[1]))

    def require_room(self, tensors: int) -> None:
        """Find a full disk before anything is paid: raise :class:`UserError` without room for so many bytes."""
        if self._path is None:
            return
        beside = self._path.with_name(".room")
        try:
            _made(self._path.parent)
            with beside.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, tensors + _BESIDE)
        except (OSError, UserError) as error:
            raise self._cannot(error) from None
        finally:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)

    def keep(self, about: AdapterState, answer: RecordDict) -> None:
        """Keep ``answer``, and forget those long past. Raises :class:`UserError` when the disk is full or read-only."""
        if self._path is None:
            return
        body = recorddict_to_proto(answer).SerializeToString()
        head = json.dumps([self._terms, _digest(about), _sha256(body)])
        try:
            _made(self._path.parent)
            write(self._path, head.encode() + b"\n" + body, PRIVATE_FILE)
            sync_folders(*self._path.parents[:3])
            _forget(self._path.parent, self._round - _ROUNDS)
        except (OSError, UserError) as error:
            raise self._cannot(error) from None

    def _read(self) -> tuple[str, bytes] | None:
        """The digest of the adapter that the kept answer is about, and the answer."""
        if self._path is None:
            return None
        try:
            head, _, body = self._path.read_bytes().partition(b"\n")
            terms, about, digest = json.loads(head)
        except (OSError, ValueError, TypeError):
            return None
        if terms != self._terms or digest != _sha256(body):
            return None
        return str(about), body

    def _cannot(self, error: OSError | UserError) -> UserError:
        why = error if isinstance(error, UserError) else f"{self._path}: cannot be written: {error.strerror or error}"
        return UserError(f"{why}; an answer that the site cannot keep does not leave")


def _made(folder: Path) -> None:
    private_folder(folder.parent)
    private_folder(folder)


def _forget(run: Path, last: int) -> None:
    """Remove the answers of rounds up to ``last``, and runs long past."""
    for path in run.glob("[a-z]*-*"):
        if int(path.name.rpartition("-")[2]) <= last:
            path.unlink(missing_ok=True)
    for past in sorted(run.parent.iterdir(), key=lambda path: path.stat().st_mtime)[:-_RUNS]:
        shutil.rmtree(past, ignore_errors=True)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _digest(state: AdapterState) -> str:
    return f"{state.spec.digest}|{state.digest}"
