"""A server's side of a conversation with the ClientApp of a real site."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedgraft.client.app import app
from fedgraft.client.policy import unrestricted
from fedgraft.client.resident import resident
from fedgraft.core.config import RunConfig
from fedgraft.core.wire import Answer, Job, decode_answer, encode_adapter


def open_policy(path: str | Path) -> str:
    """The policy of a site that lets a job do what it likes with one file."""
    return unrestricted().text.replace('"the scenario\'s"', json.dumps(str(path)))


class Conversation:
    """A server's side of it, with the ClientApp of a real site, which knows itself by its node configuration alone.

    ``policy``: the text of the site's policy, by default one that allows everything; None leaves it without one.
    """

    def __init__(self, config: RunConfig, folder: Path, *, policy: str | None = "", **node: Any) -> None:
        TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
        self.config = config
        self.folder = folder
        if policy is not None:
            folder.mkdir(parents=True, exist_ok=True)
            path = node.get("data-path") or config.data.path
            (folder / "policy.toml").write_text(policy or open_policy(path), encoding="utf-8")
        node_config = {"site": "north", "site-folder": str(folder), **node}
        self.context = Context(
            run_id=1,
            node_id=2,
            node_config={key: value for key, value in node_config.items() if value is not None},
            state=RecordDict(),
            run_config={},
        )
        self.model = resident(config)
        self.state = self.model.adapter.read()
        self.state = self.state.with_spec(self.state.spec.with_policy("share", lambda t: True))

    def say(self, kind: str, round: int = 1, content: RecordDict | None = None, **job: Any) -> RecordDict:
        values = {
            "run": "r",
            "round": round,
            "site": "north",
            "config": self.config.to_json(),
            "fingerprint": self.model.base.fingerprint,
            **job,
        }
        message = Message(
            RecordDict({"job": Job(**values).to_record(), **(content or {})}), dst_node_id=2, message_type=kind
        )
        return app(message, self.context).content

    def hello(self, **job: Any) -> Answer:
        return decode_answer(self.say("query.hello", **{"site": "", **job}), "hello", "north")

    def train(self, round: int = 1, content: RecordDict | None = None, **job: Any) -> tuple[Answer, RecordDict]:
        answer = self.say("train", round, content or encode_adapter(self.state, wire="fp32"), **job)
        return decode_answer(answer, "train", "north"), answer

    def evaluate(self, round: int = 1, content: RecordDict | None = None) -> Answer:
        answer = self.say("evaluate", round, content or encode_adapter(self.state, wire="fp32"))
        return decode_answer(answer, "evaluate", "north")

    def log(self) -> list[dict[str, Any]]:
        """The site's audit log."""
        return [json.loads(line) for line in (self.folder / "audit.jsonl").read_text(encoding="utf-8").splitlines()]
