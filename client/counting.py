"""The answer to an instruction to evaluate: counts, exact or noised, or none."""

from __future__ import annotations

from functools import partial

from flwr.app import RecordDict

from ..core.adapter import AdapterState
from ..core.config import RunConfig
from ..core.progress import Watch
from ..core.wire import Job, encode_answer
from ..privacy.noise import RandomStream
from ..privacy.release import noised
from .attempt import Attempt
from .budget import event_of_release, planned, promise, reserve, resume
from .devicememory import telling
from .evaluation import evaluate
from .holdings import Holdings
from .learning import PERSONAL, with_local
from .paid import Paid, terms
from .prepared import Prepared
from .resident import Resident
from .visit import Here


class Counting:
    """Answers with how good an adapter is on a site's held-out records."""

    def __init__(self, holdings: Holdings, paid: Paid, watch: Watch) -> None:
        self._holdings, self._paid, self._watch = holdings, paid, watch

    def evaluate(self, job: Job, config: RunConfig, here: Here, content: RecordDict) -> RecordDict:
        """The answer, with as much of the counts as the run lets out."""
        prepared, model = self._holdings.site(job, config, here)
        known = self._holdings.memory(job, here).of(job.round)
        state = with_local(self._holdings.receive(content, here.context, model), known)
        if PERSONAL in known:
            state = AdapterState(state.spec, {**state, **known[PERSONAL]})
        metrics: dict[str, float] = {}
        kept = self._paid.kept("evaluate", job, config, here, prepared)
        if config.evaluation_release == "noised":
            if (repeated := self._paid.repeated(kept, state, job, here)) is not None:
                return repeated
            kept.require_room(0)
            with self._paid.attempt("evaluate", config, here) as attempt:
                metrics = self._noised_counts(job, config, here, prepared, model, state, attempt)
        elif config.evaluation_release == "exact_not_private":
            metrics = evaluate(
                model, state, prepared.held_out, config, on_smaller=telling(self._watch, here.site)
            ).exact()
        privacy = promise(config, prepared)
        answer = encode_answer("evaluate", site=here.site, round=job.round, metrics=metrics, privacy=privacy)
        if config.evaluation_release == "noised":
            kept.keep(state, answer)
        return answer

    def _noised_counts(
        self,
        job: Job,
        config: RunConfig,
        here: Here,
        prepared: Prepared,
        model: Resident,
        state: AdapterState,
        attempt: Attempt,
    ) -> dict[str, float]:
        """Evaluation counts that the budget of the held-out units has paid for."""
        event, again = planned(
            attempt,
            prepared,
            partial(event_of_release, job, config, prepared),
            lambda: terms(job, config, here, state),
        )
        if again is not None:
            reserved = resume(config, prepared, again)
            self._paid.resumed(job, here)
        else:
            reserved = reserve(job, config, prepared, event, "held-out", None, **attempt.about)
        scores = evaluate(model, state, prepared.held_out, config, on_smaller=telling(self._watch, here.site))
        if config.privacy.seeded_noise_not_private:
            stream = RandomStream.seeded_not_private(config.seed, here.site, job.round, "evaluation")
        else:
            stream = RandomStream.from_os() if attempt.key is None else RandomStream(attempt.key)
        even = model.task.even_loss(model.adapter.model)
        counts = noised(scores, prepared.held_out_groups, even, event.noise_multiplier, stream)
        attempt.end()
        prepared.ledger.settle(reserved, 1, "released")
        return counts
