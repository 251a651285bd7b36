"""What a site's records say of its adapter's parameters: Fisher information and the Gram matrices of layer inputs.

Both are means over raw records that no noise protects, so they are refused for a run that promises privacy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from ...core.adapter import AdapterState
from ...core.config import RunConfig
from ...core.errors import UserError
from ...core.tasks import Example
from ..resident import Resident
from ..trainer import by_length, to_device


def fisher(
    model: Resident,
    state: AdapterState,
    examples: Sequence[Example],
    config: RunConfig,
    labels: Literal["drawn", "given"] = "drawn",
    seed: int = 0,
) -> AdapterState:
    """The diagonal Fisher information of each number of ``state``, the mean over ``examples``.

    F = mean_x E_{y ~ p(y|x)} (d log p(y|x) / d theta)^2, with one y drawn for each x from the model itself (``drawn``,
    for classification), or with the record's own label (``given``, the empirical Fisher). The square is of each
    example's own gradient. Source: Matena and Raffel 2022, arXiv 2111.09832, equation 5.
    """
    _refuse(config, "Fisher information")
    _require_records(examples)
    model.adapter.write(state)
    trainables = model.adapter.trainables()
    total = {name: torch.zeros(parameter.shape, dtype=torch.float64) for name, parameter in trainables.items()}
    generator = torch.Generator().manual_seed(seed)
    for example in examples:
        batch = to_device(model.task.collate([example], model.base.processor), model.device)
        if labels == "drawn":
            batch = _with_drawn_label(model, batch, generator)
        loss = model.task.losses(model.adapter.model, batch).sum()
        gradients = torch.autograd.grad(loss, list(trainables.values()), allow_unused=True)
        for name, gradient in zip(trainables, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient.double().cpu() ** 2
    found = {
        name: (total[name].numpy() / len(examples)).astype(state.spec.by_name[name].dtype)
        if name in total
        else np.zeros_like(array)
        for name, array in state.items()
    }
    return AdapterState(state.spec, found)


@torch.no_grad()
def _with_drawn_label(model: Resident, batch: dict[str, torch.Tensor], generator: torch.Generator) -> dict[str, Any]:
    if "labels" not in batch:
        raise UserError(f"task {model.task.name} has no labels to draw; use the records' own (labels = given)")
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    chances = torch.softmax(model.adapter.model(**inputs).logits.double().cpu(), dim=-1)
    return {**batch, "labels": torch.multinomial(chances, 1, generator=generator)[:, 0].to(batch["labels"])}


def grams(
    model: Resident, state: AdapterState, examples: Sequence[Example], config: RunConfig
) -> Mapping[str, np.ndarray]:
    """For each low-rank pair, by its ``a``: G = mean of x x^T over the inputs x of its layer, (n, n), in float64.

    Inputs are those of the adapted model, token by token, padding left out. Source: Jin et al. 2023, "Dataless
    Knowledge Fusion", arXiv 2212.09849, equation 2.
    """
    _refuse(config, "Gram matrices")
    _require_records(examples)
    model.adapter.write(state)
    modules = dict(model.adapter.model.named_modules())
    total: dict[str, torch.Tensor] = {}
    mask: torch.Tensor | None = None
    seen = 0

    def watch(name: str) -> Any:
        def hook(_: object, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].detach()
            rows = x[mask] if mask is not None and x.shape[:-1] == mask.shape else x.reshape(-1, x.shape[-1])
            rows = rows.double().cpu()
            total[name] = total.get(name, torch.zeros(())) + rows.T @ rows / len(rows) * weight

        return hook

    hooks = [
        modules[pair.a.partition(".lora_A.")[0]].register_forward_pre_hook(watch(pair.a)) for pair in state.spec.pairs
    ]
    weight = 0.0
    try:
        with torch.inference_mode():
            for batch in by_length(examples, range(len(examples)), config.evaluate.batch_size):
                tensors = to_device(model.task.collate(batch, model.base.processor), model.device)
                mask = tensors["attention_mask"].bool() if "attention_mask" in tensors else None
                weight = float(mask.sum()) if mask is not None else float(len(batch))
                seen += int(weight)
                model.task.losses(model.adapter.model, tensors)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (matrix / seen).numpy() for name, matrix in total.items()}


def _refuse(config: RunConfig, what: str) -> None:
    if config.privacy.enabled:
        raise UserError(
            f"{what} are taken from raw records, which the privacy budget does not pay for; choose a rule that needs "
            "adapters alone, such as soup, or set privacy.enabled = false"
        )


def _require_records(examples: Sequence[Example]) -> None:
    if not examples:
        raise UserError("there are no records to take statistics of")
