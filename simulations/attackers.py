"""Simulated sites that lie: what ``data.sites[].attack`` has a site send in place of what it learned."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict

from ..core.adapter import AdapterState
from ..core.config import RunConfig
from ..core.errors import UserError
from ..strategies import LocalRule, Training
from ..strategies.wrapping import WrappedRule
from .backdoor import boost

#: How long a random change is when nothing is said, over the change that the site learned.
_LOUD = 10.0


@dataclass(frozen=True)
class Attack:
    """theta_0 + c (theta_k - theta_0) for every tensor sent, with c = ``factor``.

    ``random``: a normal draw in place of theta_k - theta_0, each tensor's as long as the change that was learned.
    """

    factor: float
    random: bool = False

    @classmethod
    def named(cls, text: str) -> Attack:
        """``scale:C``, ``sign-flip`` or ``sign-flip:C`` (factor -C; 1), ``random`` or ``random:C`` (10)."""
        name, _, size = text.partition(":")
        if name == "scale" and size:
            return cls(float(size))
        if name == "sign-flip":
            return cls(-float(size or 1))
        if name == "random":
            return cls(float(size or _LOUD), random=True)
        raise UserError(f"attack `{text}` is unknown; there are scale:C, sign-flip, sign-flip:C, random, random:C")

    def apply(self, received: AdapterState, sent: AdapterState, draw: np.random.Generator) -> AdapterState:
        """What is sent in place of ``sent``: its shared tensors changed, the others as they are."""
        lies = {}
        for name in received.spec.select("share"):
            start = received[name].astype(np.float64)
            step = sent[name].astype(np.float64) - start
            if self.random:
                noise = draw.standard_normal(step.shape)
                length = float(np.linalg.norm(noise))
                step = noise * (float(np.linalg.norm(step)) / length) if length else noise
            lies[name] = (start + self.factor * step).astype(sent[name].dtype)
        return AdapterState(sent.spec, {**sent, **lies}, names=tuple(sent))


#: What is no number, as each array of a message carries it (bfloat16 as its bits).
_NAN: Mapping[str, float] = {
    "float32": np.nan,
    "float64": np.nan,
    "float16": np.nan,
    "values": np.nan,
    "bfloat16": 0x7FC0,
}


def sends_nan(config: RunConfig, site: str) -> bool:
    """Whether ``site`` is to send no numbers."""
    own = config.site(site)
    return own is not None and own.attack == "nan"


def spoilt(answer: Message, instruction: Message) -> Message:
    """``answer`` with NaN for every number of its adapter, put there past the site's gate, which would hold it back."""
    content = RecordDict(dict(answer.content))
    if "adapter" in content:
        arrays = answer.content.array_records["adapter"]
        content["adapter"] = ArrayRecord(
            {key: Array(np.full_like(array.numpy(), _NAN.get(key, 0))) for key, array in arrays.items()}
        )
    return Message(content, reply_to=instruction)


class Attacker(WrappedRule):
    """A site that trains as it is told, and then sends ``attack``.

    What it sends passes its gate like any answer: a gate looks at what leaves, not at how it was learned. Under
    differential privacy its statement is a lie too, about nobody's data but its own.
    """

    def __init__(
        self, training: Training, memory: Mapping[str, AdapterState], inner: LocalRule | None, attack: Attack, seed: int
    ) -> None:
        super().__init__(training, memory, inner)
        self._attack = attack
        text = f"attack|{seed}|{training.site}|{training.round}"
        self._draw = np.random.default_rng(list(hashlib.sha256(text.encode()).digest()))

    def finish(self, trained: AdapterState, received: AdapterState) -> AdapterState:
        return self._attack.apply(received, self.inner.finish(trained, received), self._draw)


def attacking(rule: LocalRule | None, config: RunConfig, training: Training) -> LocalRule | None:
    """``rule``, or that of an attacker where the configuration makes the site one."""
    own = config.site(training.site)
    text = own.attack if own is not None else ""
    if text in ("", "nan"):
        return rule
    attack = Attack(boost(config)) if text.startswith("backdoor:") else Attack.named(text)
    return Attacker(training, rule.memory if rule is not None else {}, rule, attack, config.seed)
