"""Which tensors are shared, frozen or a site's own, by patterns of the configuration: any strategy made personal."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from ..core.adapter import AdapterSpec, AdapterState, Policy
from ..core.config import TensorPolicy
from ..core.errors import UserError
from .aggregator import Aggregator
from .wrapping import Wrapper


class TensorPolicies(Wrapper):
    """``inner``, with tensor policies by name: share, local, freeze, or shared in odd or even rounds only.

    A tensor takes the policy of the first pattern (shell style) that fits; in the other rounds a scheduled one is
    frozen at its global value. Raises :class:`UserError` for a pattern that fits no tensor of the adapter.
    """

    def __init__(self, inner: Aggregator, patterns: Mapping[str, TensorPolicy]) -> None:
        super().__init__(inner)
        self.patterns = dict(patterns)

    def prepare(self, initial: AdapterState) -> AdapterState:
        prepared = self.inner.prepare(initial)
        for pattern in self.patterns:
            if not any(fnmatchcase(name, pattern) for name in prepared.spec.bare.names):
                raise UserError(
                    f'tensor_policy: no tensor of the adapter fits "{pattern}"; there are {prepared.spec.names[0]} ...'
                )
        for number in (1, 2):
            # A rule that cannot do without a tensor that rests says so now, not when sites have trained.
            self.inner.start_round(prepared.with_spec(self._with_policies(prepared.spec, number)))
        return prepared.with_spec(self._with_policies(prepared.spec, 0))

    def start_round(self, state: AdapterState) -> None:
        self.inner.start_round(state.with_spec(self._with_policies(state.spec, self.round)))

    def for_site(self, state: AdapterState, site: str) -> AdapterState:
        sent = self.inner.for_site(state, site)
        return sent.with_spec(self._with_policies(sent.spec, self.round))

    def _with_policies(self, spec: AdapterSpec, round: int) -> AdapterSpec:
        """``round`` 0: before the first, when every scheduled tensor is shared."""
        for name, asked in self._asked(spec).items():
            policy: Policy
            if asked == "odd" or asked == "even":
                resting = round and (round % 2 == 0) == (asked == "odd")
                policy = "freeze" if resting else "share"
            else:
                policy = asked
            spec = spec.with_policy(policy, lambda tensor, name=name: tensor.name == name)  # type: ignore[misc]
        return spec

    def _asked(self, spec: AdapterSpec) -> dict[str, TensorPolicy]:
        found: dict[str, TensorPolicy] = {}
        for name in spec.bare.names:
            for pattern, policy in self.patterns.items():
                if fnmatchcase(name, pattern):
                    found[name] = policy
                    break
        return found
