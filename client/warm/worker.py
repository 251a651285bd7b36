"""The worker: one for each site folder, the only one that takes the SuperNode's tasks, and never the one that dies."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict

from ... import __version__
from ...core.errors import PrivateError, UserError, one_line
from ...core.wire import decode_job, encode_refusal
from ...privacy.auditlog import AuditLog
from ..gate import require_refusal
from ..installed import installed_digest
from ..policy import NoPolicyError, PolicyError, load_policy
from .answerer import Answerer, AnswererDiedError
from .bundle import bundle_hash, require_configuration
from .runtime import StrangerError, SuperNode, Task

log = logging.getLogger("fedgraft.worker")
#: Its name in the site's folder.
LOCK = "worker.lock"
_AGAIN = 2.0


@dataclass(frozen=True)
class Options:
    """How a site's worker runs.

    ``folder``: the site's, with policy, ledgers and audit log; ``address``, ``secret`` and ``certificates``: of the
    SuperNode's runtime interface, see :class:`~.runtime.SuperNode`; ``deadline``: seconds that an answer may take;
    ``poll``: seconds between two looks for a task.
    """

    folder: Path
    address: str
    secret: Path
    certificates: Path | None = None
    deadline: float = 7200.0
    poll: float = 0.1


def serve(options: Options) -> None:
    """Answer a SuperNode's tasks until this process is ended.

    Raises :class:`UserError` with one line when another worker has the site's folder, when the secret cannot be read,
    or when the SuperNode hands tasks to others than this worker.
    """
    try:
        secret = options.secret.read_bytes()
    except OSError as error:
        raise UserError(f"{options.secret}: the secret cannot be read: {error.strerror or error}") from None
    if not secret:
        raise UserError(f"{options.secret}: the secret is empty")
    if not options.folder.is_dir():
        raise UserError(f"{options.folder}: no such folder; the site's policy, ledgers and audit log lie there")
    with only_worker(options.folder):
        node = SuperNode(options.address, secret, options.certificates)
        worker = Worker(options.folder, options.deadline)
        try:
            worker.begin()
            worker.serve(node, options.poll)
        finally:
            worker.end()


@contextmanager
def only_worker(folder: Path) -> Iterator[None]:
    """Hold the site's ``folder``. Raises :class:`UserError` that names the process which has it."""
    path = folder / LOCK
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(file, 32, 0).decode(errors="replace").strip() or "?"
            raise UserError(
                f"{folder}: another worker (process {holder}) serves this site; end it first, or give each SuperNode a "
                "folder of its own"
            ) from None
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(file)


class Worker:
    """Answers tasks for the site in ``folder``, each within ``deadline`` seconds."""

    def __init__(self, folder: Path, deadline: float) -> None:
        self.folder = folder.resolve()
        self._deadline = deadline
        self._answerer = Answerer()
        self._audit_log = AuditLog(self.folder)
        self._said = ""

    def begin(self) -> None:
        """Write down what code serves from now on, and have the answerer load it."""
        self._audit_log.write("worker", did="started", code={"version": __version__, "sha256": installed_digest()})
        self._answerer.start()

    def end(self) -> None:
        self._answerer.stop()

    def serve(self, node: SuperNode, poll: float) -> None:
        """Take and answer tasks for ever. Raises :class:`StrangerError`."""
        known = False
        while True:
            try:
                if not known:
                    node.require_guarded()
                    known = True
                token = node.acquire()
            except StrangerError:
                raise
            except UserError as error:
                # It may be another SuperNode that comes back.
                known = False
                self._say(str(error))
                time.sleep(_AGAIN)
                continue
            if not token:
                # One that died while nothing was asked of it must not make the next instruction wait.
                self._answerer.start()
                time.sleep(poll)
                continue
            try:
                with node.task(token) as task:
                    self.answer(task)
                self._said = ""
            except UserError as error:
                self._say(str(error))
            except Exception:  # whatever becomes of one message, the next one finds somebody here
                log.exception("a message was left without an answer")

    def answer(self, task: Task) -> None:
        """Answer one task. Raises :class:`UserError` where the SuperNode does not take the answer."""
        context, message = task.context, None
        try:
            message = task.read()
            self._require_own(task)
            reply, context = self._asked(message, context)
        except Exception as error:
            if not isinstance(error, UserError):
                log.exception("an instruction was not answered")
            reply = Message(self._refusal(error, task, message), reply_to=task.envelope)
        task.answer(reply, context)

    def _require_own(self, task: Task) -> None:
        """Raise :class:`UserError` for what is not this site's, or brings code."""
        node = task.context.node_config
        given = str(node.get("site-folder", "") or self.folder)
        if Path(given).resolve() != self.folder:
            raise PrivateError(f"the SuperNode's site-folder {given} is not {self.folder}, which this worker serves")
        node["site-folder"] = str(self.folder)
        chosen = str(node.get("policy", ""))
        require_configuration(task.bundle, load_policy(Path(chosen) if chosen else self.folder / "policy.toml"))

    def _asked(self, message: Message, context: Context) -> tuple[Message, Context]:
        """The answerer's answer; where it dies, that of the next one, once."""
        about = message.metadata
        # An answer that comes later reaches nobody. A clock that is off says nothing of that.
        left = about.created_at + about.ttl - time.time()
        until = time.monotonic() + (min(self._deadline, left) if left > 0 else self._deadline)
        try:
            return self._answerer.ask(message, context, until - time.monotonic())
        except AnswererDiedError as error:
            # What the first had reserved in the ledger the second takes up again, or pays for anew.
            self._say(f"{error}; it is started again, for this instruction once")
            self._audit_log.write(
                "worker", did="started the answerer again", why=one_line(error), **_about(message, context)
            )
        return self._answerer.ask(message, context, max(1.0, until - time.monotonic()))

    def _refusal(self, error: Exception, task: Task, message: Message | None) -> RecordDict:
        """What is sent where nothing was answered, and its line in the audit log; ``message``: None where unread."""
        about = _about(message or task.envelope, task.context)
        why: dict[str, Any] = {"why": one_line(error) if isinstance(error, UserError) else type(error).__name__}
        if isinstance(error, PolicyError):
            why["rule"] = error.rule.record
        sendable = UserError(error.sent) if isinstance(error, NoPolicyError) else error
        self._say(one_line(error))
        try:
            self._audit_log.write("refused", **about, bundle=bundle_hash(task.bundle), **why)
        except UserError as unwritten:
            sendable = unwritten
            self._say(str(unwritten))
        if isinstance(sendable, UserError) and not isinstance(sendable, PrivateError):
            sendable = UserError(str(sendable).replace(f"{self.folder}/", ""))
        content = encode_refusal(sendable, site=about["site"], round=about.get("round", 0))
        require_refusal(content)
        return content

    def _say(self, text: str) -> None:
        """Tell whoever sits at the site, once for what goes on and on."""
        if text != self._said:
            log.error("%s", text)
            self._said = text


def _about(message: Message, context: Context) -> Mapping[str, Any]:
    """What an instruction says of itself, for the audit log."""
    kind = message.metadata.message_type.removeprefix("query.")
    site = str(context.node_config.get("site", "?"))
    try:
        job = decode_job(message.content if message.has_content() else RecordDict())
    except UserError:
        return {"site": site, "kind": kind}
    return {"site": job.site or site, "kind": kind, "run": job.run, "round": job.round}
