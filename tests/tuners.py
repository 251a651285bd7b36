"""Every tuner of PEFT beyond the methods of fedgraft, on tiny models: what the engine clips, or refuses in a line."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import peft
import torch
from torch import nn

TARGETS = {
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
    "gpt2": ["c_attn"],
    "llama": ["q_proj", "v_proj"],
    "t5": ["q", "v"],
    "vit": ["q_proj", "v_proj"],
}
EMBEDDING = {
    "bert": "word_embeddings",
    "roberta": "word_embeddings",
    "gpt2": "wte",
    "llama": "embed_tokens",
    "t5": "shared",
    "vit": "none",
}
#: Ids of the tiny tokenizers' words: what a test's texts are made of.
TOKENS = list(range(2, 14))

Configure = Callable[[str], Any]


def _on_layers(name: str, **settings: Any) -> Configure:
    return lambda family: getattr(peft, name)(target_modules=TARGETS[family], **settings)


def _on_embedding(name: str, **settings: Any) -> Configure:
    return lambda family: getattr(peft, name)(target_modules=[EMBEDDING[family]], **settings)


def _virtual(name: str, **settings: Any) -> Configure:
    return lambda family: getattr(peft, name)(num_virtual_tokens=3, **settings)


TUNERS: dict[str, Configure] = {
    "lora, own biases": _on_layers("LoraConfig", r=4, bias="lora_only"),
    "lora, biases of B": _on_layers("LoraConfig", r=4, lora_bias=True),
    "lora, embedding": _on_embedding("LoraConfig", r=4),
    "lora, tokens": lambda family: peft.LoraConfig(
        r=4, target_modules=TARGETS[family], trainable_token_indices={EMBEDDING[family]: TOKENS}
    ),
    "dora, embedding": _on_embedding("LoraConfig", r=4, use_dora=True),
    "qalora": _on_layers("LoraConfig", r=4, use_qalora=True, qalora_group_size=4),
    "alora": _on_layers("LoraConfig", r=4, alora_invocation_tokens=[3]),
    "adalora": _on_layers("AdaLoraConfig", init_r=4, target_r=4, total_step=100),
    "loha": _on_layers("LoHaConfig", r=4),
    "lokr": _on_layers("LoKrConfig", r=4),
    "vera": _on_layers("VeraConfig", r=8),
    "pvera": _on_layers("PveraConfig", r=8),
    "oft": _on_layers("OFTConfig", r=0, oft_block_size=4),
    "oft, cayley": _on_layers("OFTConfig", r=0, oft_block_size=4, use_cayley_neumann=False),
    "boft": _on_layers("BOFTConfig", boft_block_size=4),
    "hra": _on_layers("HRAConfig", r=4),
    "hra, orthogonal": _on_layers("HRAConfig", r=4, apply_GS=True),
    "fourierft": _on_layers("FourierFTConfig", n_frequency=20),
    "waveft": _on_layers("WaveFTConfig", n_frequency=20),
    "vblora": _on_layers("VBLoRAConfig", r=2, num_vectors=16, vector_length=8, topk=2),
    "unilora": _on_layers("UniLoraConfig"),
    "tinylora": _on_layers("TinyLoraConfig"),
    "randlora": _on_layers("RandLoraConfig", r=4),
    "gralora": _on_layers("GraloraConfig", r=4),
    "delora": _on_layers("DeloraConfig", r=4),
    "hira": _on_layers("HiraConfig", r=4),
    "glora": _on_layers("GloraConfig", r=4),
    "psoft": _on_layers("PsoftConfig", r=4),
    "peanut": _on_layers("PeanutConfig", r=4),
    "frod": _on_layers("FrodConfig"),
    "lily": _on_layers("LilyConfig", r=4),
    "osf": _on_layers("OSFConfig"),
    "miss": _on_layers("MissConfig", r=4),
    "miss, bat": _on_layers("MissConfig", r=4, init_weights="bat"),
    "shira": _on_layers("ShiraConfig", r=2),
    "road": _on_layers("RoadConfig", group_size=8),
    "road, variant 4": _on_layers("RoadConfig", group_size=8, variant="road_4"),
    "beft": _on_layers("BeftConfig"),
    "c3a": _on_layers("C3AConfig", block_size=8),
    "ia3, all outputs": _on_layers("IA3Config", feedforward_modules=[]),
    "trainable tokens": _on_embedding("TrainableTokensConfig", token_indices=TOKENS),
    "p-tuning": _virtual("PromptEncoderConfig", encoder_hidden_size=8),
    "p-tuning, lstm": _virtual("PromptEncoderConfig", encoder_hidden_size=8, encoder_reparameterization_type="LSTM"),
    "prefix, projection": _virtual("PrefixTuningConfig", encoder_hidden_size=8, prefix_projection=True),
    "cartridge": _virtual("CartridgeConfig"),
    "cpt": lambda family: peft.CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[3, 4], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 1]
    ),
    "llama-adapter": lambda family: peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1),
}
#: Those that put virtual tokens before a text, for which a decoder must be a language model.
VIRTUAL = ("p-tuning", "p-tuning, lstm", "cpt", "llama-adapter", "cartridge")
#: Those that the engine refuses, and what the line says.
REFUSED: Mapping[str, str] = {
    "lily": "mixes the examples of a batch",
    "osf": "has a gradient hook",
    "cpt": "has a gradient hook",
    "llama-adapter": "takes no single example",
}


class UnfitError(Exception):
    """PEFT itself does not put this tuner on this model."""


def build(lab: Any, name: str, family: str, double: bool = True) -> tuple[nn.Module, tuple[str, str]]:
    """A model with the tuner on it, shaken off its first values, in float64; and the (family, task) of its batches."""
    task, kind = ("image-classification", None) if family == "vit" else ("sequence-classification", "SEQ_CLS")
    if name in VIRTUAL and family in ("gpt2", "llama"):
        task, kind = "causal-lm", "CAUSAL_LM"
    base = lab.base(family, task)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            config = TUNERS[name](family)
            config.task_type = kind
            if hasattr(config, "modules_to_save"):
                config.modules_to_save = list(base.head) or None
            torch.manual_seed(1)
            model = peft.get_peft_model(base.model, config)
        except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
            raise UnfitError(str(error)) from None
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    if double:
        model.double()
    return model.eval(), (family, task)
