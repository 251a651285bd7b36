"""IFCA: several global adapters; each site trains the one that fits its records best."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from ..core.adapter import AdapterSpec, AdapterState, TensorSpec
from ..core.errors import UserError
from ..core.update import Update
from .aggregator import Aggregator, Capabilities, Options, strategy
from .averaging import RunningMean
from .local import LocalRule, Training

#: The extra in which a site says which cluster it trained: 1 there, 0 elsewhere.
CHOICE = "ifca.choice"
_CLUSTER, _CHOICES = "cluster-", "choices"


class IFCAOptions(Options):
    """``clusters``: how many; ``dealt``: first rounds in which sites are dealt to them and do not choose.

    ``spread``: noise on the clusters that they begin with, as a share of the adapter's size; ``seed``:
    what it is drawn from.
    """

    clusters: int = Field(2, ge=1, le=64)
    dealt: int = Field(1, ge=0)
    spread: float = Field(0.0, ge=0)
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _apart(self) -> IFCAOptions:
        if not self.dealt and not self.spread and self.clusters > 1:
            raise ValueError("clusters that begin alike stay alike unless sites are dealt to them: set dealt or spread")
        return self


def of_cluster(name: str, cluster: int) -> str:
    """The name of the extra that holds tensor ``name`` of a cluster's adapter."""
    return f"{name}.cluster{cluster}"


def _clustered(spec: AdapterSpec) -> tuple[TensorSpec, ...]:
    return tuple(tensor for tensor in spec.tensors if tensor.parameter and tensor.policy == "share")


class ClusteredSite(LocalRule):
    """Begins with the cluster of least training loss, and says which that was."""

    needs_loss = True

    def __init__(self, training: Training, memory: Mapping[str, AdapterState], dealt: int) -> None:
        super().__init__(training, memory)
        self.dealt = dealt

    def begin(self, received: AdapterState, loss: Callable[[AdapterState], float] | None = None) -> AdapterState:
        if self.training.round <= self.dealt:
            self.choice = int(np.argmax(received[CHOICE]))
            return self._with(received, self.choice)
        if loss is None:
            raise UserError("strategy `ifca` chooses by the training loss, which is not told here")
        clusters = range(received.spec.by_name[CHOICE].size)
        offered = [self._with(received, cluster) for cluster in clusters]
        losses = [loss(state) for state in offered]
        if not np.isfinite(losses).any():
            raise UserError(f"site {self.training.site}: no cluster's adapter has a finite training loss")
        best = np.flatnonzero(np.array(losses) == np.nanmin(losses))
        # Adapters that are equally good are dealt among the sites, each always to the same one.
        self.choice = int(best[_number(self.training.site) % len(best)])
        return offered[self.choice]

    @staticmethod
    def _with(received: AdapterState, cluster: int) -> AdapterState:
        # By the extras, not the policies: a tensor that rests in this round is its cluster's all the same.
        offered = {name: of_cluster(name, cluster) for name in received.spec.bare.names}
        own = {name: received[extra] for name, extra in offered.items() if extra in received}
        return AdapterState(received.spec, {**received, **own})

    def finish(self, trained: AdapterState, received: AdapterState) -> AdapterState:
        sent = {**trained, CHOICE: _one_hot(self.choice, received.spec.by_name[CHOICE].size)}
        return AdapterState(received.spec, sent, names=tuple(n for n in received.spec.names if n in sent))


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _one_hot(cluster: int, clusters: int) -> np.ndarray:
    return np.eye(clusters, dtype=np.float32)[cluster]


@strategy("ifca")
class IFCA(Aggregator):
    """k global adapters x_1 ... x_k; each round a site trains argmin_j F_k(x_j), and x_j is averaged over its sites.

    x_j <- sum_{k in S_j} w_k y_k / sum_{k in S_j} w_k; a cluster that nobody chose stays. All k come down (k times the
    bytes), one goes up. What a site evaluates is the cluster that it trained last; the run's own adapter, which is
    exported and which a new site meets first, is the one of most weight in the last round.

    As published the clusters begin apart (``spread``) and sites choose from the first round on; often all then choose
    one, and the others never train (on quadratic losses of two kinds, in 6 of 8 seeds). So here the sites are first
    dealt evenly to clusters that begin alike, for ``dealt`` rounds, and choose among what came of it.

    The choice is made by a loss over the site's records, before any noise, and is told to the server: refused under
    differential privacy. Source: Ghosh et al. 2020, "An Efficient Framework for Clustered Federated Learning", arXiv
    2006.04088, Algorithm 1 (option II, model averaging).
    """

    summary = "k global adapters; each site trains the one with the least loss on its records"
    equation = "j_k = argmin_j F_k(x_j);  x_j = sum over {k: j_k = j} of w_k y_k / sum of w_k"
    source = "Ghosh et al. 2020, arXiv 2006.04088"
    capabilities = Capabilities(needs_individual=True, needs_loss=True)
    Options = IFCAOptions

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self._clusters: list[dict[str, np.ndarray]] = []
        self._choices: dict[str, int] = {}
        self._spec: AdapterSpec | None = None

    def local(self, training: Training, memory: Mapping[str, AdapterState]) -> LocalRule:
        return ClusteredSite(training, memory, self.options.dealt)

    def _begun(self, state: AdapterState) -> list[dict[str, np.ndarray]]:
        """The clusters; at first the adapter ``state`` and noisy copies of it."""
        if self._clusters:
            return self._clusters
        names = [tensor.name for tensor in _clustered(state.spec)]
        first = {name: state[name] for name in names}
        size = np.sqrt(np.mean([np.mean(array.astype(np.float64) ** 2) for array in first.values()]))
        found = [first]
        for cluster in range(1, self.options.clusters):
            random = np.random.default_rng([self.options.seed, cluster])
            tensors = {}
            for name, array in first.items():
                own = float(np.sqrt(np.mean(array.astype(np.float64) ** 2)))
                # A factor that begins at zero has no size of its own.
                noise = self.options.spread * (own or size) * random.standard_normal(array.shape)
                tensors[name] = (array + noise).astype(array.dtype)
            found.append(tensors)
        return found

    def for_site(self, state: AdapterState, site: str) -> AdapterState:
        clusters, shared = self._begun(state), _clustered(state.spec)
        extras = list(state.spec.extras)
        tensors: dict[str, np.ndarray] = dict(state)
        for number, cluster in enumerate(clusters):
            for tensor in shared:
                name = of_cluster(tensor.name, number)
                extras.append(TensorSpec(name, tensor.shape, tensor.dtype, "cluster", policy="freeze", parameter=False))
                tensors[name] = cluster[tensor.name]
        chosen = self._chosen(site)
        if site in self._choices:
            tensors |= {tensor.name: clusters[chosen][tensor.name] for tensor in shared}
        extras.append(TensorSpec(CHOICE, (len(clusters),), role="choice", parameter=False))
        tensors[CHOICE] = _one_hot(chosen, len(clusters))
        return AdapterState(state.spec.with_extras(extras), tensors)

    def _chosen(self, site: str) -> int:
        """The cluster that ``site`` trained last; before that, the one that it is dealt to."""
        if site in self._choices:
            return self._choices[site]
        known = sorted(self.ranks)
        return (known.index(site) if site in self.ranks else 0) % self.options.clusters

    def start_round(self, state: AdapterState) -> None:
        self._clusters = self._begun(state)
        self._spec = state.spec
        self._means = [RunningMean() for _ in self._clusters]
        self._heard: dict[str, int] = {}

    def add(self, update: Update) -> None:
        told = update.state[CHOICE] if CHOICE in update.state else _one_hot(0, len(self._clusters))
        chosen = int(np.argmax(told))
        # A coarse form on the wire may round the 1, but leaves no doubt which it was.
        if not (np.isfinite(told).all() and told[chosen] > 0 and (np.delete(told, chosen) <= told[chosen] / 2).all()):
            raise UserError(f"{update.site}: does not say which one of {len(self._clusters)} clusters it trained")
        names = (name for name in update.state if update.state.spec.by_name[name].parameter)
        self._means[chosen].add(update.state.only(names), update.weight)
        self._heard[update.site] = chosen

    def result(self) -> AdapterState:
        heaviest = int(np.argmax([mean.weight for mean in self._means]))
        given = self._means[heaviest].result()
        for cluster, mean in enumerate(self._means):
            if mean.weight:
                self._clusters[cluster] = {**self._clusters[cluster], **mean.result()}
        self._choices |= self._heard
        return given

    def memory(self) -> Mapping[str, AdapterState]:
        if self._spec is None:
            return {}
        memory = {
            f"{_CLUSTER}{number}": AdapterState(self._spec, cluster, names=tuple(cluster))
            for number, cluster in enumerate(self._clusters)
        }
        if self._choices:
            sites = tuple(TensorSpec(site, (1,), "float64", policy="local") for site in sorted(self._choices))
            chosen = {site: np.array([float(cluster)]) for site, cluster in self._choices.items()}
            memory[_CHOICES] = AdapterState(AdapterSpec("ifca", sites), chosen)
        return memory

    def recall(self, memory: Mapping[str, AdapterState]) -> None:
        held = [memory[f"{_CLUSTER}{n}"] for n in range(self.options.clusters) if f"{_CLUSTER}{n}" in memory]
        if held and len(held) != self.options.clusters:
            raise UserError(f"the checkpoint holds {len(held)} clusters, the strategy has {self.options.clusters}")
        self._clusters = [dict(cluster) for cluster in held]
        self._spec = held[0].spec if held else None
        self._choices = {site: int(chosen[0]) for site, chosen in memory.get(_CHOICES, {}).items()}
