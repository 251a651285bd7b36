"""The frozen base model: where it comes from, and the fingerprint by which every site proves that it holds the same."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import UserError, one_line


@dataclass(frozen=True)
class BaseModel:
    """A loaded base model, its tokenizer or image processor, and its fingerprint.

    ``head``: names of the modules that the task adds and that are trained whole (a classifier).
    """

    model: nn.Module
    processor: Any
    fingerprint: str
    head: tuple[str, ...]
    parameters: int
    bytes: int


def resolve(name: str) -> str:
    """A folder or hub name that `from_pretrained` takes.

    ``package:NAME/FOLDER`` is a folder inside an installed Python package; an existing path is a local folder; anything
    else is a hub name. Raises :class:`UserError` when a package or folder is not there.
    """
    if name.startswith("package:"):
        package, _, folder = name.removeprefix("package:").partition("/")
        found = importlib.util.find_spec(package) if package.isidentifier() else None
        if found is None or not found.submodule_search_locations:
            raise UserError(f"model {name}: the Python package {package} is not installed")
        path = Path(next(iter(found.submodule_search_locations))) / folder
        if not path.is_dir():
            raise UserError(f"model {name}: the package {package} has no folder {folder}")
        return str(path)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"model {name}: the folder has no config.json")
        return str(path)
    if path.is_absolute() or name.startswith(("./", "../", "~")):
        raise UserError(f"model {name}: no such folder")
    return name


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and load reports of transformers: a fresh classifier is expected here."""
    from transformers.utils import logging as hf_logging

    bars, level = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def load_pretrained(auto_class: Any, name: str, seed: int, **options: Any) -> tuple[nn.Module, set[str]]:
    """`auto_class.from_pretrained` in float32, fresh tensors drawn from ``seed``; also the names of those.

    Raises :class:`UserError` with one line when the model cannot be had.
    """
    source = resolve(name)
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, report = auto_class.from_pretrained(source, dtype=torch.float32, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"model {name}: cannot be loaded: {one_line(error)[:300]}") from None
    if report.get("mismatched_keys"):
        odd = sorted(str(key[0] if isinstance(key, tuple) else key) for key in report["mismatched_keys"])[0]
        raise UserError(f"model {name}: tensor {odd} has another shape than the task asks for")
    return model, set(report["missing_keys"])


def load_processor(auto_class: Any, name: str) -> Any:
    """The tokenizer or image processor that lies beside the model."""
    try:
        with quiet():
            return auto_class.from_pretrained(resolve(name))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model {name}: its tokenizer or processor cannot be loaded: {one_line(error)[:300]}") from None


def fingerprint(model: nn.Module, fresh: set[str] | frozenset[str] = frozenset()) -> str:
    """SHA-256 over the names, shapes, dtypes and bytes of a model's state.

    ``fresh``: tensors that are not part of the base model because the task has just made them (a new classifier).
    """
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name in fresh:
            continue
        total.update(f"{name}|{list(tensor.shape)}|{tensor.dtype}|".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            total.update(memoryview(flat.view(torch.uint8).numpy()))
    return total.hexdigest()


def describe(model: nn.Module, processor: Any, missing: set[str], head: tuple[str, ...]) -> BaseModel:
    """Freeze ``model`` and gather what the federation needs to know of it."""
    fresh = {key for key in missing if any(key.startswith(f"{module}.") for module in head)}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.eval()
    return BaseModel(
        model=model,
        processor=processor,
        fingerprint=fingerprint(model, fresh),
        head=head,
        parameters=sum(p.numel() for p in model.parameters()),
        bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
    )
