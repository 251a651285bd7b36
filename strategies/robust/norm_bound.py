"""Norm bounding: no site moves the adapter farther than a given length."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from ...core.adapter import AdapterSpec, AdapterState, TensorSpec
from ...core.errors import UserError
from ...core.update import Update
from ..aggregator import Capabilities, Options, strategy
from ..local import LocalRule, Training
from ..wrapping import WrappedRule
from .distances import Path, moved
from .judging import Robust, RobustOptions, require_like

_MEMORY = "norm-bound"


class NormBoundOptions(RobustOptions):
    """``norm``: the bound C; ``past``, ``factor``: a bound that follows the lengths seen; ``measure``: of what.

    ``cut_by``: the server, or the sites themselves, for a secure sum.
    """

    norm: float = Field(10.0, gt=0, description="bound on the length of one site's change; with `past` the first one")
    past: int = Field(0, ge=0, description="take the median length of the last so many rounds for the bound; 0: fixed")
    factor: float = Field(1.0, gt=0, description="of `past`: the bound over that median")
    measure: Literal["sent", "dW"] = Field("sent", description="the length of the tensors as sent, or of dW")
    cut_by: Literal["server", "sites"] = Field("server", description="who cuts; sites: it works under a secure sum")

    @model_validator(mode="after")
    def _possible(self) -> NormBoundOptions:
        if self.past and self.cut_by == "sites":
            raise ValueError("past needs the lengths before the cut, which sites that cut do not show; set past = 0")
        return self


@strategy("norm-bound")
class NormBound(Robust):
    """theta_k becomes theta_0 + min(1, C / |theta_k - theta_0|) (theta_k - theta_0), and ``then`` aggregates.

    One update at a time, so memory does not grow with the sites. A lie is bounded, not found: of n sites, each moves
    the mean by C / n at most. C is fixed, or (``past``) ``factor`` times the median over the last rounds of each
    round's median length before the cut, which fewer than half of the sites cannot raise above the honest ones'.

    ``measure = "sent"``: the length of the shared tensors as they are, which bounds the change of a pair's dW by
    s C (|A_0| + |B_0|) + s C^2 / 2. ``measure = "dW"``: the length of the change of dW itself, whatever the factors,
    which go along the straight line that they were moved, to the first point at that length.

    ``cut_by = "sites"``: each site cuts its own change before it leaves (post-processing of what it trained), and the
    server does nothing but add up: of the rules against lies the only one that works under a secure sum. A sum shows
    neither a site that does not cut nor the weight that it takes, so there the rule bounds sites whose data are bad;
    liars it would bound with proofs of the length, which are not part of this. Source: Sun et al. 2019, "Can You
    Really Backdoor Federated Learning?", arXiv 1911.07963.
    """

    summary = "each change cut to length C, then summed"
    equation = "theta_k <- theta_0 + min(1, C / |theta_k - theta_0|) (theta_k - theta_0)"
    source = "Sun et al. 2019, arXiv 1911.07963"
    capabilities: ClassVar[Capabilities] = Capabilities()
    Options: ClassVar[type[Options]] = NormBoundOptions
    # Far enough out that the toy federation's changes pass whole.
    contract_options: ClassVar[Mapping[str, float]] = {"norm": 1e3}

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        can = self.inner.capabilities
        vars(self)["capabilities"] = replace(can, linear_sum=can.linear_sum and not self._cuts, exact=False)
        self.medians: list[float] = []

    @property
    def _cuts(self) -> bool:
        """Whether the server cuts."""
        return bool(self.options.cut_by == "server")

    @property
    def bound(self) -> float:
        """C in this round."""
        recent = [median for median in self.medians[-self.options.past :] if median > 0] if self.options.past else []
        return self.options.factor * float(np.median(recent)) if recent else self.options.norm

    def local(self, training: Training, memory: Mapping[str, AdapterState]) -> LocalRule | None:
        inner = self.inner.local(training, memory)
        return inner if self._cuts else Cutting(training, memory, inner, self._cut)

    def start_round(self, state: AdapterState) -> None:
        self.inner.start_round(state)
        self._state = state
        self._lengths: list[float] = []

    def add(self, update: Update) -> None:
        if not self._cuts:
            # As a sum would come: whole, and with the weight that it says.
            self.inner.add(update)
            return
        received = self.inner.for_site(self._state, update.site)
        sent = update.state.require_finite()
        require_like(update, received)
        with np.errstate(over="ignore", invalid="ignore"):
            length = self._length(received, sent)
        if not np.isfinite(length):
            raise UserError(f"{update.site}: the numbers of its update are too large to be measured")
        weight = update.weight if self.options.weigh else 1.0
        self.inner.add(replace(update, state=self._cut(received, sent), weight=weight))
        self._lengths.append(length)

    def result(self) -> AdapterState:
        result = self.inner.result()
        if self.options.past:
            self.medians = [*self.medians, float(np.median(self._lengths))][-self.options.past :]
        return result

    def _length(self, received: AdapterState, sent: AdapterState) -> float:
        if self.options.measure == "dW":
            return Path.between(received, sent).length(1.0)
        squares = (np.sum((sent[n].astype(np.float64) - received[n].astype(np.float64)) ** 2) for n in sent)
        return float(np.sqrt(sum(squares)))

    def _cut(self, received: AdapterState, sent: AdapterState) -> AdapterState:
        """``sent``, no farther from ``received`` than the bound."""
        length = self._length(received, sent)
        if length <= self.bound:
            return sent
        if self.options.measure == "dW":
            return moved(received, sent, Path.between(received, sent).reach(self.bound))
        return moved(received, sent, self.bound / length)

    def own_memory(self) -> Mapping[str, AdapterState]:
        return {_MEMORY: AdapterState(_memory_spec(len(self.medians)), {"medians": np.array(self.medians)})}

    def own_recall(self, memory: Mapping[str, AdapterState]) -> None:
        own = memory.get(_MEMORY)
        if own is not None:
            if tuple(own) != ("medians",) or own.spec != _memory_spec(own["medians"].size):
                raise UserError("the checkpoint's memory of norm-bound is not one that this version wrote")
            self.medians = own["medians"].tolist()


def _memory_spec(count: int) -> AdapterSpec:
    return AdapterSpec(_MEMORY, (TensorSpec("medians", (count,), dtype="float64", policy="local"),))


class Cutting(WrappedRule):
    """``inner`` (or none), whose answer ``cut(received, sent)`` keeps within the bound before it leaves.

    Arithmetic on what the training gave, so under differential privacy it is post-processing.
    """

    def __init__(
        self,
        training: Training,
        memory: Mapping[str, AdapterState],
        inner: LocalRule | None,
        cut: Callable[[AdapterState, AdapterState], AdapterState],
    ) -> None:
        super().__init__(training, memory, inner)
        self._cut = cut

    def finish(self, trained: AdapterState, received: AdapterState) -> AdapterState:
        sent = self.inner.finish(trained, received)
        shared = sent.only(received.spec.select("share"))
        return AdapterState(sent.spec, {**sent, **self._cut(received, shared)}, names=tuple(sent))
