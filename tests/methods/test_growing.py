"""Ranks that grow: which layers gain components, that all sites agree, and what trains meanwhile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft.tuners.adalora import AdaLoraLayer
from safetensors.torch import load_file

from fedgraft.core.config import MethodConfig
from fedgraft.core.errors import UserError
from fedgraft.methods import AttachedAdapter
from fedgraft.methods.catalogue.increlora import Growth, IncreLoraOptions, budget, importance
from fedgraft.methods.wrapping import layers_in

TEXT = "sequence-classification"


def layers(adapter: AttachedAdapter) -> list[Any]:
    return layers_in(adapter.model, AdaLoraLayer)


def parts(layer: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    a, b, e = (getattr(layer, f"lora_{key}")["default"].detach().double() for key in "ABE")
    return a, b, e[:, 0]


def growing(lab: Any, used: tuple[int, ...] = (1, 3, 2, 1), seed: int = 1) -> AttachedAdapter:
    """Four layers of eight components, of which the first few are in use; the mean that they grow to is 4."""
    adapter = lab.attach("bert", TEXT, "increlora", seed=seed)
    torch.manual_seed(7)
    with torch.no_grad():
        for layer, count in zip(layers(adapter), used, strict=True):
            layer.lora_E["default"][:count] = torch.randn(count, 1)
    return adapter


def start(adapter: AttachedAdapter, first: int = 40, **options: Any) -> Growth:
    config = MethodConfig(name="increlora", rank=4, alpha=8.0, options=options)
    steps = Growth(adapter, config, first=first, total=100)
    steps.before(0)
    return steps


def in_use(steps: Growth) -> list[int]:
    return [int(used.sum()) for used in steps.used]


def test_the_budget_rises_evenly_between_the_warm_up_and_the_end() -> None:
    options = IncreLoraOptions(warmup=0.1, final=0.5)
    assert [budget(step, 100, 4, 16, options) for step in (0, 10, 20, 30, 49, 50, 99)] == [4, 4, 7, 10, 15, 16, 16]
    # No time to grow in: all at once.
    late = IncreLoraOptions(warmup=0.6, final=0.5)
    assert [budget(step, 100, 4, 16, late) for step in (49, 50)] == [4, 16]


def test_a_layers_importance_is_the_mean_square_of_its_change(lab: Any) -> None:
    for layer in layers(growing(lab)):
        a, b, e = parts(layer)
        total = 0.0
        for i in range(b.shape[0]):
            for j in range(a.shape[1]):
                total += float(sum(b[i, k] * e[k] * a[k, j] for k in range(len(e)))) ** 2
        assert importance(layer) == pytest.approx(total / (b.shape[0] * a.shape[1]), rel=1e-9)


def test_the_most_important_layers_gain_what_is_due(lab: Any) -> None:
    """By a loop: the best layer first, two components at a time, until the budget is spent."""
    adapter = growing(lab)
    means = []
    for layer in layers(adapter):
        a, b, e = parts(layer)
        means.append(float((b @ torch.diag(e) @ a).square().mean()))
    want = [1, 3, 2, 1]
    due = 4 + int(12 * (40 - 10) / (50 - 10)) - sum(want)
    assert due == 6
    for at in sorted(range(4), key=means.__getitem__, reverse=True)[:3]:
        want[at] += 2
    steps = start(adapter)
    assert in_use(steps) == want
    # The reserve is as long as what is gained at once; what waits behind it is of no effect.
    for layer, used, live in zip(layers(adapter), steps.used, steps.live, strict=True):
        assert int(live.sum()) == int(used.sum()) + 2
        e = parts(layer)[2]
        assert torch.equal(e[~live], torch.zeros(int((~live).sum()), dtype=e.dtype))
        assert torch.allclose(e[live & ~used], torch.full((2,), 1e-5, dtype=e.dtype))


def test_nothing_grows_before_the_warm_up_is_over(lab: Any) -> None:
    assert in_use(start(growing(lab, (1, 1, 1, 1)), first=10)) == [1, 1, 1, 1]


def test_a_layer_grows_to_its_most_and_others_take_what_is_left(lab: Any) -> None:
    steps = start(growing(lab, (8, 5, 1, 1)), first=50)
    assert sum(in_use(steps)) == 16 and max(in_use(steps)) == 8


def test_sites_grow_alike_though_they_train_apart(lab: Any) -> None:
    """The mean of what two sites send has as many components as the budget, whatever their optimizers did."""
    one, two = growing(lab), growing(lab, seed=2)
    two.write(one.read())
    for site, seed in ((one, 3), (two, 4)):
        steps = start(site, first=60)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in site.trainables().values():
                parameter.add_(torch.randn_like(parameter))
        steps.after(0)
        steps.close()
    mean = [(one.read()[name] + two.read()[name]) / 2 for name in one.read() if ".lora_E." in name]
    assert sum(int((values != 0).sum()) for values in mean) == 16


def test_where_all_numbers_are_noised_the_strongest_stay_within_the_budget(lab: Any) -> None:
    adapter = lab.attach("bert", TEXT, "increlora")
    lab.shaken(adapter)
    found = []
    for index, layer in enumerate(layers(adapter)):
        a, b, e = parts(layer)
        found += [(float((b[:, [i]] * e[i] @ a[[i]]).norm()), index, i) for i in range(8)]
    want = {(index, i) for _, index, i in sorted(found, reverse=True)[:16]}
    steps = start(adapter)
    assert {(index, int(i)) for index, used in enumerate(steps.used) for i in used.nonzero()} == want


def test_what_waits_behind_the_reserve_does_not_train_and_the_rest_is_pulled_towards_orthonormal_ones(lab: Any) -> None:
    """By the gradient of the penalty over what trains, which torch finds by itself."""
    adapter = growing(lab)
    adapter.model.double()
    steps = start(adapter)
    factors = [layer.lora_A["default"] for layer in layers(adapter)]
    factors += [layer.lora_B["default"] for layer in layers(adapter)]
    live = [*steps.live, *steps.live]
    total = torch.zeros((), dtype=torch.float64)
    for factor, at in zip(factors, live, strict=True):
        rows = (factor if len(factor) == 8 else factor.T)[at]
        total = total + 0.1 / 8 * torch.linalg.norm(rows @ rows.T - torch.eye(len(rows), dtype=torch.float64))
    want = torch.autograd.grad(total, factors)
    for factor in factors:
        factor.grad = torch.ones_like(factor)
    steps.gradients(0)
    for factor, wanted, at in zip(factors, want, live, strict=True):
        ones = torch.ones_like(factor) * (at[:, None] if len(factor) == 8 else at)
        lab.close(factor.grad, wanted + ones)
        waiting = factor.grad[~at] if len(factor) == 8 else factor.grad[:, ~at]
        assert waiting.numel() and not bool(waiting.any())


def test_a_rank_that_the_components_do_not_allow_is_one_line(lab: Any) -> None:
    for options in ({"init_r": 5}, {"max_r": 3}):
        with pytest.raises(UserError, match=r"method\.rank 4 is the mean that layers grow to: set it to"):
            lab.attach("bert", TEXT, "increlora", options=options)


def test_a_federation_grows_to_its_budget_under_privacy(tiny_federation: Any, tmp_path: Any) -> None:
    config = tiny_federation.private(**{"method.name": "increlora"})
    tiny_federation.run(config, tmp_path / "run")
    weights = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    held = {key: tensor for key, tensor in weights.items() if key.endswith("lora_E")}
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())
    assert sum(int((tensor != 0).sum()) for tensor in held.values()) == 4 * len(held)
