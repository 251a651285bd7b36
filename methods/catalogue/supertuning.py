"""Super-Tuning and SHiRA: a few entries of each weight train, chosen by magnitude or by lot, alike at every site."""

from __future__ import annotations

from peft import ShiraConfig, SupertuningConfig
from pydantic import Field

from ..registry import Method, MethodOptions, meaning_by, register
from ..wrapping import on_layers

_FEDERATES = "averages exactly: every site trains the same entries"


class SupertuningOptions(MethodOptions):
    sparsity: float = Field(0.99, ge=0, lt=1, description="share of the entries that stay as they are")
    select_top: bool = Field(True, description="train the largest entries; false: the smallest")


class ShiraOptions(MethodOptions):
    random_seed: int = Field(0, ge=0, description="seed of the trained entries, equal at all sites")


register(
    Method(
        name="supertuning",
        summary="the largest one per cent of each weight's entries",
        source="arXiv 2607.09287",
        configure=lambda config, task, base: on_layers(SupertuningConfig, config, task, base),
        meaning=meaning_by((".supertuning_values.", "entries", "linear")),
        Options=SupertuningOptions,
        accepts=frozenset({"target_modules"}),
        equation="W = W0 + S, S zero but at the entries where |W0| is largest",
        federates=_FEDERATES,
        privacy="exact clipping; m n (1 - sparsity) numbers a layer; their choice asks the base weights alone",
        kind="partial",
        contract={"unfit": {"gpt2": "choose lora"}, "settings": {"options": {"sparsity": 0.9}}},
    )
)
register(
    Method(
        name="shira",
        summary="as many entries of each weight as LoRA of the rank has numbers, drawn by lot",
        source="Bhardwaj et al. 2024, arXiv 2406.13175",
        configure=lambda config, task, base: on_layers(ShiraConfig, config, task, base, weights=True, r=config.rank),
        meaning=meaning_by((".shira_weight.", "entries", "linear")),
        Options=ShiraOptions,
        uses_rank=True,
        uses_alpha=False,
        accepts=frozenset({"target_modules"}),
        options={"common_rank": True},
        equation="W = W0 + S, S zero but at r (m + n) drawn entries",
        federates=_FEDERATES,
        privacy="exact clipping; r (m + n) numbers a layer",
        kind="partial",
        contract={"unfit": {"gpt2": "choose lora"}},
    )
)
