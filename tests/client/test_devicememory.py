"""What fits into a device's memory: estimated beforehand, halved when it was not enough, never a change of result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedgraft.client import devicememory
from fedgraft.client.devicememory import Needed, Peak, estimated, longest, room, share_device
from fedgraft.client.evaluation import evaluate
from fedgraft.client.resident import Resident, forget_all, resident
from fedgraft.client.trainer import Trained, require_memory, train
from fedgraft.core.adapter import AdapterState
from fedgraft.core.config import RunConfig
from fedgraft.core.errors import UserError, is_out_of_memory
from fedgraft.core.progress import Watch
from fedgraft.privacy.clipping import create_engine
from fedgraft.privacy.noise import RandomStream
from fedgraft.privacy.plan import PrivacyPlan

RECORDS = 40
GIB = 2**30


@pytest.fixture(autouse=True)
def fresh_models() -> Iterator[None]:
    """What was found to fit is remembered with the model."""
    forget_all()
    yield
    forget_all()
    share_device(1)


@pytest.fixture
def config(tiny_federation: Any) -> Callable[..., RunConfig]:
    def make(**changes: Any) -> RunConfig:
        return tiny_federation.config(**{"train.local_steps": 3, "train.batch_size": 16, **changes})  # type: ignore[no-any-return]

    return make


@pytest.fixture
def examples(tiny_federation: Any) -> Callable[[Resident], Any]:
    def make(model: Resident) -> Any:
        rows = tiny_federation.rows[:RECORDS]
        labels = [("class-zebra", "class-yak", "class-walrus").index(row["label"]) for row in rows]
        return model.task.encode([row["text"] for row in rows], labels, model.base.processor)

    return make


def start(model: Resident) -> AdapterState:
    """An adapter whose B is not zero, so that A has a gradient too; the same whatever was trained since."""
    fresh = model.adapter.read()
    draw = np.random.default_rng(4)
    return AdapterState(fresh.spec.bare, dict(fresh)).map(
        lambda array: draw.normal(0, 0.05, array.shape).astype(array.dtype)
    )


def plan(config: RunConfig, **changes: Any) -> PrivacyPlan:
    values: dict[str, Any] = {
        "unit": "record",
        "units": RECORDS,
        "expected_batch": config.train.batch_size,
        "clip": 0.5,
        "noise_multiplier": 1.0,
        "steps": config.train.local_steps,
        "epsilon": 50.0,
        "delta": 1e-3,
        "seeded_noise_not_private": True,
    }
    return PrivacyPlan(**{**values, **changes})


def shortage(model: Resident, monkeypatch: pytest.MonkeyPatch, at: Sequence[int], where: str) -> list[int]:
    """Let memory run out in the passes of the numbers ``at``; the list fills with the size of each pass."""
    sizes: list[int] = []
    plain = model.task.losses

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    def losses(network: Any, batch: Any) -> torch.Tensor:
        number = len(sizes)
        sizes.append(len(batch["labels"]))
        if number in at and where == "before":
            full()
        found = plain(network, batch)
        if number in at and where == "after":
            full()
        if number in at:
            found.register_hook(full)
        return found

    monkeypatch.setattr(model.task, "losses", losses)
    return sizes


def at_site(
    config: RunConfig,
    examples: Callable[[Resident], Any],
    told: list[tuple[str, int]],
    *,
    private: bool,
    groups: Sequence[np.ndarray] = tuple(np.array([i]) for i in range(RECORDS)),
    **changes: Any,
) -> Trained:
    model = resident(config)
    return train(
        model,
        start(model),
        examples(model),
        groups,
        config,
        site="north",
        round=1,
        plan=plan(config, **changes) if private else None,
        on_smaller=lambda setting, size, text: told.append((setting, size)),
    )


# When memory runs out


@pytest.mark.parametrize("where", ["before", "after", "backward"])
@pytest.mark.parametrize(("private", "engine"), [(False, "exact"), (True, "exact"), (True, "opacus")])
def test_a_step_that_runs_out_of_memory_gives_the_same_in_smaller_parts(
    config: Callable[..., RunConfig],
    examples: Any,
    monkeypatch: pytest.MonkeyPatch,
    private: bool,
    engine: str,
    where: str,
) -> None:
    """To the bit what the smaller size gives from the start, dropout and the verification of rows included."""
    changes = {"privacy.engine": engine, "method.dropout": 0.3}
    small = at_site(config(**changes, **{"train.micro_batch": 4}), examples, [], private=private)
    forget_all()
    run, told = config(**changes, **{"train.micro_batch": 8}), []
    with monkeypatch.context() as patch:
        # The second part of the first step: half of its sum was there already.
        sizes = shortage(resident(run), patch, [1], where)
        halved = at_site(run, examples, told, private=private)
    assert told == [("train.micro_batch", 4)]
    assert max(sizes[2:]) == 4 and max(sizes[:2]) == 8
    assert halved.state.digest == small.state.digest
    assert halved.loss == small.loss
    model = resident(run)
    assert all(p.grad is None and not hasattr(p, "grad_sample") for p in model.adapter.trainables().values())
    # The next training begins with what was found.
    again = at_site(run, examples, told, private=private)
    assert again.state.digest == small.state.digest
    assert len(told) == 1


@pytest.mark.parametrize("private", [False, True])
def test_a_later_step_goes_on_from_where_the_earlier_ones_came(
    config: Callable[..., RunConfig], examples: Any, monkeypatch: pytest.MonkeyPatch, private: bool
) -> None:
    run, told = config(**{"train.micro_batch": 40}), []
    whole = at_site(run, examples, [], private=private)
    with monkeypatch.context() as patch:
        shortage(resident(run), patch, [1, 2, 3], "backward")
        parts = at_site(run, examples, told, private=private)
    sizes = [size for _, size in told]
    assert len(sizes) == 3 and sizes[1:] == [sizes[0] // 2, sizes[0] // 4]
    gap = max(float(np.abs(parts.state[name] - whole.state[name]).max()) for name in whole.state)
    assert 0 < gap < 1e-6


@pytest.mark.parametrize("private", [False, True])
def test_when_one_example_is_too_much_the_error_says_the_mend(
    config: Callable[..., RunConfig], examples: Any, monkeypatch: pytest.MonkeyPatch, private: bool
) -> None:
    run, told = config(**{"train.micro_batch": 8}), []
    before = at_site(run, examples, [], private=private)
    with monkeypatch.context() as patch:
        shortage(resident(run), patch, range(99), "after")
        with pytest.raises(UserError) as caught:
            at_site(run, examples, told, private=private)
    assert [size for _, size in told] == [4, 2, 1]
    assert str(caught.value) == (
        "out of memory on cpu with a single example; set train.gradient_checkpointing = true, choose a shorter "
        "task.max_length (now 32), a smaller model or another train.device"
    )
    forget_all()
    assert at_site(run, examples, [], private=private).state.digest == before.state.digest


def test_a_units_records_stay_together_however_small_the_batch(
    config: Callable[..., RunConfig], examples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = [np.arange(at, at + 5) for at in range(0, RECORDS, 5)]
    values = {"unit": "patient", "units": len(groups), "records_per_patient": 5, "expected_batch": 6}
    run, told = config(**{"train.micro_batch": 20, "train.batch_size": 6}), []
    small = config(**{"train.micro_batch": 10, "train.batch_size": 6})
    want = at_site(small, examples, [], private=True, groups=groups, **values)
    forget_all()
    sizes = shortage(resident(run), monkeypatch, [0], "after")
    got = at_site(run, examples, told, private=True, groups=groups, **values)
    assert told == [("train.micro_batch", 10)]
    assert sizes[0] == 20 and all(size % 5 == 0 for size in sizes)
    assert got.state.digest == want.state.digest


@pytest.mark.parametrize("engine", ["exact", "opacus"])
def test_what_is_dropped_leaves_no_trace(lab: Any, engine: str) -> None:
    case = ("bert", "sequence-classification", "lora")
    adapter = lab.double(case)
    first, second = lab.records(*case[:2], (3, 5, 2)), lab.records(*case[:2], (4, 1), seed=7)
    rows = lab.rows(adapter, case, second)
    clip = float(rows.norm(dim=1).mean())
    with create_engine(engine, adapter.model, adapter.trainables(), clip) as made:
        lab.add(made, adapter, case, second, scale=(1.0, float("nan")))
        made.release(0.0, 1.0, RandomStream.seeded_not_private("drop"))
        assert made.skipped == 1
        # One batch is in the sum, with a row that was left out; the forward pass of another broke off.
        lab.add(made, adapter, case, first, scale=(1.0, float("inf"), 1.0))
        made.expect(2)
        lab.losses(adapter.model, lab.batch(*case[:2], second))
        made.drop()
        assert (made.skipped, made.within, made.over) == (1, 0, 0)
        lab.add(made, adapter, case, second)
        assert made.within + made.over == 2
        made.release(0.0, 1.0, RandomStream.seeded_not_private("drop"))
        lab.close(lab.flat(adapter.trainables()), lab.clipped(rows, clip))


@pytest.mark.parametrize("engine", ["exact", "opacus"])
def test_a_rehearsal_verifies_and_adds_nothing(lab: Any, engine: str) -> None:
    case = ("bert", "sequence-classification", "lora")
    adapter = lab.double(case)
    records = lab.records(*case[:2], (3, 5))
    with create_engine(engine, adapter.model, adapter.trainables(), 1.0) as made:
        made.expect(2)
        made.rehearse(lab.losses(adapter.model, lab.batch(*case[:2], records)))
        assert not made._verified and (made.within, made.over) == (0, 0)
        made.release(0.0, 1.0, RandomStream.seeded_not_private("rehearsed"))
        assert not lab.flat(adapter.trainables()).any()
    with create_engine(engine, adapter.model, adapter.trainables(), 1.0) as made:
        assert not made._verified, "rows that were never checked are taken for checked"


def test_an_evaluation_that_runs_out_of_memory_scores_the_same(
    config: Callable[..., RunConfig], examples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config(**{"evaluate.batch_size": 16})
    model = resident(run)
    state, records = start(model), examples(model)
    want = evaluate(model, state, records, config(**{"evaluate.batch_size": 8}))
    plain, sizes, told = model.task.counts, [], []

    def counts(network: Any, batch: Any) -> Any:
        sizes.append(len(batch["labels"]))
        if len(sizes) == 2:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )
        return plain(network, batch)

    monkeypatch.setattr(model.task, "counts", counts)
    for _ in range(2):
        got = evaluate(model, state, records, run, on_smaller=lambda *values: told.append(values[:2]))
        assert np.array_equal(got.correct, want.correct)
        assert np.array_equal(got.loss_sum, want.loss_sum)
    assert told == [("evaluate.batch_size", 8)]
    assert sizes == [16, 16, *[8] * 5, *[8] * 5]


def test_a_run_that_runs_out_of_memory_spends_each_step_once(
    tiny_federation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same adapter as with smaller parts, one release a step, and a person is told once."""
    changes = {"rounds": 2, "privacy.seeded_noise_not_private": True, "privacy.noise_multiplier": 2.0}
    small = tiny_federation.run(tiny_federation.private(**changes, **{"train.micro_batch": 4}), tmp_path / "small")
    forget_all()
    run = tiny_federation.private(**changes, **{"train.micro_batch": 8})
    notes: list[str] = []

    class Noting(Watch):
        def note(self, text: str) -> None:
            notes.append(text)

    releases = 0
    plain = RandomStream.normal_like

    def counted(self: RandomStream, tensor: torch.Tensor) -> torch.Tensor:
        nonlocal releases
        releases += 1
        return plain(self, tensor)

    monkeypatch.setattr(RandomStream, "normal_like", counted)
    shortage(resident(run), monkeypatch, [1], "backward")
    halved = tiny_federation.run(run, tmp_path / "halved", watch=Noting())
    assert halved["digest"] == small["digest"]
    assert halved["execution"]["smaller"] == {"train.micro_batch": 4} and "smaller" not in small["execution"]
    assert [text for text in notes if "memory" in text] == [
        "site east: out of memory on cpu: train.micro_batch is 4 from now on instead of 8; the batch stays what it is"
    ]
    steps = 3 * run.rounds * run.train.local_steps
    assert releases == steps
    for name in run.site_names:
        (file,) = (tmp_path / "halved" / "sites" / name / "ledgers").glob("*.jsonl")
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        settled = [line["steps"] for line in lines if line["kind"] == "settle" and line["outcome"] == "released"]
        assert sum(settled[:2]) == run.rounds * run.train.local_steps
        assert not [line for line in lines if line.get("outcome") == "failed"]


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (UserError("out of memory"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_running_out_of_memory_is_told_from_other_errors(error: BaseException, full: bool) -> None:
    assert is_out_of_memory(error) is full


def test_what_this_machine_really_says_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**45)
    assert is_out_of_memory(caught.value)


def test_another_error_passes_as_it_is(
    config: Callable[..., RunConfig], examples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config()

    def broken(*_: Any) -> Any:
        raise RuntimeError("shapes")

    monkeypatch.setattr(resident(run).task, "losses", broken)
    with pytest.raises(RuntimeError, match=r"^shapes$"):
        at_site(run, examples, [], private=False)


# Before the first step


def test_the_peak_counts_every_storage_once_and_until_its_end() -> None:
    there = torch.ones(1000)
    with Peak() as peak:
        a = there * 2
        assert (peak.now, peak.most) == (4000, 4000)
        b, c = a.view(10, 100), there[:500]
        a.add_(1.0)
        assert peak.now == 4000, "views and what happens in place take nothing, nor does what was there"
        d = torch.cat([a, a])
        assert peak.now == 12_000
        del a
        assert peak.now == 12_000, "a view keeps its storage"
        del b, c, d
        assert (peak.now, peak.most) == (0, 12_000)


def naive(call: Callable[[], torch.Tensor]) -> tuple[int, torch.Tensor]:
    """The bytes that autograd keeps, by its own hooks, each storage once."""
    kept: dict[int, int] = {}
    held = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = call()
    return sum(kept.values()), result


def test_the_peak_is_no_less_than_what_autograd_keeps() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(64, 32), torch.randn(32, 32, requires_grad=True)

    def forward() -> torch.Tensor:
        return ((x @ w).tanh() @ w).exp().sum()

    kept, _ = naive(forward)
    with Peak() as peak:
        forward().backward()
    there = x.nbytes + w.nbytes
    assert kept - there <= peak.most <= 2 * (kept - there) + 4 * w.nbytes


@pytest.mark.parametrize("private", [False, True])
def test_what_a_batch_takes_grows_by_the_example(
    config: Callable[..., RunConfig], examples: Any, monkeypatch: pytest.MonkeyPatch, private: bool
) -> None:
    """The estimate from one and two examples is the peak of 24, to 2 %, slack left aside."""
    run = config(**{"task.max_length": 32})
    model = resident(run)
    rehearsal: list[Callable[[list[Any]], None]] = []
    monkeypatch.setattr(
        "fedgraft.client.trainer.require_room", lambda m, e, c, rehearse, *_, **__: rehearsal.append(rehearse)
    )
    require_memory(model, examples(model), run, private=private, on_smaller=lambda *_: None)
    example = longest(examples(model), 32)
    monkeypatch.setattr(devicememory, "_SLACK", {"cpu": 1.0})
    needed = estimated(lambda count: rehearsal[0]([example] * count), 0, torch.device("cpu"))
    with Peak() as peak:
        rehearsal[0]([example] * 24)
    assert needed.of(24) == pytest.approx(peak.most, rel=0.02)
    assert peak.now == 0 and all(p.grad is None for p in model.adapter.trainables().values())


def test_a_text_counts_as_long_as_it_may_be() -> None:
    some = [{"ids": [5, 6, 7], "length": 3, "label": 1}, {"ids": [9], "length": 1, "label": 0}]
    assert longest(some, 8) == {"ids": [5, 6, 7, 5, 6, 7, 5, 6], "length": 8, "label": 1}
    assert longest([{"image": "a", "length": 1}], 8) == {"image": "a", "length": 1}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Have so many bytes free, and nothing pass as obviously small."""

    def free(count: float) -> None:
        monkeypatch.setattr(devicememory, "room", lambda device: count)
        monkeypatch.setattr(devicememory, "_at_most", lambda *_: float("inf"))

    return free


@pytest.mark.parametrize("private", [False, True])
def test_a_plan_that_is_too_large_is_cut_down_before_the_first_step(
    config: Callable[..., RunConfig], examples: Any, monkeypatch: pytest.MonkeyPatch, measured: Any, private: bool
) -> None:
    small = at_site(config(**{"train.micro_batch": 5}), examples, [], private=private)
    forget_all()
    run, seen = config(**{"train.micro_batch": 16}), []
    plain = estimated
    monkeypatch.setattr(devicememory, "estimated", lambda *args: seen.append(plain(*args)) or seen[-1])
    measured(10 * GIB)
    at_site(run, examples, [], private=private)
    (needed,) = seen
    assert needed.each > 10_000
    forget_all()
    measured(needed.of(5) + needed.each / 2)
    told: list[tuple[str, int]] = []
    cut = at_site(run, examples, told, private=private)
    assert told == [("train.micro_batch", 5)]
    assert cut.state.digest == small.state.digest
    # Looked at once, whatever follows.
    at_site(run, examples, told, private=private)
    assert len(seen) == 2 and len(told) == 1


@pytest.mark.parametrize("private", [False, True])
def test_a_plan_that_cannot_fit_is_refused_with_what_it_needs_and_what_there_is(
    config: Callable[..., RunConfig], examples: Any, measured: Any, private: bool
) -> None:
    run = config()
    measured(30_000)
    with pytest.raises(UserError) as caught:
        require_memory(resident(run), examples(resident(run)), run, private=private, on_smaller=lambda *_: None)
    text = str(caught.value)
    assert text.startswith("training needs 0.00") and " GiB on cpu for a single example at a time, there are " in text
    assert "2.8e-05; set train.gradient_checkpointing = true, choose a shorter task.max_length (now 32)" in text


def test_a_run_that_cannot_fit_never_begins(tiny_federation: Any, tmp_path: Path, measured: Any) -> None:
    measured(30_000)
    run = tiny_federation.private(**{"privacy.seeded_noise_not_private": True})
    with pytest.raises(UserError, match=r"^site east: training needs .* GiB on cpu for a single example"):
        tiny_federation.run(run, tmp_path / "run")
    assert not list(tmp_path.rglob("*.jsonl")) or not list(tmp_path.rglob("ledgers"))


def test_a_model_whose_rehearsal_runs_out_of_memory_is_refused(
    config: Callable[..., RunConfig], examples: Any, monkeypatch: pytest.MonkeyPatch, measured: Any
) -> None:
    run = config()
    measured(GIB)
    shortage(resident(run), monkeypatch, [0], "after")
    with pytest.raises(UserError, match=r"^training needs 2 GiB on cpu for a single example at a time, there are 1; "):
        require_memory(resident(run), examples(resident(run)), run, private=False, on_smaller=lambda *_: None)


def test_a_patients_records_must_fit_together(
    config: Callable[..., RunConfig], examples: Any, monkeypatch: pytest.MonkeyPatch, measured: Any
) -> None:
    run = config(**{"privacy.unit": "patient", "privacy.records_per_patient": 6})
    monkeypatch.setattr(devicememory, "estimated", lambda *_: Needed(0, GIB))
    measured(5.5 * GIB)
    model = resident(run)
    with pytest.raises(UserError, match=r"needs 6 GiB on cpu for the 6 examples of privacy\.records_per_patient at"):
        require_memory(model, examples(model), run, private=True, on_smaller=lambda *_: None)
    require_memory(model, examples(model), run, private=False, on_smaller=lambda *_: None)


def test_what_is_obviously_small_is_not_measured(
    config: Callable[..., RunConfig], examples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(devicememory, "estimated", never)
    at_site(config(), examples, [], private=False)


@pytest.mark.parametrize(
    "case", [("bert", "lora"), ("gpt2", "lora"), ("llama", "dora"), ("t5", "lora"), ("bert", "ln")]
)
def test_what_passes_as_small_without_a_pass_takes_no_less_than_it_does(
    lab: Any, tiny_federation: Any, case: tuple[str, str]
) -> None:
    family, method = case
    task = "sequence-classification"
    adapter = lab.attach(family, task, method)
    config = tiny_federation.config(**{"train.micro_batch": 6, "method.virtual_tokens": 3})
    held = Resident(lab.base(family, task), lab.task(task), adapter, torch.device("cpu"))
    records = [longest(lab.records(family, task, (9,)), 32)] * 6
    trained = sum(p.numel() for p in adapter.trainables().values())
    with create_engine("exact", adapter.model, adapter.trainables(), 1.0) as made, Peak() as peak:
        made.expect(6)
        made.rehearse(lab.losses(adapter.model, lab.batch(family, task, records)))
    most = devicememory._at_most(held, config, trained)
    assert peak.most < most < 40 * peak.most


def test_the_processes_of_a_device_share_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    class Free:
        available = 10 * GIB

    monkeypatch.setattr(devicememory.psutil, "virtual_memory", lambda: Free)
    monkeypatch.setattr(devicememory, "_group_allows", lambda: float("inf"))
    cpu = torch.device("cpu")
    assert room(cpu) == pytest.approx(9 * GIB)
    share_device(3)
    assert room(cpu) == pytest.approx(3 * GIB)
    monkeypatch.setattr(devicememory, "_group_allows", lambda: 5 * GIB)
    assert room(cpu) == pytest.approx(1.5 * GIB)


def test_the_limit_of_a_container_counts(tmp_path: Path) -> None:
    (tmp_path / "memory.stat").write_text("anon 1000\nfile 999999\n")
    (tmp_path / "memory.max").write_text("5000\n")
    assert devicememory._group_allows(tmp_path) == 4000
    (tmp_path / "memory.max").write_text("max\n")
    assert devicememory._group_allows(tmp_path) == float("inf")
    assert devicememory._group_allows(tmp_path / "none") == float("inf")


_MEASURE = """
import json, resource, sys
import psutil, torch
torch.set_num_threads(1)
from fedgraft.client import devicememory, trainer
from fedgraft.client.resident import resident
from fedgraft.core.config import parse_config
config = parse_config(json.loads(sys.argv[1]))
private, count = sys.argv[2] == "private", int(sys.argv[3])
found = []
trainer.require_room = lambda *args, **named: found.append(args[3])
model = resident(config)
trainer.require_memory(model, [], config, private=private, on_smaller=print)
example = {"ids": [5] * config.task.max_length, "length": config.task.max_length, "label": 0}
rehearse = lambda many: found[0]([example] * many)
rehearse(1)
devicememory._SLACK = {"cpu": 1.0}
told = devicememory.estimated(rehearse, 0, model.device).of(count)
before = psutil.Process().memory_info().rss
rehearse(count)
print(json.dumps([told, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measures as Linux does")
@pytest.mark.parametrize("private", [False, True])
def test_the_estimate_is_what_the_process_grows_by(tiny_federation: Any, private: bool) -> None:
    """Within 20 % where glibc gives back what was freed, and below estimate times slack where it does not."""
    values = tiny_federation.values(**{"train.micro_batch": 2000, "task.max_length": 64})
    command = [sys.executable, "-c", _MEASURE, json.dumps(values), "private" if private else "plain", "2000"]
    grown = {}
    for name, more in (("exact", {"MALLOC_MMAP_THRESHOLD_": "65536"}), ("usual", {})):
        done = subprocess.run(command, env={**os.environ, **more}, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        told, grown[name] = json.loads(done.stdout.splitlines()[-1])
    assert told > 100e6, "too little to be seen among all else"
    assert grown["exact"] == pytest.approx(told, rel=0.2)
    assert grown["usual"] < devicememory._SLACK["cpu"] * told
