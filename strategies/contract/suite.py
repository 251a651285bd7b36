"""What every strategy promises, as tests: a plugin's test file inherits them."""

from __future__ import annotations

import gc
import inspect
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest

from ...core.adapter import AdapterSpec, AdapterState
from ...core.errors import UserError
from ...core.update import Update
from ..aggregator import Aggregator, find_strategy
from .bench import FROZEN, OWN, Bench, BrokenContractError, fresh, guarded, precise, toy_spec

#: The rounding of float32. Most checks run in float64, where a right rule is far below it.
TOLERANCE = 1e-6
ROUNDS = 3
_RECORDS = (30, 10, 25, 5, 17, 40, 8, 21, 12, 33)
Effect = dict[str, np.ndarray]


def effect_of(state: AdapterState) -> Effect:
    """What an adapter does: the dense dW of each low-rank pair under its A, and every other parameter as it is."""
    factors = {name for pair in state.spec.pairs for name in (pair.a, pair.b)}
    others = [t.name for t in state.spec.tensors if t.parameter and t.name not in factors and t.name in state]
    return {pair.a: state.delta(pair) for pair in state.spec.pairs} | {
        name: state[name].astype(np.float64) for name in others
    }


class StrategyContract:
    """Inherit it in a class whose name begins with ``Test``, and name the strategy::

        class TestMine(StrategyContract):
            strategy = "mine"

    ``strategy``: a name, or the class; ``options``: its options for the suite; ``sites``: how many train;
    ``tensor``: makes something else than NumPy arrays of the tensors in training, such as ``torch.from_numpy``, to see
    that the local rule works with these too.

    A strategy may say how it wants to be tested, in attributes of its class: ``contract_options`` (a mapping),
    ``contract_sites`` (a number), ``contract_spec`` (a static method that gives the :class:`AdapterSpec` of a method
    without which the strategy makes no sense) and ``contract_effect`` (a static method that gives the dense effect of a
    whole state by name, where this is not ``scaling * B A`` and the base offset).
    """

    strategy: ClassVar[str | type[Aggregator]] = ""
    options: ClassVar[Mapping[str, Any]] = {}
    sites: ClassVar[int] = 0
    tensor: ClassVar[Callable[[np.ndarray], Any] | None] = None

    # What the checks stand on

    @property
    def cls(self) -> type[Aggregator]:
        return find_strategy(self.strategy) if isinstance(self.strategy, str) else self.strategy

    def make(self) -> Aggregator:
        """A new aggregator, as for a run."""
        options = {**getattr(self.cls, "contract_options", {}), **self.options}
        return self.cls(self.cls.Options.model_validate(options))

    def spec(self) -> AdapterSpec:
        """The adapter that is trained."""
        factory = getattr(self.cls, "contract_spec", toy_spec)
        return guarded(factory())

    def weights(self, count: int = 0) -> dict[str, float]:
        """``count`` sites and their records."""
        count = count or self.sites or getattr(self.cls, "contract_sites", 4)
        return {f"site-{number:02d}": float(_RECORDS[number % len(_RECORDS)]) for number in range(count)}

    def bench(self, *, spec: AdapterSpec | None = None, sites: int = 0, **more: Any) -> Bench:
        """A federation in float64; skips the test where the strategy refuses the adapter."""
        spec = precise(self.spec()) if spec is None else spec
        more.setdefault("weights", self.weights(sites))
        return Bench(self.make, fresh(spec), **more)

    def effect(self, state: AdapterState) -> Effect:
        return dict(getattr(self.cls, "contract_effect", effect_of)(state))

    def shared_effect(self, state: AdapterState) -> Effect:
        """The part of an adapter's effect that the federation decides: what hangs on a site's own tensors is left out.

        In a round in which one factor rests, it is what the others train.
        """
        kept = {tensor.name for tensor in state.spec.tensors if tensor.policy in ("local", "receive")}
        for pair in state.spec.pairs:
            if kept & {pair.a, pair.b}:
                kept |= {pair.a, pair.b}
        return {name: array for name, array in self.effect(state).items() if name not in kept}

    def same(self, got: Effect, want: Effect, what: str, tolerance: float = TOLERANCE) -> None:
        """Raise :class:`BrokenContractError` unless two effects are equal, each tensor up to ``tolerance``."""
        __tracebackhide__ = True
        for name in want:
            error = relative(got[name], want[name])
            if not error <= tolerance:
                raise BrokenContractError(f"{what}: {name} is off by {error:.2g} of its size, not {tolerance:g}")

    def twins(self, what: str, *, rounds: int = ROUNDS, arrange: Any = None, other: Any = None, **more: Any) -> None:
        """Two federations that differ in ``arrange`` (of the updates) or in settings stay equal, round by round."""
        __tracebackhide__ = True
        one, two = self.bench(**more), self.bench(**{**more, **(other or {})})
        for number in range(1, rounds + 1):
            got = two.round() if arrange is None else two.round(*arrange())
            self.same(self.shared_effect(got), self.shared_effect(one.round()), f"{what} (round {number})")
            # So that the next round shows what it does by itself, not what the differences before have grown to.
            two.memories = {site: dict(kept) for site, kept in one.memories.items()}

    # Declarations

    def test_it_says_what_it_is(self) -> None:
        """A name, a line on its rule, and capabilities that do not contradict each other."""
        cls, can = self.cls, self.cls.capabilities
        for attribute in ("name", "summary"):
            if not getattr(cls, attribute):
                raise BrokenContractError(f"the strategy has no `{attribute}`")
        if can.linear_sum and can.needs_individual:
            raise BrokenContractError("linear_sum and needs_individual: a sum shows no single update")

    def test_two_instances_and_two_runs_give_the_same_bits(self) -> None:
        """Same updates, same result: nothing is drawn from a source that the run does not fix."""
        one, two = self.bench(), self.bench()
        for number in range(1, ROUNDS + 1):
            if one.round() != two.round():
                raise BrokenContractError(f"two equal runs differ after round {number}")

    # One update, equal updates

    def test_one_site_gets_back_what_it_brought(self) -> None:
        """An update of any weight comes back as itself, under any scaling: forgetting alpha / r shows here."""
        for spec in scalings(precise(self.spec())):
            bench = None
            for number in range(1, ROUNDS + 1):
                try:
                    bench = bench or self.bench(spec=spec, sites=1)
                    got = bench.round()
                except UserError as error:
                    if self.cls.capabilities.linear_sum:
                        raise BrokenContractError(f"declares linear_sum, but refuses one update: {error}") from None
                    pytest.skip(f"refuses a single update: {error}")
                (brought,) = bench.brought.values()
                self.same(self._part(got, brought), self.shared_effect(brought), f"one site, round {number}")

    def test_sites_that_agree_get_back_what_they_brought(self) -> None:
        bench = self.bench(alike=True)
        for number in range(1, ROUNDS + 1):
            got = bench.round()
            for site, brought in bench.brought.items():
                self.same(self._part(got, brought), self.shared_effect(brought), f"{site} of alike, round {number}")

    def test_two_sites_that_agree_count_as_one_of_their_weights(self) -> None:
        """Linear in the weights, where the strategy declares ``exact`` or ``linear_sum``."""
        self._only("exact", "linear_sum")

        def arrange() -> tuple[Any, ...]:
            def split(updates: list[Update]) -> list[Update]:
                first, *rest = updates
                parts = [(f"{first.site}{end}", share * first.weight) for end, share in (("", 0.25), ("-b", 0.75))]
                return [*(_reweighed(replace(first, site=site), weight) for site, weight in parts), *rest]

            return (split,)

        ranks = self.bench().ranks
        first = min(ranks)
        self.twins("a site in two parts", arrange=arrange, other={"ranks": {**ranks, f"{first}-b": ranks[first]}})

    # Many updates

    def test_the_order_of_the_updates_does_not_matter(self) -> None:
        def arrange() -> tuple[Any, ...]:
            return (lambda updates: [*updates[1::2], *updates[::2]][::-1],)

        self.twins("another order", arrange=arrange)

    def test_only_the_proportion_of_the_weights_matters(self) -> None:
        doubled = {site: 2.0 * weight for site, weight in self.weights().items()}
        self.twins("doubled weights", other={"weights": doubled})

    def test_the_layout_of_the_base_weights_does_not_matter(self) -> None:
        """GPT-2 stores W transposed, but A and B have the shapes that they have anywhere."""
        spec = precise(self.spec())
        flipped = replace(spec, pairs=tuple(replace(p, fan_in_fan_out=not p.fan_in_fan_out) for p in spec.pairs))
        self.twins("another layout", spec=spec, other={"spec": flipped})

    def test_the_aggregated_dw_is_the_weighted_mean_where_exact_is_declared(self) -> None:
        """In float32, three rounds, both layouts, mixed ranks where the strategy mixes them."""
        self._only("exact")
        spec = self.spec()
        flipped = replace(spec, pairs=tuple(replace(pair, fan_in_fan_out=True) for pair in spec.pairs))
        cases: list[tuple[AdapterSpec, dict[str, int]]] = [(each, {}) for each in (*scalings(spec), flipped)]
        if self.cls.capabilities.heterogeneous_ranks:
            cases.append((spec, self._mixed(spec)))
        for each, ranks in cases:
            bench = self.bench(spec=each, ranks=ranks)
            for number in range(1, ROUNDS + 1):
                got = bench.round()
                parts = {site: self.shared_effect(bench.brought[site]) for site in bench.sent}
                total = sum(bench.weights[site] for site in parts)
                first = bench.brought[next(iter(parts))]
                for name in parts[next(iter(parts))]:
                    mean = sum(np.asarray(bench.weights[site] * part[name]) for site, part in parts.items()) / total
                    error = relative(self._part(got, first)[name], np.asarray(mean))
                    if not error <= TOLERANCE:
                        mixed = " of mixed ranks" if ranks else ""
                        raise BrokenContractError(
                            f"declares exact, but in round {number}{mixed} the error of {name} is {error:.2g}"
                        )

    def test_biases_and_heads_are_aggregated(self) -> None:
        """They move, and not much further than a site moved them."""
        bench = self.bench()
        factors = {name for pair in bench.state.spec.pairs for name in (pair.a, pair.b)}
        others = [t.name for t in bench.state.spec.tensors if t.parameter and t.name not in factors]
        moved: set[str] = set()
        shared: set[str] = set()
        for number in range(1, ROUNDS + 1):
            before = bench.state
            after = bench.round()
            for name in others:
                sent = [update.state[name] for update in bench.sent.values() if name in update.state]
                if not sent:
                    continue
                shared.add(name)
                moved |= {name} if not np.array_equal(before[name], after[name]) else set()
                furthest = max(float(np.linalg.norm(array - before[name])) for array in sent)
                went = float(np.linalg.norm(after[name] - before[name]))
                if went > 2 * furthest:
                    raise BrokenContractError(
                        f"round {number}: {name} went {went:.2g}, no site more than {furthest:.2g}"
                    )
        if shared - moved:
            raise BrokenContractError(f"{min(shared - moved)} was shared, but never moved")

    def test_frozen_and_local_tensors_are_left_alone(self) -> None:
        bench = self.bench()
        before = {name: bench.state[name] for name in (FROZEN, OWN)}
        for number in range(1, ROUNDS + 1):
            state = bench.round()
            for name, array in before.items():
                if not np.array_equal(state[name], array):
                    raise BrokenContractError(f"round {number}: changed {name}, which no site shares")
            for update in bench.sent.values():
                if {FROZEN, OWN} & set(update.state):
                    raise BrokenContractError("had a site send what it was not to share")
        if {FROZEN, OWN} & set(state.spec.select("share")):
            raise BrokenContractError("shares tensors that the configuration froze or kept at the sites")

    def test_an_adapter_without_low_rank_factors_is_taken_or_refused(self) -> None:
        if hasattr(self.cls, "contract_spec"):
            pytest.skip("needs an adapter of its own")
        spec = precise(guarded(toy_spec(pairs=False)))
        try:
            bench = self.bench(spec=spec, alike=True)
            got = bench.round()
        except UserError as error:
            pytest.skip(f"refuses it: {error}")
        except BrokenContractError:
            raise
        except Exception as error:
            raise BrokenContractError(f"neither takes nor refuses an adapter without factors: {error!r}") from error
        for brought in bench.brought.values():
            self.same(self._part(got, brought), self.shared_effect(brought), "biases and heads alone")

    def test_what_the_federation_starts_from_does_what_the_given_adapter_does(self) -> None:
        """A run may start from a trained adapter: making it ready must not change its dW."""
        given = fresh(precise(self.spec()), trained=True)
        try:
            bench = Bench(self.make, given, self.weights())
            got = bench.received(min(bench.weights))
        except UserError as error:
            pytest.skip(f"refuses a trained adapter: {error}")
        self.same(self.effect(got), self.effect(given), "the adapter to start from")

    # Ranks

    def test_sites_of_lower_ranks_are_served_where_mixed_ranks_are_declared(self) -> None:
        """Each receives, trains and brings an adapter of its own rank and scaling, and agreeing sites get it back."""
        self._only("heterogeneous_ranks")
        spec = precise(self.spec())
        ranks = self._mixed(spec)
        for each in scalings(spec):
            bench = self.bench(spec=each, ranks=ranks)
            for _ in range(ROUNDS):
                bench.round()
            low = min(r for r in ranks.values())
            bench = self.bench(spec=each, sites=1, ranks={"site-00": low})
            for number in range(1, ROUNDS + 1):
                got = bench.round()
                (brought,) = bench.brought.values()
                self.same(self._part(got, brought), self.shared_effect(brought), f"rank {low}, round {number}")

    def test_an_update_of_another_rank_is_refused_where_no_mixed_ranks_are_declared(self) -> None:
        if self.cls.capabilities.heterogeneous_ranks:
            pytest.skip("mixes ranks")
        if not self.spec().rank:
            pytest.skip("its adapter has no rank")
        spec = precise(self.spec())
        lower = (spec.rank or 0) - 1

        def shrink(update: Update) -> Update:
            try:
                other = update.state.spec.with_rank(lower)
            except UserError as error:
                pytest.skip(f"its adapter has one rank: {error}")
            parts = {
                name: array[tuple(slice(n) for n in other.by_name[name].shape)] for name, array in update.state.items()
            }
            return replace(update, state=AdapterState(other, parts, names=tuple(parts)))

        if not any(pair.a in s or pair.b in s for s in [spec.select("share")] for pair in spec.pairs):
            pytest.skip("shares no low-rank factor")
        self._refused(f"an update of rank {lower} among others of rank {spec.rank}", shrink, at=-1)

    # What is refused

    def test_numbers_that_are_none_are_refused(self) -> None:
        for name in self._one_of_each_role():
            self._refused(f"a NaN in {name}", partial(_spoiled, name=name, value=np.nan), at=0)
            self._refused(f"an infinity in {name}", partial(_spoiled, name=name, value=-np.inf), at=-1)
        if self.cls.capabilities.two_passes:
            self._refused("a NaN in a second answer", partial(_spoiled, name="", value=np.nan), at=0, second=True)

    def test_tensors_of_a_wrong_shape_are_refused(self) -> None:
        for name in self._one_of_each_role(extras=False):
            self._refused(f"a {name} of another shape", partial(_widened, name=name), at=-1)

    def test_a_weight_that_is_not_positive_and_finite_is_refused(self) -> None:
        """Unless weights mean nothing to the strategy: then it makes no difference."""
        one, two = self.bench(), self.bench(weights=dict.fromkeys(self.weights(), 1.0))
        if one.round() == two.round():
            pytest.skip("does not weigh updates")
        for at, weights in ((0, (np.nan, -1.0)), (-1, (0.0, np.inf))):
            for weight in weights:
                self._refused(f"a weight of {weight}", partial(_reweighed, weight=weight), at=at)

    def test_a_round_without_updates_is_refused(self) -> None:
        bench = self.bench()
        bench.open()
        try:
            bench.close([])
        except UserError:
            return
        except Exception as error:
            raise BrokenContractError(f"a round without updates ends in {error!r}, not in a UserError") from error
        raise BrokenContractError("makes an adapter of no updates")

    # What is kept

    def test_a_run_goes_on_after_a_restart_as_if_there_had_been_none(self) -> None:
        """memory() goes to a file and into a new aggregator, between any two rounds, and changes nothing."""
        whole, parted = self.bench(), self.bench()
        with tempfile.TemporaryDirectory() as folder:
            for number in range(1, ROUNDS + 1):
                rule = parted.aggregator()
                try:
                    rule.recall(_saved(parted.rule.memory() if number > 1 else {}, Path(folder)))
                except UserError as error:
                    pytest.skip(f"refuses to be resumed: {error}")
                parted.rule = rule
                if number > 1:
                    (parted.state,) = _saved({"state": parted.state}, Path(folder)).values()
                    parted.memories = {s: _saved(kept, Path(folder)) for s, kept in parted.memories.items()}
                if whole.round() != parted.round():
                    raise BrokenContractError(f"a restart before round {number} changes what comes of it")

    def test_an_abandoned_round_leaves_no_trace(self) -> None:
        """A round that misses its quorum is never closed; it is begun again, after a restart or at once."""
        one, two = self.bench(), self.bench()
        for number in range(1, ROUNDS + 1):
            two.open()
            kept = {site: dict(memory) for site, memory in two.memories.items()}
            for site in two.asked:
                two.rule.add(_tripled(two.answer(site)))
            two.memories, two.number = kept, two.number - 1
            if one.round() != two.round():
                raise BrokenContractError(f"an abandoned round {number} shows in the one that followed")

    def test_asking_what_sites_receive_changes_nothing(self) -> None:
        """``for_site`` is asked for evaluations too, any number of times."""
        one, two = self.bench(), self.bench()
        for number in range(1, ROUNDS + 1):
            for site in [*two.weights] * 2:
                if two.received(site) != two.received(site):
                    raise BrokenContractError("for_site() gives another adapter when it is asked again")
            if one.round() != two.round():
                raise BrokenContractError(f"asking for_site() more often changes round {number}")

    def test_memory_does_not_grow_with_the_sites_unless_single_updates_are_needed(self) -> None:
        if self.cls.capabilities.needs_individual:
            pytest.skip("declares needs_individual")
        many = 16
        bench = self.bench(sites=many)
        bench.open()
        held, size = [], 0
        for site in bench.asked:
            update = bench.answer(site)
            size = max(size, sum(array.nbytes for array in update.state.values()))
            bench.rule.add(update)
            held.append(_array_bytes(bench.rule))
        # What an equation needs (a sum of low rank) may grow until it is as large as the matrix itself.
        half = len(held) // 2
        if len(held) > 2 and held[-1] - held[half] > size:
            raise BrokenContractError(
                f"holds {(held[-1] - held[half]) / 1024:.1f} KiB more after {len(held)} updates of "
                f"{size / 1024:.1f} KiB than after {half + 1}, and does not declare needs_individual"
            )

    # Flags

    def test_it_sees_nothing_but_sums_where_linear_sum_is_declared(self) -> None:
        """Masks that cancel in the weighted sums hide every update, and even every weight; then one update for all."""
        self._only("linear_sum")
        masks = np.random.default_rng(11)

        def hidden(updates: list[Update]) -> list[Update]:
            return _masked(updates, masks)

        self.twins("updates under masks", arrange=lambda: (hidden,))

        def together(updates: list[Update]) -> list[Update]:
            total = sum(update.weight for update in updates)
            first = updates[0].state
            tensors = {
                name: np.asarray(sum(u.state[name] * u.weight for u in updates) / total).astype(first[name].dtype)
                for name in first
            }
            return [Update("all sites together", AdapterState(first.spec, tensors, names=tuple(first)), total)]

        if not self.cls.capabilities.two_passes:
            self.twins("one update for all", arrange=lambda: (together,))

    def test_the_base_model_changes_where_it_is_declared_and_only_there(self) -> None:
        bench = self.bench()
        changed = False
        for _ in range(ROUNDS):
            state = bench.round()
            changed |= any(t.role == "offset" and np.any(state[t.name]) for t in state.spec.extras)
        if changed != self.cls.capabilities.touches_base:
            found = "changes" if changed else "never changes"
            raise BrokenContractError(f"{found} the base weights, which capabilities.touches_base denies")

    def test_the_parameterisation_changes_where_it_is_declared_and_only_there(self) -> None:
        """Where all sites send the same, a rule that keeps the parameterisation gives back the very tensors."""
        bench = self.bench(alike=True)
        if not bench.state.spec.pairs:
            pytest.skip("no low-rank factors")
        worst, where = 0.0, ""
        for _ in range(ROUNDS):
            state = bench.round()
            brought = next(iter(bench.brought.values()))
            for tensor in brought.spec.tensors:
                if not tensor.parameter or tensor.policy == "local":
                    continue
                error = relative(state[tensor.name], brought[tensor.name])
                if error > worst:
                    worst, where = error, tensor.name
        changed = worst > TOLERANCE
        if changed and not self.cls.capabilities.resets_state:
            raise BrokenContractError(f"{where} comes back as another tensor, which resets_state does not say")
        if self.cls.capabilities.resets_state and not changed:
            raise BrokenContractError("declares resets_state, but every factor comes back as it was sent")

    def test_it_scores_adapters_where_needs_validation_is_declared(self) -> None:
        self._only("needs_validation")
        bench = self.bench()
        for _ in range(ROUNDS):
            bench.round()
        if not bench.scored:
            raise BrokenContractError("declares needs_validation, but never asked for a score")

    def test_its_local_rule_needs_the_loss_where_it_is_declared(self) -> None:
        self._only("needs_loss")
        bench = self.bench()
        bench.open()
        rule = bench.site_rule(bench.asked[0])
        if rule is None or not rule.needs_loss:
            raise BrokenContractError("declares needs_loss, but its local rule does not ask for it")

    def test_its_local_rule_works_on_other_tensors_than_numpys(self) -> None:
        if type(self).tensor is None:
            pytest.skip("no `tensor` given")
        self.twins("other tensors", other={"tensor": type(self).tensor})

    # Inside

    def _only(self, *flags: str) -> None:
        """Skip the check unless the strategy declares one of ``flags``."""
        if not any(getattr(self.cls.capabilities, flag) for flag in flags):
            pytest.skip(f"does not declare {' or '.join(flags)}")

    def _one_of_each_role(self, *, extras: bool = True) -> list[str]:
        """Of what a site shares in the second round, the first tensor of each role."""
        bench = self.bench()
        bench.round()
        bench.open()
        spec = bench.received(bench.asked[0]).spec
        found: dict[tuple[str, bool], str] = {}
        for name in spec.select("share"):
            if extras or spec.by_name[name].parameter:
                found.setdefault((spec.by_name[name].role, spec.by_name[name].parameter), name)
        return list(found.values())

    def _part(self, state: AdapterState, brought: AdapterState) -> Effect:
        """The effect of the global ``state`` as far as ``brought`` decides it."""
        whole = self.effect(state)
        return {name: whole[name] for name in self.shared_effect(brought) if name in whole}

    def _mixed(self, spec: AdapterSpec) -> dict[str, int]:
        """Ranks from the whole down to a quarter, by turns."""
        whole = spec.rank or 1
        choices = (whole, max(1, whole // 4), max(1, whole // 2))
        return {site: choices[number % 3] for number, site in enumerate(sorted(self.weights()))}

    def _refused(self, what: str, spoil: Callable[[Update], Update], *, at: int, second: bool = False) -> None:
        """The update at the place ``at``, spoiled, ends in a :class:`UserError`: at once, or with the round."""
        __tracebackhide__ = True
        bench = self.bench()
        bench.round()
        bench.open()
        updates = [bench.answer(site) for site in bench.asked]

        def spoiled(given: list[Update]) -> list[Update]:
            return [spoil(update) if update is given[at] else update for update in given]

        try:
            given, again = (updates, spoiled) if second else (spoiled(updates), list)
        except KeyError:
            return  # not shared in this round
        try:
            bench.close(given, again)
        except UserError:
            return
        except BrokenContractError:
            raise
        except Exception as error:
            raise BrokenContractError(f"{what} ends in {error!r}, not in a UserError") from error
        raise BrokenContractError(f"takes {what}")


def relative(got: np.ndarray, want: np.ndarray) -> float:
    """The relative error in the Frobenius norm; of a ``want`` of zero, the norm of ``got``."""
    if got.shape != want.shape:
        return np.inf
    size = float(np.linalg.norm(want.astype(np.float64)))
    return float(np.linalg.norm(got.astype(np.float64) - want.astype(np.float64))) / (size or 1.0)


def scalings(spec: AdapterSpec) -> Iterable[AdapterSpec]:
    """``spec`` as it is, with half the alpha, and scaled by alpha / sqrt(r)."""
    yield spec
    if not spec.pairs or spec.rank is None:
        return
    yield replace(
        spec, alpha=(spec.alpha or 1.0) / 2, pairs=tuple(replace(p, scaling=p.scaling / 2) for p in spec.pairs)
    )
    if not spec.options.get("scaling") and not spec.options.get("common_rank"):
        root = tuple(replace(pair, scaling=pair.scaling * spec.rank**0.5) for pair in spec.pairs)
        yield replace(spec, pairs=root, options={**spec.options, "scaling": "sqrt"})


def _reweighed(update: Update, weight: float) -> Update:
    return replace(update, weight=weight, metrics={**update.metrics, "records": weight})


def _masked(updates: list[Update], masks: np.random.Generator) -> list[Update]:
    """Other updates and weights with the same weighted sums."""
    total = sum(update.weight for update in updates)
    shares = masks.dirichlet(np.full(len(updates), 5.0)) * total
    sums = {}
    for name in updates[0].state:
        noise = 20.0 * masks.standard_normal((len(updates), *updates[0].state[name].shape))
        sums[name] = noise - noise.mean(axis=0)
    hidden = []
    for number, (update, weight) in enumerate(zip(updates, shares, strict=True)):
        tensors = {
            name: ((array * update.weight + sums[name][number]) / weight).astype(array.dtype)
            for name, array in update.state.items()
        }
        state = AdapterState(update.state.spec, tensors, names=tuple(update.state))
        hidden.append(_reweighed(replace(update, state=state), float(weight)))
    return hidden


def _tripled(update: Update) -> Update:
    """``update`` with all parameters three times as large."""
    spec = update.state.spec
    tensors = {name: array * 3 if spec.by_name[name].parameter else array for name, array in update.state.items()}
    return replace(update, state=AdapterState(spec, tensors, names=tuple(update.state)))


def _spoiled(update: Update, name: str, value: float) -> Update:
    """``update`` with ``value`` as the last number of the tensor ``name`` (empty: of the first that it holds)."""
    name = name or next(iter(update.state))
    array = update.state[name].copy()
    array.reshape(-1)[-1:] = value
    tensors = {**update.state, name: array}
    return replace(update, state=AdapterState(update.state.spec, tensors, names=tuple(update.state)))


def _widened(update: Update, name: str) -> Update:
    """``update`` with one more column in the tensor ``name``."""
    spec = update.state.spec
    array = update.state[name]
    wide = np.concatenate([array, array[..., :1]], axis=-1) if array.ndim else np.stack([array, array])
    tensors = tuple(replace(t, shape=wide.shape) if t.name == name else t for t in spec.tensors)
    state = AdapterState(replace(spec, tensors=tensors), {**update.state, name: wide}, names=tuple(update.state))
    return replace(update, state=state)


def _array_bytes(rule: Aggregator) -> int:
    """The size of all arrays that can be reached from ``rule``."""
    waiting: list[Any] = [vars(rule)]
    seen: set[int] = set()
    arrays: dict[int, int] = {}
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, type | ModuleType | Bench | str | int | float):
            continue
        seen.add(id(thing))
        if isinstance(thing, np.ndarray):
            while isinstance(thing.base, np.ndarray):
                thing = thing.base
            arrays[id(thing)] = thing.nbytes
        elif inspect.isfunction(thing):
            # Not its globals, through which everything can be reached.
            waiting += [thing.__closure__, thing.__defaults__, thing.__kwdefaults__]
        else:
            waiting += gc.get_referents(thing)
    return sum(arrays.values())


def _saved(memory: Mapping[str, AdapterState], folder: Path) -> dict[str, AdapterState]:
    """``memory`` through files, as a checkpoint keeps it."""
    back = {}
    for number, (name, state) in enumerate(memory.items()):
        path = folder / f"{number}.safetensors"
        state.save(path)
        back[name] = AdapterState.load(path)
    return back
