"""What grids that need no Flower runtime have in common: nodes that are numbered, and messages made on the spot."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

#: The node of the server; the sites' follow it.
FIRST_NODE = 1


class LocalGrid(Grid):
    """A Flower Grid with ``sites`` nodes; how messages come to them and back is left to who derives from it."""

    def __init__(self, sites: int) -> None:
        # Messages ask for the identity of the running task, which Flower sets in the processes that it starts.
        TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = FIRST_NODE
        self._sites = sites
        self._run: Any = None

    def set_run(self, run: Any) -> None:
        self._run = run

    @property
    def run(self) -> Any:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id=dst_node_id, message_type=message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        return range(FIRST_NODE + 1, FIRST_NODE + 1 + self._sites)
