"""What must hold of a model before any engine may clip: every trainable is listed, and no layer mixes the records."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from ...core.errors import UserError


def require_listed(modules: Mapping[str, nn.Module], trainables: Mapping[str, nn.Parameter]) -> None:
    """Raise :class:`UserError` unless ``trainables`` are all that trains in ``modules``, and nothing hooks in."""
    if not trainables:
        raise UserError("no tensor trains: there is nothing to clip")
    for name, parameter in trainables.items():
        if not parameter.requires_grad:
            raise UserError(f"tensor {name} is listed as trained but is frozen")
        # A hook sees, and may keep or change, what is not yet clipped.
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise UserError(f"tensor {name} has a gradient hook; remove it to train with privacy")
    identities = {id(parameter) for parameter in trainables.values()}
    if len(identities) < len(trainables):
        raise UserError("a tensor is listed as trained under two names")
    for path, module in modules.items():
        for key, other in module._parameters.items():
            if other is not None and other.requires_grad and id(other) not in identities:
                name = f"{path}.{key}" if path else key
                raise UserError(
                    f"tensor {name} trains but is not among the adapter's tensors: it would escape clipping"
                )


def require_separate(modules: Mapping[str, nn.Module]) -> list[tuple[str, nn.Module]]:
    """The layers that keep records apart only in eval mode; raises :class:`UserError` for one that never does."""
    norms: list[tuple[str, nn.Module]] = []
    for path, module in modules.items():
        if not isinstance(module, _NormBase):
            continue
        if module.running_mean is not None:
            norms.append((path, module))
        elif isinstance(module, _BatchNorm):
            raise UserError(
                f"layer {path} ({type(module).__name__}) normalises over the batch, which mixes records: "
                "this model cannot be trained with privacy"
            )
    return norms
