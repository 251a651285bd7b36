"""Whether an interrupted run can go on as if nothing had happened."""

from __future__ import annotations

import json
from pathlib import Path

from ...core.errors import UserError
from ...server import checkpoints
from ...server.rundir import read_metrics


def lost_nothing_paid(folder: Path) -> bool:
    """Whether all that the privacy budget of the run in ``folder`` has paid for is on the disk.

    A round that was paid for and lost stays spent: the run would go on under more noise than the others of its sweep,
    or not at all.
    """
    try:
        reached = checkpoints.load_last(folder / "checkpoints").round
    except UserError:
        return False
    evaluated = {line["round"] for line in read_metrics(folder) if line["kind"] == "evaluate"}
    for ledger in (*folder.glob("sites/*/ledgers/*.jsonl"), *folder.glob("central-ledger.jsonl")):
        for text in ledger.read_bytes().splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                return False  # cut off as it was written
            if line["kind"] != "reserve":
                continue
            kept = line["round"] <= reached if line["part"] == "train" else line["round"] in evaluated
            if not kept:
                return False
    return True
