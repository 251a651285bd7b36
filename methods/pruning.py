"""Which heads and channels a task needs: the weights that go together, and the gradients of LoRA that tell.

Source: Zhang et al. 2023, LoRAPrune, arXiv 2305.18403. As in the authors' code, every block loses the same share, by a
cubic schedule with a warm-up and a cool-down, and scores are moving means; the code spares the first tenth of the
layers and the last one, takes |.| for the square and divides by norms, here the paper's own equation stands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..core.basemodel import BaseModel
from ..core.errors import UserError
from ..core.tasks import Example, Task
from .anatomy import Attention, dense_weight, layers_of, shape_of
from .dense import upright
from .rehearsal import head_of, losses, rehearsed

_STEPS, _EVERY, _RATE = 100, 10, 3e-4
_RANK, _SCALE, _MEMORY, _EDGE = 8, 2.0, 0.9, 0.1


@dataclass(frozen=True)
class Block:
    """Units that go or stay whole: the heads of an attention, or the channels of a feed-forward block.

    ``rows`` and ``columns``: which outputs and which inputs of a layer are each unit's, (units, k), by the layer's
    path. Heads that have keys and values in common are one unit.
    """

    rows: Mapping[str, torch.Tensor]
    columns: Mapping[str, torch.Tensor]

    @property
    def units(self) -> int:
        return len(next(iter(self.columns.values())))

    @property
    def sides(self) -> dict[str, torch.Tensor]:
        """Rows or columns, by path: a layer has the one or the other."""
        return {**self.rows, **self.columns}

    def kept(self, stay: torch.Tensor) -> dict[str, torch.Tensor]:
        """The rows or columns that are left, in order, by path, where the units ``stay``, (units) of booleans, are."""
        return {path: places[stay].flatten().sort().values for path, places in self.sides.items()}

    def scores(self, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The sum over a unit's weights of their scores (m, n), by path: (units)."""
        rows = [weights[path].sum(1)[places].sum(1) for path, places in self.rows.items()]
        return torch.stack(rows + [weights[path].sum(0)[at].sum(1) for path, at in self.columns.items()]).sum(0)


def blocks_of(model: nn.Module) -> tuple[Block, ...]:
    """Every attention and feed-forward block. Raises :class:`UserError` where a model's heads are not known."""
    modules = dict(model.named_modules())
    heads = getattr(getattr(model, "config", None), "num_attention_heads", None)
    found = []
    for layer in layers_of(model):
        found += [_attention(attention, modules, heads) for attention in layer.attentions]
        channels = torch.arange(shape_of(modules[layer.down])[0])[:, None]
        found.append(Block({path: channels for path in (layer.gate, layer.up) if path}, {layer.down: channels}))
    return tuple(found)


def _attention(attention: Attention, modules: Mapping[str, nn.Module], heads: Any) -> Block:
    inner, made = shape_of(modules[attention.output])[0], shape_of(modules[attention.key])[1]
    if (
        not isinstance(heads, int)
        or inner % heads
        or (made != 3 * inner if attention.fused else made % (inner // heads))
    ):
        raise UserError(f"how the heads lie in {attention.module} is not known to this method; choose lora")
    if attention.fused:
        own = torch.arange(inner).view(heads, -1)
        return Block({attention.query: torch.cat([own, own + inner, own + 2 * inner], 1)}, {attention.output: own})
    groups = made // (inner // heads)
    own, common = torch.arange(inner).view(groups, -1), torch.arange(made).view(groups, -1)
    rows = {attention.query: own, attention.key: common, attention.value: common}
    return Block(rows, {attention.output: own})


def criterion(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, grad_a: torch.Tensor, grad_b: torch.Tensor, scale: float
) -> torch.Tensor:
    """[(dL/dB A + B dL/dA - dL/dB dL/dA) * (W0 + s B A)]^2, (m, n): the first is what a step does to B A."""
    return ((grad_b @ a + b @ grad_a - grad_b @ grad_a) * (weight + scale * b @ a)).square()


def sparsity(step: int, steps: int, final: float) -> float:
    """The share that is gone after ``step`` of ``steps``: 0 at first, ``final`` in the end, by the cube between."""
    done = (step - _EDGE * steps) / (steps - 2 * _EDGE * steps)
    return final * (1 - (1 - min(max(done, 0.0), 1.0)) ** 3)


class _Trial:
    """LoRA on every layer of ``blocks``, and zeros in the place of what is pruned: hooks, which leave the weights."""

    def __init__(self, model: nn.Module, blocks: Sequence[Block]) -> None:
        modules = dict(model.named_modules())
        self.blocks = blocks
        self.stay = [torch.ones(block.units, dtype=torch.bool) for block in blocks]
        self.layers = {path: modules[path] for block in blocks for path in block.sides}
        self.a: dict[str, nn.Parameter] = {}
        self.b: dict[str, nn.Parameter] = {}
        self.masks: dict[str, torch.Tensor] = {}
        drawn = torch.Generator().manual_seed(0)
        for path, layer in self.layers.items():
            (n, m), weight = shape_of(layer), dense_weight(layer)
            a = (2 * torch.rand(_RANK, n, generator=drawn) - 1) / n**0.5
            self.a[path] = nn.Parameter(a.to(weight))
            self.b[path] = nn.Parameter(weight.new_zeros(m, _RANK))
        self._mask()
        self._hooks = [
            hook
            for block in blocks
            for path in block.sides
            for hook in (
                self.layers[path].register_forward_pre_hook(self._before(path, path in block.columns)),
                self.layers[path].register_forward_hook(self._behind(path, path in block.rows)),
            )
        ]

    def _before(self, path: str, cut: bool) -> Callable[..., Any]:
        return lambda _, args: (args[0] * self.masks[path], *args[1:]) if cut else None

    def _behind(self, path: str, cut: bool) -> Callable[..., torch.Tensor]:
        def changed(_: nn.Module, args: Any, y: torch.Tensor) -> torch.Tensor:
            y = y + _SCALE * F.linear(F.linear(args[0], self.a[path]), self.b[path])
            return y * self.masks[path] if cut else y

        return changed

    def _mask(self) -> None:
        for block, stay in zip(self.blocks, self.stay, strict=True):
            kept = block.kept(stay)
            for path, places in block.sides.items():
                mask = torch.zeros(places.numel())
                mask[kept[path]] = 1.0
                self.masks[path] = mask.to(self.a[path])

    @torch.no_grad()
    def scores(self) -> list[torch.Tensor]:
        """Of the units of each block, by the gradients that the factors hold."""
        found = []
        for block in self.blocks:
            dense = {}
            for path in block.sides:
                a, b = self.a[path], self.b[path]
                dense[path] = criterion(upright(self.layers[path]), a, b, _gradient(a), _gradient(b), _SCALE)
            found.append(block.scores(dense).cpu())
        return found

    def prune(self, scores: Sequence[torch.Tensor], share: float) -> None:
        """Leave the best units of each block, of those that are left; one at least."""
        for at, score in enumerate(scores):
            count = max(1, round((1 - share) * len(score)))
            best = score.masked_fill(~self.stay[at], -1.0).topk(count).indices
            self.stay[at] = torch.zeros_like(self.stay[at]).index_fill(0, best, True)
        self._mask()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def kept_units(
    base: BaseModel,
    task: Task,
    examples: Sequence[Example],
    keep: float,
    told: Callable[[int, int], None],
    steps: int = 0,
) -> dict[str, torch.Tensor]:
    """The rows, or columns, that stay of each layer, by its path: a share ``keep`` of each block's heads or channels.

    LoRA and the head train on ``examples`` (for ``steps`` steps; 0: as many as is usual) while more and more units go;
    all then is as it was.
    """
    steps = steps or _STEPS
    trial = _Trial(base.model, blocks_of(base.model))
    head = head_of(base)
    optimizer = torch.optim.AdamW([*trial.a.values(), *trial.b.values(), *head], lr=_RATE)
    means = [torch.zeros(block.units, dtype=torch.float64) for block in trial.blocks]
    with rehearsed(head), closing(trial):
        for step, loss in enumerate(losses(base, task, examples, steps), 1):
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for mean, scores in zip(means, trial.scores(), strict=True):
                mean.mul_(_MEMORY).add_((1 - _MEMORY) * scores.double())
            if step % _EVERY == 0 or step == steps:
                trial.prune(means, sparsity(step, steps, 1 - keep))
            optimizer.step()
            told(step, steps)
    if not all(bool(mean.isfinite().all()) for mean in means):
        raise UserError("the loss of these records is not finite; choose others to make a mask of")
    kept = {}
    for block, stay in zip(trial.blocks, trial.stay, strict=True):
        kept.update(block.kept(stay))
    return kept
