"""From a configuration to the aggregator of a run: the strategy, what stands around it, and what cannot go together."""

from __future__ import annotations

from ..core.config import RunConfig
from ..core.errors import UserError
from ..privacy.securesum import Terms
from .aggregator import Aggregator, Capabilities, create_aggregator
from .lateness import late_refusal
from .optimisers import ServerOptimiser, why_not
from .policies import TensorPolicies


def compose(config: RunConfig) -> Aggregator:
    """The aggregator of a run, whole: strategy, tensor policies, server optimiser.

    Raises :class:`UserError`, with the reason and the mend, for what cannot go together.
    """
    aggregator = create_aggregator(config.strategy, config.strategy_options)
    if reason := refusal(config, aggregator.capabilities):
        raise UserError(reason)
    if config.tensor_policy:
        aggregator = TensorPolicies(aggregator, config.tensor_policy)
    if config.server.optimizer != "avg" or config.server.lr != 1:
        server = config.server
        aggregator = ServerOptimiser(
            aggregator, server.optimizer, lr=server.lr, momentum=server.momentum, beta2=server.beta2, tau=server.tau
        )
    aggregator.ranks = config.ranks
    return aggregator


def refusal(config: RunConfig, can: Capabilities) -> str | None:
    """Why a strategy with the capabilities ``can`` cannot do what ``config`` asks; None: it can."""
    name, server = config.strategy, config.server
    for site, rank in config.ranks.items():
        if rank > config.method.rank:
            return f"site {site} has rank {rank}, above method.rank {config.method.rank}; raise method.rank to {rank}"
        if rank != config.method.rank and config.central.enabled:
            return (
                f"site {site} has rank {rank}, the run has method.rank {config.method.rank}, and central privacy "
                "cannot mix ranks; give all sites one rank"
            )
        if rank != config.method.rank and not can.heterogeneous_ranks:
            return (
                f"site {site} has rank {rank}, the run has method.rank {config.method.rank}, and strategy `{name}` "
                "cannot mix ranks; give all sites one rank, or choose one that can (flexlora, raflora, flora)"
            )
    if reason := why_not(server.optimizer, can, server.lr):
        return (
            f'server.optimizer "{server.optimizer}" (server.lr {server.lr:g}) cannot stand around strategy `{name}`: '
            f'{reason}; set server.optimizer = "avg" and server.lr = 1'
        )
    if config.secure_sum.enabled and (reason := _secure_sum_reason(config, can)):
        return reason
    if reason := late_refusal(config, can):
        return reason
    if can.two_passes and config.central.enabled:
        return f"strategy `{name}` asks each site twice a round, and central privacy answers for one release only"
    if can.two_passes and server.upload != "plain":
        return (
            f'strategy `{name}` sends sketches, which no change to int8 or topk survives; set server.upload = "plain"'
        )
    if can.needs_loss and config.privacy.enabled:
        return (
            f"strategy `{name}` has a site choose by its training loss, which no noise protects; choose another "
            "strategy, or set privacy.enabled = false"
        )
    if can.needs_validation and not server.validation:
        return f"strategy `{name}` scores adapters on data of the server's own; name the file in server.validation"
    return None


def _secure_sum_reason(config: RunConfig, can: Capabilities) -> str | None:
    """Why ``config`` cannot be run under the secure sum that it asks for; None: it can."""
    name, server = config.strategy, config.server
    if reason := secure_sum_refusal(name, can):
        return f"{reason}; choose one that adds up (fedit, ffa), or set secure_sum.enabled = false"
    try:
        terms = Terms.of(config, "", 0)
    except UserError as error:
        return str(error)
    if config.quorum < terms.threshold or 0 < server.sites_per_round < terms.threshold:
        return (
            f"a secure sum needs {terms.threshold} of the {len(terms.sites)} sites (secure_sum.threshold), and "
            "server.quorum or server.sites_per_round asks for fewer; raise it, or lower the threshold"
        )
    if config.central.enabled:
        return (
            "central privacy bounds each site's change at the server, which under a secure sum sees none; switch "
            "central.enabled or secure_sum.enabled off"
        )
    if server.upload != "plain" or server.wire_dtype != "fp32":
        return (
            "a secure sum has its own form on the wire, which rounds after the noise: set server.upload = "
            '"plain" and server.wire_dtype = "fp32"; secure_sum.bits = 32 sends the bytes of fp32'
        )
    if len(set(config.ranks.values())) > 1:
        return "a secure sum adds up tensors of one shape; give all sites one rank"
    if any(site.attack == "nan" for site in config.data.sites):
        return 'data.sites[].attack "nan" sends its update in the open, which a secure sum does not take; leave it out'
    return None


def secure_sum_refusal(name: str, can: Capabilities) -> str | None:
    """Why a strategy cannot work where the server sees nothing but the sum of the updates; None: it can."""
    if can.needs_individual:
        return f"strategy `{name}` looks at single updates, of which a secure sum shows none"
    if not can.linear_sum:
        return f"strategy `{name}` does more with the updates than add them up, which is all that a secure sum does"
    if can.two_passes:
        return f"strategy `{name}` asks each site twice a round, of which a secure sum adds up one answer"
    return None
