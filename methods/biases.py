"""Which biases a task needs: the loss that each one's change has won, in a short training that drops the others.

Source: Lawton et al. 2023, arXiv 2305.16597: the first-order estimate of what taking a change back costs. The paper
prunes at the end of each epoch; here it is on the schedule of LoRAPrune (:mod:`.pruning`), with moving means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from ..core.basemodel import BaseModel
from ..core.errors import UserError
from ..core.tasks import Example, Task
from .pruning import sparsity
from .rehearsal import head_of, losses, rehearsed

_STEPS, _EVERY, _RATE, _MEMORY = 100, 10, 1e-3, 0.9


def biases_of(base: BaseModel) -> dict[str, nn.Parameter]:
    """Every bias of the base model, the head apart, by the path of its layer. Raises :class:`UserError` for none."""
    found = {}
    for path, module in base.model.named_modules():
        bias = getattr(module, "bias", None)
        if isinstance(bias, nn.Parameter) and not any(f"{path}.".startswith(f"{head}.") for head in base.head):
            found[path] = bias
    if not found:
        raise UserError(f"{type(base.model).__name__} has no biases; choose lora")
    return found


def cost(change: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """What the loss gains, to first order, when each number of ``change`` goes back to 0: -change * gradient."""
    return -change * gradient


def chosen(scores: Mapping[str, torch.Tensor], keep: float, *, whole: bool) -> dict[str, torch.Tensor]:
    """The numbers that stay of each bias, at most a share ``keep`` of all, by the highest scores: their places.

    ``whole``: biases stay or go as one, by the sum of their scores, the best that still fit; else number by number.
    """
    count = max(1, round(keep * sum(score.numel() for score in scores.values())))
    if not whole:
        ordered = torch.cat(list(scores.values())).argsort(descending=True, stable=True)
        stay = torch.zeros(len(ordered), dtype=torch.bool)
        stay[ordered[:count]] = True
        parts = stay.split([score.numel() for score in scores.values()])
        return {path: part.nonzero()[:, 0] for path, part in zip(scores, parts, strict=True) if bool(part.any())}
    found: dict[str, torch.Tensor] = {}
    for path in sorted(scores, key=lambda path: -float(scores[path].sum())):
        if scores[path].numel() <= count or not found:
            found[path] = torch.arange(scores[path].numel())
            count -= scores[path].numel()
    return {path: found[path] for path in scores if path in found}


def kept_biases(
    base: BaseModel,
    task: Task,
    examples: Sequence[Example],
    keep: float,
    told: Callable[[int, int], None],
    *,
    whole: bool,
    steps: int = 0,
) -> dict[str, torch.Tensor]:
    """The numbers of each bias that shall train, by its layer's path: a share ``keep`` of all.

    All biases and the head train on ``examples`` (for ``steps`` steps; 0: as many as is usual) while more and more of
    them go back for good; the model then is as it was.
    """
    steps = steps or _STEPS
    biases = biases_of(base)
    trained = [*biases.values(), *head_of(base)]
    optimizer = torch.optim.AdamW(trained, lr=_RATE, weight_decay=0.0)
    means = {path: torch.zeros(bias.numel(), dtype=torch.float64) for path, bias in biases.items()}
    stay = {path: torch.arange(bias.numel()) for path, bias in biases.items()}
    with rehearsed(trained) as before:
        first = dict(zip(biases, before, strict=False))
        for step, loss in enumerate(losses(base, task, examples, steps), 1):
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            with torch.no_grad():
                for path, bias in biases.items():
                    gradient = torch.zeros_like(bias) if bias.grad is None else bias.grad
                    score = cost(bias - first[path], gradient)
                    means[path].mul_(_MEMORY).add_((1 - _MEMORY) * score.double().cpu())
            if step % _EVERY == 0 or step == steps:
                stay = chosen(_left(means, stay), 1 - sparsity(step, steps, 1 - keep), whole=whole)
            optimizer.step()
            with torch.no_grad():
                for path, bias in biases.items():
                    left = torch.zeros_like(bias)
                    left[stay.get(path, torch.zeros(0, dtype=torch.long))] = 1.0
                    bias.copy_(first[path] + left * (bias - first[path]))
            told(step, steps)
    if not all(bool(mean.isfinite().all()) for mean in means.values()):
        raise UserError("the loss of these records is not finite; choose others to make a mask of")
    return stay


def _left(means: Mapping[str, torch.Tensor], stay: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``means``, below all others where a number is gone: what goes does not come back."""
    lowest = -sum(float(mean.abs().sum()) for mean in means.values()) - 1.0
    found = {}
    for path, mean in means.items():
        found[path] = torch.full_like(mean, lowest)
        if path in stay:
            found[path][stay[path]] = mean[stay[path]]
    return found
