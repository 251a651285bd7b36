"""Prompts that were trained on other tasks, from PEFT's folders."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..core.errors import UserError, one_line
from .peftfolder import locate, peft_type

_KEY = "prompt_embeddings"


def source_prompts(method: str, folders: Sequence[str], width: int, tokens: int) -> torch.Tensor:
    """The prompts in ``folders`` as one tensor (folders, tokens, width). Raises :class:`UserError` for any other."""
    if not folders:
        raise UserError(f"method {method} begins with trained prompts: give their PEFT folders in method.experts")
    found = []
    for folder in folders:
        if peft_type(folder) != "PROMPT_TUNING":
            raise UserError(f"{folder}: holds no prompt, its type is {peft_type(folder)}; choose a folder of `prompt`")
        try:
            prompt = load_file(str(locate(folder) / "adapter_model.safetensors"))[_KEY]
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(f"{folder}: its prompt cannot be read: {one_line(error)[:200]}") from None
        if tuple(prompt.shape) != (tokens, width):
            raise UserError(
                f"{folder}: its prompt is {' x '.join(map(str, prompt.shape))}, this model and method.virtual_tokens "
                f"ask for {tokens} x {width}: set method.virtual_tokens to the prompt's length"
            )
        if not bool(torch.isfinite(prompt).all()):
            raise UserError(f"{folder}: its prompt holds NaN or infinity; choose another")
        found.append(prompt.float())
    return torch.stack(found)
