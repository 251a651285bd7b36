"""The frozen base model: where it comes from, and the fingerprint by which every site proves that it holds the same."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
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

    ``builtin:NAME`` is a tiny untrained model; ``package:NAME/FOLDER`` is a folder inside an installed Python package;
    an existing path is a local folder; anything else is a hub name. Raises :class:`UserError` when a package
    or folder is not there.
    """
    if name.startswith("builtin:"):
        from .builtin import builtin_folder

        return str(builtin_folder(name))
    if name.startswith("package:"):
        package, _, folder = name.removeprefix("package:").partition("/")
        try:
            found = importlib.util.find_spec(package) if package.isidentifier() else None
        except ValueError:
            found = None  # a module that runs as a script has no place of its own
        if found is None or not found.submodule_search_locations:
            raise UserError(f"model {name}: the Python package {package} is not installed")
        path = Path(next(iter(found.submodule_search_locations))) / folder
        if not path.is_dir():
            raise UserError(f"model {name}: the package {package} has no folder {folder}")
        return str(path)
    try:
        path = Path(name).expanduser()
        is_folder = path.is_dir()
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"model {name}: not a path or a hub name: {one_line(error)[:100]}") from None
    if is_folder:
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

    Weights come from safetensors alone and no code from the model's folder runs. Raises :class:`UserError` with one
    line when the model cannot be had.
    """
    source = resolve(name)
    if Path(source).is_dir() and not any(Path(source).glob("*.safetensors")):
        raise UserError(
            f"model {name}: the folder has no .safetensors file; save_pretrained of transformers writes one"
        )
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, report = auto_class.from_pretrained(
                source,
                dtype=torch.float32,
                output_loading_info=True,
                use_safetensors=True,
                trust_remote_code=False,
                # Refused below, where the tensor can be named.
                ignore_mismatched_sizes=True,
                **options,
            )
    except Exception as error:
        # A damaged or foreign file fails in as many ways as there are architectures.
        raise _cannot_load(name, source, "the model", error) from None
    if report["mismatched_keys"]:
        odd, got, want = sorted(report["mismatched_keys"])[0]
        raise UserError(
            f"model {name}: tensor {odd} has shape {list(got)}, expected {list(want)}: a head for other labels than "
            "task.labels, or a config.json of another model"
        )
    return model, set(report["missing_keys"])


def load_processor(auto_class: Any, name: str) -> Any:
    """The tokenizer or image processor that lies beside the model."""
    source = resolve(name)
    try:
        with quiet():
            processor = auto_class.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise _cannot_load(name, source, "its tokenizer or image processor", error) from None
    if hasattr(processor, "all_special_ids") and len(processor) <= len(set(processor.all_special_ids)):
        # transformers makes an empty tokenizer where the folder has none.
        raise UserError(f"model {name}: its tokenizer knows no words; save the tokenizer beside the model")
    return processor


def _cannot_load(name: str, source: str, what: str, error: Exception) -> UserError:
    if not Path(source).is_dir():
        return UserError(
            f"model {name}: no local folder of that name, and the hub did not give {what}: {one_line(error)[:300]}"
        )
    return UserError(f"model {name}: {what} cannot be loaded: {one_line(error)[:300]}")


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


#: Entries of a model's configuration that say where it came from or what the task made of it, not what it computes.
_INCIDENTAL = {
    "_name_or_path",
    "architectures",
    "dtype",
    "id2label",
    "label2id",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
}


def identity(weights: str, model: nn.Module, processor: Any) -> str:
    """SHA-256 over the fingerprint of the weights, the architecture's settings and the tokenizer or image processor.

    The same bytes under another number of heads, or behind another vocabulary, are another model.
    """
    config: Any = model.config
    settings = {key: value for key, value in config.to_diff_dict().items() if key not in _INCIDENTAL}
    backend = getattr(processor, "backend_tokenizer", None)
    reader = backend.to_str() if backend is not None else processor.to_json_string()
    text = json.dumps([weights, settings, reader], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def describe(model: nn.Module, processor: Any, missing: set[str], head: tuple[str, ...]) -> BaseModel:
    """Freeze ``model`` and gather what the federation needs to know of it.

    ``missing``: tensors that the checkpoint does not hold; ``head``: the modules that the task trains. Raises
    :class:`UserError` for a missing tensor outside of the head: it would stay random, frozen and unnoticed.
    """
    fresh = {key for key in missing if any(key.startswith(f"{module}.") for module in head)}
    if missing - fresh:
        raise UserError(
            f"model {getattr(model, 'name_or_path', '')}: the checkpoint lacks tensor {min(missing - fresh)}; it was "
            "saved from another kind of model, or is not whole"
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.eval()
    return BaseModel(
        model=model,
        processor=processor,
        fingerprint=identity(fingerprint(model, fresh), model, processor),
        head=head,
        parameters=sum(p.numel() for p in model.parameters()),
        bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
    )
