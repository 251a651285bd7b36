"""What a run's configuration comes to at one site."""

from __future__ import annotations

from ..core.config import RunConfig
from ..core.errors import UserError
from ..strategies import create_aggregator
from .resident import Resident


def own_version(config: RunConfig, site: str) -> RunConfig:
    """The configuration with what is written for this site alone."""
    own = next((entry for entry in config.data.sites if entry.name == site), None)
    if own is None or not (own.model or own.rank):
        return config
    method = config.method.model_copy(update={"rank": own.rank or config.method.rank})
    return config.model_copy(update={"model": own.model or config.model, "method": method})


def shared_tensors(config: RunConfig, model: Resident) -> tuple[str, ...]:
    """The tensors that a job would have leave: all of the adapter where its strategy is not known here."""
    try:
        aggregator = create_aggregator(config.strategy, config.strategy_options)
        return aggregator.prepare(model.adapter.read()).spec.select("share")
    except UserError:
        return model.adapter.spec.names
