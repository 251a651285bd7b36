"""Whose turn it is at a step of a run, with what chance, and what steps cost."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.errors import UserError
from .accounting import Event

SAMPLERS = ("poisson", "truncated_poisson", "cyclic")


@dataclass(frozen=True)
class Turns:
    """How the units of a site come to a run's steps. See :class:`fedgraft.privacy.plan.PrivacyPlan` for the words.

    What contradicts itself, or has no proof, does not construct: it raises :class:`UserError`.
    """

    sampler: str
    units: int
    expected_batch: int
    max_batch: int = 0
    bands: int = 1

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise UserError(f"privacy.sampler is `{self.sampler}`; there are {', '.join(SAMPLERS)}")
        if (self.sampler == "truncated_poisson") != (self.max_batch > 0):
            raise UserError('privacy.max_batch and privacy.sampler = "truncated_poisson" go together')
        if self.max_batch and self.max_batch < self.expected_batch:
            raise UserError(
                f"privacy.max_batch {self.max_batch} is below train.batch_size {self.expected_batch}, the expected "
                "batch; give a larger one"
            )
        if self.bands < 1:
            raise UserError(f"privacy.bands is {self.bands}; 1 is independent noise, more correlates so many steps")
        if self.bands > 1 and self.sampler == "truncated_poisson":
            raise UserError(
                'privacy.bands above 1 is proved for privacy.sampler "poisson" and "cyclic" only, not for cut-down '
                "samples"
            )
        if self.sampler == "cyclic" and self.bands > self.slots:
            raise UserError(
                f"privacy.bands {self.bands} is more than the {self.slots} steps in which each of the {self.units} "
                "units takes part once; use at most that many, or a smaller train.batch_size"
            )
        if self.sampler == "poisson" and self.bands * self.expected_batch > self.units:
            raise UserError(
                f"privacy.bands {self.bands} times train.batch_size {self.expected_batch} is more than the site's "
                f"{self.units} units, of which each step samples one part in {self.bands}; make either smaller"
            )

    @property
    def slots(self) -> int:
        """Into how many slots the units are dealt, whose turns come one step after another."""
        return -(-self.units // self.expected_batch) if self.sampler == "cyclic" else self.bands

    @property
    def rate(self) -> float:
        """The chance of each unit of the slot whose turn it is."""
        return 1.0 if self.sampler == "cyclic" else self.bands * self.expected_batch / self.units

    def event(self, noise_multiplier: float, turns: int) -> Event:
        """The cost of ``turns`` turns of every unit."""
        return Event(noise_multiplier, self.rate, turns, self.units if self.max_batch else 0, self.max_batch)

    def begun(self, noise_multiplier: float, first_step: int, steps: int, spent: tuple[Event, ...]) -> int:
        """How many rounds of turns must be paid for before ``steps`` steps from ``first_step`` on.

        A round of turns (``slots`` steps: an epoch, or a block of bands) is paid for as a whole by whoever begins it.
        One that goes on under less noise than it may have been paid for at is paid for again.
        """
        before = -(-first_step // self.slots)
        if first_step % self.slots and not noise_multiplier >= self.paid(spent):
            before -= 1
        return -(-(first_step + steps) // self.slots) - before

    def paid(self, spent: tuple[Event, ...]) -> float:
        """The least noise under which a round of turns that was begun may go on: the most that any like it took.

        Which event paid for it the ledger does not say, another run's may lie between; infinity where there is none.
        """
        return max((event.noise_multiplier for event in spent if self._alike(event)), default=float("inf"))

    def last(self, spent: tuple[Event, ...]) -> float | None:
        """The noise of the last turns like these, None where there were none."""
        return next((event.noise_multiplier for event in reversed(spent) if self._alike(event)), None)

    def _alike(self, event: Event) -> bool:
        return event == self.event(event.noise_multiplier, event.steps)
