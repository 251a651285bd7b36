"""What every test shares: quiet libraries, one thread (tiny models gain nothing from more), tiny models on the spot."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

torch.set_num_threads(1)

# The same examples on every run, and no time limit for one: the machine may be busy.
settings.register_profile("fedgraft", deadline=None, derandomize=True)
settings.load_profile("fedgraft")


@pytest.fixture(scope="session")
def tinymodels() -> ModuleType:
    """The module of the tiny models: its words, sizes, tokenizers and builders."""
    return importlib.import_module("fedgraft.simulations.contract.tinymodels")


def _beside(name: str) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their own module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def lab(tiny_model: Callable[..., str], tiny_text: Callable[[int, int], str]) -> Any:
    """A `Lab` of `tests/lab.py`: adapters on tiny models, batches for them, and naive twins of what an engine does."""
    return _beside("lab").Lab(tiny_model, tiny_text)


@pytest.fixture(scope="session")
def tuners() -> ModuleType:
    """The module `tests/tuners.py`: every tuner of PEFT on tiny models."""
    return _beside("tuners")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The arguments that `tests/lab.py` supplies: ``fitting``, ``unfitting``, ``hooked``."""
    if {"fitting", "unfitting", "hooked"} & set(metafunc.fixturenames):
        _beside("lab").pytest_generate_tests(metafunc)


@pytest.fixture(scope="session")
def fuzzing() -> ModuleType:
    """The module `tests/fuzzing.py`: messages as a broken or hostile peer may send them."""
    return _beside("fuzzing")


@pytest.fixture(scope="session")
def tinyfederation() -> ModuleType:
    """The module `tests/tinyfederation.py`: its labels, sites and helpers."""
    return _beside("tinyfederation")


@pytest.fixture(scope="session")
def tiny_federation(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., str],
    tinymodels: ModuleType,
    tinyfederation: ModuleType,
) -> Any:
    """A `TinyFederation`: three sites, a tiny BERT and a CSV file of 600 records, run in this process in a second."""
    records = tinyfederation.rows(tinymodels.WORDS)
    table = tinyfederation.write_csv(tmp_path_factory.mktemp("records") / "records.csv", records)
    return tinyfederation.TinyFederation(tiny_model("bert"), table, tuple(records))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tinymodels: ModuleType) -> Callable[..., str]:
    """``tiny_model(family, task="sequence-classification")``: the folder of a tiny untrained model.

    Families: bert, roberta, gpt2, llama, t5, vit. Built once a session: copy the folder before changing it.
    """
    built: dict[tuple[str, str], str] = {}

    def folder(family: str, task: str = "sequence-classification") -> str:
        if (family, task) not in built:
            path = tmp_path_factory.mktemp(f"{family}-{task}-")
            tinymodels.build(path, family, task)
            built[family, task] = str(path)
        return built[family, task]

    return folder


@pytest.fixture(scope="session")
def tiny_text(tinymodels: ModuleType) -> Callable[[int, int], str]:
    """``tiny_text(words, seed)``: a text of that many words that the tiny tokenizers know."""

    def text(words: int, seed: int) -> str:
        generator = torch.Generator().manual_seed(seed)
        at = torch.randint(len(tinymodels.WORDS), (words,), generator=generator)
        return " ".join(tinymodels.WORDS[i] for i in at)

    return text
