"""Personal tensors: a part of the adapter stays at each site, the rest is averaged (FedPer, FedRep, FedBN)."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping

from pydantic import Field

from ..core.adapter import AdapterSpec, AdapterState, TensorSpec
from ..core.errors import UserError
from .aggregator import Capabilities, Options, strategy
from .averaging import FedIT
from .local import LocalRule, Training

#: How models call normalisation layers: LayerNorm, layer_norm, layernorm_before, input_layernorm, ln_1, norm2, bn1.
_NORM = re.compile(r"layer_?norm|rms_?norm|batch_?norm|group_?norm|(^|[._])(ln|norm|bn)_?\d*[._]", re.IGNORECASE)


def is_head(tensor: TensorSpec) -> bool:
    """Whether a tensor belongs to the head, which turns features into answers."""
    return tensor.role == "head"


def is_norm(tensor: TensorSpec) -> bool:
    """Whether a tensor is the scale or shift of a normalisation layer, as the ln and bitfit methods train them."""
    return tensor.role == "norm" or (tensor.role == "bias" and _NORM.search(tensor.name) is not None)


def kept_local(initial: AdapterState, where: Callable[[TensorSpec], bool], what: str, name: str) -> AdapterState:
    """``initial`` with the tensors that satisfy ``where`` made personal.

    Raises :class:`UserError` when there is none of ``what``, or nothing else that strategy ``name`` could share.
    """
    own = {tensor.name for tensor in initial.spec.tensors if tensor.parameter and where(tensor)}
    if not own:
        raise UserError(
            f"strategy `{name}` keeps {what} at each site, and the {initial.spec.method} adapter of this model trains "
            "none; choose another method, or name the tensors to keep in tensor_policy"
        )
    spec = initial.spec.with_policy("local", lambda tensor: tensor.name in own)
    if not spec.select("share"):
        raise UserError(
            f"strategy `{name}` keeps {what} at each site, and a {initial.spec.method} adapter is nothing else; choose "
            "another method"
        )
    return initial.with_spec(spec)


@strategy("fedper")
class FedPer(FedIT):
    """The head stays at each site; all other tensors are averaged as FedIT: x = sum p_k x_k.

    The personal head begins as the run's and is trained at the site in every round. It never leaves the site, so under
    differential privacy nobody sees what its noise protects. Source: Arivazhagan et al. 2019, "Federated Learning with
    Personalization Layers", arXiv 1912.00818, Algorithm 1 and 2.
    """

    summary = "the head stays local, the rest is averaged"
    equation = "x = sum p_k x_k for all tensors but the head;  head_k stays at site k"
    source = "Arivazhagan et al. 2019, arXiv 1912.00818"
    capabilities = Capabilities(linear_sum=True)

    def prepare(self, initial: AdapterState) -> AdapterState:
        return kept_local(initial, is_head, "the head", self.name)


class FedRepOptions(Options):
    """``head_fraction``: share of a round's local steps in which the head trains; then the body does."""

    head_fraction: float = Field(0.5, gt=0, lt=1)


class HeadFirst(LocalRule):
    """Trains the personal tensors for the first steps of a round, then the shared ones."""

    def __init__(self, training: Training, memory: Mapping[str, AdapterState], fraction: float) -> None:
        super().__init__(training, memory)
        # Each side gets a step at least.
        self.head_steps = min(max(1, round(fraction * training.steps)), training.steps - 1)

    def begin(self, received: AdapterState, loss: Callable[[AdapterState], float] | None = None) -> AdapterState:
        if self.training.steps < 2:
            raise UserError(
                f"site {self.training.site}: strategy `fedrep` trains the head first and the rest after it; "
                "set train.local_steps to 2 or more"
            )
        return received

    def trains(self, spec: AdapterSpec, step: int) -> Collection[str]:
        own = set(spec.select("local"))
        return own if step < self.head_steps else {t.name for t in spec.tensors if t.parameter} - own


@strategy("fedrep")
class FedRep(FedPer):
    """FedPer whose head is trained first: head steps at a fixed body, then body steps at the fixed head.

    The server averages the bodies: x = sum p_k x_k. As published the head takes its steps from where it was left in the
    round before. Source: Collins et al. 2021, "Exploiting Shared Representations for Personalized Federated Learning",
    arXiv 2102.07078, Algorithm 1.
    """

    summary = "the head stays local and trains first, then the body, which is averaged"
    equation = "head_k <- steps on F_k(x, head_k);  x_k <- steps on F_k(x_k, head_k);  x = sum p_k x_k"
    source = "Collins et al. 2021, arXiv 2102.07078"
    Options = FedRepOptions

    def local(self, training: Training, memory: Mapping[str, AdapterState]) -> LocalRule:
        return HeadFirst(training, memory, self.options.head_fraction)


@strategy("fedbn")
class FedBN(FedIT):
    """Scales and shifts of normalisation layers stay at each site; all other tensors are averaged: x = sum p_k x_k.

    For sites whose inputs differ (scanners, styles of writing) more than their labels. Here these are trained tensors,
    of the methods ln and bitfit; running statistics of batch normalisation are part of the frozen base model and do not
    move. Source: Li et al. 2021, "FedBN", arXiv 2102.07623, Algorithm 1.
    """

    summary = "normalisation tensors stay local, the rest is averaged"
    equation = "x = sum p_k x_k for all tensors but scales and shifts of normalisation layers"
    source = "Li et al. 2021, arXiv 2102.07623"
    capabilities = Capabilities(linear_sum=True)

    def prepare(self, initial: AdapterState) -> AdapterState:
        return kept_local(initial, is_norm, "normalisation tensors", self.name)
