"""What a strategy has a site do otherwise: the seam between an aggregation rule and the training that feeds it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ..core.adapter import AdapterSpec, AdapterState


@dataclass(frozen=True)
class Training:
    """What a rule is told of the training it belongs to. ``steps`` were taken, or will be, at learning rate ``lr``."""

    site: str
    round: int
    steps: int
    lr: float
    momentum: float = 0.0
    private: bool = False


class LocalRule:
    """One site's part of a strategy in one round: plain arithmetic, whose tensors may be NumPy's or torch's.

    A rule sees the adapter, never a record, and gradients only after clipping and noise, so that under differential
    privacy whatever it does is post-processing. ``memory`` is what the site remembered of the round before; it never
    leaves the site.
    """

    #: Whether :meth:`begin` evaluates the training loss, which no noise protects: refused under privacy.
    needs_loss: bool = False

    def __init__(self, training: Training, memory: Mapping[str, AdapterState]) -> None:
        self.training = training
        self.memory = memory

    def begin(self, received: AdapterState, loss: Callable[[AdapterState], float] | None = None) -> AdapterState:
        """What the training starts from; ``loss`` is the mean training loss of an adapter, where ``needs_loss``."""
        return received

    def trains(self, spec: AdapterSpec, step: int) -> Collection[str] | None:
        """The tensors that train at ``step`` (from 0); None: all that the policies let train."""
        return None

    def direction(self, name: str, gradient: Any, value: Any, start: Any, step: int) -> Any:
        """The gradient that the optimiser takes in place of ``gradient``.

        ``value``: the tensor now; ``start``: as the training began; all three of one shape and kind.
        """
        return gradient

    def finish(self, trained: AdapterState, received: AdapterState) -> AdapterState:
        """What is sent: the tensors of ``received.spec`` whose policy is ``share``, extras included."""
        return trained

    def remember(self) -> Mapping[str, AdapterState]:
        """What the site keeps until its next round, by name."""
        return {}

    def refine(self, received: AdapterState) -> AdapterState:
        """The second answer of a round, for strategies with two passes: from ``memory`` and what the server sent."""
        raise NotImplementedError

    def personal(self) -> LocalRule | None:
        """A second training, of an adapter that stays at the site and is what is evaluated there (Ditto)."""
        return None
