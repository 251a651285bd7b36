"""Cartridges: trained keys and values before a text, behind a frozen attention sink."""

from __future__ import annotations

from peft import CartridgeConfig
from pydantic import Field

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.errors import UserError
from ...core.tasks import Task
from ..registry import Method, MethodOptions, register
from .prefix import require_text, virtual_token_meaning


class CartridgeOptions(MethodOptions):
    num_frozen_tokens: int = Field(1, ge=0, description="of the virtual tokens, how many first ones stay as drawn")


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> CartridgeConfig:
    require_text("cartridge", task, base)
    options = CartridgeOptions.model_validate(dict(config.options))
    if options.num_frozen_tokens >= config.virtual_tokens:
        raise UserError("method.options.num_frozen_tokens leaves no virtual token to train: lower it")
    return CartridgeConfig(
        task_type=task.peft_type,
        num_virtual_tokens=config.virtual_tokens,
        num_frozen_tokens=options.num_frozen_tokens,
        modules_to_save=list(base.head) or None,
    )


register(
    Method(
        name="cartridge",
        summary="virtual keys and values in every attention layer, the first of them frozen",
        # The paper's first values are a corpus's own keys and values, which would be a site's private text; here they
        # are drawn, as PEFT does where it is given no text.
        source="Eyuboglu et al. 2025, arXiv 2506.06266",
        configure=_configure,
        frozen=lambda name: name.endswith(".frozen_embedding"),
        meaning=virtual_token_meaning,
        Options=CartridgeOptions,
        equation="attention over [Z_k; K], [Z_v; V], p trained keys and values a layer but the first",
        federates="averaged position by position; the mean is not the mean of the functions; the sink crosses once",
        privacy="exact clipping; 2 p d numbers a layer",
        kind="prompt",
        merges=False,
        recomputes=False,
        contract={"unfit": {"t5": "choose lora", "vit": "choose lora"}},
    )
)
