"""The door to exact clipping: an engine by its name, and whether a model's trainables can be clipped exactly at all."""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakKeyDictionary

from torch import nn

from ..core.errors import UserError
from .engine.clippedsum import Noise
from .engine.exact import ExactGradients
from .engine.gradients import ClippedGradients
from .engine.opacus import OpacusGradients

__all__ = [
    "ENGINES",
    "ClippedGradients",
    "ExactGradients",
    "Noise",
    "OpacusGradients",
    "create_engine",
    "require_exact",
]

#: The engines that ``privacy.engine`` names.
ENGINES: dict[str, type[ClippedGradients]] = {"exact": ExactGradients, "opacus": OpacusGradients}


#: Engines and trainables that were found to fit a model; whatever trains it is refused all the same where they do not.
_fitting: WeakKeyDictionary[nn.Module, set[tuple[str, ...]]] = WeakKeyDictionary()


def create_engine(name: str, model: nn.Module, trainables: Mapping[str, nn.Parameter], clip: float) -> ClippedGradients:
    """The engine that ``privacy.engine`` names. Raises :class:`UserError` where it could not be exact."""
    if name not in ENGINES:
        raise UserError(f"privacy.engine is `{name}`; there are {', '.join(ENGINES)}")
    return ENGINES[name](model, trainables, clip)


def require_exact(model: nn.Module, trainables: Mapping[str, nn.Parameter], engine: str = "exact") -> None:
    """Raise :class:`UserError` that names the first trainable that ``engine`` cannot clip exactly."""
    asked = (engine, *trainables)
    if asked not in _fitting.setdefault(model, set()):
        create_engine(engine, model, trainables, clip=1.0)
        _fitting[model].add(asked)
