"""The laboratory `tests/lab.py`, which no test can import by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_SPEC = importlib.util.spec_from_file_location("lab", Path(__file__).parents[1] / "lab.py")
assert _SPEC is not None and _SPEC.loader is not None
_LAB = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_LAB)

pytest_generate_tests = _LAB.pytest_generate_tests


@pytest.fixture(scope="session")
def lab(tiny_model: Callable[..., str], tiny_text: Callable[[int, int], str]) -> Any:
    return _LAB.Lab(tiny_model, tiny_text)
