"""The conversation of `tests/conversation.py`, which no test can import by name."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def conversation() -> ModuleType:
    """The module: `Conversation`, and the policy of a site that allows everything."""
    spec = importlib.util.spec_from_file_location("conversation", Path(__file__).parents[1] / "conversation.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
