"""What a method gives each attention head of its own, against a loop over heads, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

TEXT, LM = "sequence-classification", "causal-lm"
HEADS, WIDTH, RANK, SHARE, SCALE = 4, 8, 2, 3, 3.0
N = HEADS * WIDTH


def grafted(lab: Any, family: str, task: str, path: str) -> tuple[Any, Any]:
    """The part of a tiny model's layer at ``path``, shaken off its first values, and the layer of the base."""
    settings = {"rank": RANK, "alpha": RANK * SCALE, "options": {"share": SHARE}}
    adapter = lab.attach(family, task, "kernel-wise", **settings)
    lab.shaken(adapter, by=0.3)
    place = adapter.model.double().get_submodule(f"base_model.model.{path}")
    return place.graft["default"], place.base_layer


def rows(x: torch.Tensor, factors: Any) -> torch.Tensor:
    """What the heads of a query or value get, word by word and head by head."""
    own = [[b @ (a @ word) for a, b in zip(factors.own_a, factors.own_b, strict=True)] for word in x]
    common = factors.common_b @ factors.common_a
    return torch.stack([SCALE * (torch.cat(heads) + common @ word) for word, heads in zip(x, own, strict=True)])


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.dtype == torch.float64 and float((got - want).norm()) <= 1e-12 * float(want.norm())


@torch.no_grad()
@pytest.mark.parametrize("projection", ["query", "value"])
def test_each_head_of_a_query_or_value_has_rows_of_its_own(lab: Any, projection: str) -> None:
    part, base = grafted(lab, "bert", TEXT, f"bert.encoder.layer.1.attention.self.{projection}")
    x = torch.randn(5, N, dtype=torch.float64)
    assert part.update.own_a.shape == (HEADS, RANK, N) and part.update.own_b.shape == (HEADS, WIDTH, RANK)
    close(part(base, x), base(x) + rows(x, part.update))


@torch.no_grad()
def test_each_head_has_columns_of_its_own_behind_attention(lab: Any) -> None:
    part, base = grafted(lab, "bert", TEXT, "bert.encoder.layer.1.attention.output.dense")
    x, own = torch.randn(5, N, dtype=torch.float64), part.update
    assert own.own_a.shape == (HEADS, RANK, WIDTH) and own.own_b.shape == (N, HEADS * RANK)
    want = base(x) + SCALE * x @ (own.common_b @ own.common_a).T
    for head in range(HEADS):
        a, b = own.own_a[head], own.own_b[:, head * RANK : (head + 1) * RANK]
        want = want + SCALE * x[:, head * WIDTH : (head + 1) * WIDTH] @ (b @ a).T
    close(part(base, x), want)


@torch.no_grad()
def test_a_layer_that_gives_queries_keys_and_values_keeps_its_keys(lab: Any) -> None:
    part, base = grafted(lab, "gpt2", LM, "transformer.h.1.attn.c_attn")
    x = torch.randn(5, N, dtype=torch.float64)
    added = torch.cat([rows(x, part.update), torch.zeros(5, N, dtype=torch.float64), rows(x, part.values)], 1)
    close(part(base, x), base(x) + added)
