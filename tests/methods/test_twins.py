"""What the methods of our own compute, against the equations of their papers on dense matrices, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.linalg import hadamard
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedgraft.core.config import MethodConfig
from fedgraft.methods import Setting, Steps, create_method
from fedgraft.methods.catalogue.intrinsic import walsh_hadamard
from fedgraft.methods.catalogue.nested import DeltaSteps, NestedSteps
from fedgraft.methods.grafts import GraftConfig

N, M, RANK = 12, 8, 2


def setting(method: str, path: str = "layer", common: dict[str, Any] | None = None, **options: Any) -> Setting:
    found = create_method(method)
    config = GraftConfig(method=method, places={path: "x"}, rank=RANK, alpha=6.0, options=options)
    model = nn.Module()
    model.config = type("Config", (), {"hidden_size": M})()
    common = {} if common is None else common
    return Setting(config, path, found.Options.model_validate(options), common, {}, model)


def part(method: str, base: nn.Module, **options: Any) -> Any:
    """A part of ``method`` around ``base``, shaken off its first values, in float64."""
    given = setting(method, **options)
    (kind,) = create_method(method).parts.values()
    made: Any = kind(base, given)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name not in made.frozen:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return made.double()


@pytest.fixture(params=["linear", "conv1d"])
def base(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Linear(N, M) if request.param == "linear" else Conv1D(M, N)
    with torch.no_grad():
        layer.bias.normal_()
    return layer.double().requires_grad_(False)


def upright(layer: nn.Module) -> torch.Tensor:
    weight: Any = layer.weight
    return weight.T if isinstance(layer, Conv1D) else weight


def x() -> torch.Tensor:
    return torch.randn(3, 5, N, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert float((got - want).norm()) <= 1e-12 * float(want.norm())


def test_ssf_scales_and_shifts(base: nn.Module) -> None:
    made = part("ssf", base)
    want = torch.stack([made.scale[i] * base(x())[..., i] + made.shift[i] for i in range(M)], -1)
    close(made(base, x()), want)


def test_loreft_moves_the_states_within_the_rows_of_a_rotation_only() -> None:
    identity = nn.Identity()
    made = part("loreft", identity)
    h = torch.randn(3, 5, M, dtype=torch.float64)
    rows = made.intervention.rows()
    close(rows @ rows.T, torch.eye(RANK, dtype=torch.float64))
    # Gram and Schmidt, one row after the other.
    own = made.intervention.rotation
    first = own[0] / own[0].norm()
    second = own[1] - (own[1] @ first) * first
    close(rows, torch.stack((first, second / second.norm())))
    w, b = made.intervention.source.weight, made.intervention.source.bias
    want = torch.stack([v + rows.T @ (w @ v + b - rows @ v) for v in h.reshape(-1, M)]).view_as(h)
    close(made(identity, h), want)


def test_kadaptation_is_the_sum_of_its_kronecker_products(base: nn.Module) -> None:
    made = part("kadaptation", base, terms=2)
    total = sum(torch.kron(made.shared.matrices[i], made.up.weight[i] @ made.down.weight[i]) for i in range(2))
    assert total.shape == (M, N)
    want = F.linear(x(), upright(base) + 6.0 / RANK * total, base.bias)
    close(made(base, x()), want)


def test_layers_of_one_adapter_share_the_kronecker_matrices() -> None:
    common: dict[str, Any] = {}
    kind = create_method("kadaptation").parts["change"]
    one, two = (kind(nn.Linear(N, M), setting("kadaptation", path, common)) for path in ("one", "two"))
    assert one.shared is two.shared and one.down is not two.down


def test_a_threshold_mask_keeps_the_weights_with_a_score_above_it(base: nn.Module) -> None:
    made = part("threshold-mask", base)
    kept = torch.zeros(M, N, dtype=torch.float64)
    for i in range(M):
        for j in range(N):
            kept[i, j] = float(made.scores[i, j] > 0.01) * upright(base)[i, j]
    assert 0 < int((kept == 0).sum()) < M * N
    close(made(base, x()), F.linear(x(), kept, base.bias))
    # Straight through: the gradient of a score is that of its mask, dL/dW * W0.
    (got,) = torch.autograd.grad(made(base, x()).square().sum(), made.scores)
    weight = kept.clone().requires_grad_(True)
    (plain,) = torch.autograd.grad(F.linear(x(), weight, base.bias).square().sum(), weight)
    close(got, plain * upright(base))


def test_diff_pruning_gates_each_difference_by_a_hard_concrete_number(base: nn.Module) -> None:
    made = part("diff-pruning", base)
    s = 1 / (1 + np.exp(-made.odds.detach().numpy()))
    z = np.clip(s * 3.0 - 1.5, 0, 1)
    assert 0 < (z == 0).sum() < z.size
    change = torch.from_numpy(z) * made.difference
    close(made(base, x()), F.linear(x(), upright(base) + change, base.bias))

    # The expected L0 norm's gradient, by differences.
    def expected(a: np.ndarray) -> float:
        return float((1 / (1 + np.exp(-(a - np.log(1.5 / 1.5))))).sum())

    a, h = made.odds.detach().numpy(), 1e-6
    e = np.zeros_like(a)
    e[0, 0] = h
    slope = (expected(a + e) - expected(a - e)) / (2 * h)
    assert abs(float(made.penalty_gradient()[0, 0]) - slope) <= 1e-8


@pytest.mark.parametrize("size", [1, 2, 8, 16, 512])
def test_the_fast_transform_is_the_matrix_of_hadamard(size: int) -> None:
    v = torch.randn(3, size, dtype=torch.float64)
    close(walsh_hadamard(v), v @ torch.from_numpy(hadamard(size).astype(np.float64)).T)


def test_said_moves_all_weights_by_one_drawn_projection_of_length_one_on_average() -> None:
    layer = nn.Linear(64, 48).double().requires_grad_(False)
    given = setting("said", dimensions=10)
    made: Any = create_method("said").parts["change"](layer, given).double()
    with torch.no_grad():
        made.shared.point.normal_()
        made.lambda_.fill_(0.7)
    # The dense matrix of the transform: H G Pi H B, block under block, of which the layer's share is kept.
    h = torch.from_numpy(hadamard(16).astype(np.float64))
    blocks = []
    for signs, normal, order in zip(made.signs, made.normal, made.order, strict=True):
        permutation = torch.eye(16, dtype=torch.float64)[order]
        blocks.append(h @ torch.diag(normal) @ permutation @ h @ torch.diag(signs.double()))
    matrix = torch.cat(blocks)[: 64 * 48, :10]
    change = 0.7 * (matrix @ made.shared.point).view(48, 64)
    close(made.change(layer.weight), change)
    # Lengths of the columns differ by the draw of 192 blocks' normal numbers.
    assert abs(float(matrix.norm(dim=0).mean()) - 1) < 0.1


def test_sparse_is_a_dense_change_with_few_entries(base: nn.Module) -> None:
    made = part("sparse", base, keep=0.1)
    assert len(made.values) == round(0.1 * M * N)
    dense = torch.zeros(M, N, dtype=torch.float64)
    for (i, j), value in zip(made.places.long().tolist(), made.values, strict=True):
        dense[i, j] += value.item()
    close(made(base, x()), F.linear(x(), upright(base) + dense, base.bias))
    least = upright(base).abs()[dense != 0].min()
    assert bool((upright(base).abs()[dense == 0] <= least).all()), "the largest weights are chosen"


def test_a_drawn_mask_is_the_same_everywhere_and_another_with_another_seed() -> None:
    layer = nn.Linear(N, M)
    one, same, other = (
        part("sparse", layer, keep=0.2, choice="random", projection_seed=seed).places for seed in (0, 0, 1)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


def _lora(lab: Any, method: str, **options: Any) -> tuple[Any, Steps]:
    adapter = lab.attach("bert", "sequence-classification", method, rank=4, options=options)
    lab.shaken(adapter)
    config = MethodConfig(name=method, rank=4, alpha=8.0, options=options)
    return adapter, adapter.steps(adapter, config, first=0, total=10)


def test_dylora_computes_at_the_drawn_rank_and_trains_no_more_than_it(lab: Any) -> None:
    adapter, own = _lora(lab, "dylora")
    assert isinstance(own, NestedSteps)
    batch = lab.batch("bert", "sequence-classification", lab.records("bert", "sequence-classification", (3, 5)))
    state = adapter.read()
    torch.manual_seed(1)
    seen = set()
    for step in range(24):
        own.before(step)
        rank = own._rank
        seen.add(rank)
        adapter.model.zero_grad(set_to_none=True)
        loss = lab.losses(adapter.model, batch).sum()
        loss.backward()
        own.gradients(step)
        for name, parameter in adapter.trainables().items():
            if ".lora_A." in name:
                assert not parameter.grad[rank:].any() and parameter.grad[:rank].any()
            if ".lora_B." in name:
                assert not parameter.grad[:, rank:].any() and parameter.grad[:, :rank].any()
        with torch.no_grad():
            cut = {
                n: np.where(np.arange(a.shape[0])[:, None] < rank, a, 0) if ".lora_A." in n else a
                for n, a in state.items()
            }
            twin = lab.attach("bert", "sequence-classification", "lora", rank=4)
            twin.write(type(state)(twin.spec, cut))
            assert abs(float(lab.losses(twin.model, batch).sum() - loss)) <= 1e-5
    assert seen == {1, 2, 3, 4}
    own.close()
    with torch.no_grad():
        twin.write(type(state)(twin.spec, dict(state)))
        assert torch.allclose(lab.losses(twin.model, batch), lab.losses(adapter.model, batch), atol=1e-6)


def test_frozen_dylora_trains_row_and_column_b_alone(lab: Any) -> None:
    adapter, own = _lora(lab, "dylora", frozen=True)
    own.before(0)
    for parameter in adapter.trainables().values():
        parameter.grad = torch.ones_like(parameter)
    own.gradients(0)
    own.close()
    a = next(p.grad for n, p in adapter.trainables().items() if ".lora_A." in n)
    assert [bool(row.any()) for row in a] == [i == own._rank - 1 for i in range(4)]


def test_delta_lora_is_lora_whose_changes_move_the_base_weights_as_well(lab: Any) -> None:
    """Against the paper's algorithm 1 with dense base weights, by plain gradient descent."""
    share, lr, case = 0.5, 0.05, ("bert", "sequence-classification")
    adapter = lab.attach(*case, "delta-lora", rank=4, options={"share": share})
    twin = lab.attach(*case, "lora", rank=4)
    first = lab.shaken(twin)
    zeroed = {n: a * 0 if ".lora_B." in n else a for n, a in first.items()}
    twin.write(type(first)(twin.spec, zeroed))
    adapter.write(type(first)(adapter.spec, zeroed))
    adapter.model.double()
    twin.model.double()
    batch = lab.batch(*case, lab.records(*case, (3, 5, 8)))
    own = adapter.steps(adapter, MethodConfig(name="delta-lora", options={"share": share}), first=0, total=10)
    assert isinstance(own, DeltaSteps)
    layers = {n: m for n, m in twin.model.named_modules() if hasattr(m, "lora_A")}

    def product(layer: Any) -> torch.Tensor:
        return layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight

    for step in range(4):
        for model, steps in ((adapter, own), (twin, None)):
            model.model.zero_grad(set_to_none=True)
            lab.losses(model.model, batch).sum().backward()
            if steps is not None:
                steps.gradients(step)
        with torch.no_grad():
            before = {n: product(m) for n, m in layers.items()}
            for model in (adapter, twin):
                for parameter in model.trainables().values():
                    parameter -= lr * parameter.grad
            for n, m in layers.items():
                m.get_base_layer().weight += share * (product(m) - before[n])
    with torch.no_grad():
        got, want = lab.losses(adapter.model, batch), lab.losses(twin.model, batch)
    assert float((got - want).abs().max()) <= 1e-9


def test_child_tuning_drops_gradients_by_chance_and_scales_the_others(lab: Any) -> None:
    adapter = lab.attach("bert", "sequence-classification", "child-tuning-f", options={"keep": 0.25})
    own = adapter.steps(adapter, MethodConfig(name="child-tuning-f", options={"keep": 0.25}), first=0, total=1)
    for parameter in adapter.trainables().values():
        parameter.grad = torch.ones_like(parameter)
    own.gradients(0)
    kept = torch.cat([p.grad.flatten() for n, p in adapter.trainables().items() if ".free." in n])
    assert set(kept.unique().tolist()) == {0.0, 4.0}
    # Standard deviation of the share: sqrt(.25 * .75 / 25,000) = .0027.
    assert abs(float((kept > 0).double().mean()) - 0.25) < 0.015
    assert all(bool((p.grad == 1).all()) for n, p in adapter.trainables().items() if "classifier" in n)


def test_l_lora_is_the_linearisation_of_lora_where_training_starts(lab: Any) -> None:
    """Against the forward-mode derivative of PEFT's own layer at (A_0, 0), in any direction of A and B."""
    adapter = lab.attach("bert", "sequence-classification", "l-lora", rank=4)
    plain = lab.attach("bert", "sequence-classification", "lora", rank=4)
    name = "base_model.model.bert.encoder.layer.0.attention.self.query"
    ours, theirs = (a.model.double().get_submodule(name) for a in (adapter, plain))
    a, b = (getattr(theirs, f"lora_{side}")["default"].weight for side in "AB")
    changes = (torch.randn_like(a), torch.randn_like(b))
    x = torch.randn(3, 32, dtype=torch.float64)

    def layer(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        names = ("lora_A.default.weight", "lora_B.default.weight")
        return torch.func.functional_call(theirs, dict(zip(names, (a, b), strict=True)), (x,))

    with torch.no_grad():
        there, slope = torch.func.jvp(layer, (a.detach(), b.detach()), changes)
        ours.lora_A["default"].weight.copy_(a)
        ours.lora_B["default"].weight.copy_(b + changes[1])
        close(ours(x), there + slope)
    assert not ours.lora_A["default"].weight.requires_grad
