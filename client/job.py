"""What a run's configuration comes to at one site."""

from __future__ import annotations

from collections.abc import Callable

from ..core.config import RunConfig
from ..core.errors import UserError
from ..strategies.compose import compose
from .resident import Resident


def own_version(config: RunConfig, site: str) -> RunConfig:
    """The configuration with what is written for this site alone: its base model, rank and local steps."""
    own = config.site(site)
    if own is None or not (own.model or own.rank or own.memory or own.local_steps):
        return config
    method = config.method.model_copy(update={"rank": config.ranks[site]})
    train = config.train.model_copy(update={"local_steps": own.local_steps or config.train.local_steps})
    return config.model_copy(update={"model": own.model or config.model, "method": method, "train": train})


def shared_tensors(config: RunConfig, model: Resident, site: str) -> tuple[str, ...]:
    """The tensors that a job would have leave: all of the adapter where its strategy is not known here."""
    return sharing(config, model)(site)


def sharing(config: RunConfig, model: Resident) -> Callable[[str], tuple[str, ...]]:
    """:func:`shared_tensors` for many sites that have one version of the configuration."""
    try:
        aggregator = compose(config)
        # The resident adapter may still carry the policies and extras of another run.
        start = aggregator.prepare(model.adapter.read().with_spec(model.adapter.fresh))
    except UserError:
        return lambda site: model.adapter.fresh.names

    def shared(site: str) -> tuple[str, ...]:
        try:
            return aggregator.for_site(start, site).spec.select("share")
        except UserError:
            return model.adapter.fresh.names

    return shared
