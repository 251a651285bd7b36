"""Untrained models of a few thousand numbers, one for each architecture family, built from configuration on the spot.

A folder looks like a published checkpoint: weights, configuration, and a tokenizer or image processor beside them.
For classification the head is left out, as in a pretrained encoder, so that the task has to make it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    T5Config,
    ViTConfig,
    ViTImageProcessor,
)

from ...core.basemodel import quiet

_TEXT = """
acute chronic severe mild left right upper lower fracture infection neoplasm disorder fever pain burn injury
of the with without due to and or unspecified heart lung liver kidney skin bone eye ear nerve blood artery
vein stomach colon spine hand foot knee hip shoulder patient hospital birth mental diabetes asthma anemia
stroke sepsis benign malignant open closed
"""
#: Everything a tiny tokenizer knows; any other word is its unknown token.
WORDS = tuple(_TEXT.split())
FAMILIES = ("bert", "roberta", "gpt2", "llama", "t5", "vit")
HIDDEN, LAYERS, HEADS, POSITIONS = 32, 2, 4, 64
IMAGE_SIZE, PATCH = 16, 8

# The usual 0.02 makes an untrained model all but blind to its input, and a test of padding or masking could not fail.
_SPREAD = 0.25

#: Special tokens in the order of their ids, and what stands around a text ("$A").
_SPECIAL: dict[str, tuple[dict[str, str], str]] = {
    "bert": (
        {
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "mask_token": "[MASK]",
        },
        "[CLS] $A [SEP]",
    ),
    "roberta": (
        {
            "bos_token": "<s>",
            "pad_token": "<pad>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "mask_token": "<mask>",
        },
        "<s> $A </s>",
    ),
    "gpt2": (
        {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
        "$A",
    ),
    "llama": ({"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}, "<s> $A"),
    "t5": ({"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}, "$A </s>"),
}


def tokenizer(family: str) -> PreTrainedTokenizerFast:
    """One token a word, with the special tokens of ``family``; like the real ones, GPT-2 and Llama have no padding."""
    special, template = _SPECIAL[family]
    tokens = [*dict.fromkeys(special.values()), *WORDS]
    ids = {token: i for i, token in enumerate(tokens)}
    fast = Tokenizer(models.WordLevel(ids, unk_token=special["unk_token"]))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    around = [part for part in template.split() if part != "$A"]
    fast.post_processor = processors.TemplateProcessing(single=template, special_tokens=[(t, ids[t]) for t in around])
    return PreTrainedTokenizerFast(tokenizer_object=fast, model_max_length=POSITIONS, **special)


def _text_config(family: str) -> PretrainedConfig:
    words = tokenizer(family)
    size = len(words)
    ids = {key: getattr(words, f"{key}_id") for key in ("bos_token", "eos_token", "pad_token")}
    given = {f"{key}_id": value for key, value in ids.items() if value is not None}
    encoder: dict[str, Any] = {
        "vocab_size": size,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": 2 * HIDDEN,
        "initializer_range": _SPREAD,
        **given,
    }
    if family == "bert":
        return BertConfig(**encoder, max_position_embeddings=POSITIONS)
    if family == "roberta":
        return RobertaConfig(**encoder, max_position_embeddings=POSITIONS + 2, type_vocab_size=1)
    if family == "llama":
        return LlamaConfig(**encoder, num_key_value_heads=HEADS // 2, max_position_embeddings=POSITIONS)
    if family == "gpt2":
        return GPT2Config(
            vocab_size=size,
            n_embd=HIDDEN,
            n_layer=LAYERS,
            n_head=HEADS,
            n_positions=POSITIONS,
            initializer_range=_SPREAD,
            **given,
        )
    return T5Config(
        vocab_size=size,
        d_model=HIDDEN,
        d_kv=HIDDEN // HEADS,
        d_ff=2 * HIDDEN,
        num_layers=LAYERS,
        num_heads=HEADS,
        decoder_start_token_id=words.pad_token_id,  # type: ignore[call-arg]
        **given,
    )


def _vit_config() -> ViTConfig:
    return ViTConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=2 * HIDDEN,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        initializer_range=_SPREAD,
    )


_WITH_HEAD: dict[str, Any] = {
    "causal-lm": AutoModelForCausalLM,
    "masked-lm": AutoModelForMaskedLM,
    "seq2seq-lm": AutoModelForSeq2SeqLM,
}


def build(folder: Path, family: str, task: str) -> None:
    """Write a tiny ``family`` model that ``task`` can load into ``folder``.

    ``task``: one of fedgraft's (sequence-classification, causal-lm, image-classification), masked-lm or seq2seq-lm.
    """
    if family not in FAMILIES:
        raise ValueError(f"no tiny model of family {family}; there are {', '.join(FAMILIES)}")
    config = _vit_config() if family == "vit" else _text_config(family)
    make: Callable[[PretrainedConfig], Any] = _WITH_HEAD.get(task, AutoModel).from_config
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        make(config).save_pretrained(folder)
        if family == "vit":
            ViTImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(folder)
        else:
            tokenizer(family).save_pretrained(folder)
