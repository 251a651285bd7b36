"""Sites that train in one come out as each does alone, and what goes wrong with one stays with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedgraft.client.cohort import CannotShareError, Cohort, Decision, fitting, heap, train_in_one, training, why_alone
from fedgraft.client.cohort import decision as deciding
from fedgraft.client.cohort.fitting import fitting_groups
from fedgraft.client.cohort.student import Student
from fedgraft.client.resident import resident
from fedgraft.client.together import train_together
from fedgraft.client.trainer import Lesson, Trained
from fedgraft.core.adapter import AdapterSpec, AdapterState
from fedgraft.core.errors import UserError
from fedgraft.privacy.plan import PrivacyPlan
from fedgraft.privacy.sampling import group_by_unit
from fedgraft.strategies import LocalRule, Training

LABELS = ("class-zebra", "class-yak", "class-walrus")
#: Records of each site.
SIZES = (40, 31, 40, 25)
Make = Callable[..., list[Lesson]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Rounding hangs on how a product is shared among threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def lessons(tiny_federation: Any) -> Make:
    def make(
        *,
        private: bool = False,
        sizes: Sequence[int] = SIZES,
        plan: dict[str, Any] | None = None,
        spread: float = 0.05,
        **changes: Any,
    ) -> list[Lesson]:
        """The trainings of several sites with records and values of their own."""
        config = tiny_federation.config(**{"train.batch_size": 8, "train.momentum": 0.5, **changes})
        model = resident(config)
        start = model.adapter.read().with_spec(model.adapter.fresh)
        made, at = [], 0
        for site, size in enumerate(sizes):
            rows = tiny_federation.rows[at : at + size]
            at += size
            labels = [LABELS.index(row["label"]) for row in rows]
            own = shaken(start, spread, seed=site)
            values = {"unit": "record", "units": size, "expected_batch": 8, "clip": 0.5 + site, "noise_multiplier": 1.0}
            values |= {"steps": 30, "epsilon": 1e6, "delta": 1e-3, "seeded_noise_not_private": True, **(plan or {})}
            keys = [str(number % 12) for number in range(size)] if values["unit"] == "patient" else None
            groups = group_by_unit(keys, size)
            made.append(
                Lesson(
                    model,
                    own,
                    model.task.encode([row["text"] for row in rows], labels, model.base.processor),
                    groups,
                    config,
                    site=f"s{site}",
                    round=2,
                    plan=PrivacyPlan(**{**values, "units": len(groups)}) if private else None,
                    keys=[str(number).encode() for number in range(len(groups))],
                )
            )
        return made

    return make


def shaken(state: AdapterState, spread: float, seed: int) -> AdapterState:
    """``state`` with other values for what trains."""
    draw, frozen = np.random.default_rng(seed), state.spec.select("freeze")
    moved = {n: a + spread * draw.standard_normal(a.shape).astype(a.dtype) for n, a in state.items()}
    return AdapterState(state.spec, {**moved, **{name: state[name] for name in frozen}})


def gap(one: AdapterState, other: AdapterState) -> float:
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def trained(results: Sequence[Trained | Exception]) -> list[Trained]:
    found = []
    for result in results:
        assert isinstance(result, Trained), result
        found.append(result)
    return found


def hold(made: Sequence[Lesson], results: Sequence[Trained | Exception] | None = None) -> None:
    """Each site's adapter, loss and clip are those of its training alone, and training has moved it."""
    together = trained(train_in_one(made) if results is None else results)
    for lesson, got in zip(made, together, strict=True):
        want = lesson.train()
        assert gap(got.state, want.state) <= 1e-6
        assert gap(got.state, lesson.state) > 1e-3
        assert (got.steps, got.state.spec) == (want.steps, want.state.spec)
        assert got.loss == pytest.approx(want.loss, rel=1e-5) if want.loss is not None else got.loss is None
        assert got.clip == pytest.approx(want.clip, rel=1e-6) if want.clip is not None else got.clip is None


SETTINGS: dict[str, dict[str, Any]] = {
    "sgd": {"train.momentum": 0.9, "train.weight_decay": 0.1},
    "adamw": {"train.optimizer": "adamw", "train.lr": 0.01, "train.weight_decay": 0.1},
    "schedule": {"train.schedule": "cosine", "train.warmup_steps": 5, "rounds": 4},
    "micro": {"train.micro_batch": 3},
    "bf16": {"train.precision": "bf16"},
    "large": {"train.batch_size": 30},
}


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_whatever_the_optimiser_sites_train_in_one_as_alone(lessons: Make, name: str, private: bool) -> None:
    hold(lessons(private=private, **SETTINGS[name]))


METHODS = [
    *("dora", "ia3"),
    *[pytest.param(name, marks=pytest.mark.slow) for name in ("bitfit", "ln", "lora-sb", "prefix", "prompt", "ravan")],
]


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_whatever_the_method_sites_train_in_one_as_alone(lessons: Make, method: str, private: bool) -> None:
    hold(lessons(private=private, sizes=(20, 15, 20), **{"method.name": method, "train.local_steps": 2}))


def test_on_one_thread_the_adapters_are_the_same_to_the_bit(lessons: Make) -> None:
    for private in (False, True):
        made = lessons(private=private)
        for lesson, got in zip(made, trained(train_in_one(made)), strict=True):
            assert got.state.digest == lesson.train().state.digest


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    batch=st.integers(1, 12),
    micro=st.integers(1, 12),
)
def test_sites_may_be_of_any_size(lessons: Make, sizes: list[int], batch: int, micro: int) -> None:
    made = lessons(sizes=sizes, **{"train.batch_size": batch, "train.micro_batch": micro, "train.local_steps": 2})
    for lesson, got in zip(made, trained(train_in_one(made)), strict=True):
        assert gap(got.state, lesson.train().state) <= 1e-6


def test_the_gradient_norm_is_limited_in_each_site(lessons: Make) -> None:
    hold(lessons(**{"train.max_grad_norm": 0.05}))
    free, limited = (trained(train_in_one(lessons(**{"train.max_grad_norm": most}))) for most in (0.0, 0.05))
    assert all(gap(a.state, b.state) > 1e-3 for a, b in zip(free, limited, strict=True))


@pytest.mark.parametrize("kind", ["mean", "sum"])
def test_patients_are_sampled_and_clipped_in_their_own_site(lessons: Make, kind: str) -> None:
    plan = {"unit": "patient", "records_per_patient": 3, "patient_gradient": kind, "expected_batch": 5}
    hold(lessons(private=True, plan=plan))


def test_each_site_adapts_its_own_clip(lessons: Make) -> None:
    made = lessons(private=True, plan={"clip_quantile": 0.5, "clip_rate": 0.5})
    made[1] = replace(made[1], clip=0.02)
    hold(made)
    assert len({result.clip for result in trained(train_in_one(made))}) == len(made)


@pytest.mark.parametrize("plan", [{"sampler": "truncated_poisson", "max_batch": 9}, {"sampler": "cyclic"}])
def test_each_site_samples_as_its_plan_says(lessons: Make, plan: dict[str, Any]) -> None:
    hold(lessons(private=True, sizes=(40, 32, 40, 24), plan=plan))


def test_an_empty_sample_still_releases_its_noise(lessons: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    plain = Student.begin

    def counting(self: Student, step: int, size: int) -> Any:
        micros = plain(self, step, size)
        drawn.append(sum(len(micro.examples) for micro in micros))
        return micros

    monkeypatch.setattr(Student, "begin", counting)
    hold(lessons(private=True, plan={"expected_batch": 1}))
    assert drawn.count(0) >= 2


def test_unseeded_noise_is_each_sites_own(lessons: Make) -> None:
    made = lessons(private=True, spread=0.0, plan={"seeded_noise_not_private": False, "expected_batch": 1})
    one, other = (trained(train_in_one(made)) for _ in range(2))
    moves = [result.state - lesson.state for result, lesson in zip([*one, *other], [*made, *made], strict=True)]
    for at, move in enumerate(moves):
        assert all(abs(move.dot(each)) < 0.5 * move.norm() * each.norm() for each in moves[at + 1 :])


def test_sites_draw_from_the_keys_that_they_are_given(lessons: Make) -> None:
    made = lessons(private=True, plan={"seeded_noise_not_private": False})
    hold([replace(lesson, key=bytes([at]) * 32) for at, lesson in enumerate(made)])
    one, other = (replace(made[0], key=key).train().state for key in (bytes(32), bytes([1]) * 32))
    assert gap(one, other) > 1e-3


def test_one_site_is_a_cohort_too(lessons: Make) -> None:
    hold(lessons(sizes=(30,)))
    hold(lessons(sizes=(30,), private=True))


def test_sites_may_take_unequal_steps(lessons: Make) -> None:
    made = lessons(**{"train.schedule": "linear"})
    for place, steps in ((1, 1), (2, 5)):
        train = made[place].config.train.model_copy(update={"local_steps": steps})
        made[place] = replace(made[place], config=made[place].config.model_copy(update={"train": train}))
    assert fitting_groups(made) == [[0, 1, 2, 3]]
    hold(made)


def test_steps_and_losses_are_told_as_they_are_alone(lessons: Make) -> None:
    told: list[tuple[str, int, float | None]] = []

    def telling(lesson: Lesson) -> Lesson:
        return replace(lesson, on_step=lambda step, loss: told.append((lesson.site, step, loss)))

    made = [telling(lesson) for lesson in lessons()]
    train_in_one(made)
    together, told[:] = list(told), []
    for lesson in made:
        lesson.train()
    assert [(site, step) for site, step, _ in sorted(together)] == [(site, step) for site, step, _ in sorted(told)]
    for (_, _, got), (_, _, want) in zip(sorted(together), sorted(told), strict=True):
        assert got == pytest.approx(want, rel=1e-5)
    # Each step of all sites before the next.
    assert [step for _, step, _ in together] == [step for step in (1, 2, 3) for _ in made]


# Strategies' rules


class Halving(LocalRule):
    """Half of the gradient, and a pull to where it began."""

    def direction(self, name: str, gradient: Any, value: Any, start: Any, step: int) -> Any:
        return 0.5 * gradient + 0.1 * (value - start)


class InTurn(LocalRule):
    """A in one step, all else in the next; ``late`` begins with the others."""

    late = False

    def trains(self, spec: AdapterSpec, step: int) -> Collection[str] | None:
        first = step % 2 == (1 if self.late else 0)
        return [name for name in spec.bare.names if ("lora_A" in name) == first]


class Late(InTurn):
    late = True


class Dying(LocalRule):
    def trains(self, spec: AdapterSpec, step: int) -> Collection[str] | None:
        if step == 1:
            raise UserError("died")
        return None


def rule(kind: type[LocalRule], lesson: Lesson) -> Lesson:
    return replace(lesson, rule=kind(Training(lesson.site, lesson.round, 3, 0.1), {}))


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize(
    "kinds",
    [(Halving,) * 4, (InTurn,) * 4, (InTurn, Late, Halving, None)],
    ids=["direction", "in turn", "each its own"],
)
def test_each_site_keeps_to_its_rule(lessons: Make, kinds: Sequence[type[LocalRule] | None], private: bool) -> None:
    made = lessons(private=private, **{"train.max_grad_norm": 0.0 if private else 0.5})
    hold([lesson if kind is None else rule(kind, lesson) for kind, lesson in zip(kinds, made, strict=True)])


@pytest.mark.parametrize("private", [False, True])
def test_a_site_that_dies_in_the_middle_ends_alone(lessons: Make, private: bool) -> None:
    made = lessons(private=private)
    results = train_in_one([made[0], rule(Dying, made[1]), *made[2:]])
    assert isinstance(results[1], UserError) and str(results[1]) == "died"
    hold([made[0], *made[2:]], [results[0], *results[2:]])


# What goes wrong


@pytest.mark.parametrize("private", [False, True])
def test_a_site_that_diverges_is_named_and_touches_nobody(lessons: Make, private: bool) -> None:
    made = lessons(private=private)
    odd = {name: np.full_like(array, np.nan) for name, array in made[2].state.items()}
    made[2] = replace(made[2], state=AdapterState(made[2].state.spec, odd))
    results = train_in_one(made)
    assert isinstance(results[2], UserError) and "training diverged in round 2" in str(results[2])
    rest = [0, 1, 3]
    hold([made[place] for place in rest], [results[place] for place in rest])


def test_a_site_whose_record_cannot_be_read_ends_alone(lessons: Make) -> None:
    made = lessons()
    broken = [{**example, "label": None} for example in made[1].examples]
    results = train_in_one([made[0], replace(made[1], examples=broken), *made[2:]])
    assert isinstance(results[1], TypeError | RuntimeError)
    hold([made[0], *made[2:]], [results[0], *results[2:]])


def test_the_model_serves_the_next_as_if_nothing_had_been(lessons: Make) -> None:
    made = lessons()
    want = made[0].train().state
    train_in_one([made[0], rule(InTurn, made[1])])
    model = made[0].resident.adapter
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.trainables().values())
    assert all(np.isfinite(array).all() for array in model.read().values())
    assert made[0].train().state == want


def test_a_model_that_mixes_its_examples_trains_one_site_after_another(
    lessons: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = lessons()
    task = made[0].resident.task
    plain = type(task).losses

    def mixing(self: Any, model: Any, batch: Any) -> torch.Tensor:
        return plain(self, model, batch) * len(batch["labels"])

    monkeypatch.setattr(type(task), "losses", mixing)
    monkeypatch.setattr(training, "_checked", type(training._checked)())
    monkeypatch.setattr(fitting, "_unfit", type(fitting._unfit)())
    with pytest.raises(CannotShareError, match="others than alone"):
        train_in_one(made)
    assert "others than alone" in why_alone(made[0])
    hold(made, train_together(made, Cohort()))


def test_memory_that_runs_out_leaves_each_to_itself(lessons: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made = lessons()
    plain = training._Cohort._pass

    def full(self: Any, micros: Any) -> None:
        if len(micros) > 1:
            raise torch.OutOfMemoryError("out of memory")
        plain(self, micros)

    monkeypatch.setattr(training._Cohort, "_pass", full)
    hold(made, train_together(made, Cohort()))
    assert why_alone(made[0]) == ""


def test_a_pass_holds_no_more_than_memory_allows(lessons: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made = lessons(**{"train.batch_size": 8, "train.micro_batch": 8})
    rows: list[int] = []
    plain = training._Cohort._pass

    def counting(self: Any, micros: Any) -> None:
        rows.append(sum(len(micro.examples) for micro in micros))
        plain(self, micros)

    monkeypatch.setattr(training._Cohort, "_pass", counting)
    train_in_one(made)  # what a pass takes is known now
    monkeypatch.setattr(training, "_PASS", 1)
    rows.clear()
    hold(made)
    assert max(rows) == 8


# Which sites fit together


WHY: dict[str, tuple[dict[str, Any], str]] = {
    "fp16": ({"train.precision": "fp16"}, "loss"),
    "checkpointing": ({"train.gradient_checkpointing": True}, "second time"),
    "base dropout": ({"train.base_dropout": True}, "dropout"),
    "dropout": ({"method.dropout": 0.1}, "dropout"),
}


@pytest.mark.parametrize("name", WHY)
def test_what_cannot_be_shared_says_why(lessons: Make, name: str) -> None:
    changes, why = WHY[name]
    made = lessons(sizes=(20, 20), **changes)
    assert why in why_alone(made[0])
    assert fitting_groups(made) == [[0], [1]]


def test_another_engine_and_correlated_noise_say_why(lessons: Make) -> None:
    made = lessons(private=True, plan={"bands": 2, "expected_batch": 4})
    assert made[0].plan is not None
    noisy = replace(made[0], noise=made[0].plan.correlated(bytes(32)))
    assert "correlated noise" in why_alone(noisy)
    assert "opacus" in why_alone(lessons(private=True, **{"privacy.engine": "opacus"})[0])
    assert why_alone(lessons(private=True)[0]) == ""


def test_sites_whose_frozen_tensors_differ_train_apart(lessons: Make) -> None:
    made = lessons(**{"method.name": "lora-sb"})
    frozen = made[1].state.spec.select("freeze")
    other = {name: made[1].state[name] + np.float32(1.0) for name in frozen}
    made[1] = replace(made[1], state=AdapterState(made[1].state.spec, {**made[1].state, **other}))
    assert fitting_groups(made) == [[0, 2, 3], [1]]
    hold(made, train_together(made, Cohort()))


def test_sites_with_and_without_privacy_train_apart(lessons: Make) -> None:
    made = [*lessons(private=True)[:2], *lessons()[2:]]
    assert fitting_groups(made) == [[0, 1], [2, 3]]
    hold(made, train_together(made, Cohort()))


def test_no_more_train_in_one_than_asked_for(lessons: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[list[str]] = []

    def watched(some: Sequence[Lesson]) -> list[Trained | Exception]:
        groups.append([lesson.site for lesson in some])
        return train_in_one(some)

    monkeypatch.setattr("fedgraft.client.together.train_in_one", watched)
    made = lessons()
    hold(made, train_together(made, Cohort(3)))
    assert groups == [["s0", "s1", "s2"]]
    hold(made, train_together(made, Cohort(1)))
    assert len(groups) == 1


# What a measurement decides


def timed(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int], float]) -> list[int]:
    """Have rehearsals take what ``seconds`` says; the sizes as they are rehearsed."""
    rehearse, sizes = deciding._rehearse, []

    def rehearsed(lessons: Sequence[Lesson], size: int) -> tuple[float, list[AdapterState]]:
        sizes.append(size)
        return seconds(size), rehearse(lessons, size)[1]

    monkeypatch.setattr(deciding, "_rehearse", rehearsed)
    return sizes


def test_the_fastest_size_is_taken_where_the_bits_are_the_same(lessons: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, lambda size: {1: 0.010, 2: 0.007, 4: 0.004}[size])
    cohort = Cohort(0)
    told: list[Decision] = []
    cohort.on_decision = told.append
    made = lessons(rounds=1000)
    assert cohort.most > 1
    hold(made, train_together(made, cohort))
    assert told == [cohort.decision]
    assert cohort.decision is not None and cohort.most == 4
    assert cohort.decision.text == "cohort 4: 2.5 times as fast as one after another, same bits"
    assert dict(cohort.decision.steps) == {1: 0.010, 2: 0.007, 4: 0.004}
    hold(made, train_together(made, cohort))
    assert len(told) == 1


def test_what_is_hardly_faster_is_not_taken(lessons: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, lambda size: {1: 0.010, 2: 0.0098, 4: 0.0095}[size])
    found = deciding.measured(lessons(rounds=1000))
    assert (found.size, found.same) == (1, True)
    assert found.text.startswith("cohort 1: several sites in one pass are 1.05 times as fast")


def test_other_bits_are_never_taken_however_fast(lessons: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, lambda size: 0.01 / size)
    plain = train_in_one

    def rounded(some: Sequence[Lesson]) -> list[Trained | Exception]:
        return [replace(result, state=result.state * (1 + 1e-6)) for result in trained(plain(some))]

    monkeypatch.setattr(deciding, "train_in_one", rounded)
    found = deciding.measured(lessons(rounds=100))
    assert (found.size, found.same) == (1, False)
    assert "round otherwise" in found.text


def test_a_short_run_pays_for_a_short_measurement_or_none(lessons: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = timed(monkeypatch, lambda size: 0.01 / size)
    config = lessons()[0].config
    # A twentieth of the steps that are left; two sites take two steps together and two alone, each.
    rounds = math.ceil(8 / (0.05 * len(config.site_names) * config.train.local_steps))
    found = deciding.measured(lessons(rounds=rounds))
    assert (found.size, found.why) == (1, "too little is left to train for a measurement to pay")
    assert sizes == [1, 1]
    assert deciding.measured(lessons(rounds=rounds + 1)).size == 2
    assert sizes[2:6] == [1, 1, 2, 1]
    assert deciding.measured(lessons(rounds=2 * rounds + 1)).size == 4


def test_where_one_site_keeps_a_processor_busy_nothing_more_is_measured(
    lessons: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = timed(monkeypatch, lambda size: 0.25)
    found = deciding.measured(lessons(rounds=1000))
    assert found == Decision(1, why="a step of one site, 250 ms, keeps the processor busy")
    assert sizes == [1, 1]


def test_a_measurement_touches_nothing_of_the_sites(lessons: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, lambda size: 0.01 / size)

    class Untouchable(LocalRule):
        def trains(self, spec: AdapterSpec, step: int) -> Collection[str] | None:
            raise AssertionError("asked")

    def untouchable(step: int, loss: float | None) -> None:
        raise AssertionError("told")

    made = [replace(rule(Untouchable, lesson), on_step=untouchable) for lesson in lessons(private=True, rounds=1000)]
    found = deciding.measured(made)
    assert (found.size, found.same, found.why) == (4, True, "")


def test_where_nothing_can_be_shared_the_decision_says_why(lessons: Make) -> None:
    cohort = Cohort(0)
    made = lessons(sizes=(20, 20), **{"train.gradient_checkpointing": True})
    train_together(made, cohort)
    assert cohort.decision == Decision(1, why="train.gradient_checkpointing runs layers a second time")
    assert cohort.decision.text.startswith("cohort 1: train.gradient_checkpointing")


def test_a_measurement_takes_real_steps(lessons: Make) -> None:
    found = deciding.measured(lessons(sizes=(20, 20, 20), rounds=1000))
    assert found.same and {size for size, _ in found.steps} == {1, 2, 3}
    assert all(seconds > 0 for _, seconds in found.steps)
    steps = dict(found.steps)
    assert found.speed == pytest.approx(steps[1] / min(steps[2], steps[3]))


def test_freed_memory_is_kept_where_the_c_library_can(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    class Glibc:
        @staticmethod
        def mallopt(parameter: int, value: int) -> int:
            asked.append((parameter, value))
            return 1

    for library in (Glibc, object):
        monkeypatch.setattr("ctypes.CDLL", lambda name, library=library: library)
        heap.keep_freed.__wrapped__()
    assert asked == [(-3, 2**25), (-1, 2**28)]
