"""How sure an adapter is: a Laplace approximation over the LoRA factors, after the training, for calibrated chances.

Source: Yang et al. 2023, arXiv 2308.13111 (Laplace-LoRA): Kronecker-factored curvature of every LoRA factor, the
prior's precision by the evidence, the linearised predictive. The head stays at its values. The paper keeps of each
large Gram the leading eigenvectors, to spare memory; here Grams are whole.

The Grams tell of the records that they are made of, without noise; none of these may be a patient's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from scipy.optimize import minimize_scalar
from torch import nn

from ..core.errors import UserError
from ..core.tasks import Batch, Example

#: Gives the scores of the labels, (B, C), of a batch.
Scores = Callable[[Batch], torch.Tensor]
#: The precisions that the evidence is compared at.
_LEAST, _MOST = 1e-6, 1e8


@dataclass(frozen=True)
class Curvature:
    """The generalised Gauss-Newton matrix of each factor, as a product of two Grams, in float64.

    ``inputs``: by factor, (in, in), the mean over words of a a^T; ``slopes``: (out, out), the sum over words and labels
    of g g^T, g the slope of the loss by what the factor gives. ``likelihood``: log p(label), summed over the records.
    """

    inputs: Mapping[str, torch.Tensor]
    slopes: Mapping[str, torch.Tensor]
    likelihood: float


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


@contextmanager
def _taped(factors: Mapping[str, nn.Linear]) -> Iterator[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """What each factor was last given, and gave, while the context lasts."""
    tape: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, result: torch.Tensor) -> None:
            if name in tape:
                raise UserError("a layer of this model runs twice on one text: Laplace-LoRA cannot be made of it")
            tape[name] = given[0].detach(), result

        return hook

    hooks = [factor.register_forward_hook(note(name)) for name, factor in factors.items()]
    try:
        yield tape
    finally:
        for hook in hooks:
            hook.remove()


def _slopes(
    factors: Mapping[str, nn.Linear], scores: Scores, batch: Batch, directions: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, list[dict[str, tuple[torch.Tensor, torch.Tensor]]]]:
    """The scores (B, C); for each of ``directions`` of them (K, B, C), by factor, a (B, T, in) and g (B, T, out)."""
    with torch.enable_grad(), _taped(factors) as tape:
        given = scores(batch)
        along = directions(given.detach().double())
        outputs = [result for _, result in tape.values()]
        found = []
        for number, direction in enumerate(along):
            last = number + 1 == len(along)
            slopes = torch.autograd.grad((direction.to(given.dtype) * given).sum(), outputs, retain_graph=not last)
            found.append(
                {name: (_words(tape[name][0]), _words(slope)) for name, slope in zip(tape, slopes, strict=True)}
            )
    return given.detach().double(), found


def _words(x: torch.Tensor) -> torch.Tensor:
    """(B, ..., width) as (B, words, width), in float64."""
    return x.detach().double().reshape(len(x), -1, x.shape[-1])


def _roots(scores: torch.Tensor) -> torch.Tensor:
    """Directions v_c = sqrt(p_c) (e_c - p), (C, B, C): the sum of v_c v_c^T is diag(p) - p p^T, the loss's Hessian."""
    p = scores.softmax(-1)
    return (p.T.sqrt()[:, :, None] * (torch.eye(p.shape[1], dtype=p.dtype, device=p.device)[:, None] - p)).detach()


def _each(scores: torch.Tensor) -> torch.Tensor:
    """Directions e_c, (C, B, C)."""
    eye = torch.eye(scores.shape[1], dtype=scores.dtype, device=scores.device)
    return eye[:, None].expand(-1, len(scores), -1)


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
    words = dict.fromkeys(factors, 0)
    likelihood = 0.0
    for number, batch in enumerate(batches):
        given, found = _slopes(factors, scores, batch, _roots)
        likelihood += float(given.log_softmax(-1).gather(1, batch["labels"][:, None].to(given.device)).sum())
        for name, (a, _) in found[0].items():
            flat = a.flatten(0, 1)
            inputs[name] += (flat.T @ flat).cpu()
            words[name] += len(flat)
        for taped in found:
            for name, (_, g) in taped.items():
                flat = g.flatten(0, 1)
                slopes[name] += (flat.T @ flat).cpu()
        told(number + 1)
    return Curvature({name: gram / words[name] for name, gram in inputs.items()}, slopes, likelihood)


@dataclass(frozen=True)
class Laplace:
    """The posterior N(factors, (curvature + precision)^-1) of a trained adapter.

    ``turns``: by factor, the eigenvectors of both Grams, (in, in) and (out, out); ``values``: the curvature's
    eigenvalues, (out, in); ``squares``: the sum of the factors' squares.
    """

    turns: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    values: Mapping[str, torch.Tensor]
    squares: float
    likelihood: float
    precision: float

    def evidence(self, precision: float) -> float:
        """log p(labels) with the factors integrated out, under a prior N(0, 1 / precision)."""
        spread = sum(float((torch.log1p(values / precision)).sum()) for values in self.values.values())
        return self.likelihood - (precision * self.squares + spread) / 2

    def covariance(self, slopes: Sequence[Mapping[str, tuple[torch.Tensor, torch.Tensor]]]) -> torch.Tensor:
        """J (curvature + precision)^-1 J^T of the scores, (B, C, C), from what factors were given and their slopes."""
        found: Any = 0
        for name, (left, right) in self.turns.items():
            # The Jacobian of each score by the factor, (C, B, out, in), in the axes of both Grams.
            jacobian = torch.stack(
                [
                    torch.einsum("nto,nti->noi", g.cpu() @ right, a.cpu() @ left)
                    for a, g in (each[name] for each in slopes)
                ]
            )
            found = found + torch.einsum("cnoi,dnoi->ncd", jacobian / (self.values[name] + self.precision), jacobian)
        return found  # type: ignore[no-any-return]

    def predict(self, model: nn.Module, scores: Scores, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The scores (B, C) of a batch without padding, and their covariance (B, C, C), in float64."""
        given, slopes = _slopes(factors_of(model), scores, batch, _each)
        return given.cpu(), self.covariance(slopes)


def laplace(model: nn.Module, found: Curvature) -> Laplace:
    """The posterior of the adapter on ``model``, with the prior's precision that has the most evidence."""
    turns, values, squares = {}, {}, 0.0
    for name, factor in factors_of(model).items():
        (left_values, left), (right_values, right) = (torch.linalg.eigh(g[name]) for g in (found.inputs, found.slopes))
        turns[name] = left, right
        values[name] = right_values.clamp(min=0)[:, None] * left_values.clamp(min=0)
        squares += float(factor.weight.detach().double().square().sum())
    begun = Laplace(turns, values, squares, found.likelihood, 1.0)
    bounds = (math.log(_LEAST), math.log(_MOST))
    best = minimize_scalar(lambda at: -begun.evidence(math.exp(at)), bounds=bounds, method="bounded")
    return Laplace(turns, values, squares, found.likelihood, math.exp(float(best.x)))


def chances(scores: torch.Tensor, covariance: torch.Tensor, draws: int, seed: int) -> torch.Tensor:
    """The mean of softmax(f) over f ~ N(scores, covariance), (B, C), by ``draws`` of f in pairs around the mean."""
    values, turns = torch.linalg.eigh(covariance)
    root = turns * values.clamp(min=0).sqrt()[:, None, :]
    random = torch.Generator().manual_seed(seed)
    noise = torch.randn(math.ceil(draws / 2), *scores.shape, generator=random, dtype=scores.dtype)
    shift = torch.einsum("bcd,sbd->sbc", root, noise)
    return ((scores + shift).softmax(-1).mean(0) + (scores - shift).softmax(-1).mean(0)) / 2
