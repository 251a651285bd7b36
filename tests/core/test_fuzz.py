"""Hundreds of thousands of broken and hostile messages, at the decoders of both ends."""

from __future__ import annotations

import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
from flwr.app import RecordDict

from fedgraft.core import config, packing
from fedgraft.core.adapter import AdapterSpec, AdapterState, LowRankPair, TensorSpec
from fedgraft.core.config import RunConfig, config_from_json, parse_config
from fedgraft.core.errors import UserError
from fedgraft.core.update import PrivacyStatement
from fedgraft.core.wire import (
    Job,
    content_bytes,
    decode_adapter,
    decode_answer,
    decode_job,
    encode_adapter,
    encode_answer,
    encode_change,
    encode_refusal,
)

#: The limit of a message that these tests set: low enough that all of it is tried.
LIMIT = 1 << 18
#: No message may take longer, in seconds of processor time.
SECONDS = 5.0
SPEC = AdapterSpec(
    "lora",
    (
        TensorSpec("x.lora_A.w", (4, 8)),
        TensorSpec("x.lora_B.w", (6, 4)),
        TensorSpec("head", (3,), "float64"),
        TensorSpec("own", (5,), policy="local"),
    ),
    (LowRankPair("x.lora_A.w", "x.lora_B.w", 2.0),),
    rank=4,
    alpha=8.0,
)
EXTRA = TensorSpec("control", (7,), "float32", "control", parameter=False)
PRIVACY = PrivacyStatement(True, "patient", 3.5, 1e-5, 1.0, 0.8, 0.02, 12)
KINDS = ("hello", "train", "refine", "evaluate")
Try = Callable[[RecordDict], object]


def state_of(spec: AdapterSpec, seed: int = 0) -> AdapterState:
    draw = np.random.default_rng(seed)
    return AdapterState(spec, {t.name: draw.standard_normal(t.shape).astype(t.dtype) for t in spec.tensors})


STATE = state_of(SPEC)
#: float32 alone, as a lossy upload must be; what the server sent, and what a site made of it.
SENT = state_of(replace(SPEC, tensors=(*SPEC.tensors[:2], replace(SPEC.tensors[3], policy="share"))))
CHANGED = state_of(SENT.spec, 1)


def instructions() -> Iterator[RecordDict]:
    config = parse_config(
        {
            "name": "fuzzed",
            "model": "builtin:bert",
            "data": {"sites": ["north", "south"]},
            "task": {"labels": ["a", "b"]},
        }
    )
    job = RecordDict({"job": Job("r1", 3, "north", config.to_json(), "f" * 64).to_record()})
    yield job
    for wire in ("fp32", "fp16", "bf16"):
        for code in (False, True):
            yield RecordDict({**job, **encode_adapter(STATE, wire=wire, code=code)})
    part = encode_adapter(STATE.only(["head"]), wire="fp32", whole=STATE.digest, rest=STATE.digest)
    yield RecordDict({**job, **part})
    wider = SPEC.with_extras([EXTRA])
    yield RecordDict({**job, **encode_adapter(state_of(wider), wire="fp32")})
    # An honest description of what would fill the memory.
    vast = SPEC.with_extras([replace(EXTRA, shape=(20 * LIMIT,))])
    zeros = AdapterState(vast, {**STATE, "control": np.zeros(20 * LIMIT, np.float32)})
    yield RecordDict({**job, **encode_adapter(zeros, wire="fp32", code=True)})


def answers() -> Iterator[RecordDict]:
    yield encode_answer(
        "hello",
        site="north",
        round=1,
        metrics={"records": 120, "held_out": 30, "units": 70},
        facts={"spec": "0123456789abcdef", "fingerprint": "f" * 64},
    )
    yield encode_answer("evaluate", site="north", round=3, metrics={"examples": 9, "correct": 4}, privacy=PRIVACY)
    yield encode_refusal(UserError("the budget is spent"), site="north", round=2)
    uploads = [encode_adapter(CHANGED, wire=wire, code=code) for wire in ("fp32", "bf16") for code in (False, True)]
    for form in ("int8", "topk"):
        for code in (False, True):
            draw = np.random.default_rng(0)
            uploads.append(encode_change(CHANGED, SENT, form, fraction=0.2, random=draw, code=code)[0])
    for upload in uploads:
        yield encode_answer("train", site="north", round=3, metrics={"records": 9}, privacy=PRIVACY, adapter=upload)


def read_job(content: RecordDict) -> RunConfig:
    return config_from_json(decode_job(content).config, "the server's configuration")


def read_adapter(content: RecordDict) -> AdapterState:
    return decode_adapter(content, SPEC, sender="the server", held=STATE)


def read_upload(content: RecordDict) -> AdapterState:
    return decode_adapter(content, SENT.spec, sender="north", names=SENT.spec.names, base=SENT)


def read_answer(content: RecordDict) -> object:
    for kind in KINDS:
        try:
            return decode_answer(content, kind, "north")  # type: ignore[arg-type]
        except UserError as error:
            refused = error
    raise refused


SITE: tuple[Try, ...] = (read_job, read_adapter, content_bytes)
SERVER: tuple[Try, ...] = (read_answer, read_upload, content_bytes)


def tried(read: Try, content: RecordDict) -> tuple[str, float, int]:
    """What became of it, seconds of processor time, and bytes of memory beyond those of the message."""
    tracemalloc.reset_peak()
    before, start = tracemalloc.get_traced_memory()[0], time.process_time()
    try:
        found = read(content)
        become = "read"
        if isinstance(found, AdapterState):
            found.require_finite()
            assert found.spec.bare == (SPEC if read is read_adapter else SENT.spec).bare
    except UserError as error:
        become = "refused"
        assert 0 < len(str(error)) <= 1100 and str(error).isprintable(), str(error)
    return become, time.process_time() - start, tracemalloc.get_traced_memory()[1] - before


def bombarded(fuzzing: ModuleType, seed: int, count: int) -> Counter[str]:
    """``count`` messages, half of them at each end; a failure says how to make the message again."""
    became: Counter[str] = Counter()
    tracemalloc.start()
    try:
        for end, (corpus, reads) in enumerate(((list(instructions()), SITE), (list(answers()), SERVER))):
            fuzzer = fuzzing.Fuzzer(2 * seed + end, corpus, LIMIT)
            for number in range(count // 2):
                bent = fuzzer.next()
                where = f"message {number} of seed {2 * seed + end} ({', '.join(bent.changes)})"
                for read in reads:
                    try:
                        become, seconds, peak = tried(read, bent.content)
                    except Exception as error:
                        raise AssertionError(
                            f"{where}: {read.__name__} raised {type(error).__name__}: {error}"
                        ) from error
                    assert seconds < SECONDS, f"{where}: {read.__name__} took {seconds:.1f} s"
                    assert peak <= 2 * LIMIT, f"{where}: {read.__name__} took {peak} bytes"
                    became[f"{read.__name__} {become}"] += 1
    finally:
        tracemalloc.stop()
    return became


@pytest.fixture(autouse=True)
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every limit, as much smaller as that of a message."""
    monkeypatch.setattr(config, "_MOST_SITES", config._MOST_SITES * LIMIT // packing.LIMIT)
    monkeypatch.setattr(packing, "LIMIT", LIMIT)


def require_both(became: Counter[str]) -> None:
    """Each decoder has read some messages and refused many: a fuzzer that only makes rubbish would test nothing."""
    for read in ("read_job", "read_adapter", "read_answer", "read_upload"):
        assert became[f"{read} read"] > 0 and became[f"{read} refused"] > 0, became


def test_the_messages_that_are_bent_are_read_before_they_are_bent() -> None:
    *honest, vast = instructions()
    for content in honest[1:]:
        read_job(content), read_adapter(content)
    with pytest.raises(UserError, match="too many"):
        read_adapter(vast)
    for content in answers():
        read_answer(content)
        if "adapter" in content:
            read_upload(content)


def test_thousands_of_bent_messages_are_read_or_refused_at_once_and_within_twice_the_limit(fuzzing: ModuleType) -> None:
    require_both(bombarded(fuzzing, seed=0, count=2_000))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_500_000_bent_messages_are_read_or_refused(fuzzing: ModuleType, seed: int) -> None:
    require_both(bombarded(fuzzing, seed, 50_000))


def test_a_seed_makes_the_same_messages_again(fuzzing: ModuleType) -> None:
    corpus = list(answers())
    one, other = fuzzing.Fuzzer(7, corpus, LIMIT), fuzzing.Fuzzer(7, corpus, LIMIT)
    for _ in range(200):
        first, again = one.next(), other.next()
        assert first.changes == again.changes and repr(first.content) == repr(again.content)


def test_a_message_beyond_the_limit_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    content = list(answers())[3]
    size = sum(len(array.data) for array in content["adapter"].values())
    monkeypatch.setattr(packing, "LIMIT", size)
    with pytest.raises(UserError, match=r"north: the message is too large: \d+ bytes where at most"):
        decode_answer(content, "train", "north")


@pytest.mark.parametrize("size", [1, 300, LIMIT])
def test_a_name_of_any_length_makes_a_short_line(size: int) -> None:
    assert len(str(UserError("a\n" * size + "mend it"))) <= 1010
    assert str(UserError("a\n" * size + "mend it")).endswith("mend it")
