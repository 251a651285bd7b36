"""A base model with one adapter on it: what trains, how its tensors are read and written, PEFT folders."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..core.adapter import AdapterSpec, AdapterState, LowRankPair, Policy, TensorSpec, explain_shape
from ..core.basemodel import BaseModel
from ..core.config import MethodConfig
from ..core.errors import UserError, one_line
from ..core.tasks import Task
from .grafts import GraftConfig
from .offset import BaseOffset, fold_into_folder
from .registry import Method, create_method
from .steps import Steps

_ADAPTER = "default"
#: What stands in the folder of a method that PEFT knows through fedgraft alone.
_OWN_README = """An adapter by the method `{method}` of fedgraft. PEFT loads it where fedgraft is installed:

    import fedgraft.methods
    from peft import PeftModel

    model = PeftModel.from_pretrained(base, "this folder")
"""
# Fields of a PEFT configuration that do not change what given tensors compute. Which modules carry an adapter does, but
# the names of the tensors tell that.
_HARMLESS = frozenset(
    {
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
        *("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"),
        *("lora_dropout", "fan_in_fan_out", "megatron_core", "runtime_config", "eva_config", "qalora_group_size"),
        *("ensure_weight_tying", "init_ia3_weights", "init_weights", "prompt_tuning_init", "prompt_tuning_init_text"),
        *("tokenizer_name_or_path", "tokenizer_kwargs", "mask"),
    }
)


class AttachedAdapter:
    """A :class:`peft.PeftModel`, its :class:`AdapterSpec`, and the tensors between them.

    The raw trainable ``named_parameters()`` are what is exchanged: PEFT's own ``get_peft_model_state_dict`` leaves out
    or transforms trainables of several methods.
    """

    def __init__(
        self,
        model: PeftModel,
        spec: AdapterSpec,
        plain: Callable[[PeftModel], AbstractContextManager[None]] | None = None,
        steps: Callable[..., Steps] = Steps,
    ) -> None:
        self.model = model
        #: What the method does at the steps of a training; :class:`Steps` itself where it does nothing.
        self.steps = steps
        #: As the method made it; :attr:`spec` has the policies and extras of the run that it serves.
        self.fresh = self.spec = spec
        self._plain = plain or nullcontext
        self._parameters = {name: p for name, p in model.named_parameters() if name in spec.by_name}
        self._offset = BaseOffset(model)

    def adopt(self, spec: AdapterSpec) -> None:
        """Take over the policies of ``spec``: frozen tensors stop training. Its extras are no tensors of the model."""
        if spec.bare.names != self.spec.bare.names:
            odd = sorted(set(spec.bare.names) ^ set(self.spec.bare.names))
            raise UserError(f"the description is not of this adapter: {odd[0] if odd else 'order'}")
        self.spec = spec
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(spec.by_name[name].policy != "freeze")

    def trainables(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that train now, by name, in order."""
        return {name: p for name, p in self._parameters.items() if p.requires_grad}

    def read(self, names: Iterable[str] | None = None) -> AdapterState:
        """A snapshot of the adapter's own tensors (all, or ``names``), without what accompanies it."""
        order = self.spec.bare.names if names is None else tuple(names)
        tensors: dict[str, np.ndarray] = {}
        for name in order:
            want = getattr(torch, self.spec.by_name[name].dtype)
            tensors[name] = self._parameters[name].detach().to("cpu", want, copy=True).numpy()
            tensors[name].flags.writeable = False
        return AdapterState(self.spec, tensors, names=order)

    def write(self, state: AdapterState) -> None:
        """Copy a full state into the model, in place, so that optimizers and hooks keep their parameters.

        The base weights become those that the state asks for: changed by its offset, or the original ones. Other
        extras mean nothing to the model.
        """
        whole = [tensor.name for tensor in state.spec.tensors if tensor.parameter or tensor.role == "offset"]
        own = state.spec.bare.names
        if own != self.spec.bare.names or not set(whole) <= set(state):
            odd = sorted(set(self.spec.bare.names) ^ set(own)) or [name for name in whole if name not in state]
            raise UserError(f"the state is not the whole adapter: {odd[0] if odd else 'order'}")
        for name, parameter in self._parameters.items():
            # torch would spread a smaller tensor over a larger one.
            if state[name].shape != tuple(parameter.shape):
                raise UserError(explain_shape(name, state[name].shape, tuple(parameter.shape)))
        self._offset.apply(state)
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                array = state[name]
                # torch will not wrap read-only memory; the copy below never writes to it.
                source = torch.from_numpy(array.copy() if not array.flags.writeable else array)
                parameter.copy_(source)

    def save_peft(self, folder: str | Path, state: AdapterState) -> Path:
        """Write ``state`` as a PEFT adapter folder that ``PeftModel.from_pretrained`` loads on the original base model.

        What the state adds to the base weights becomes part of the adapter, of a larger rank where there is any.
        """
        self.write(state)
        # Embeddings are never trained here; "auto" would ask the hub whether they were resized.
        with self._plain(self.model):
            self.model.save_pretrained(str(folder), save_embedding_layers=False)
        if any(tensor.role == "offset" for tensor in state.spec.extras):
            fold_into_folder(Path(folder), state)
        if isinstance(self.model.peft_config[_ADAPTER], GraftConfig):
            (Path(folder) / "README.md").write_text(_OWN_README.format(method=self.spec.method), encoding="utf-8")
        return Path(folder)

    def merge(self) -> torch.nn.Module:
        """The base model with the adapter in its weights, without any trace of it; this object is then of no more use.

        Raises :class:`UserError` where the adapter is no change of the base weights.
        """
        try:
            with self._plain(self.model):
                tuner: Any = self.model
                # Some of PEFT's tuners ask each module that they put back for a weight, which a head of several layers
                # has none of.
                tuner.base_model._replace_module = lambda parent, name, module, _: setattr(parent, name, module)
                merged: torch.nn.Module = tuner.merge_and_unload(safe_merge=True)
        except (ValueError, NotImplementedError, AttributeError, TypeError, RuntimeError) as error:
            raise UserError(f"method {self.spec.method} cannot be merged: {one_line(error)[:200]}") from None
        return merged

    def load_peft(self, folder: str | Path) -> AdapterState:
        """Read a PEFT adapter folder of the same method into the model and return its state.

        Raises :class:`UserError` that names the folder when its method, scale, rank or tensors do not fit; the model is
        then as it was.
        """
        folder = Path(folder)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            if not (folder / file).is_file():
                raise UserError(f"{folder}: not a PEFT adapter folder: it has no {file}")
        try:
            config = PeftConfig.from_pretrained(str(folder))
            weights = load_file(str(folder / "adapter_model.safetensors"))
        except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
            raise UserError(f"{folder}: not a PEFT adapter folder: {one_line(error)[:200]}") from None
        own = self.model.peft_config[_ADAPTER]
        theirs, ours = _meaning_of(config), _meaning_of(own)
        for key in ("peft_type", *sorted(ours)):
            if theirs.get(key) != ours[key]:
                raise UserError(f"{folder}: its {key} is {theirs.get(key)}, this run's is {ours[key]}")
        before = {name: parameter._version for name, parameter in self._parameters.items()}
        with self._plain(self.model):
            self._load(folder, weights)
        untouched = sorted(name for name, p in self._parameters.items() if p._version == before[name])
        if untouched:
            raise UserError(f"{folder}: has no value for tensor {untouched[0]} of this run")
        state = self.read()
        self._offset.apply(state.with_spec(self.spec.bare))
        return state

    def _load(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        wanted = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        odd = sorted(set(weights) ^ set(wanted))
        if odd:
            raise UserError(f"{folder}: tensor {odd[0]} is {'missing' if odd[0] in wanted else 'not of this adapter'}")
        for name, tensor in weights.items():
            if tensor.shape != wanted[name].shape:
                raise UserError(f"{folder}: {explain_shape(name, tuple(tensor.shape), tuple(wanted[name].shape))}")
            if not bool(torch.isfinite(tensor).all()):
                raise UserError(f"{folder}: tensor {name} holds NaN or infinity")
        try:
            set_peft_model_state_dict(self.model, weights)
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(f"{folder}: its tensors do not fit the base model: {one_line(error)[:200]}") from None


def _meaning_of(config: PeftConfig) -> dict[str, object]:
    """The fields of ``config`` that change what its tensors compute, in a comparable form."""
    values: dict[str, object] = {}
    for key, value in config.to_dict().items():
        if key == "init_lora_weights":
            # PiSSA, OLoRA and their like also change the base model; the plain ways only set first values.
            value = value if isinstance(value, str) and value not in ("gaussian", "orthogonal", "eva") else True
        elif key == "peft_type":
            value = getattr(value, "value", value)
        if key not in _HARMLESS:
            values[key] = sorted(value) if isinstance(value, list | set | tuple) else value
    return values


def attach(base: BaseModel, config: MethodConfig, task: Task, seed: int) -> AttachedAdapter:
    """Put a fresh adapter on ``base`` (in place), drawn from ``seed``, and describe its tensors.

    Raises :class:`UserError` when the method does not fit the model or would train nothing.
    """
    method = create_method(config.name)
    if method.refused:
        raise UserError(f"method {config.name} cannot be trained here: {method.refused}")
    method.options_of(config)
    for key in ("target_modules", "layers", "dropout", "init", "heads", "experts", "mask"):
        if getattr(config, key) and key not in method.accepts:
            raise UserError(f"method.{key} means nothing to method {config.name}; leave it out")
    peft_config = method.configure(config, task, base)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # PEFT remarks that a LayerNorm is a LayerNorm, and that it corrects the layout for GPT-2.
            warnings.filterwarnings("ignore", category=UserWarning, module="peft")
            torch.manual_seed(seed)
            model = get_peft_model(base.model, peft_config)
            if method.build:
                method.build(model, config)
    except (ValueError, NotImplementedError, KeyError, AttributeError, TypeError, RuntimeError) as error:
        raise UserError(f"method {config.name} does not fit {type(base.model).__name__}: {one_line(error)}") from None
    if method.prepare:
        method.prepare(model)
    spec = _describe(model, method, config)
    adapted = [tensor.name for tensor in spec.tensors if tensor.role != "head"]
    if not adapted:
        raise UserError(f"method {config.name} would train nothing in {type(base.model).__name__} but the head")
    for layer in config.layers:
        if not any(f".{layer}." in name for name in adapted):
            raise UserError(f"method.layers: {type(base.model).__name__} has no layer {layer} with such modules")
    for head in base.head:
        if not any(tensor.role == "head" and f".{head}." in tensor.name for tensor in spec.tensors):
            raise UserError(
                f"method {config.name} would leave the head {head} of {type(base.model).__name__} untrained"
            )
    model.eval()
    return (method.attached or AttachedAdapter)(model, spec, method.plain, method.steps or Steps)


def _describe(model: PeftModel, method: Method, config: MethodConfig) -> AdapterSpec:
    tensors = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or (method.frozen and method.frozen(name)):
            role, averaging = method.meaning(name)
            dtype = "float64" if parameter.dtype == torch.float64 else "float32"
            policy: Policy = "share" if parameter.requires_grad else "freeze"
            tensors.append(TensorSpec(name, tuple(parameter.shape), dtype, role, averaging, policy))
    names = {tensor.name for tensor in tensors}
    pairs = []
    for name, module in model.named_modules():
        a, b = f"{name}.lora_A.{_ADAPTER}.weight", f"{name}.lora_B.{_ADAPTER}.weight"
        if isinstance(module, LoraLayer) and a in names and b in names:
            flipped = bool(getattr(module, "fan_in_fan_out", False))
            pairs.append(LowRankPair(a, b, float(module.scaling[_ADAPTER]), flipped))
    return AdapterSpec(
        method=method.name,
        tensors=tuple(tensors),
        pairs=tuple(pairs),
        rank=config.rank if method.uses_rank else None,
        alpha=config.alpha if method.scaled else None,
        options={
            **method.options,
            **({"init": config.init} if config.init else {}),
            **({"options": method.options_of(config).model_dump(mode="json")} if method.Options.model_fields else {}),
        },
    )
