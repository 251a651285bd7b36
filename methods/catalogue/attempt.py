"""ATTEMPT: each text asks which of the prompts of other tasks to mix with its own task's."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from pydantic import Field
from torch import nn

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.errors import UserError
from ...core.tasks import Task
from ..anatomy import hidden_width, layers_of
from ..grafts import GraftConfig, Part, Setting, graft_config
from ..registry import Method, MethodOptions, meaning_by, register
from ..sourceprompts import source_prompts


class MixOptions(MethodOptions):
    """``width``: of the network that asks; ``sources``: how many prompts there are, which method.experts tells."""

    width: int = Field(100, ge=1, description="dimensions of the network between text and prompts")
    sources: int = Field(0, ge=0, description="prompts of other tasks; 0: as many as method.experts")


class MixedPrompts(Part):
    """[c; P + sum_j a_j P_j; x], c the first token of the text, j over the sources and P itself.

    a = softmax_j(max(P_j) . LN(U silu(D max(E x))) / (e d)), each max over positions, the text's words alone.
    """

    frozen = frozenset({"sources"})

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, setting)
        width, tokens = hidden_width(setting.model), setting.config.virtual_tokens
        self.sources = nn.Parameter(torch.zeros(setting.options.sources, tokens, width), requires_grad=False)
        self.target = nn.Parameter(torch.zeros(tokens, width))
        self.down = nn.Linear(width, setting.options.width, bias=False)
        self.up = nn.Linear(setting.options.width, width, bias=False)
        self.norm = nn.LayerNorm(width)

    def prompts(self, embedded: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """The prompt of each text, (B, p, d), of its embeddings (B, L, d) and which of them are ``words`` (B, L)."""
        kind = self.target.dtype
        least = torch.finfo(kind).min
        text = embedded.to(kind).masked_fill(~words[:, :, None], least).amax(1)
        asked = self.norm(self.up(F.silu(self.down(text))))
        all_prompts = torch.cat([self.sources, self.target[None]])
        chances = torch.softmax(asked @ all_prompts.amax(1).T / (math.e * text.shape[1]), dim=-1)
        return torch.einsum("bj,jpd->bpd", chances, all_prompts) + self.target

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(base.forward).bind(*args, **kwargs)
        given, model = bound.arguments, base
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        if ids is None:
            raise UserError("attempt reads the text's ids to choose its prompt: give the model input_ids")
        table: Any = model.get_input_embeddings()  # type: ignore[operator]
        embedded = table(ids)
        words = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        prompt = self.prompts(embedded, words).to(embedded.dtype)
        config: Any = model.config
        room = config.max_position_embeddings - (config.pad_token_id + 1 if config.model_type == "roberta" else 0)
        if embedded.shape[1] + prompt.shape[1] > room:
            raise UserError(
                f"a text of {embedded.shape[1]} tokens and {prompt.shape[1]} of the prompt are more than the model's "
                f"{room}: lower task.max_length"
            )
        given["input_ids"] = None
        given["inputs_embeds"] = torch.cat([embedded[:, :1], prompt, embedded[:, 1:]], dim=1)
        for key, value in (("attention_mask", words.to(ids.dtype)), ("token_type_ids", given.get("token_type_ids"))):
            if value is not None:
                # The prompt is seen, and of the same sentence as the first token.
                given[key] = torch.cat([value[:, :1], value[:, :1].expand(-1, prompt.shape[1]), value[:, 1:]], dim=1)
        return base(*bound.args, **bound.kwargs)


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> GraftConfig:
    layers = layers_of(base.model)
    if not layers[0].joins:
        raise UserError(
            f"attempt looks at a whole text, in an encoder like BERT; for {type(base.model).__name__}, choose prompt"
        )
    found = source_prompts("attempt", config.experts, hidden_width(base.model), config.virtual_tokens)
    options = {**config.options, "sources": len(found)}
    places = {layers[0].path.partition(".")[0]: "prompts"}
    return graft_config("attempt", places, config.model_copy(update={"options": options}), task, base)


def _build(model: PeftModel, config: MethodConfig) -> None:
    for part in model.modules():
        if isinstance(part, MixedPrompts):
            sources = source_prompts("attempt", config.experts, part.sources.shape[2], part.sources.shape[1])
            with torch.no_grad():
                part.sources.copy_(sources)
                part.target.copy_(sources.mean(0))


register(
    Method(
        name="attempt",
        summary="a prompt that each text mixes of frozen prompts of other tasks (method.experts) and a trained one",
        source="Asai et al. 2022, arXiv 2205.11961",
        configure=_configure,
        build=_build,
        frozen=lambda name: name.endswith(".sources"),
        meaning=meaning_by(
            (".sources", "basis", "nonlinear"),
            (".target", "prompt", "nonlinear"),
            (".down.", "gate", "nonlinear"),
            (".up.", "gate", "nonlinear"),
            (".norm.", "gate", "nonlinear"),
        ),
        parts={"prompts": MixedPrompts},
        Options=MixOptions,
        accepts=frozenset({"experts"}),
        equation="P + sum_j a_j P_j, a = softmax(max(P_j) . LN(U silu(D max(E x))) / (e d)) over the sources and P",
        federates="averaged tensor by tensor; the mean is not the mean of the functions; sources cross once",
        privacy="exact clipping; p d + 2 d w + 2 d numbers; the sources have paid their own",
        kind="prompt",
        merges=False,
        contract={"unfit": dict.fromkeys(("gpt2", "llama", "t5", "vit"), "choose prompt")},
    )
)
