"""What a task must say: how a record becomes tensors, a loss for each example, and counts that add up over sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from ..basemodel import BaseModel
from ..config import TaskConfig
from ..errors import UserError

Example = Mapping[str, Any]
Batch = dict[str, torch.Tensor]


class Predictions(NamedTuple):
    """What is predicted of each record: ``logits`` (B, P, C), the right answers ``targets`` (B, P), and ``shares``
    (B, P), each one's part in the loss of its record; they add up to 1."""

    logits: torch.Tensor
    targets: torch.Tensor
    shares: torch.Tensor


class Task(Protocol):
    """One kind of learning problem.

    Under differential privacy only losses that belong to one example can be clipped, so a task has no batch loss:
    :meth:`losses` returns one number an example, shape (B,).
    """

    name: str
    #: The task type of PEFT, for `PeftConfig.task_type`.
    peft_type: str
    #: The column of the data that holds the input: "text" or "image".
    input_kind: str
    labelled: bool

    def load(self, model: str, config: TaskConfig, seed: int) -> BaseModel:
        """The base model with the task's head, in float32, frozen."""
        ...

    def encode(self, inputs: Sequence[Any], labels: Sequence[int] | None, processor: Any) -> list[Example]:
        """Turn raw inputs into examples, once. An example's ``length`` sorts batches so that little is padded."""
        ...

    def collate(self, examples: Sequence[Example], processor: Any) -> Batch:
        """Stack examples, padded to the longest of them."""
        ...

    def losses(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Loss of each example, shape (B,), each independent of the other rows."""
        ...

    def predictions(self, model: nn.Module, batch: Batch) -> Predictions:
        """What :meth:`losses` is the cross-entropy of, for methods whose loss is another one."""
        ...

    def counts(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """``examples``, ``correct`` and ``loss_sum`` of each record, each (B,), at least float32; sums of them add up
        over batches and sites. A record may count as several examples (the tokens of a text)."""
        ...

    def even_loss(self, model: nn.Module) -> float:
        """The mean loss of whoever finds every answer equally likely."""
        ...


_TASKS: dict[str, Callable[[TaskConfig], Task]] = {}


def register(name: str) -> Callable[[Callable[[TaskConfig], Task]], Callable[[TaskConfig], Task]]:
    """Make a task available by name."""

    def add(factory: Callable[[TaskConfig], Task]) -> Callable[[TaskConfig], Task]:
        _TASKS[name] = factory
        return factory

    return add


def create_task(config: TaskConfig) -> Task:
    """The task of a configuration. Raises :class:`UserError` that lists the known ones."""
    if config.name not in _TASKS:
        raise UserError(f"unknown task `{config.name}`; there are {', '.join(sorted(_TASKS))}")
    return _TASKS[config.name](config)


def head_modules(model: nn.Module, candidates: Sequence[str], missing: Set[str] = frozenset()) -> tuple[str, ...]:
    """The head of a Hugging Face model: the first of ``candidates`` that it has as a top-level module.

    ``missing``: tensors that the checkpoint does not hold. Modules that had to be made between the base model and the
    candidate belong to the head too: DistilBERT's ``pre_classifier``, or the pooler of an encoder saved without one.
    """
    children = [name for name, _ in model.named_children()]
    head = [name for name in candidates if name in children][:1]
    if not head:
        raise UserError(f"{type(model).__name__} has none of the heads {', '.join(candidates)}")
    body = getattr(model, "base_model_prefix", "")
    made = [name for name in children if name != body and any(key.startswith(f"{name}.") for key in missing)]
    if any(key.startswith(f"{body}.pooler.") for key in missing):
        made.append(f"{body}.pooler")
    return tuple(dict.fromkeys([*head, *made]))


def check_text_limits(model: nn.Module, tokenizer: Any, max_length: int) -> None:
    """Raise :class:`UserError` unless the model has an embedding for every token and every position."""
    words = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    if tokenizer.vocab_size > words:
        raise UserError(
            f"the tokenizer knows {tokenizer.vocab_size} tokens, the model {words}; put the model's own beside it"
        )
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rsplit(".", 1)[-1] in ("position_embeddings", "wpe"):
            # RoBERTa counts positions from its padding index on.
            limit = module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
            if max_length > limit:
                raise UserError(f"task.max_length is {max_length}, but the model takes {limit} tokens; set it to that")


def padding_id(tokenizer: Any) -> int:
    """The token that pads: GPT-2 and Llama have none of their own, so the end of a text stands in."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def set_padding(model: Any, tokenizer: Any) -> None:
    """Tell the model the padding token: decoder-only classifiers find the end of a text by it."""
    model.config.pad_token_id = padding_id(tokenizer)


def tokenize(tokenizer: Any, texts: Sequence[Any], max_length: int) -> list[list[int]]:
    """Token ids of each text, truncated, not padded."""
    if not len(texts):
        return []
    return tokenizer([str(text) for text in texts], truncation=True, max_length=max_length)["input_ids"]


def pad_tokens(examples: Sequence[Example], tokenizer: Any) -> Batch:
    """``input_ids`` and ``attention_mask``, right-padded to the longest example, each (B, T)."""
    longest = max(example["length"] for example in examples)
    fill = padding_id(tokenizer)
    gaps = [longest - example["length"] for example in examples]
    return {
        "input_ids": torch.tensor([[*e["ids"], *[fill] * gap] for e, gap in zip(examples, gaps, strict=True)]),
        "attention_mask": torch.tensor([[1] * e["length"] + [0] * gap for e, gap in zip(examples, gaps, strict=True)]),
    }
