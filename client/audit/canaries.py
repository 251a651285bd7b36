"""Records and a model made up on the spot, for an audit where there are no data, or not even a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from ...core.basemodel import quiet
from ...core.config import RunConfig, parse_config
from ..data import Records
from ..resident import resident

_MOST_RECORDS_A_PATIENT = 8
_LABELS = ("a", "b", "c")


def synthetic_records(config: RunConfig, units: int) -> Records:
    """Random records that the task and the model of ``config`` can read, of ``units`` privacy units; a patient has 1
    to 8."""
    random = np.random.default_rng()
    by_patient = config.privacy.unit == "patient"
    sizes = (
        random.integers(1, _MOST_RECORDS_A_PATIENT + 1, size=units) if by_patient else np.ones(units, dtype=np.int64)
    )
    count = int(sizes.sum())
    model = resident(config)
    labels = random.integers(len(config.task.labels), size=count) if model.task.labelled else None
    if model.task.input_kind == "image":
        inputs: list[Any] = [
            Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(count)
        ]
    else:
        inputs = _texts(model.base.processor, config.task.max_length, count, random)
    patients = [f"canary-{unit}" for unit in np.repeat(np.arange(units), sizes)]
    return Records(inputs, labels, patients)


def _texts(tokenizer: Any, longest: int, count: int, random: np.random.Generator) -> list[str]:
    special = set(tokenizer.all_special_ids)
    words = [token for token in range(tokenizer.vocab_size) if token not in special]
    return [
        tokenizer.decode(random.choice(words, size=int(random.integers(1, max(2, longest - 2)))).tolist())
        for _ in range(count)
    ]


def canary_config(folder: Path) -> RunConfig:
    """A whole small plan: LoRA on a two-layer BERT of random weights, written into ``folder``, and patients."""
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *_words()])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", words["[CLS]"]), ("[SEP]", words["[SEP]"])]
    )
    shape = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        # The usual 0.02 makes an untrained model all but blind to its input.
        initializer_range=0.25,
    )
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        BertModel(shape).save_pretrained(folder)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
        ).save_pretrained(folder)
    return parse_config(
        {
            "name": "canary",
            "model": str(folder),
            "rounds": 5,
            "method": {"name": "lora", "rank": 4, "alpha": 8},
            "task": {"labels": list(_LABELS), "max_length": 16},
            "train": {"local_steps": 8, "batch_size": 16, "micro_batch": 16, "device": "cpu"},
            "privacy": {
                "unit": "patient",
                "epsilon": 8.0,
                "delta": 1e-3,
                "records_per_patient": 4,
            },
            "data": {"path": "", "sites": ["canary", "canary-too"]},
        }
    )


def _words() -> list[str]:
    return [a + b for a in "bcdfglmnprst" for b in ("a", "e", "i", "o", "u")]
