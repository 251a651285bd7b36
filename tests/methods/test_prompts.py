"""Prompts that begin with those of other tasks: the contract, and a naive twin in float64."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedgraft.core.errors import UserError
from fedgraft.methods import create_method
from fedgraft.simulations.contract.suite import contract_of, laboratory

TEXT = "sequence-classification"
_scratch: list[Path] = []


@pytest.fixture(scope="session", autouse=True)
def _folders(tmp_path_factory: pytest.TempPathFactory) -> None:
    _scratch.append(tmp_path_factory.mktemp("prompts"))


@cache
def sources(count: int) -> tuple[str, ...]:
    """Folders of trained prompts: three tokens, as wide as the tiny models are."""
    lab, folders = laboratory(), []
    for seed in range(count):
        adapter = lab.attach("bert", TEXT, "prompt", seed=seed)
        folders.append(str(adapter.save_peft(_scratch[0] / f"{count}-{seed}", lab.shaken(adapter, seed))))
    return tuple(folders)


class WithSources:
    """The contract, with folders that are there when a test runs."""

    count = 1

    def settings_for(self, case: tuple[str, str]) -> dict[str, Any]:
        return {"experts": sources(self.count)}


class WithThree(WithSources):
    count = 3

    def settings_for(self, case: tuple[str, str]) -> dict[str, Any]:
        return {**super().settings_for(case), "options": {"width": 6}}


TestSpot = contract_of(create_method("spot"), WithSources)
TestAttempt = contract_of(create_method("attempt"), WithThree)


def prompt_of(folder: str) -> torch.Tensor:
    return load_file(str(Path(folder) / "adapter_model.safetensors"))["prompt_embeddings"]


def test_spot_begins_with_the_prompt_of_its_source() -> None:
    (folder,) = sources(1)
    adapter = laboratory().attach("bert", TEXT, "spot", experts=(folder,))
    (prompt,) = (p for n, p in adapter.trainables().items() if n.startswith("prompt_encoder."))
    assert torch.equal(prompt.detach(), prompt_of(folder))


@torch.no_grad()
def test_attempt_mixes_the_prompts_that_a_text_asks_for() -> None:
    lab = laboratory()
    adapter = lab.attach("bert", TEXT, "attempt", experts=sources(3), options={"width": 6})
    part = adapter.model.get_submodule("base_model.model.bert").graft["default"]
    frozen = [prompt_of(folder) for folder in sources(3)]
    assert torch.equal(part.sources, torch.stack(frozen))
    lab.shaken(adapter, by=0.3)
    adapter.model.double()
    base = lab.base("bert", TEXT).model.double()
    batch = lab.batch("bert", TEXT, lab.records("bert", TEXT, (3, 11, 1)))
    prompts = [*part.sources, part.target]
    head = next(m for n, m in adapter.model.named_modules() if n.endswith("modules_to_save.default"))
    for b in range(3):
        words = [i for i in range(batch["input_ids"].shape[1]) if batch["attention_mask"][b, i]]
        embedded = base.bert.embeddings.word_embeddings(batch["input_ids"][b, words])
        text = torch.stack([max(row[d] for row in embedded) for d in range(32)])
        inner = part.down.weight @ text
        out = part.up.weight @ (inner / (1 + (-inner).exp()))
        out = (out - out.mean()) / (out.var(unbiased=False) + part.norm.eps).sqrt() * part.norm.weight + part.norm.bias
        scores = torch.stack([(torch.stack([max(p[:, d]) for d in range(32)]) * out).sum() for p in prompts])
        chances = (scores / (2.718281828459045 * 32)).exp()
        chances = chances / chances.sum()
        prompt = part.target + sum(c * p for c, p in zip(chances, prompts, strict=True))
        whole = torch.cat([embedded[:1], prompt, embedded[1:]])
        want = head(base.bert(inputs_embeds=whole[None]).pooler_output)[0]
        got = adapter.model(**batch_of(batch)).logits[b]
        assert got.dtype == torch.float64 and float((got - want).abs().max()) <= 1e-10 * float(want.abs().max())


def batch_of(batch: Any) -> dict[str, Any]:
    return {key: value for key, value in batch.items() if key != "labels"}


@pytest.mark.parametrize("method", ["spot", "attempt"])
def test_sources_that_are_none_are_refused_with_the_mend(method: str, tmp_path: Path) -> None:
    lab = laboratory()
    with pytest.raises(UserError, match=r"give their PEFT folders in method\.experts"):
        lab.attach("bert", TEXT, method)
    with pytest.raises(UserError, match=r"set method\.virtual_tokens to the prompt's length"):
        lab.attach("bert", TEXT, method, experts=sources(1), virtual_tokens=4)
    adapter = lab.attach("bert", TEXT, "lora")
    folder = adapter.save_peft(tmp_path / "lora", adapter.read())
    with pytest.raises(UserError, match="holds no prompt, its type is LORA"):
        lab.attach("bert", TEXT, method, experts=(str(folder),))


def test_spot_begins_with_one_prompt() -> None:
    with pytest.raises(UserError, match="leave one folder"):
        laboratory().attach("bert", TEXT, "spot", experts=sources(3))


def test_attempt_refuses_a_text_that_leaves_its_prompt_no_room() -> None:
    adapter = laboratory().attach("bert", TEXT, "attempt", experts=sources(3), options={"width": 6})
    with pytest.raises(UserError, match=r"lower task\.max_length"):
        adapter.model(input_ids=torch.ones(1, 62, dtype=torch.long))
