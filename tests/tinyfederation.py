"""A federation of three sites that runs in a second: a tiny BERT and 600 made-up records with patients.

What a record says is recognisable wherever it turns up: every text and every patient key holds a word of its own.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from flwr.app import Message

from fedgraft.core.config import RunConfig, parse_config
from fedgraft.core.progress import SILENT, Watch
from fedgraft.simulations import run as runs
from fedgraft.simulations.engines.inprocess import InProcessGrid

LABELS = ("class-zebra", "class-yak", "class-walrus")
SITES = ("east", "north", "south")
_KEYS = ("heart", "lung", "liver")
RECORDS = 600

#: What stands between the server and a site: gets the site, the instruction, and what gives the site's answer to it.
Between = Callable[[str, Message, Callable[[], Message]], Message]


class Interrupted(BaseException):
    """Stops a run from inside, as Ctrl-C would; no `except Exception` takes it for a site's failure."""


def rows(words: tuple[str, ...]) -> list[dict[str, str]]:
    """Records whose label can be told from their words, of about 250 patients."""
    draw = random.Random(5)
    found = []
    for number in range(RECORDS):
        kind = number % len(LABELS)
        text = [draw.choice(words) for _ in range(draw.randint(1, 6))] + [_KEYS[kind]] * 3
        draw.shuffle(text)
        found.append(
            {
                "text": f"{' '.join(text)} zq{number:04d}",
                "label": LABELS[kind],
                "patient": f"pt-{draw.randrange(250):04d}-xj",
            }
        )
    return found


def write_csv(path: Path, records: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    return path


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with each dotted key of ``changes`` set."""
    result = json.loads(json.dumps(values))
    for key, value in changes.items():
        *parents, leaf = key.split(".")
        node = result
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return result


@dataclass(frozen=True)
class TinyFederation:
    """A tiny model folder, a table of records, and how to run a federation over them in this process."""

    model: str
    table: Path
    rows: tuple[dict[str, str], ...]

    def values(self, **changes: Any) -> dict[str, Any]:
        """The configuration as a nested mapping; ``changes`` are dotted keys (``**{"train.lr": 1}``). Without DP."""
        plain = {
            "name": "tiny",
            "seed": 3,
            "rounds": 3,
            "model": self.model,
            "method": {"rank": 4, "alpha": 8},
            "task": {"labels": list(LABELS), "max_length": 32},
            "train": {"local_steps": 3, "batch_size": 16, "lr": 0.1, "momentum": 0.5, "device": "cpu"},
            "privacy": {"enabled": False},
            "data": {"path": str(self.table), "sites": list(SITES), "alpha": 5.0},
        }
        return merged(plain, changes)

    def config(self, **changes: Any) -> RunConfig:
        return parse_config(self.values(**changes))

    def private(self, **changes: Any) -> RunConfig:
        """The same under DP, with the patient as the unit; its counts are exact, so that they can be compared."""
        promise = {"privacy.enabled": True, "privacy.unit": "patient", "privacy.epsilon": 2.0, "privacy.delta": 1e-3}
        promise |= {"evaluate.release": "exact_not_private"}
        return self.config(**{**promise, **changes})

    def run(
        self, config: RunConfig, output: Path, between: Between | None = None, watch: Watch = SILENT
    ) -> dict[str, Any]:
        with intercepted(between, config):
            return runs.simulate(config, output, watch=watch)

    def resume(
        self, config: RunConfig, output: Path, between: Between | None = None, watch: Watch = SILENT, **more: Any
    ) -> dict[str, Any]:
        with intercepted(between, config):
            return runs.resume(output, watch=watch, **more)


@contextmanager
def intercepted(between: Between | None, config: RunConfig) -> Iterator[None]:
    """Put ``between`` on the way of every message of the in-process engine."""
    if between is None:
        yield
        return
    plain = InProcessGrid._answer

    def answer(grid: InProcessGrid, message: Message) -> Message:
        number = grid._contexts[message.metadata.dst_node_id].node_config["partition-id"]
        return between(config.site_names[int(number)], message, lambda: plain(grid, message))

    with mock.patch.object(InProcessGrid, "_answer", answer):
        yield


def metrics(output: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of one kind."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["kind"] == kind]


class Notes(Watch):
    """Keeps what a person would have read."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)
