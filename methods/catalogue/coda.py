"""CoDA: an adapter for every word, and the frozen layer for the few that a router picks.

The paper trains routers and adapters on unlabelled text before it tunes them; from fresh ones it is a longer way.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from pydantic import Field
from torch import nn

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.errors import UserError
from ...core.tasks import Task
from ..anatomy import Layer, hidden_width, layers_of
from ..attending import first_of, visible
from ..bottleneck import Bottleneck, BottleneckOptions
from ..grafts import GraftConfig, Part, Setting, graft_config
from ..registry import Method, meaning_by, register


class CodaOptions(BottleneckOptions):
    """``reduction``: r, of which n / r words of a text pass the frozen layer; ``softness`` of their choice."""

    reduction: int = Field(3, ge=1, description="words of a text over those that the frozen layer computes")
    softness: float = Field(1.0, gt=0, description="epsilon of the soft top-k; the paper's are 0.02 to 1")


def soft_top_k(scores: torch.Tensor, words: torch.Tensor, k: torch.Tensor, softness: float) -> torch.Tensor:
    """Which k of the ``words`` have the highest ``scores``, softly: numbers of 0 to 1 that add up to k; 0 beside them.

    scores (B, n), words (B, n) boolean, k (B) from 1 to the number of words; gives (B, n). This maximises
    scores . x + softness * entropy(x) over such x (Lei et al. 2023, section 3), whose solution is
    x_i = min(1, exp((s_i + a) / softness)). The paper comes near to a by coordinate descent; here it is found among the
    k values that it has where the j = 0, ..., k - 1 highest are 1.
    """
    s = scores.masked_fill(~words, torch.finfo(scores.dtype).min / 4) / softness
    ordered, _ = s.sort(-1, descending=True)
    rest = ordered.flip(-1).logcumsumexp(-1).flip(-1)
    left = k[:, None] - torch.arange(s.shape[1], device=s.device)
    levels = left.clamp(min=1).to(s.dtype).log() - rest
    # The first that leaves no number above 1.
    j = ((ordered + levels <= 0) | (left <= 1)).to(torch.uint8).argmax(-1, keepdim=True)
    return (s + levels.gather(1, j)).clamp(max=0.0).exp()


class ConditionalLayer(Part):
    """x + U act(D z) + scatter(l_i (F(x)_i - x_i)), F the frozen layer of the k = n / r words alone that l picks.

    l = the k highest of soft_top_k(w . z); z is x, which the layers of BERT give normalised. A text of fewer than r
    words has one. Words that were not picked are neither queries nor keys (the paper's k-to-k attention). In a model
    without a decoder the first word, which is what heads read, is always one of the k, with l = 1: where it is not
    picked, a layer has no part in the answer.
    """

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, setting)
        self.reduction: int = setting.options.reduction
        self.softness: float = setting.options.softness
        self.heads_read_first = not getattr(setting.model.config, "is_encoder_decoder", False)
        self.router = nn.Linear(hidden_width(setting.model), 1, bias=False)
        self.bottleneck = Bottleneck.of(setting)

    def normed(self, base: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(base.forward).bind(*args, **kwargs)
        given = bound.arguments
        x: torch.Tensor = given["hidden_states"]
        words = _words(base, given.get("attention_mask"), x)
        z = self.normed(base, x)
        k = -(-words.sum(1) // self.reduction)
        scores = self.router(z.to(self.router.weight.dtype))[..., 0]
        if self.heads_read_first:
            first = torch.arange(words.shape[1], device=x.device) == 0
            chances = soft_top_k(scores, words & ~first, (k - 1).clamp(min=1), self.softness).masked_fill(first, 1.0)
            order = chances.masked_fill(first, 2.0)
        else:
            order = chances = soft_top_k(scores, words, k, self.softness)
        at = order.masked_fill(~words, -1.0).topk(int(k.max())).indices
        chosen = torch.arange(at.shape[1], device=x.device) < k[:, None]
        rows = at[..., None].expand(-1, -1, x.shape[-1])
        picked = x.gather(1, rows)
        given["hidden_states"] = picked
        nobody = torch.zeros(chosen.shape, dtype=x.dtype, device=x.device)
        nobody = nobody.masked_fill(~chosen, torch.finfo(x.dtype).min)
        given["attention_mask"] = nobody[:, None, None].expand(-1, 1, at.shape[1], -1)
        bias = None
        if "position_bias" in inspect.signature(base.forward).parameters:
            # T5's first layer makes it, and gives it to the others: of all words, as it is here.
            bias = given.get("position_bias")
            if bias is None:
                bias = _first_bias(base, x)
            given["position_bias"] = _among(bias, at)
        result = base(*bound.args, **bound.kwargs)
        weight = (chances.gather(1, at) * chosen)[..., None].to(x.dtype)
        out = x + self.bottleneck(z)
        out = out.scatter_add(1, rows, weight * (first_of(result) - picked))
        if not isinstance(result, tuple):
            return out
        return (out, *(result[1:] if bias is None else (bias, *result[2:])))


class ConditionalPreNorm(ConditionalLayer):
    """The same around a layer that normalises what it is given: z = LN(x)."""

    def __init__(self, base: nn.Module, setting: Setting) -> None:
        super().__init__(base, setting)
        self.norm = next(name for name, module in base.named_modules() if type(module).__name__.endswith("Norm"))

    def normed(self, base: nn.Module, x: torch.Tensor) -> torch.Tensor:
        z: torch.Tensor = base.get_submodule(self.norm)(x)
        return z


def _words(base: nn.Module, mask: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """Which of x (B, n, d) are words, and not padding: (B, n)."""
    seen = visible(base, mask, x.shape[1], x.shape[1])
    if seen is None:
        return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    return seen.any(-2)[:, 0].expand(len(x), -1)


def _first_bias(base: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """T5's bias by the distance of words, (1, heads, n, n)."""
    attention = next(module for module in base.modules() if hasattr(module, "compute_bias"))
    bias: torch.Tensor = attention.compute_bias(x.shape[1], x.shape[1], device=x.device)  # type: ignore[operator]
    return bias


def _among(bias: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """The bias (1, heads, n, n) between the words ``at`` (B, K) of each record: (B, heads, K, K)."""
    between = bias[0][:, at[:, :, None], at[:, None, :]]
    return between.transpose(0, 1)


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> GraftConfig:
    places = {layer.path: _kind(layer, base.model) for layer in layers_of(base.model) if _encodes(layer, base.model)}
    if not places:
        raise UserError(
            f"coda picks among the words of a whole text, in an encoder; for {type(base.model).__name__}, choose "
            "parallel-adapter"
        )
    return graft_config("coda", places, config, task, base)


def _encodes(layer: Layer, model: nn.Module) -> bool:
    attention = model.get_submodule(layer.attentions[0].module)
    return not (getattr(attention, "is_causal", False) or getattr(attention, "is_decoder", False))


def _kind(layer: Layer, model: nn.Module) -> str:
    after = layer.joins or hasattr(model.get_submodule(layer.path), "output_layer_norm")
    return "layer" if after else "prenorm"


register(
    Method(
        name="coda",
        summary="an adapter for every word, and the frozen layer for the few that a router picks",
        source="Lei et al. 2023, arXiv 2304.04947, section 3",
        equation="h <- x + U act(D z) + P^T (l (F(P x) - P x)), P picks k = n / r words by l = softtopk(w . z)",
        federates="averaged tensor by tensor; the mean is not the mean of the functions, nor its choice of words",
        privacy="exact clipping; each record picks among its own words; 2 d w + 2 d + w numbers a layer",
        configure=_configure,
        meaning=meaning_by((".router.", "gate", "nonlinear"), (".bottleneck.", "adapter", "nonlinear")),
        parts={"layer": ConditionalLayer, "prenorm": ConditionalPreNorm},
        Options=CodaOptions,
        kind="adapter",
        merges=False,
        contract={
            "settings": {"options": {"width": 8}},
            # Of the last layer's words, a head reads the first alone, whose weight is no router's.
            "inert": (".router.",),
            "unfit": dict.fromkeys(("gpt2", "llama"), "choose parallel-adapter"),
        },
    )
)
