"""PEFT adapter folders as adapter states and back, without the base model wherever the folder says enough by itself."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import convert_to_lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..core.adapter import AdapterSpec, AdapterState, Averaging, LowRankPair, TensorSpec
from ..core.basemodel import load_pretrained
from ..core.errors import UserError, one_line

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_ADAPTER = "default"
# Settings of a LoRA folder under which its factors are not all there is to the change, or mean something else.
_BEYOND = (
    *(
        "alora_invocation_tokens",
        "kasa_config",
        "layer_replication",
        "lora_bias",
        "megatron_config",
        "monteclora_config",
    ),
    *("target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config"),
)
#: First values that are drawn for the factors alone; any other way also changes the base model.
_PLAIN_INIT = (True, False, None, "gaussian", "eva", "orthogonal")
_AUTO = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}


@dataclass(frozen=True)
class PeftFolder:
    """An adapter as PEFT keeps it: ``config`` is its adapter_config.json, ``state`` its tensors.

    Tensors bear the names that they have as parameters of the adapted model, as elsewhere in fedgraft. ``run``: the
    run.json of the run whose directory it is in, if it is in one; ``carried``: entries of the file that repeat or
    accompany what is merged, by their key: a parameter's name, or the tensor itself. ``lost`` is the relative error of
    a conversion.
    """

    path: Path
    config: Mapping[str, Any]
    state: AdapterState
    run: Mapping[str, Any] | None = None
    carried: Mapping[str, str | np.ndarray] = field(default_factory=dict)
    lost: float = 0.0

    @property
    def base(self) -> str:
        """The base model's name or path, as the folder says it."""
        revision = self.config.get("revision")
        name = str(self.config.get("base_model_name_or_path") or "")
        return f"{name}@{revision}" if revision else name

    @property
    def labels(self) -> tuple[str, ...]:
        """The task's labels in order, where a run says them."""
        return tuple(str(label) for label in self._of_run("config", "task", "labels") or ())

    @property
    def fingerprint(self) -> str:
        """The base model's, where a run says it."""
        return str(self._of_run("model", "fingerprint") or "")

    @property
    def private(self) -> bool:
        """Whether it was trained with noise for differential privacy, as far as a run says so."""
        return bool(self._of_run("config", "privacy", "enabled"))

    def _of_run(self, *keys: str) -> Any:
        value: Any = self.run
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value


def locate(folder: str | Path) -> Path:
    """The adapter folder that ``folder`` is, or has within it if it is a run directory. Raises :class:`UserError`."""
    folder = Path(folder)
    place = (
        folder / "adapter" if (folder / "adapter" / CONFIG).is_file() and not (folder / CONFIG).is_file() else folder
    )
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    for file in (CONFIG, WEIGHTS):
        if not (place / file).is_file():
            hint = "; save it as safetensors" if file == WEIGHTS and (place / "adapter_model.bin").is_file() else ""
            raise UserError(f"{place}: not a PEFT adapter folder: it has no {file}{hint}")
    return place


def peft_type(folder: str | Path) -> str:
    """What kind of adapter a folder holds, such as LORA or IA3."""
    return str(_config(locate(folder)).get("peft_type"))


def read_folder(folder: str | Path) -> PeftFolder:
    """The LoRA adapter (also rsLoRA, DoRA, of mixed ranks, with heads or biases) of a folder or a run directory.

    Raises :class:`UserError` that names the folder when it is not whole, or holds what is more than low-rank factors.
    """
    place = locate(folder)
    config = _config(place)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{place}: its type is {config.get('peft_type')}; only LORA is read without its base model")
    for key in _BEYOND:
        if config.get(key):
            raise UserError(f"{place}: its {key} is {config[key]}, which cannot be merged")
    if config.get("init_lora_weights") not in _PLAIN_INIT:
        raise UserError(
            f"{place}: init_lora_weights is {config['init_lora_weights']}, which changes the base model too; save it "
            "with path_initial_model_for_weight_conversion"
        )
    return _understood(place, config, _tensors(place))


def _understood(
    place: Path, config: Mapping[str, Any], weights: Mapping[str, np.ndarray], lost: float = 0.0
) -> PeftFolder:
    heads = [str(name) for name in config.get("modules_to_save") or ()]
    biased = config.get("bias", "none") != "none"
    specs: dict[str, TensorSpec] = {}
    tensors: dict[str, np.ndarray] = {}
    carried: dict[str, str | np.ndarray] = {}
    for key in sorted(weights, key=_natural):
        array = weights[key]
        if ".original_module." in key:
            carried[key] = array
            continue
        plain = key.replace(".modules_to_save.", ".")
        name, role, averaging = _meaning(place, plain, heads, biased)
        if plain != key:
            carried[key] = name
            if plain in weights:
                continue
        if role in ("lora_A", "lora_B") and array.ndim != 2:
            raise UserError(f"{place}: tensor {key} has shape {list(array.shape)}; only linear layers are merged")
        if not np.isfinite(array).all():
            raise UserError(f"{place}: tensor {key} holds NaN or infinity")
        specs[name] = TensorSpec(name, array.shape, array.dtype.name, role, averaging)
        tensors[name] = array
    pairs = tuple(_pairs(place, config, specs))
    if not pairs:
        raise UserError(f"{place}: has no low-rank factors")
    ranks = [specs[pair.a].shape[0] for pair in pairs]
    root = bool(config.get("use_rslora"))
    spec = AdapterSpec(
        method="dora" if config.get("use_dora") else "rslora" if root else "lora",
        tensors=tuple(specs.values()),
        pairs=pairs,
        rank=max(ranks),
        alpha=float(config.get("lora_alpha", 8)),
        options={"scaling": "sqrt"} if root else {},
    )
    return PeftFolder(place, config, AdapterState(spec, tensors), _run(place), carried, lost)


def _meaning(place: Path, key: str, heads: Iterable[str], biased: bool) -> tuple[str, str, Averaging]:
    """A key of the file as the parameter's name, and its role."""
    for head in heads:
        if found := re.match(rf"(.*\.{re.escape(head)})\.(.+)$", key):
            return f"{found[1]}.modules_to_save.{_ADAPTER}.{found[2]}", "head", "nonlinear"
    for side in "AB":
        if key.endswith(f".lora_{side}.weight"):
            return key.removesuffix("weight") + f"{_ADAPTER}.weight", f"lora_{side}", "product"
        if key.endswith(f".lora_embedding_{side}"):
            return f"{key}.{_ADAPTER}", f"lora_{side}", "product"
    if key.endswith(".lora_magnitude_vector"):
        return f"{key}.{_ADAPTER}.weight", "magnitude", "nonlinear"
    if biased and key.endswith(".bias"):
        return key, "bias", "linear"
    raise UserError(
        f"{place}: tensor {key} is neither a low-rank factor nor of its modules_to_save; it cannot be merged"
    )


def _pairs(place: Path, config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> Iterable[LowRankPair]:
    for name, tensor in specs.items():
        if tensor.role != "lora_A":
            if tensor.role == "lora_B" and _partner(name, "A") not in specs:
                raise UserError(f"{place}: tensor {name} has no lora_A beside it")
            continue
        partner = _partner(name, "B")
        if partner not in specs:
            raise UserError(f"{place}: tensor {name} has no lora_B beside it")
        rank, module = tensor.shape[0], module_of(name)
        said = _pattern(config, "rank_pattern", "r", module)
        if not rank == said == specs[partner].shape[1]:
            raise UserError(
                f"{place}: {name} has rank {rank}, its lora_B {specs[partner].shape[1]}, {CONFIG} says {said}"
            )
        alpha = float(_pattern(config, "alpha_pattern", "lora_alpha", module))
        scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
        flipped = ".lora_embedding_" in name or bool(config.get("fan_in_fan_out"))
        yield LowRankPair(name, partner, scaling, flipped)


def _partner(name: str, side: str) -> str:
    return re.sub(r"\.lora_(embedding_)?[AB]\.", rf".lora_\g<1>{side}.", name)


def module_of(name: str) -> str:
    """The module of the base model that a factor belongs to."""
    return re.sub(r"\.lora_(embedding_)?[AB]\..*$", "", name).removeprefix(_PREFIX)


def _pattern(config: Mapping[str, Any], patterns: str, default: str, module: str) -> Any:
    held = config.get(patterns) or {}
    return held.get(get_pattern_key(list(held), module), config.get(default, 8))


def _natural(key: str) -> list[Any]:
    """Layers in the order of their numbers, and what is beside the factors last."""
    return [".lora_" not in key, *(int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", key))]


def _config(place: Path) -> dict[str, Any]:
    try:
        config = json.loads((place / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{place / CONFIG}: not JSON: {one_line(error)[:200]}") from None
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise UserError(f"{place / CONFIG}: not the configuration of a PEFT adapter: it has no peft_type")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise UserError(f"{place / CONFIG}: {key} is not a table")
    for key in ("r", "lora_alpha"):
        if key in config and not (type(config[key]) in (int, float) and config[key] > 0):
            raise UserError(f"{place / CONFIG}: {key} is {config[key]!r}; it must be a positive number")
    return config


def _tensors(place: Path) -> dict[str, np.ndarray]:
    try:
        weights = load_file(str(place / WEIGHTS))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{place / WEIGHTS}: not a whole safetensors file: {one_line(error)[:200]}") from None
    return {key: _array(tensor) for key, tensor in weights.items()}


def _array(tensor: torch.Tensor) -> np.ndarray:
    wide = tensor if tensor.dtype == torch.float64 else tensor.float()
    return wide.detach().cpu().contiguous().numpy()


def _run(place: Path) -> dict[str, Any] | None:
    """The run.json beside the folder of an adapter, if there is one."""
    try:
        run = json.loads((place.parent / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return run if isinstance(run, dict) and isinstance(run.get("config"), dict) else None


def convert_folder(folder: str | Path, model: str, rank: int) -> PeftFolder:
    """An adapter of another PEFT type as LoRA of ``rank``, by PEFT's ``convert_to_lora`` on the base ``model``.

    Heads stay as they are. ``lost`` of the answer is the relative Frobenius error over all layers together: 0 where the
    change has at most that rank. Raises :class:`UserError` for a type that PEFT does not convert: one that adds no
    matrix to a weight, such as a prompt, a prefix or (IA)3.
    """
    place = locate(folder)
    config, weights = _config(place), _tensors(place)
    base = _load_base(place, config, weights, model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = PeftModel.from_pretrained(base, str(place)).eval()
            lora, factors = convert_to_lora(adapted, rank)
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError, NotImplementedError) as error:
        raise UserError(f"{place}: {config['peft_type']} cannot be made LoRA: {one_line(error)[:200]}") from None
    found = {key: _array(tensor) for key, tensor in factors.items()}
    heads = {n for n, _ in adapted.named_modules() if n.endswith(".modules_to_save")}
    kept = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    for module in (name.removesuffix("modules_to_save") for name in heads):
        found |= {key: _array(tensor) for key, tensor in kept.items() if key.startswith(module)}
    written = json.loads(json.dumps(lora.to_dict(), default=_plain))
    written |= {key: config.get(key) for key in ("task_type", "modules_to_save", "base_model_name_or_path", "revision")}
    written["peft_type"] = "LORA"
    return _understood(place, written, found, _conversion_error(adapted, found))


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, set) else getattr(value, "value", str(value))


@torch.no_grad()
def _conversion_error(model: PeftModel, found: Mapping[str, np.ndarray]) -> float:
    missed = whole = 0.0
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and f"{name}.lora_A.weight" in found:
            delta = _array(module.get_delta_weight(_ADAPTER)).astype(np.float64)  # type: ignore[attr-defined]
            product = found[f"{name}.lora_B.weight"].astype(np.float64) @ found[f"{name}.lora_A.weight"]
            # GPT-2 keeps W, and so the change of it, transposed.
            flipped = type(module.get_base_layer()).__name__ == "Conv1D"
            missed += float(np.sum((delta - (product.T if flipped else product)) ** 2))
            whole += float(np.sum(delta**2))
    return math.sqrt(missed / whole) if whole > 0 else 0.0


def _load_base(
    place: Path, config: Mapping[str, Any], weights: Mapping[str, np.ndarray], model: str
) -> torch.nn.Module:
    import transformers

    kind = config.get("task_type")
    if kind not in _AUTO:
        raise UserError(f"{place}: its task_type is {kind}, which does not say what model to load; merge LoRA folders")
    options = {}
    if kind in ("SEQ_CLS", "TOKEN_CLS"):
        names = tuple(f".{name}." for name in config.get("modules_to_save") or ())
        rows = [weights[k].shape[0] for k in sorted(weights) if k.endswith(".weight") and any(n in k for n in names)]
        if rows:
            options["num_labels"] = rows[-1]
    return load_pretrained(getattr(transformers, _AUTO[kind]), model, 0, **options)[0]


def write_folder(folder: str | Path, state: AdapterState, like: PeftFolder, heads: bool = True) -> Path:
    """Write ``state`` as a PEFT folder that plain ``PeftModel.from_pretrained`` loads, with the settings of ``like``.

    The ranks and scalings are those of ``state``, pair by pair. Without ``heads`` the folder holds none. Raises
    :class:`UserError` where something lies in the folder already.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is not an empty folder; name another for the merged adapter")
    tensors = {key_of(name): array for name, array in state.items() if heads or state.spec.by_name[name].role != "head"}
    if heads:
        tensors |= {key: state[kept] if isinstance(kept, str) else kept for key, kept in like.carried.items()}
    config = _config_of(state, like, heads)
    try:
        # What PEFT itself would refuse is refused before anything is written.
        LoraConfig(**{key: value for key, value in config.items() if key in LoraConfig.__dataclass_fields__})
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {key: torch.from_numpy(np.array(array)) for key, array in tensors.items()},
            folder / WEIGHTS,
            metadata={"format": "pt"},
        )
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder}: cannot be written: {one_line(error)[:200]}") from None
    return folder


def key_of(name: str) -> str:
    """The key of a parameter in the file: its name without the adapter's."""
    plain = name.replace(f".modules_to_save.{_ADAPTER}.", ".")
    plain = re.sub(rf"\.(lora_[AB])\.{_ADAPTER}\.weight$", r".\1.weight", plain)
    plain = re.sub(rf"\.lora_magnitude_vector\.{_ADAPTER}\.weight$", ".lora_magnitude_vector", plain)
    return re.sub(rf"\.(lora_embedding_[AB])\.{_ADAPTER}$", r".\1", plain)


def _config_of(state: AdapterState, like: PeftFolder, heads: bool) -> dict[str, Any]:
    spec, root = state.spec, bool(like.config.get("use_rslora"))
    ranks = {module_of(pair.a): spec.by_name[pair.a].shape[0] for pair in spec.pairs}
    alphas = {
        module_of(pair.a): pair.scaling * (math.sqrt(rank) if root else rank)
        for pair, rank in zip(spec.pairs, ranks.values(), strict=True)
    }
    rank, alpha = _most(ranks.values()), _most(alphas.values())
    config = {
        **like.config,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "rank_pattern": {re.escape(name): value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {re.escape(name): value for name, value in alphas.items() if value != alpha},
        "init_lora_weights": True,
        "inference_mode": True,
        "eva_config": None,
        "lora_ga_config": None,
        "corda_config": None,
        "loftq_config": {},
    }
    if {pair.a for pair in spec.pairs} != {pair.a for pair in like.state.spec.pairs} or like.lost:
        # Whole names of modules, which no other module ends with.
        config |= {"target_modules": sorted(ranks), "exclude_modules": None}
        config |= {"layers_to_transform": None, "layers_pattern": None}
    if not heads:
        # PEFT would make and save heads of its own for a task that has them.
        config |= {"modules_to_save": None, "task_type": None}
    return config


def _most(values: Iterable[Any]) -> Any:
    held = list(values)
    return max(held, key=held.count)
