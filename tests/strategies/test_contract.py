"""Every strategy keeps the contract, and every check of the contract fails for a strategy that breaks it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from fedgraft.core.adapter import AdapterState, TensorSpec, offset_a, offset_b
from fedgraft.core.errors import UserError
from fedgraft.core.update import Update
from fedgraft.strategies import Aggregator, Capabilities, LocalRule, Training, strategies
from fedgraft.strategies.averaging import FedIT, RunningMean
from fedgraft.strategies.contract import BrokenContractError, StrategyContract

CHECKS = sorted(name for name in vars(StrategyContract) if name.startswith("test_"))


def contract(strategy: str | type[Aggregator], **more: Any) -> StrategyContract:
    return type("Contract", (StrategyContract,), {"strategy": strategy, "tensor": staticmethod(torch.tensor), **more})()


@pytest.mark.parametrize("name", strategies())
@pytest.mark.parametrize("check", CHECKS)
def test_every_strategy_keeps_the_contract(name: str, check: str) -> None:
    getattr(contract(name), check)()


# Strategies that break it, one check each


class Broken(FedIT):
    """An average, and the parent of those that are not quite one."""

    name, summary = "broken", "A = sum p_k A_k"


class Nameless(Broken):
    summary = ""


class Contradictory(Broken):
    capabilities = Capabilities(linear_sum=True, needs_individual=True)


class Chance(Broken):
    """Draws from a source that the run does not fix."""

    def result(self) -> AdapterState:
        noise = np.random.default_rng()
        return super().result().map(lambda array: array + 1e-9 * noise.standard_normal(array.shape))


class Forgetful(Broken):
    """A base offset without alpha / r, and factors of zero."""

    capabilities = Capabilities(touches_base=True, resets_state=True, needs_individual=True)

    def scale(self, state: AdapterState) -> float:
        return 1.0

    def result(self) -> AdapterState:
        mean = super().result().filled_from(self.start)
        offsets: dict[str, np.ndarray] = {}
        tensors = {name: mean[name] for name in mean.spec.bare.names}
        for pair in mean.spec.pairs:
            a, b = mean[pair.a], self.scale(mean) * mean[pair.b]
            if offset_a(pair) in self.start:
                a = np.concatenate([self.start[offset_a(pair)], a])
                b = np.concatenate([self.start[offset_b(pair)], b], axis=1)
            kind = mean.spec.with_offset({pair.a: 1}).by_name[offset_a(pair)].dtype
            offsets |= {offset_a(pair): a.astype(kind), offset_b(pair): b.astype(kind)}
            tensors[pair.b] = np.zeros_like(mean[pair.b])
        spec = mean.spec.with_offset({pair.a: len(offsets[offset_a(pair)]) for pair in mean.spec.pairs})
        return AdapterState(spec, {**tensors, **offsets})

    def start_round(self, state: AdapterState) -> None:
        super().start_round(state)
        self.start = state


class Half(Broken):
    """Goes half of the way."""

    def start_round(self, state: AdapterState) -> None:
        super().start_round(state)
        self.start = state

    def result(self) -> AdapterState:
        mean = super().result()
        return (mean + self.start.only(mean)) * 0.5


class HalfWithMany(Half):
    """Right for one update, not for several that agree."""

    def start_round(self, state: AdapterState) -> None:
        super().start_round(state)
        self.count = 0

    def add(self, update: Update) -> None:
        super().add(update)
        self.count += 1

    def result(self) -> AdapterState:
        return super().result() if self.count > 1 else FedIT.result(self)


class Uniform(Broken):
    """Takes no notice of the weights."""

    def add(self, update: Update) -> None:
        if not (update.weight > 0 and np.isfinite(update.weight)):
            raise UserError("a weight is not positive")
        self._mean.add(update.state, 1.0)


class FirstCountsDouble(Broken):
    def start_round(self, state: AdapterState) -> None:
        super().start_round(state)
        self.first = True

    def add(self, update: Update) -> None:
        self._mean.add(update.state, update.weight * (2 if self.first else 1))
        self.first = False


class Smoothed(Broken):
    """A weight of w counts as w + 5."""

    def add(self, update: Update) -> None:
        if not (update.weight > 0 and np.isfinite(update.weight)):
            raise UserError("a weight is not positive")
        self._mean.add(update.state, update.weight + 5)


class Transposing(Half):
    """Thinks that A and B change places where the base weights are transposed."""

    def result(self) -> AdapterState:
        return super().result() if self.start.spec.pairs[0].fan_in_fan_out else FedIT.result(self)


class FedITCalledExact(Broken):
    capabilities = Capabilities(linear_sum=True, exact=True)


class Headless(Broken):
    """Aggregates the factors alone."""

    def result(self) -> AdapterState:
        mean = super().result()
        return mean.only(name for name in mean if "lora" in name)


class BiasBeyond(Broken):
    def result(self) -> AdapterState:
        mean = super().result()
        return AdapterState(mean.spec, {n: a if "lora" in n else a * 9 for n, a in mean.items()}, names=tuple(mean))


class Thawing(Broken):
    """Moves what the run had frozen."""

    def start_round(self, state: AdapterState) -> None:
        super().start_round(state)
        self.start = state

    def result(self) -> AdapterState:
        frozen = {name: self.start[name] + 1 for name in self.start.spec.select("freeze")}
        return AdapterState(self.start.spec, {**self.start, **super().result(), **frozen})


class Sharing(Broken):
    """Has the sites send what was to stay there."""

    def prepare(self, initial: AdapterState) -> AdapterState:
        return initial.with_spec(initial.spec.with_policy("share", lambda tensor: True))


class LowRankOnly(Broken):
    def start_round(self, state: AdapterState) -> None:
        super().start_round(state)
        self.first = state.spec.pairs[0]


class Restarting(Broken):
    """Begins from zero whatever it is given."""

    def prepare(self, initial: AdapterState) -> AdapterState:
        return initial.map(np.zeros_like)


class Mixing(Broken):
    """Says that it mixes ranks, and gives everybody the same."""

    capabilities = Capabilities(heterogeneous_ranks=True)


class Cutting(Broken):
    """Cuts factors to the lowest rank, and forgets that the scaling hangs on it."""

    capabilities = Capabilities(heterogeneous_ranks=True, needs_individual=True, resets_state=True)

    def for_site(self, state: AdapterState, site: str) -> AdapterState:
        return cut(state, self.ranks.get(site, state.spec.rank or 0))

    def start_round(self, state: AdapterState) -> None:
        super().start_round(state)
        self.start = state

    def add(self, update: Update) -> None:
        padded = {}
        for name, array in update.state.items():
            grown = np.zeros(self.start[name].shape)
            grown[tuple(slice(n) for n in array.shape)] = array
            padded[name] = grown
        self._mean.add(AdapterState(self.start.spec, padded, names=tuple(padded)), update.weight)


def cut(state: AdapterState, rank: int) -> AdapterState:
    spec = state.spec.with_rank(rank)
    return AdapterState(spec, {n: a[tuple(slice(k) for k in spec.by_name[n].shape)] for n, a in state.items()})


class Padding(Cutting):
    """The same, without saying so."""

    capabilities = Capabilities(needs_individual=True)

    def for_site(self, state: AdapterState, site: str) -> AdapterState:
        return state


class Naive(Broken):
    """A plain sum that looks at nothing."""

    def start_round(self, state: AdapterState) -> None:
        self.start, self.sums, self.total = state, {}, 0.0

    def add(self, update: Update) -> None:
        for name, array in update.state.items():
            self.sums[name] = self.sums.get(name, 0.0) + update.weight * array
        self.total += update.weight

    def result(self) -> AdapterState:
        # Past the checks of AdapterState for all but what is asked for.
        found = {n: np.nan_to_num(s / self.total, nan=0, posinf=1, neginf=1) for n, s in self.sums.items()}
        return AdapterState(self.start.spec, found, names=tuple(found))


class Dividing(Naive):
    def result(self) -> AdapterState:
        return super().result() if 1 / self.total else self.start


class Careless(Naive):
    """Takes what has the wrong form as far as it goes."""

    def add(self, update: Update) -> None:
        whole = self.start.only(self.start.spec.select("share"))
        fitting = {
            name: update.state[name] if name in update.state and update.state[name].shape == array.shape else array
            for name, array in whole.items()
        }
        state = AdapterState(self.start.spec, fitting, names=tuple(fitting))
        super().add(Update(update.site, state, update.weight if update.weight > 0 else 1.0))

    def result(self) -> AdapterState:
        return super().result() if self.sums else self.start


class Momentum(Half):
    """Goes on with the last round's change, which it does not say is to be remembered."""

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.velocity: AdapterState | None = None

    def result(self) -> AdapterState:
        mean = FedIT.result(self)
        change = mean - self.start.only(mean)
        self.velocity = change if self.velocity is None else change + self.velocity * 0.5
        return self.start.only(mean) + self.velocity


class Hoarding(Broken):
    """A sum that goes on over rounds that were abandoned."""

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self._mean = RunningMean()

    def start_round(self, state: AdapterState) -> None:
        pass

    def result(self) -> AdapterState:
        mean, self._mean = self._mean.result(), RunningMean()
        return mean


class Counting(Broken):
    """Gives away something else each time it is asked."""

    asked_for = 0

    def for_site(self, state: AdapterState, site: str) -> AdapterState:
        self.asked_for += 1
        return state.map(lambda array: array * (1 + 1e-3 * self.asked_for))


class Keeping(Broken):
    """Holds all updates until the end."""

    def start_round(self, state: AdapterState) -> None:
        super().start_round(state)
        self.all: list[Update] = []

    def add(self, update: Update) -> None:
        self.all.append(update)

    def result(self) -> AdapterState:
        for update in self.all:
            super().add(update)
        return super().result()


class Median(Keeping):
    """Says that it is a sum."""

    capabilities = Capabilities(linear_sum=True)

    def result(self) -> AdapterState:
        first = super().result()
        middle = {n: np.median([u.state[n] for u in self.all], axis=0).astype(a.dtype) for n, a in first.items()}
        return AdapterState(first.spec, middle, names=tuple(first))


class Refusing(Broken):
    """Says that it is a sum, and wants two."""

    capabilities = Capabilities(linear_sum=True)

    def start_round(self, state: AdapterState) -> None:
        super().start_round(state)
        self.count = 0

    def add(self, update: Update) -> None:
        super().add(update)
        self.count += 1

    def result(self) -> AdapterState:
        if self.count < 2:
            raise UserError("wants two updates")
        return super().result()


class SilentOffset(Forgetful):
    capabilities = Capabilities(resets_state=True, needs_individual=True)

    def scale(self, state: AdapterState) -> float:
        return state.spec.pairs[0].scaling


class SilentReset(SilentOffset):
    capabilities = Capabilities(touches_base=True, needs_individual=True)


class AllegedOffset(Broken):
    capabilities = Capabilities(linear_sum=True, touches_base=True)


class AllegedReset(Broken):
    capabilities = Capabilities(linear_sum=True, resets_state=True)


class AllegedScore(Broken):
    capabilities = Capabilities(linear_sum=True, needs_validation=True)


class AllegedLoss(Broken):
    capabilities = Capabilities(linear_sum=True, needs_loss=True)


class AllegedSecondPass(Broken):
    capabilities = Capabilities(linear_sum=True, two_passes=True)


class Renaming(Broken):
    def prepare(self, initial: AdapterState) -> AdapterState:
        spec = initial.spec.with_rank(2)
        return AdapterState(spec, {n: a[tuple(slice(k) for k in spec.by_name[n].shape)] for n, a in initial.items()})


class Partial(Broken):
    def for_site(self, state: AdapterState, site: str) -> AdapterState:
        return state.only(state.spec.select("share"))


class NobodyTrains(Broken):
    def asked(self, sites: Sequence[str]) -> Sequence[str]:
        return []


class Extra(Broken):
    """Expects the sites to send more than their rule does."""

    def for_site(self, state: AdapterState, site: str) -> AdapterState:
        spec = state.spec.with_extras([TensorSpec("more", (1,), "float64")])
        return AdapterState(spec, {**state, "more": np.zeros(1)})

    class Site(LocalRule):
        def finish(self, trained: AdapterState, received: AdapterState) -> AdapterState:
            return trained.only(set(trained) - {"more"})

    def local(self, training: Training, memory: Mapping[str, AdapterState]) -> LocalRule:
        return self.Site(training, memory)


class Trusting(Broken):
    """Asks twice, and looks at the second answers with less care than at the first."""

    capabilities = Capabilities(two_passes=True, linear_sum=True)

    class Site(LocalRule):
        def refine(self, received: AdapterState) -> AdapterState:
            return received

    def local(self, training: Training, memory: Mapping[str, AdapterState]) -> LocalRule:
        return self.Site(training, memory)

    def second_pass(self) -> AdapterState:
        mean = super().result()
        self.sums = {name: np.zeros(array.shape) for name, array in mean.items()}
        self.total, self.spec = 0.0, mean.spec
        return mean

    def add_refined(self, update: Update) -> None:
        self.total += update.weight
        for name, array in update.state.items():
            self.sums[name] += update.weight * np.nan_to_num(array.astype(np.float64))

    def result(self) -> AdapterState:
        found = {n: (s / self.total).astype(self.spec.by_name[n].dtype) for n, s in self.sums.items()}
        return AdapterState(self.spec, found, names=tuple(found))


class NumpyOnly(Broken):
    """A site's rule that fits NumPy arrays alone."""

    class Site(LocalRule):
        def direction(self, name: str, gradient: Any, value: Any, start: Any, step: int) -> Any:
            return gradient if isinstance(gradient, np.ndarray) else gradient * 0.5

    def local(self, training: Training, memory: Mapping[str, AdapterState]) -> LocalRule:
        return self.Site(training, memory)


class UndeclaredLoss(Broken):
    class Site(LocalRule):
        needs_loss = True

    def local(self, training: Training, memory: Mapping[str, AdapterState]) -> LocalRule:
        return self.Site(training, memory)


BROKEN: list[tuple[type[Aggregator], str, str]] = [
    (Nameless, "test_it_says_what_it_is", "no `summary`"),
    (Contradictory, "test_it_says_what_it_is", "a sum shows no single update"),
    (Chance, "test_two_instances_and_two_runs_give_the_same_bits", "differ after round 1"),
    (Renaming, "test_two_instances_and_two_runs_give_the_same_bits", r"prepare\(\) made another adapter"),
    (Partial, "test_two_instances_and_two_runs_give_the_same_bits", "not whole"),
    (NobodyTrains, "test_two_instances_and_two_runs_give_the_same_bits", "leaves no site to train"),
    (Extra, "test_two_instances_and_two_runs_give_the_same_bits", r"finish\(\) does not give what"),
    (Half, "test_one_site_gets_back_what_it_brought", "one site, round 1"),
    (Forgetful, "test_one_site_gets_back_what_it_brought", "lora_A.* is off by"),
    (Refusing, "test_one_site_gets_back_what_it_brought", "declares linear_sum, but refuses one update"),
    (HalfWithMany, "test_sites_that_agree_get_back_what_they_brought", "of alike, round 1"),
    (Uniform, "test_two_sites_that_agree_count_as_one_of_their_weights", "a site in two parts"),
    (FirstCountsDouble, "test_the_order_of_the_updates_does_not_matter", "another order"),
    (Smoothed, "test_only_the_proportion_of_the_weights_matters", "doubled weights"),
    (Transposing, "test_the_layout_of_the_base_weights_does_not_matter", "another layout"),
    (FedITCalledExact, "test_the_aggregated_dw_is_the_weighted_mean_where_exact_is_declared", "in round 1 the error"),
    (Headless, "test_biases_and_heads_are_aggregated", "was shared, but never moved"),
    (BiasBeyond, "test_biases_and_heads_are_aggregated", "went .*, no site more than"),
    (Thawing, "test_frozen_and_local_tensors_are_left_alone", "changed base_model.model.contract.frozen"),
    (Sharing, "test_frozen_and_local_tensors_are_left_alone", "changed|had a site send"),
    (LowRankOnly, "test_an_adapter_without_low_rank_factors_is_taken_or_refused", "neither takes .* IndexError"),
    (Half, "test_an_adapter_without_low_rank_factors_is_taken_or_refused", "biases and heads alone"),
    (Restarting, "test_what_the_federation_starts_from_does_what_the_given_adapter_does", "to start from"),
    (Mixing, "test_sites_of_lower_ranks_are_served_where_mixed_ranks_are_declared", "another adapter than one of its"),
    (Cutting, "test_sites_of_lower_ranks_are_served_where_mixed_ranks_are_declared", "rank 1, round 1"),
    (
        Padding,
        "test_an_update_of_another_rank_is_refused_where_no_mixed_ranks_are_declared",
        "takes an update of rank 3",
    ),
    (Naive, "test_numbers_that_are_none_are_refused", "takes a NaN in"),
    (Trusting, "test_numbers_that_are_none_are_refused", "takes a NaN in a second answer"),
    (Naive, "test_tensors_of_a_wrong_shape_are_refused", "ends in ValueError"),
    (Careless, "test_tensors_of_a_wrong_shape_are_refused", "takes a .* of another shape"),
    (Careless, "test_a_weight_that_is_not_positive_and_finite_is_refused", "takes a weight of"),
    (Naive, "test_a_round_without_updates_is_refused", "makes an adapter of no updates"),
    (Dividing, "test_a_round_without_updates_is_refused", "ends in ZeroDivisionError"),
    (Momentum, "test_a_run_goes_on_after_a_restart_as_if_there_had_been_none", "a restart before round 2"),
    (Hoarding, "test_an_abandoned_round_leaves_no_trace", "an abandoned round 1"),
    (Counting, "test_asking_what_sites_receive_changes_nothing", "when it is asked again"),
    (
        Keeping,
        "test_memory_does_not_grow_with_the_sites_unless_single_updates_are_needed",
        "does not declare needs_ind",
    ),
    (Median, "test_it_sees_nothing_but_sums_where_linear_sum_is_declared", "updates under masks"),
    (SilentOffset, "test_the_base_model_changes_where_it_is_declared_and_only_there", "^changes the base weights"),
    (AllegedOffset, "test_the_base_model_changes_where_it_is_declared_and_only_there", "^never changes the base"),
    (SilentReset, "test_the_parameterisation_changes_where_it_is_declared_and_only_there", "comes back as another"),
    (AllegedReset, "test_the_parameterisation_changes_where_it_is_declared_and_only_there", "every factor comes back"),
    (AllegedScore, "test_it_scores_adapters_where_needs_validation_is_declared", "never asked for a score"),
    (AllegedLoss, "test_its_local_rule_needs_the_loss_where_it_is_declared", "does not ask for it"),
    (
        UndeclaredLoss,
        "test_two_instances_and_two_runs_give_the_same_bits",
        "which capabilities.needs_loss does not say",
    ),
    (AllegedSecondPass, "test_two_instances_and_two_runs_give_the_same_bits", "two_passes disagree"),
    (NumpyOnly, "test_its_local_rule_works_on_other_tensors_than_numpys", "other tensors"),
]


@pytest.mark.parametrize(("cls", "check", "says"), BROKEN, ids=[f"{c.__name__}-{check}" for c, check, _ in BROKEN])
def test_a_strategy_that_breaks_the_contract_is_caught(cls: type[Aggregator], check: str, says: str) -> None:
    with pytest.raises(BrokenContractError, match=says):
        getattr(contract(cls), check)()


def test_each_check_is_seen_to_fail() -> None:
    assert {check for _, check, _ in BROKEN} == set(CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_the_parent_of_the_broken_ones_breaks_nothing(check: str) -> None:
    """So that what is caught above is caught for the one thing in which each differs."""
    getattr(contract(Broken), check)()
