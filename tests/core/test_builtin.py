"""Tiny models that need no download: always the same bits, built once, fit for their tasks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedgraft.core import builtin
from fedgraft.core.basemodel import BaseModel, resolve
from fedgraft.core.config import TaskConfig, parse_config
from fedgraft.core.errors import UserError
from fedgraft.core.tasks import create_task

FITS = [
    ("tiny-bert", "sequence-classification"),
    ("tiny-gpt2", "sequence-classification"),
    ("tiny-gpt2", "causal-lm"),
    ("tiny-llama", "causal-lm"),
    ("tiny-llama", "sequence-classification"),
    ("tiny-vit", "image-classification"),
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    builtin._folder.cache_clear()
    yield tmp_path
    builtin._folder.cache_clear()


def load(name: str, task: str) -> BaseModel:
    config = TaskConfig(name=task, labels=("a", "b", "c"), max_length=24)
    return create_task(config).load(f"builtin:{name}", config, seed=1)


@pytest.mark.parametrize(("name", "task"), FITS)
def test_a_model_fits_its_task_and_is_small(name: str, task: str) -> None:
    base = load(name, task)
    assert base.parameters < 1_500_000
    assert base.fingerprint == load(name, task).fingerprint


def test_it_is_the_same_wherever_it_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Path(resolve("builtin:tiny-bert"))
    torch.manual_seed(77)  # whatever was drawn before
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    builtin._folder.cache_clear()
    second = Path(resolve("builtin:tiny-bert"))
    assert first != second and first.name == second.name
    names = {path.name for path in first.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_it_is_built_once_and_leaves_nothing_half_made(own_cache: Path) -> None:
    folder = Path(resolve("builtin:tiny-vit"))
    written = (folder / "model.safetensors").stat().st_mtime_ns
    builtin._folder.cache_clear()
    assert resolve("builtin:tiny-vit") == str(folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert [path.name for path in (own_cache / "fedgraft" / "models").iterdir()] == [folder.name]


def test_without_a_cache_a_process_builds_its_own_and_cleans_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_end: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        builtin.atexit, "register", lambda call, *arguments, **more: at_end.append((call, arguments, more))
    )
    monkeypatch.setattr(builtin.tempfile, "tempdir", str(tmp_path))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    folder = Path(resolve("builtin:tiny-vit"))
    assert folder.parent == tmp_path
    assert resolve("builtin:tiny-vit") == str(folder)
    ((call, arguments, more),) = at_end
    call(*arguments, **more)
    assert not folder.exists()


def test_an_empty_cls_carries_what_the_text_says() -> None:
    base = load("tiny-bert", "sequence-classification")
    tokens = base.processor(["fracture of tibia", "malignant neoplasm of lung"], padding=True, return_tensors="pt")
    with torch.no_grad():
        embedded = base.model.bert.embeddings(tokens["input_ids"])
        first, second = base.model.bert(**tokens).last_hidden_state[:, 0]
    assert (embedded[:, 0] == 0).all()
    assert torch.nn.functional.cosine_similarity(first, second, dim=0) < 0.9


def test_any_text_is_told_in_known_pieces() -> None:
    processor = load("tiny-bert", "sequence-classification").processor
    ids = processor("Zygomatic qwertz-Fracture, 7th!")["input_ids"]
    assert processor.unk_token_id not in ids[:-2]
    assert len(processor) == 2048
    assert processor("")["input_ids"] == [processor.cls_token_id, processor.sep_token_id]


def test_an_unknown_model_is_one_line_and_a_configuration_keeps_the_name() -> None:
    with pytest.raises(UserError) as caught:
        resolve("builtin:tiny-bart")
    known = "builtin:tiny-bert, builtin:tiny-gpt2, builtin:tiny-llama, builtin:tiny-vit"
    assert str(caught.value) == f"model builtin:tiny-bart: there is none of that name; there are {known}"
    assert parse_config({"model": "builtin:tiny-vit", "data": {"sites": 2}}).model == "builtin:tiny-vit"
