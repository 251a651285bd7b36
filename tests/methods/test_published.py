"""The counts of trainable numbers that papers publish, on models made of their configurations; and the page of them."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedgraft.methods import methods

DOCS = Path(__file__).resolve().parents[2] / "docs"


def _page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("methods_page", DOCS / "methods.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


PAGE = _page()


@cache
def models() -> Any:
    return PAGE.skeletons()


@pytest.mark.parametrize("entry", PAGE.PUBLISHED, ids=lambda entry: f"{entry.method}-{entry.model}")
def test_we_train_as_many_numbers_as_the_paper_counts(entry: Any) -> None:
    """Within 2 %, or a note on the page says why not."""
    off = abs(PAGE.counted(entry, models()) / entry.millions - 1)
    assert off <= 0.02 or entry.why


def test_every_method_is_on_the_page() -> None:
    text = (DOCS / "methods.md").read_text(encoding="utf-8")
    missing = [method.name for method in methods() if f"| `{method.name}` |" not in text]
    assert missing == [], "run `python docs/methods.py`"


def test_the_readme_counts_the_methods_that_train() -> None:
    count = sum(not method.refused for method in methods())
    assert f"[{count} PEFT methods]" in (DOCS.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_page_is_what_the_catalogue_says() -> None:
    assert (DOCS / "methods.md").read_text(encoding="utf-8") == PAGE.page(), "run `python docs/methods.py`"
