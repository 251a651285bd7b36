"""What a strategy sends for a model: by hand, and by what crosses the wire in a run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from fedgraft.core.errors import UserError
from fedgraft.server.traffic import adapter_of, traffic
from fedgraft.strategies import create_aggregator

# LoRA of rank 8 on the queries and values of BERT-base: 24 matrices of 768 x 768, and a head of two classes.
FACTOR, HEAD = 24 * 8 * 768 * 4, (2 * 768 + 2) * 4
OFFSET = 24 * 2 * 768 * 4


@pytest.fixture(scope="module")
def bert() -> tuple[Any, int]:
    return adapter_of("", "lora", 8)


def counted(name: str, adapter: tuple[Any, int], **options: Any) -> tuple[list[int], list[int]]:
    found = traffic(lambda: create_aggregator(name, options), *adapter)
    return list(found.up), list(found.down)


def test_a_model_is_known_without_its_weights(bert: tuple[Any, int]) -> None:
    spec, size = bert
    assert size == 109_483_778 * 4, "BertForSequenceClassification, without the adapter"
    assert spec.parameters == (2 * FACTOR + HEAD) // 4 and len(spec.pairs) == 24
    assert adapter_of("", "lora", 4, labels=5)[0].parameters == (FACTOR + (5 * 768 + 5) * 4) // 4


@pytest.mark.parametrize(
    ("name", "up", "down"),
    [
        ("fedit", [2 * FACTOR + HEAD] * 3, [2 * FACTOR + HEAD] * 3),
        ("ffa", [FACTOR + HEAD] * 3, [2 * FACTOR + HEAD, FACTOR + HEAD, FACTOR + HEAD]),
        # Four sites: the rank of what is added to W0 grows by (K - 1) r a round.
        ("fedex", [2 * FACTOR + HEAD] * 3, [2 * FACTOR + HEAD + n * 24 * OFFSET for n in range(3)]),
        ("scaffold", [2 * (2 * FACTOR + HEAD)] * 3, [2 * (2 * FACTOR + HEAD)] * 3),
    ],
)
def test_bytes_are_those_of_the_equations(name: str, up: list[int], down: list[int], bert: tuple[Any, int]) -> None:
    assert counted(name, bert) == (up, down)


def test_a_core_of_r_squared_is_all_that_fed_sb_sends() -> None:
    up, down = counted("fed-sb", adapter_of("", "lora-sb", 8))
    core = 24 * 8 * 8 * 4
    assert up == [core + HEAD] * 3 and down[0] == core + HEAD + 2 * FACTOR and down[1:] == [core + HEAD] * 2


def test_mergers_are_counted_by_two_pairs_of_a_shape(bert: tuple[Any, int]) -> None:
    spec, size = bert
    narrow = replace(spec, pairs=spec.pairs[:5], tensors=tuple(t for t in spec.tensors if _among(t.name, spec, 5)))
    up, down = counted("uniform", (narrow, size))
    assert up == down == [2 * FACTOR * 5 // 24 + HEAD] * 3


def _among(name: str, spec: Any, first: int) -> bool:
    gone = {n for pair in spec.pairs[first:] for n in (pair.a, pair.b)}
    return name not in gone


@pytest.mark.parametrize("name", ["fedex", "rolora", "fedask", "scaffold"])
def test_it_is_what_crosses_the_wire_in_a_run(name: str, tiny_federation: Any, tmp_path: Path) -> None:
    up: dict[int, int] = defaultdict(int)
    down: dict[int, int] = defaultdict(int)

    def size(message: Message) -> int:
        records = message.content.array_records
        return sum(array.numpy().nbytes for array in records["adapter"].values()) if "adapter" in records else 0

    def between(site: str, message: Message, answer: Callable[[], Message]) -> Message:
        reply = answer()
        kind = message.metadata.message_type
        if site == "east" and kind != "query.hello":
            number = message.content.config_records["job"]["round"]
            # What an evaluation brings is what the next round begins with.
            down[int(number) + (kind == "evaluate")] += size(message)
            up[int(number)] += size(reply)
        return reply

    tiny_federation.run(tiny_federation.config(strategy=name, rounds=3), tmp_path / "run", between)
    spec, model = adapter_of(tiny_federation.model, "lora", 4, labels=3)
    found = traffic(lambda: create_aggregator(name), spec, model, sites=3)
    assert [up[number] for number in (1, 2, 3)] == list(found.up)
    assert [down[number] for number in (1, 2, 3)] == list(found.down)


@pytest.mark.parametrize("family", ["gpt2", "llama", "roberta", "t5"])
def test_a_users_folder_is_enough(family: str, tiny_model: Callable[..., str], lab: Any) -> None:
    spec, _ = adapter_of(tiny_model(family), "lora", 4, labels=3)
    assert spec == lab.attach(family, "sequence-classification", "lora", alpha=8.0).spec


def test_a_model_of_images_is_enough(tiny_model: Callable[..., str], lab: Any) -> None:
    spec, _ = adapter_of(tiny_model("vit", "image-classification"), "lora", 4, labels=3)
    assert spec == lab.attach("vit", "image-classification", "lora", alpha=8.0).spec


@pytest.mark.parametrize("method", ["bitfit", "dora", "ia3", "ln", "lora-sb", "prefix", "ravan", "rslora"])
def test_every_method_is_counted(method: str) -> None:
    spec, _ = adapter_of("", method, 4)
    strategy = {"lora-sb": "fed-sb", "ravan": "ravan"}.get(method, "fedit")
    up, down = counted(strategy, (spec, 0))
    shared = sum(t.size * np.dtype(t.dtype).itemsize for t in spec.tensors if t.policy == "share")
    assert 0 < up[0] <= shared and down[0] >= up[0]


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the folder has no config\.json"):
        adapter_of(str(tmp_path), "lora", 4)
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(UserError, match="its configuration cannot be read"):
        adapter_of(str(tmp_path), "lora", 4)
    (tmp_path / "config.json").write_text('{"model_type": "clap"}')
    with pytest.raises(UserError, match="has no head for sequence-classification or image-classification"):
        adapter_of(str(tmp_path), "lora", 4)
    with pytest.raises(UserError, match="unknown method `loar`; did you mean `lora`"):
        adapter_of("", "loar", 4)
