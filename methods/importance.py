"""Which weights matter most for a task: rules over records that everyone may see, and the file that names the weights.

A mask tells of the records that it was made of, without noise; none of them may be a patient's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..core.basemodel import BaseModel
from ..core.errors import UserError, one_line
from ..core.tasks import Example, Task
from .anatomy import dense_weight, is_turned, layers_of
from .biases import kept_biases
from .pruning import kept_units
from .rehearsal import head_of, losses, rehearsed

#: Called with how many of how many steps are done.
Told = Callable[[int, int], None]
_STEPS, _RATE = 60, 2e-4


def _weights(base: BaseModel) -> dict[str, nn.Parameter]:
    """The weights that a mask chooses among: those of every linear layer of the transformer."""
    modules = dict(base.model.named_modules())
    return {path: dense_weight(modules[path]) for layer in layers_of(base.model) for path in layer.linears}


def fisher(base: BaseModel, task: Task, examples: Sequence[Example], told: Told) -> dict[str, torch.Tensor]:
    """The diagonal of the empirical Fisher information: mean over the records of (dL/dw)^2, of the same shape as w.

    Source: Sung et al. 2021, arXiv 2111.09839, equation 3; Xu et al. 2021, arXiv 2109.05687, equation 4.
    """
    return _summed(base, task, examples, told, lambda gradient: gradient.square())


def squared_gradient(base: BaseModel, task: Task, examples: Sequence[Example], told: Told) -> dict[str, torch.Tensor]:
    """(mean dL/dw)^2, what the second-order approximation comes to with equal curvatures.

    Source: Fu et al. 2023, arXiv 2211.15583, theorem 2 and section 4 (SAM, diagonal of the Hessian taken as constant).
    """
    return {path: mean.square() for path, mean in _summed(base, task, examples, told, lambda g: g).items()}


def change(base: BaseModel, task: Task, examples: Sequence[Example], told: Told) -> dict[str, torch.Tensor]:
    """How far each weight goes in a short training of all of them, |theta_1 - theta_0|; the weights then go back.

    Source: Ansell et al. 2022, arXiv 2110.07560, section 3.1 (lottery-ticket sparse fine-tuning).
    """
    weights = _weights(base)
    trained = [*weights.values(), *head_of(base)]
    optimizer = torch.optim.AdamW(trained, lr=_RATE)
    with rehearsed(trained) as before:
        for step, loss in enumerate(losses(base, task, examples, _STEPS), 1):
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            told(step, _STEPS)
        pairs = zip(weights.items(), before, strict=False)
        return {path: (weight.detach() - first).abs() for (path, weight), first in pairs}


def _summed(
    base: BaseModel,
    task: Task,
    examples: Sequence[Example],
    told: Told,
    of: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Mean over the records of a function of each record's own gradient."""
    weights = _weights(base)
    total = {path: torch.zeros_like(weight) for path, weight in weights.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    for number, example in enumerate(examples):
        loss = task.losses(base.model, task.collate([example], base.processor)).sum()
        gradients = torch.autograd.grad(loss, list(weights.values()))
        for path, gradient in zip(weights, gradients, strict=True):
            total[path] += of(gradient) / len(examples)
        told(number + 1, len(examples))
    for weight in weights.values():
        weight.requires_grad_(False)
    return total


#: The rules by the method that goes by them.
RULES: dict[str, Callable[[BaseModel, Task, Sequence[Example], Told], dict[str, torch.Tensor]]] = {
    "fish": fisher,
    "child-tuning-d": fisher,
    "sam": squared_gradient,
    "lt-sft": change,
}
#: The searches of methods that keep whole rows or columns, or numbers of biases, called with the share to keep.
SEARCHES: dict[str, Callable[[BaseModel, Task, Sequence[Example], float, Told], dict[str, torch.Tensor]]] = {
    "lora-prune": kept_units,
    "s-bitfit": partial(kept_biases, whole=True),
    "u-bitfit": partial(kept_biases, whole=False),
}
#: What a mask leaves unless one says otherwise: of weights, of heads and channels, of the numbers of biases.
KEEP: dict[str, float] = {**dict.fromkeys(RULES, 0.005), "lora-prune": 0.5, "s-bitfit": 0.1, "u-bitfit": 0.1}


def most(scores: dict[str, torch.Tensor], keep: float, turned: Iterable[str] = ()) -> dict[str, torch.Tensor]:
    """(row, column) of the weights with the highest scores among all layers together, a share ``keep`` of them.

    ``turned``: layers that keep their weight as (inputs, outputs); rows are outputs all the same.
    """
    sizes = [score.numel() for score in scores.values()]
    count = max(1, round(keep * sum(sizes)))
    chosen = torch.zeros(sum(sizes), dtype=torch.bool)
    chosen[torch.cat([score.flatten() for score in scores.values()]).topk(count).indices] = True
    found = {}
    for (path, score), own in zip(scores.items(), chosen.split(sizes), strict=True):
        places = own.view(score.shape).nonzero()
        if path in set(turned):
            places = places.flip(1)
        if len(places):
            found[path] = places
    return found


def mask_of(
    method: str, base: BaseModel, task: Task, examples: Sequence[Example], keep: float, told: Told
) -> dict[str, torch.Tensor]:
    """The weights that ``method`` would train, a share ``keep`` of those in linear layers: (row, column) by layer.

    For ``lora-prune`` the rows, or the columns, that stay of each layer: a share ``keep`` of the heads and channels;
    for ``s-bitfit`` and ``u-bitfit`` the numbers of each layer's bias that train, a share ``keep`` of all.
    """
    if method not in KEEP:
        raise UserError(f"method {method} takes no mask; choose {', '.join(KEEP)}")
    if not examples:
        raise UserError("there is no record to make a mask of; name a file with some")
    if not 0 < keep <= 1:
        raise UserError(f"the share to keep is {keep:g}; set it above 0, and to 1 at most")
    if method in SEARCHES:
        return SEARCHES[method](base, task, examples, keep, told)
    modules = dict(base.model.named_modules())
    scores = RULES[method](base, task, examples, told)
    return most(scores, keep, [path for path in scores if is_turned(modules[path])])


def save_mask(path: Path, mask: dict[str, torch.Tensor]) -> None:
    """Write what :func:`mask_of` found as one safetensors file, by the layer's path."""
    save_file({key: places.to(torch.int32).contiguous() for key, places in mask.items()}, path)


def load_mask(path: str) -> dict[str, torch.Tensor]:
    """Read (row, column) of single weights by layer. Raises :class:`UserError` that names the file."""
    found = _load(path)
    for key, places in found.items():
        if places.dim() != 2 or places.shape[1] != 2 or places.is_floating_point() or not len(places):
            raise UserError(f"{path}: {key} is no list of (row, column); `fedgraft methods mask` makes one")
    return found


def load_kept(path: str) -> dict[str, torch.Tensor]:
    """Read what is kept of each layer: rows, columns, numbers of a bias. Raises :class:`UserError` naming the file."""
    found = _load(path)
    for key, kept in found.items():
        if kept.dim() != 1 or kept.is_floating_point() or not bool((kept.diff() > 0).all()):
            raise UserError(f"{path}: {key} is no list of rows; `fedgraft methods mask` makes one")
    return found


def _load(path: str) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: no mask file: {one_line(error)[:200]}; make one with `fedgraft methods mask`"
        ) from None
