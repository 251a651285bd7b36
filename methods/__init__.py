"""PEFT methods: how each attaches to a base model and what its tensors mean."""

from . import bitfit, core_lora, full, fusion, ia3, layernorm, lora, prefix, prompt
from .attach import AttachedAdapter, attach
from .registry import Method, create_method, methods, register

__all__ = [
    "AttachedAdapter",
    "Method",
    "attach",
    "bitfit",
    "core_lora",
    "create_method",
    "full",
    "fusion",
    "ia3",
    "layernorm",
    "lora",
    "methods",
    "prefix",
    "prompt",
    "register",
]
