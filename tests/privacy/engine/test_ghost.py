"""Large matrices: exact norms and sums without a gradient written out for each example."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedgraft.core.errors import UserError
from fedgraft.privacy.clipping import ExactGradients, require_exact
from fedgraft.privacy.engine.ghost import LARGE, KeptMatrix
from fedgraft.privacy.noise import RandomStream

STREAM = RandomStream.seeded_not_private("ghost")
WORDS, WIDTH = 40_000, 27


class _Language(nn.Module):
    """A language model whose embedding and head both train, beside a small layer; tokens repeat."""

    def __init__(self, head: nn.Module, padding: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH, padding_idx=padding)
        self.mix, self.head = nn.Linear(WIDTH, WIDTH), head

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.mix(self.embedding(ids)))
        logits = self.head(hidden)
        return F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def _ids(rows: int = 5, length: int = 6) -> torch.Tensor:
    ids = torch.randint(3, WORDS, (rows, length), generator=torch.Generator().manual_seed(0))
    ids[:, 3] = ids[:, 1]
    ids[1] = ids[0]
    ids[:, 5] = 2
    return ids


def _check(lab: Any, model: nn.Module, ids: torch.Tensor, units: list[int] | None = None) -> ExactGradients:
    model.double()
    parameters = dict(model.named_parameters())
    assert any(p.numel() > LARGE for p in parameters.values())
    rows = lab.gradients(list(parameters.values()), (model(row[None])[0] for row in ids))
    if units is not None:
        groups = sorted(set(units))
        rows = torch.stack([rows[[i for i, u in enumerate(units) if u == g]].sum(0) for g in groups])
    clip = float(rows.norm(dim=1).median())
    with ExactGradients(model, parameters, clip) as engine:
        for part in [slice(None)] if units is not None else [slice(0, 2), slice(2, None)]:
            engine.expect(len(ids[part]))
            engine.add(model(ids[part]), None if units is None else torch.tensor(units))
        engine.release(0.0, 1.0, STREAM)
        lab.close(lab.flat(parameters), lab.clipped(rows, clip))
        # Nothing as large as one example's table is in the rows that are written out.
        assert engine._dense.size < LARGE
    return engine


@pytest.mark.parametrize("padding", [None, 2])
def test_a_vocabulary_is_clipped_exactly_without_being_written_out(lab: Any, padding: int | None) -> None:
    torch.manual_seed(0)
    _check(lab, _Language(nn.Linear(WIDTH, WORDS), padding), _ids())


def test_a_transposed_head_is_too(lab: Any) -> None:
    torch.manual_seed(0)
    _check(lab, _Language(Conv1D(WORDS, WIDTH)), _ids())


def test_rows_of_one_unit_are_summed_before_their_norm_is_taken(lab: Any) -> None:
    torch.manual_seed(0)
    _check(lab, _Language(nn.Linear(WIDTH, WORDS)), _ids(), units=[4, 1, 4, 4, 1])


def test_a_matrix_used_twice_counts_twice(lab: Any) -> None:
    class Twice(_Language):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) + 0.5 * super().forward(ids[:, :4])

    torch.manual_seed(0)
    _check(lab, Twice(nn.Linear(WIDTH, WORDS)), _ids())


def test_rows_that_are_not_finite_are_left_out(lab: Any) -> None:
    torch.manual_seed(0)
    model, ids = _Language(nn.Linear(WIDTH, WORDS)).double(), _ids()
    parameters = dict(model.named_parameters())
    rows = lab.gradients(list(parameters.values()), (model(row[None])[0] for row in ids))
    with ExactGradients(model, parameters, 0.1) as engine:
        engine.expect(5)
        engine.add(model(ids) * torch.tensor([1.0, float("inf"), 1.0, float("nan"), 1.0]))
        assert engine.skipped == 2
        engine.release(0.0, 1.0, STREAM)
        lab.close(lab.flat(parameters), lab.clipped(rows[[0, 2, 4]], 0.1))


def test_norms_are_never_too_small_where_terms_cancel() -> None:
    """In float32 the tokens' contributions may cancel: the norm must still bound what goes into the sum."""
    generator = torch.Generator().manual_seed(0)
    for scale in (1.0, 1e3, 1e5):
        a = torch.randn(8, 32, 50, generator=generator)
        b = torch.randn(8, 32, 40, generator=generator) * scale
        a[:, 16:], b[:, 16:] = -a[:, :16], b[:, :16] + torch.randn(8, 16, 40, generator=generator) * 1e-2
        kept = KeptMatrix(nn.Parameter(torch.zeros(50, 40)))
        kept.outer(a, b)
        norms = kept.squares(None, 0).sqrt()
        for row in range(8):
            exact = a[row].double().t() @ b[row].double()
            assert float(norms[row]) >= float(exact.norm()) * (1 - 1e-6)


def test_a_tie_of_a_large_embedding_and_head_is_refused_by_name() -> None:
    model = _Language(nn.Linear(WIDTH, WORDS, bias=False))
    model.head.weight = model.embedding.weight
    with pytest.raises(UserError, match=r"tensor embedding\.weight has no exact.*shared by layers of two kinds"):
        require_exact(model, dict(model.named_parameters()))


def test_a_tie_that_is_small_is_exact(lab: Any) -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            logits = self.head(torch.tanh(self.embedding(ids)))
            return F.cross_entropy(logits.transpose(1, 2), ids, reduction="none").mean(1)

    torch.manual_seed(0)
    model, ids = Small().double(), torch.randint(20, (5, 6))
    parameters = dict(model.named_parameters())
    rows = lab.gradients(list(parameters.values()), (model(row[None])[0] for row in ids))
    with ExactGradients(model, parameters, 0.2) as engine:
        engine.expect(5)
        engine.add(model(ids))
        engine.release(0.0, 1.0, STREAM)
        lab.close(lab.flat(parameters), lab.clipped(rows, 0.2))


def test_positions_that_are_looked_up_once_are_each_examples_own(lab: Any) -> None:
    class Positioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions, self.last = nn.Embedding(8, 4), nn.Linear(4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.tanh(x + self.positions(torch.arange(x.shape[1])[None]))).sum((1, 2))

    torch.manual_seed(0)
    model, x = Positioned().double(), torch.randn(5, 6, 4, dtype=torch.float64)
    parameters = dict(model.named_parameters())
    rows = lab.gradients(list(parameters.values()), (model(row[None])[0] for row in x))
    with ExactGradients(model, parameters, 0.5) as engine:
        engine.expect(5)
        engine.add(model(x))
        engine.release(0.0, 1.0, STREAM)
        lab.close(lab.flat(parameters), lab.clipped(rows, 0.5))
