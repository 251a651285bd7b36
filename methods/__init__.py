"""PEFT methods: how each attaches to a base model and what its tensors mean."""

from .attach import AttachedAdapter, attach
from .grafts import GraftConfig, Part, Setting, graft_config
from .registry import Method, MethodOptions, create_method, meaning_by, methods, register
from .steps import Steps

__all__ = [
    "AttachedAdapter",
    "GraftConfig",
    "Method",
    "MethodOptions",
    "Part",
    "Setting",
    "Steps",
    "attach",
    "create_method",
    "graft_config",
    "meaning_by",
    "methods",
    "register",
]
