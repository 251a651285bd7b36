"""Fed-MedLoRA+: sites count by how many records they have and by what their adapter is worth to the server."""

from __future__ import annotations

import math

from pydantic import Field

from ..core.adapter import AdapterState
from ..core.errors import UserError
from ..core.update import Update
from .aggregator import Aggregator, Capabilities, Options, strategy
from .averaging import RunningMean


class UtilityOptions(Options):
    """``temperature``: what difference in accuracy makes a factor of e in the weight; large: sizes alone count."""

    temperature: float = Field(0.1, ge=0.01)


@strategy("medlora")
class MedLoRA(Aggregator):
    """A = sum p_k A_k, B = sum p_k B_k, with p_k proportional to n_k exp(u_k / T).

    n_k: the site's records; u_k: the accuracy of its adapter on the server's records (server.validation), the tensors
    that sites do not share taken from the run's adapter. Only differences of accuracies count: where all are worth the
    same it is FedIT. The mean is of factors, so mean(B) mean(A) is not mean(B A). Costs the server one evaluation an
    update. An adapter that fails on the server's records counts little, whatever its site says of its size; it is not
    kept out. Under differential privacy of the sites the scores are post-processing of what these sent; the server's
    own records have no such protection.

    Source: Li et al. 2026, "A Federated and Parameter-Efficient Framework for Large Language Model Training in
    Medicine", arXiv 2601.22124 (Fed-MedLoRA+), which weighs by size and by utility on a validation set of the server's.
    The form of the utility is this module's: exp of the accuracy over a temperature, where the authors' code has
    exp(1 - validation loss) and leaves the size out; their paper's equation was not at hand.
    """

    summary = "averaged by size and by accuracy on the server's records"
    equation = "A = sum p_k A_k, B = sum p_k B_k,  p_k ~ n_k exp(accuracy_k / T)"
    source = "Li et al. 2026, arXiv 2601.22124"
    capabilities = Capabilities(needs_individual=True, needs_validation=True)
    Options = UtilityOptions

    def start_round(self, state: AdapterState) -> None:
        self._state, self._mean = state, RunningMean()

    def add(self, update: Update) -> None:
        if self.score is None:
            raise UserError(
                "strategy `medlora` scores adapters on the server's records; name them in server.validation"
            )
        update.state.require_finite()
        utility = self.score(AdapterState(self._state.spec, {**self._state, **update.state}))
        if not 0 <= utility <= 1:
            raise UserError(f"{update.site}: its adapter scores {utility}, which is no accuracy")
        # Relative to a perfect adapter, so that no weight overflows.
        self._mean.add(update.state, update.weight * math.exp((utility - 1) / self.options.temperature))

    def result(self) -> AdapterState:
        return self._mean.result()
