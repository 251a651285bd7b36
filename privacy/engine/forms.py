"""Other forms of some layers, equal in what they compute, that bring small tensors to the records, not large ones.

HRA and BOFT build a rotation of the whole width before they use it, trained tokens a whole vocabulary; the gradient of
such a matrix, for each example, costs more than the rest of the layer. Here the records are rotated instead, by the
factors, and only the trained tokens are looked up among the trainables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.boft.layer import Linear as BoftLinear
from peft.tuners.hra.layer import HRALinear
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from torch import nn
from torch.autograd import Function


def form_of(layer: nn.Module) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The other form of a layer, where there is one and it stands for exactly what the layer does."""
    form = _FORMS.get(type(layer))
    active: Any = getattr(layer, "active_adapters", ())
    if form is None or len(active) != 1 or layer.merged or layer.disable_adapters:
        return None
    if form is _tokens and not _is_plain_table(layer):
        return None
    return lambda x: form(layer, active[0], x)


def _is_plain_table(layer: Any) -> bool:
    base = layer.get_base_layer()
    return type(base) is nn.Embedding and not (base.max_norm or base.scale_grad_by_freq or base.sparse)


def _hra(layer: Any, adapter: str, x: torch.Tensor) -> torch.Tensor:
    """Householder reflections in their compact form: H_1 ... H_r = I - U T U^T (Schreiber and Van Loan 1989)."""
    u = layer.hra_u[adapter]
    if layer.hra_apply_GS[adapter]:
        u = _orthonormal(u)
        turned = x - 2 * (x @ u) @ u.t()
    else:
        u = u / u.norm(dim=0)
        overlap = u.t() @ u
        inverse = torch.triu(overlap, diagonal=1) + 0.5 * torch.diag(torch.diagonal(overlap))
        back = torch.linalg.solve_triangular(inverse.t(), u.t(), upper=False)
        turned = x - (x @ u) @ back
    base = layer.get_base_layer()
    return F.linear(turned, base.weight, base.bias)


def _orthonormal(u: torch.Tensor) -> torch.Tensor:
    """The columns of ``u`` by Gram and Schmidt, in the order in which PEFT takes them."""
    columns: list[torch.Tensor] = []
    for index in range(u.shape[1]):
        column = u[:, index]
        for other in columns:
            column = column - (other @ column) * other
        columns.append(column / column.norm())
    return torch.stack(columns, dim=1)


def _boft(layer: Any, adapter: str, x: torch.Tensor) -> torch.Tensor:
    """Butterfly factors: each permutes the columns, turns them in blocks, and permutes them back."""
    factors, blocks, size, _ = layer.boft_R[adapter].shape
    rotations = layer.cayley_batch(layer.boft_R[adapter].view(factors * blocks, size, size))
    rotations = layer.boft_dropout[adapter](rotations.view(factors, blocks, size, size)).to(x.dtype)
    turned = x
    for index in range(factors - 1, -1, -1):
        forth, back = layer.boft_P[index].argmax(0), layer.boft_P[index].argmax(1)
        inside = Permuted.apply(turned, forth, back).unflatten(-1, (blocks, size))
        turned = torch.einsum("...nh,nhk->...nk", inside, rotations[index]).flatten(-2)
        turned = Permuted.apply(turned, back, forth)
    base = layer.get_base_layer()
    result = F.linear(turned, base.weight) * layer.boft_s[adapter].squeeze(-1)
    return result if base.bias is None else result + base.bias


def _tokens(layer: Any, adapter: str, x: torch.Tensor) -> torch.Tensor:
    """The trained rows of a vocabulary alone, looked up beside the frozen ones, never a table with both."""
    base, rows = layer.get_base_layer(), layer.trainable_tokens_delta[adapter]
    place = torch.full((base.num_embeddings,), -1, device=x.device)
    place[torch.tensor(layer.token_indices[adapter], device=x.device)] = torch.arange(len(rows), device=x.device)
    padding = None if base.padding_idx is None else int(place[base.padding_idx])
    at = place[x]
    trained = F.embedding(at.clamp(min=0), rows, padding_idx=padding if padding != -1 else None)
    return torch.where((at >= 0)[..., None], trained, F.embedding(x, base.weight))


class Permuted(Function):
    """The last dimension in another order; ``back`` is the way back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        ctx.back = back
        return x.index_select(-1, order)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0].index_select(-1, ctx.back), None, None


_FORMS: dict[type[nn.Module], Callable[[Any, str, torch.Tensor], torch.Tensor]] = {
    HRALinear: _hra,
    BoftLinear: _boft,
    TrainableTokensLayer: _tokens,
}
