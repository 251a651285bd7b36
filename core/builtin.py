"""Tiny base models that need no download: `builtin:NAME`, built from a configuration and a fixed seed.

They are untrained: what an adapter learns on them it learns from the sites alone. For scenarios, tests and first steps.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from .basemodel import quiet
from .errors import UserError

PREFIX = "builtin:"
_SEED = 2024
#: Of the encoder and the language models, and of the image model, whose usual 0.02 would leave it all but blind.
_TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "initializer_range": 0.05,
}
_IMAGE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "initializer_range": 0.1,
}
#: Word pieces of ICD-10-CM terminology (public domain), one a line: five special tokens, letters, parts of words.
_VOCABULARY = Path(__file__).with_name("vocabulary.txt")
_POSITIONS = 128


@cache
def _pieces() -> tuple[str, ...]:
    return tuple(_VOCABULARY.read_text(encoding="utf-8").split("\n")[:-1])


def _tokenizer(around: str, **special: str) -> PreTrainedTokenizerFast:
    """Lower-case word pieces; ``around``: what stands beside a text ("$A")."""
    ids = {piece: number for number, piece in enumerate(_pieces())}
    fast = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    fast.normalizer = normalizers.BertNormalizer(lowercase=True)
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.decoder = decoders.WordPiece()
    tokens = [(token, ids[token]) for token in around.split() if token != "$A"]
    fast.post_processor = processors.TemplateProcessing(single=around, special_tokens=tokens)
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, model_max_length=_POSITIONS, pad_token="[PAD]", unk_token="[UNK]", **special
    )


def _bert(folder: Path) -> None:
    config = transformers.BertConfig(vocab_size=len(_pieces()), max_position_embeddings=_POSITIONS, **_TEXT)
    network = transformers.BertModel(config)
    embeddings = network.embeddings
    with torch.no_grad():
        # [CLS] begins as nothing, so that it carries what the text says and not mostly itself.
        embeddings.word_embeddings.weight[_pieces().index("[CLS]")] = 0
        embeddings.position_embeddings.weight[0] = 0
        embeddings.token_type_embeddings.weight.zero_()
    network.save_pretrained(folder)
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    _tokenizer("[CLS] $A [SEP]", **special).save_pretrained(folder)


def _causal(folder: Path, network: Any) -> None:
    network.save_pretrained(folder)
    _tokenizer("[CLS] $A [SEP]", bos_token="[CLS]", eos_token="[SEP]").save_pretrained(folder)


def _gpt2(folder: Path) -> None:
    config = transformers.GPT2Config(
        vocab_size=len(_pieces()),
        n_positions=_POSITIONS,
        n_embd=_TEXT["hidden_size"],
        n_layer=_TEXT["num_hidden_layers"],
        n_head=_TEXT["num_attention_heads"],
        n_inner=_TEXT["intermediate_size"],
        bos_token_id=2,
        eos_token_id=3,
        initializer_range=_TEXT["initializer_range"],
    )
    _causal(folder, transformers.GPT2LMHeadModel(config))


def _llama(folder: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=len(_pieces()),
        max_position_embeddings=_POSITIONS,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
        **_TEXT,
    )
    _causal(folder, transformers.LlamaForCausalLM(config))


def _vit(folder: Path) -> None:
    config = transformers.ViTConfig(image_size=8, patch_size=4, **_IMAGE)
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)


_BUILDERS: dict[str, Callable[[Path], None]] = {
    "tiny-bert": _bert,
    "tiny-gpt2": _gpt2,
    "tiny-llama": _llama,
    "tiny-vit": _vit,
}


def builtin_folder(name: str) -> Path:
    """The folder of ``builtin:NAME``, built when it is not there yet. Raises :class:`UserError` for another name.

    It lies in the user's cache (`$XDG_CACHE_HOME/fedgraft`), or for this process alone where that cannot be written.
    """
    bare = name.removeprefix(PREFIX)
    if bare not in _BUILDERS:
        raise UserError(
            f"model {name}: there is none of that name; there are {', '.join(PREFIX + n for n in _BUILDERS)}"
        )
    return _folder(bare)


@cache
def _folder(name: str) -> Path:
    # What another version of this file or of transformers would write lies elsewhere.
    text = json.dumps([transformers.__version__, Path(__file__).read_text(encoding="utf-8"), _pieces()])
    version = hashlib.sha256(text.encode()).hexdigest()[:12]
    with contextlib.suppress(OSError, RuntimeError):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedgraft" / "models"
        folder = cache / f"{name}-{version}"
        if not folder.is_dir():
            cache.mkdir(parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(dir=cache))
            try:
                _build(name, made)
                made.rename(folder)  # whole or not at all
            except OSError:
                shutil.rmtree(made, ignore_errors=True)
                if not folder.is_dir():  # unless another process was faster
                    raise
        return folder
    return _own_folder(name)


def _own_folder(name: str) -> Path:
    """A folder that goes with this process."""
    folder = Path(tempfile.mkdtemp(prefix="fedgraft-model-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _build(name, folder)
    return folder


def _build(name: str, folder: Path) -> None:
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        _BUILDERS[name](folder)
