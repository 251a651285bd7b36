"""`fedgraft site check`: everything that could keep the site from taking part, before anyone waits for a round.

Nothing is sent. With a job, the site's own code answers the server's first question to a copy of the ledger, so that
what is shown is what would leave.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from ...core.config import RunConfig
from ...core.errors import PrivateError, UserError, one_line
from ...core.progress import Watch
from ...core.wire import Job, decode_answer
from ...deployment.certificates import SOON, day, now
from ...deployment.kits import SiteKit
from ...deployment.reach import reach, require_clock
from ...privacy.auditlog import LEDGERS, require_ledger_of_audit
from ...privacy.ledger import Ledger
from ..policy import Policy, load_policy

#: A round's adapters, ledger and logs are small; a disk with less than this is about to be full.
LEAST_FREE = 1 << 30


@dataclass(frozen=True)
class Finding:
    """What one check came to: good, or what is wrong and how to mend it."""

    what: str
    good: bool
    text: str


def findings(kit: SiteKit, config: RunConfig | None = None) -> Iterator[Finding]:
    """Each check's outcome, one after another; with ``config`` those of that job too."""
    yield _try("certificate", lambda: _certificate(kit))
    yield _try("roster", lambda: _roster(kit))
    yield _try("network", lambda: _network(kit))
    policy: Policy | None = None

    def read() -> str:
        nonlocal policy
        policy = load_policy(kit.policy)
        return f"valid (SHA-256 {policy.digest[:16]})"

    yield _try("policy", read)
    places = {dataset.name: policy.data_path(dataset) for dataset in policy.datasets} if policy is not None else {}
    for name, place in places.items():
        yield _try(f"data {name}", partial(_readable, place))
    yield _try("ledger", lambda: _ledger(kit))
    yield _try("disk", lambda: _disk(kit))
    yield _try("device", lambda: _device(config))
    if config is not None and policy is not None:
        allowed = _try("job", partial(_objections, kit, config, policy))
        yield allowed
        if allowed.good:
            yield _try("answer", partial(_answer, kit, config))


def _try(what: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(what, True, check())
    except UserError as error:
        return Finding(what, False, one_line(error))


def _certificate(kit: SiteKit) -> str:
    _, certificate = kit.identity()
    soon = certificate.not_valid_after_utc - now() < SOON
    hint = " (soon: send site.csr to the coordinator again)" if soon else ""
    return f"expires {day(certificate.not_valid_after_utc)}{hint}"


def _roster(kit: SiteKit) -> str:
    roster = kit.require_member()
    return f"number {roster.number}: {', '.join(member.name for member in roster.members)}"


def _network(kit: SiteKit) -> str:
    server = kit.settings.server
    ahead = reach(server.host, server.port, kit.folder / "ca.crt")
    require_clock(ahead, server.address)
    return f"{server.address} is this federation's server; clocks differ by {abs(ahead):.0f} s"


def _readable(place: Path) -> str:
    if not place.exists():
        raise PrivateError(f"{place}: is not there; mend `path` in the policy")
    try:
        size = sum(1 for _ in place.iterdir()) if place.is_dir() else len(place.open("rb").read(1))
    except OSError as error:
        raise PrivateError(f"{place}: cannot be read: {error.strerror or error}") from None
    if not size:
        raise PrivateError(f"{place}: is empty")
    return str(place)


def _ledger(kit: SiteKit) -> str:
    require_ledger_of_audit(kit.state)
    entries = Ledger(kit.state / LEDGERS).entries()
    return f"{len(entries)} reservations, each as it was written"


def _disk(kit: SiteKit) -> str:
    free = shutil.disk_usage(kit.folder).free
    if free < LEAST_FREE:
        raise UserError(f"{kit.folder}: {free / 2**30:.2f} GiB are free; make room for {LEAST_FREE / 2**30:.0f} GiB")
    return f"{free / 2**30:.0f} GiB free"


def _device(config: RunConfig | None) -> str:
    from ..resident import device_of

    return str(device_of(config.train.device if config is not None else "auto"))


def _objections(kit: SiteKit, config: RunConfig, policy: Policy) -> str:
    from ..job import own_version, shared_tensors
    from ..resident import resident

    if kit.name not in config.site_names:
        raise UserError(f"data.sites: does not list {kit.name}")
    dataset = policy.dataset_of(config, kit.name)
    model = resident(own_version(config, kit.name))
    policy.admit(config, model.base.fingerprint, dataset)
    names = shared_tensors(config, model, kit.name)
    policy.require_tensors(names)
    state = model.adapter.read()
    numbers = sum(state[name].size for name in names)
    return (
        f"the policy lets it train on {dataset.name}; base model {model.base.fingerprint[:16]}; each round would send "
        f"{len(names)} tensors of {numbers:,} numbers: {', '.join(names)}"
    )


def _answer(kit: SiteKit, config: RunConfig) -> str:
    from ..answering import SiteClient
    from ..app import DEPLOYED
    from ..job import own_version
    from ..resident import resident

    class Heard(Watch):
        text = ""

        def note(self, text: str) -> None:
            self.text = text

    heard = Heard()
    fingerprint = resident(own_version(config, kit.name)).base.fingerprint
    with tempfile.TemporaryDirectory() as scratch:
        if (kit.state / LEDGERS).is_dir():
            shutil.copytree(kit.state / LEDGERS, Path(scratch) / LEDGERS)
        node: dict[str, bool | float | int | str] = {
            "site": kit.name,
            "site-folder": scratch,
            "policy": str(kit.policy),
        }
        context = Context(0, 0, node, RecordDict(), {})
        job = Job("check", 1, kit.name, config.to_json(), fingerprint).to_record()
        # A message says whose it is; outside of Flower's processes nobody has said it.
        TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 0
        question = Message(RecordDict({"job": job}), dst_node_id=0, message_type="query.hello", group_id="hello")
        reply = SiteClient(DEPLOYED, heard).answer("hello", question, context)
    answer = decode_answer(reply.content, "hello", kit.name)
    if answer.error:
        # At the site the whole reason may be told, which the server does not hear.
        raise PrivateError(heard.text or answer.error)
    told: dict[str, object] = {"metrics": dict(answer.metrics), "facts": dict(answer.facts)}
    if answer.privacy is not None:
        told["privacy"] = asdict(answer.privacy)
    return f"to the first question it would send {json.dumps(told, default=str)}"
