"""How sure an adapter is: a Laplace approximation over the LoRA factors, after the training, for calibrated chances.

Source: Yang et al. 2023, arXiv 2308.13111 (Laplace-LoRA): Kronecker-factored curvature of every LoRA factor, the
linearised predictive, the prior's precision by the chances of other records' labels (the paper's other way is by the
evidence, which a few hundred records and tens of thousands of numbers leave much too unsure). The head stays at its
values. The paper keeps of each large Gram the leading eigenvectors, to spare memory; here Grams are whole. Where the
paper's code looks at a text's last word alone, whose scores a decoder gives, a record here counts by the mean of what a
factor is given over its words and the sum of the slopes (K-FAC reduce, Eschenhagen et al. 2023, arXiv 2311.00636).

The Grams tell of the records that they are made of, without noise; none of these may be a patient's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from ..core.errors import UserError
from ..core.tasks import Batch, Example

#: Gives the scores of the labels, (B, C), of a batch.
Scores = Callable[[Batch], torch.Tensor]
#: The prior's precisions that are compared; by the last an adapter is as sure as it is by itself.
PRECISIONS = tuple(10.0 ** (power / 2) for power in range(-4, 17))


@dataclass(frozen=True)
class Curvature:
    """The generalised Gauss-Newton matrix of each factor, as a product of two Grams, in float64.

    ``inputs``: by factor, (in, in), the mean over records of a a^T, a what the factor is given, on average over words;
    ``slopes``: (out, out), the sum over records and labels of g g^T, g the slope of the loss by what the factor gives,
    summed over words.
    """

    inputs: Mapping[str, torch.Tensor]
    slopes: Mapping[str, torch.Tensor]


def factors_of(model: nn.Module) -> dict[str, nn.Linear]:
    """The matrices A and B of every LoRA layer, by name. Raises :class:`UserError` where there is none."""
    found = {
        f"{path}.{kind}.{name}": factor
        for path, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
        for kind in ("lora_A", "lora_B")
        for name, factor in getattr(layer, kind).items()
    }
    if not found or not all(type(factor) is nn.Linear for factor in found.values()):
        raise UserError("the Laplace approximation is over LoRA's factors of linear layers: train with laplace-lora")
    return found


def _run(
    factors: Mapping[str, nn.Linear], scores: Scores, batch: Batch
) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The scores (B, C) of a batch, and by factor what it was given, as words (B, T, in), and what it gave."""
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, result: torch.Tensor) -> None:
            if name in outputs:
                raise UserError("a layer of this model runs twice on one text: Laplace-LoRA cannot be made of it")
            inputs[name], outputs[name] = _words(given[0]), result

        return hook

    hooks = [factor.register_forward_hook(note(name)) for name, factor in factors.items()]
    try:
        with torch.enable_grad():
            given = scores(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return given, inputs, outputs


def _slopes(
    given: torch.Tensor, outputs: Mapping[str, torch.Tensor], direction: torch.Tensor
) -> dict[str, torch.Tensor]:
    """By factor, the slope (B, T, out) of the scores along ``direction`` (B, C) by what it gave."""
    along = (direction.to(given) * given).sum()
    found = torch.autograd.grad(along, list(outputs.values()), retain_graph=True)
    return {name: _words(slope) for name, slope in zip(outputs, found, strict=True)}


def _words(x: torch.Tensor) -> torch.Tensor:
    """(B, ..., width) as (B, words, width), in float64, which not every device has."""
    return x.detach().cpu().double().reshape(len(x), -1, x.shape[-1])


def _roots(scores: torch.Tensor) -> torch.Tensor:
    """Directions v_c = sqrt(p_c) (e_c - p), (C, B, C): the sum of v_c v_c^T is diag(p) - p p^T, the loss's Hessian."""
    p = scores.softmax(-1)
    return p.T.sqrt()[:, :, None] * (torch.eye(p.shape[1], dtype=p.dtype)[:, None] - p)


def _each(scores: torch.Tensor) -> torch.Tensor:
    """Directions e_c, (C, B, C)."""
    return torch.eye(scores.shape[1], dtype=scores.dtype)[:, None].expand(-1, len(scores), -1)


def same_length(examples: Sequence[Example], size: int) -> Iterator[list[int]]:
    """Places of at most ``size`` examples of one length, so that no padding counts as a word."""
    by_length: dict[int, list[int]] = {}
    for at, example in enumerate(examples):
        by_length.setdefault(example["length"], []).append(at)
    for places in by_length.values():
        yield from (places[start : start + size] for start in range(0, len(places), size))


def curvature(
    model: nn.Module, scores: Scores, batches: Sequence[Batch], told: Callable[[int], None] = lambda done: None
) -> Curvature:
    """The curvature of the loss summed over ``batches``, each without padding; ``told`` how many are done."""
    factors = factors_of(model)
    inputs = {name: torch.zeros(2 * (f.in_features,), dtype=torch.float64) for name, f in factors.items()}
    slopes = {name: torch.zeros(2 * (f.out_features,), dtype=torch.float64) for name, f in factors.items()}
    records = 0
    for number, batch in enumerate(batches):
        given, own, outputs = _run(factors, scores, batch)
        known = given.detach().cpu().double()
        records += len(known)
        for name, words in own.items():
            a = words.mean(1)
            inputs[name] += a.T @ a
        for direction in _roots(known):
            for name, words in _slopes(given, outputs, direction).items():
                g = words.sum(1)
                slopes[name] += g.T @ g
        told(number + 1)
    return Curvature({name: gram / records for name, gram in inputs.items()}, slopes)


@dataclass(frozen=True)
class Laplace:
    """The posterior N(factors, (curvature + precision)^-1) of a trained adapter, for any precision of the prior.

    ``turns``: by factor, the eigenvectors of both Grams, (in, in) and (out, out); ``values``: the curvature's
    eigenvalues, (out, in).
    """

    turns: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    values: Mapping[str, torch.Tensor]

    def predict(
        self, model: nn.Module, scores: Scores, batch: Batch, precisions: Sequence[float]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The scores (B, C) of a batch without padding, and for each of K ``precisions`` their covariance.

        These are J (curvature + precision)^-1 J^T, (K, B, C, C), J the Jacobian of the scores by the factors.
        """
        given, inputs, outputs = _run(factors_of(model), scores, batch)
        known = given.detach().cpu().double()
        # The Jacobian of each score by each factor, (B, out, in), in the axes of both Grams.
        jacobians: dict[str, list[torch.Tensor]] = {name: [] for name in inputs}
        for direction in _each(known):
            for name, g in _slopes(given, outputs, direction).items():
                left, right = self.turns[name]
                turned = g @ right, inputs[name] @ left
                jacobians[name].append(torch.einsum("nto,nti->noi", *turned))
        found = torch.zeros(len(precisions), *known.shape, known.shape[1], dtype=known.dtype)
        for name, rows in jacobians.items():
            j = torch.stack(rows)
            for covariance, precision in zip(found, precisions, strict=True):
                covariance += torch.einsum("cnoi,dnoi->ncd", j / (self.values[name] + precision), j)
        return known, found


def laplace(found: Curvature) -> Laplace:
    """The posterior by a curvature."""
    turns, values = {}, {}
    for name in found.inputs:
        (left_values, left), (right_values, right) = (torch.linalg.eigh(g[name]) for g in (found.inputs, found.slopes))
        turns[name] = left, right
        values[name] = right_values.clamp(min=0)[:, None] * left_values.clamp(min=0)
    return Laplace(turns, values)


def chances(scores: torch.Tensor, covariance: torch.Tensor, draws: int, seed: int) -> torch.Tensor:
    """The mean of softmax(f) over f ~ N(scores, covariance), (B, C), by ``draws`` of f in pairs around the mean."""
    values, turns = torch.linalg.eigh(covariance)
    root = turns * values.clamp(min=0).sqrt()[:, None, :]
    random = torch.Generator().manual_seed(seed)
    noise = torch.randn(math.ceil(draws / 2), *scores.shape, generator=random, dtype=scores.dtype)
    shift = torch.einsum("bcd,sbd->sbc", root, noise)
    return ((scores + shift).softmax(-1).mean(0) + (scores - shift).softmax(-1).mean(0)) / 2
