"""The four layers of the audit over one site: what is fed to the real trainer, and what is compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from ...core.config import RunConfig
from ...core.tasks import Example
from ...privacy.accounting import Event, epsilon
from ...privacy.audit import Verdict
from ...privacy.audit.exactness import TOLERANCES, Case, clipped_sum, exactness
from ...privacy.audit.lower_bound import lower_bound, scores
from ...privacy.audit.noise import ALPHA, Draws, Run, noise
from ...privacy.audit.sensitivity import SLACK, Neighbours, sensitivity
from ...privacy.correlated import square_root_bands
from ...privacy.noise import RandomStream
from ...privacy.plan import PrivacyPlan
from ..trainer import Sampler
from .faults import HONEST, Fault
from .subject import Subject
from .watching import Step, watch

LAYERS = ("exactness", "sensitivity", "noise", "lower bound")
#: Units of the first batch that is computed twice.
_FEW = 4
#: Most records of the patient who has many.
_MANY = 50
#: Units that a watched step samples on average, where the excerpt has enough.
_SAMPLED = 8
#: Samples that are drawn without training on them.
_DRAWS = 500
#: The guesser does best where the noise of all steps it sees together is about this much of a unit's gradient.
_GUESSABLE = 1 / 1.5
_MOST_GUESSED_STEPS = 4


class Audit:
    """The layers, one method each. ``steps``: noisy steps watched in each training; ``fault``: what is broken on
    purpose; ``alpha``: how often layer 3 may fail an honest training."""

    def __init__(
        self, subject: Subject, *, steps: int = 6, canaries: int = 256, fault: Fault = HONEST, alpha: float = ALPHA
    ) -> None:
        self.subject = subject
        self.steps = steps
        self.canaries = min(canaries, len(subject.groups))
        self.fault = fault
        self.alpha = alpha

    def run(self, layers: Sequence[str] = LAYERS, watch: Callable[[str], None] = lambda layer: None) -> list[Verdict]:
        """The verdicts of ``layers``, in order; ``watch`` is told before each begins."""
        verdicts = []
        for layer in layers:
            watch(layer)
            verdicts.append(getattr(self, layer.replace(" ", "_"))())
        return verdicts

    def exactness(self) -> Verdict:
        """A few units through the trainer, without noise, against the loop: at the plan's clip, at one that cuts every
        unit, and at one that cuts none; in one physical batch and in several."""
        subject = self.subject
        lengths = [max(subject.examples[i]["length"] for i in group) for group in subject.groups]
        order = np.argsort(lengths, kind="stable")
        most = int(np.argmax([len(group) for group in subject.groups]))
        middle = [int(order[len(order) // 3]), int(order[2 * len(order) // 3])]
        units = list(dict.fromkeys([int(order[-1]), int(order[0]), most, *middle]))[:_FEW]
        groups = [subject.groups[unit] for unit in units]
        norms = [float(row.norm()) for row in subject.reference.records([int(group[0]) for group in groups])]
        cases, crowded = [], []
        for name, clip, micro in self._clips(norms):
            (step,) = self._train(groups, self._everyone(len(groups), clip=clip), micro=micro, silent=True)
            rows = subject.reference.units(step.records, subject.owner)
            cases.append(Case(name, clip, step.released, clipped_sum(rows, step.clip)))
            most_seen = int(np.bincount(subject.owner[list(step.records)]).max(initial=0))
            if most_seen > subject.most_records:
                crowded.append(
                    f"{name}: a unit gave {most_seen} records to one step; it may give {subject.most_records}"
                )
        verdict = exactness(cases, subject.reference.tensors, TOLERANCES[subject.config.train.precision])
        return replace(verdict, findings=(*verdict.findings, *crowded))

    def _clips(self, norms: Sequence[float]) -> list[tuple[str, float, int]]:
        own, micro = self.subject.plan.clip, self.subject.config.train.micro_batch
        clips = [("the plan's clip", own, micro), ("the plan's clip, in small batches", own, self.subject.most_records)]
        if min(norms) > 0:
            clips += [
                ("a clip below every norm", min(norms) / 2, micro),
                ("a clip above every norm", max(norms) * 2, micro),
            ]
        return clips

    def sensitivity(self) -> Verdict:
        """Neighbouring data sets through the trainer, without noise."""
        subject = self.subject
        longest = max(range(len(subject.examples)), key=lambda i: subject.examples[i]["length"])
        others = [int(group[0]) for group in subject.groups[: _FEW + 1] if longest not in group][:_FEW]
        base = [[subject.examples[i]] for i in others]
        long, one = [subject.examples[longest]], base[0]
        pairs: list[tuple[str, list[list[Example]], list[list[Example]], bool]] = [
            ("a long record added", base, [*base, long], False),
            ("the only record removed", [one], [], False),
            ("one more copy of a record", [one] * 3, [one] * 4, False),
        ]
        if "label" in one[0]:
            classes = len(subject.config.task.labels)
            opposite: list[Example] = [{**one[0], "label": (one[0]["label"] + 1) % classes}]
            pairs += [
                ("the same record with another label added", [one] * 3, [*[one] * 3, opposite], False),
                ("a record's label replaced", [*base[1:], one], [*base[1:], opposite], True),
            ]
        if subject.config.privacy.unit == "patient":
            many = [subject.examples[i] for i in range(min(_MANY, len(subject.examples)))]
            pairs.append((f"a patient with {len(many)} records added", base, [*base, many], False))
        norms = subject.reference.records([*others, longest]).norm(dim=1)
        clips = [("", subject.plan.clip)]
        if float(norms.min()) > 0:
            clips.append((", every record clipped", float(norms.min()) / 2))
        found = []
        for suffix, clip in clips:
            for name, before, after, replaced in pairs:
                distance = float((self._sum(after, clip) - self._sum(before, clip)).norm())
                found.append(Neighbours(name + suffix, clip, distance, replaced))
        return sensitivity(found, SLACK[subject.config.train.precision])

    def _sum(self, units: Sequence[Sequence[Example]], clip: float) -> torch.Tensor:
        """What the trainer adds up over ``units``, all of which take part."""
        # Copies, so that two of one record are two to whoever watches.
        examples = [dict(example) for unit in units for example in unit]
        ends = np.cumsum([len(unit) for unit in units]).astype(int)
        groups = [np.asarray(part) for part in np.split(np.arange(len(examples)), ends[:-1])] if units else []
        plan = self._everyone(max(1, len(units)), clip=clip)
        (step,) = self._train(groups, plan, examples=examples, silent=True)
        return step.released

    def noise(self) -> Verdict:
        """Trainings with all the noise of the plan: the site, the same site again, another site, one without data."""
        subject = self.subject
        plan = subject.plan
        count = min(len(subject.groups), max(16, math.ceil(_SAMPLED / plan.sampling_rate)))
        groups, keys = subject.groups[:count], subject.keys[:count]
        sizes: list[int] = []
        runs = []
        for name, site, own in (
            (subject.site, subject.site, groups),
            (f"{subject.site} again", subject.site, groups),
            ("another site", f"{subject.site}-other", groups),
            ("empty batches", subject.site, []),
        ):
            seen = self._train(own, plan, site=site, steps=self.steps, real=True, keys=keys[: len(own)])
            rows = [
                (step.released - clipped_sum(subject.reference.units(step.records, subject.owner), step.clip))
                / (promised_noise(plan) * step.clip)
                for step in seen
            ]
            z = torch.stack(rows) if rows else torch.zeros(0, subject.reference.size)
            runs.append(Run(name, independent(z, plan.bands)))
            sizes += [len(set(subject.owner[list(step.records)].tolist())) for step in seen if own]
        draws = []
        if counted(plan, count):
            sampler = Sampler(self.fault.plan(plan), self.fault.groups(groups), keys, RandomStream.from_os())
            alone = tuple(len(sampler.sample(step).sizes) for step in range(_DRAWS))
            draws = [
                Draws("watched steps", tuple(sizes), count, plan.rate_within_slot),
                Draws("the sampler alone", alone, count, plan.rate_within_slot),
            ]
        return noise(runs, subject.reference.tensors, draws, alpha=self.alpha, steps=self.steps)

    def lower_bound(self) -> Verdict:
        """Canaries put in by fair coins; every one of them takes part in every step, the guesser's best case."""
        subject = self.subject
        sigma = subject.plan.noise_multiplier
        steps = int(min(max(1, round((sigma / _GUESSABLE) ** 2)), _MOST_GUESSED_STEPS))
        canaries = [group[: subject.most_records] for group in subject.groups[: self.canaries]]
        coins = np.random.default_rng().random(len(canaries)) < 0.5
        inside = [group for group, coin in zip(canaries, coins, strict=True) if coin]
        plan = self._everyone(max(1, len(inside)))
        seen = self._train(inside, plan, steps=steps)
        rows = torch.cat([subject.reference.units(group.tolist(), subject.owner) for group in canaries])
        clipped = rows * (subject.plan.clip / rows.norm(dim=1).clamp(min=1e-30)).clamp(max=1.0)[:, None]
        values = scores(clipped, torch.stack([step.released for step in seen]), sigma * subject.plan.clip)
        claim = epsilon((Event(sigma, 1.0, steps),), subject.plan.delta)
        return lower_bound(values, coins, claim, subject.plan.delta)

    def _everyone(self, units: int, *, clip: float = 0.0) -> PrivacyPlan:
        """The plan for so few units that every one takes part in every step."""
        plan = self.subject.plan
        return replace(
            plan,
            units=units,
            expected_batch=units,
            sampler="poisson",
            max_batch=0,
            bands=1,
            clip=clip or plan.clip,
            clip_quantile=0.0,
            steps=1,
            first_step=0,
            spent=(),
            # What is not released to anybody spends nothing.
            epsilon=1e9,
            delta=min(plan.delta, 0.5 / units),
        )

    def _train(
        self,
        groups: Sequence[np.ndarray],
        plan: PrivacyPlan,
        *,
        examples: Sequence[Example] | None = None,
        site: str = "",
        steps: int = 1,
        micro: int = 0,
        silent: bool = False,
        real: bool = False,
        keys: Sequence[bytes] = (),
    ) -> list[Step]:
        """Watch the trainer; ``real``: under the plan of the whole site, which a fault may tamper with."""
        subject, fault = self.subject, self.fault
        config = _with_train(subject.config, local_steps=steps, micro_batch=micro or subject.config.train.micro_batch)
        return watch(
            replace(subject.resident, task=fault.task(subject.resident.task)),
            subject.state,
            subject.examples if examples is None else examples,
            fault.groups(groups),
            config,
            fault.plan(plan) if real else plan,
            site=site or subject.site,
            keys=keys,
            claimed=plan,
            silent=silent,
            create=fault.engine(config, subject.resident),
        )


def counted(plan: PrivacyPlan, units: int) -> bool:
    """Whether every one of ``units`` units has the same chance at every step, so that sizes are binomial."""
    return plan.slots == 1 and not 0 < plan.max_batch < units


def promised_noise(plan: PrivacyPlan) -> float:
    """Std over clip of the noise that the ledger pays for, reckoned here anew: the plan's own number may be wrong.

    With an adaptive clip a noised count leaves beside the gradient (Andrew et al. 2021, theorem 1).
    """
    if not plan.clip_quantile:
        return plan.noise_multiplier
    return math.sqrt(1 / (1 / plan.noise_multiplier**2 - 1 / (2 * plan.count_noise) ** 2))


def independent(rows: torch.Tensor, bands: int) -> torch.Tensor:
    """What correlated noise was made of: C times its rows (K, P), the first of which is a run's first."""
    column = square_root_bands(bands)
    return sum(
        (float(weight) * torch.cat([torch.zeros_like(rows[:back]), rows[: len(rows) - back]]))
        for back, weight in enumerate(column[: len(rows)])
    )  # type: ignore[return-value]


def _with_train(config: RunConfig, **changes: int) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update=changes)})
