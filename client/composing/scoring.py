"""How good an adapter is on a few labelled records of the merging side, with the user's own base model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...core.adapter import AdapterSpec, AdapterState, explain_shape
from ...core.config import RunConfig
from ...core.errors import UserError
from ...core.tasks import Example
from ..data import Records
from ..evaluation import evaluate
from ..resident import Resident, resident


def resident_for(config: RunConfig, spec: AdapterSpec) -> Resident:
    """The base model of ``config`` with an adapter like ``spec`` on it, whose rank may be another than configured.

    Raises :class:`UserError` where tensors or scaling of ``spec`` are not those of the configured method.
    """
    own = config.method
    method = own.model_copy(update={"rank": spec.rank or own.rank, "alpha": spec.alpha or own.alpha})
    found = resident(config.model_copy(update={"method": method}))
    here = found.adapter.fresh
    if spec.names != here.names:
        odd = min(set(spec.names) ^ set(here.names), default="their order")
        raise UserError(f"the adapter is not one of method {own.name} on this model: tensor {odd} is not in both")
    for tensor, want in zip(spec.tensors, here.tensors, strict=True):
        if tensor.shape != want.shape:
            raise UserError(explain_shape(tensor.name, tensor.shape, want.shape))
    if spec.pairs != here.pairs:
        raise UserError(
            f"the adapter scales its factors by {spec.pairs[0].scaling:g}, method {own.name} of rank {spec.rank} and "
            f"alpha {spec.alpha:g} by {here.pairs[0].scaling:g}; set method.name to the method it was trained with"
        )
    return found


class Scorer:
    """Accuracy and mean loss of whole adapters on the same few records. What it tells must not leave the site as such.

    ``labels`` is the number of labelled records.
    """

    def __init__(self, config: RunConfig, records: Records) -> None:
        if not len(records):
            raise UserError("there are no records to score adapters on")
        self._config, self._records = config, records
        self._examples: list[Example] | None = None
        self._last: tuple[AdapterState, float, float] | None = None

    @property
    def labels(self) -> int:
        return len(self._records)

    def accuracy(self, state: AdapterState) -> float:
        """The share of right answers, in [0, 1]."""
        return self._scores(state)[0]

    def loss(self, state: AdapterState) -> float:
        """The mean loss of an example."""
        return self._scores(state)[1]

    def _scores(self, state: AdapterState) -> tuple[float, float]:
        if self._last is None or self._last[0] is not state:
            model = resident_for(self._config, state.spec)
            if self._examples is None:
                self._examples = encode(model, self._records)
            scores = evaluate(model, state, self._examples, self._config)
            count = float(scores.examples.sum())
            self._last = state, float(scores.correct.sum()) / count, float(scores.loss_sum.sum()) / count
        return self._last[1:]


def encode(model: Resident, records: Records) -> list[Example]:
    """The records as the model's task reads them."""
    labels: Sequence[int] | None = None if records.labels is None else np.asarray(records.labels).tolist()
    return list(model.task.encode(records.inputs, labels, model.base.processor))
