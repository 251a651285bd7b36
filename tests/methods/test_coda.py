"""CoDA against naive twins, in float64: the soft top-k, and layers that compute a few words of each record."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from scipy.optimize import brentq

from fedgraft.methods.catalogue.coda import ConditionalLayer, soft_top_k

TEXT, IMAGE = "sequence-classification", "image-classification"
LENGTHS = (3, 11, 1, 6, 8)


def best(scores: list[float], k: int, softness: float) -> list[float]:
    """The numbers of 0 to 1 with sum k that maximise scores . x + softness * entropy(x): min(1, exp((s + a) / e))."""

    def numbers(a: float) -> list[float]:
        return [math.exp(min(0.0, (s + a) / softness)) for s in scores]

    a = brentq(lambda a: sum(numbers(a)) - k, -max(scores) - 40 * softness, -min(scores) + 1, xtol=1e-15)
    return numbers(a)


@pytest.mark.parametrize("softness", [0.02, 0.1, 1.0, 4.0])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_the_soft_top_k_is_the_solution_of_its_problem(k: int, softness: float) -> None:
    torch.manual_seed(k)
    scores = torch.randn(6, 9, dtype=torch.float64)
    words = torch.ones(6, 9, dtype=torch.bool)
    words[3, 8:] = False
    given = torch.full((6,), k)
    got = soft_top_k(scores, words, given, softness)
    assert not got[3, 8:].any() and float(got.max()) <= 1.0
    for b in range(6):
        n = int(words[b].sum())
        want = best(scores[b, :n].tolist(), k, softness)
        assert max(abs(g - w) for g, w in zip(got[b, :n].tolist(), want, strict=True)) <= 1e-12


def test_of_as_many_words_as_are_picked_each_counts_whole() -> None:
    scores = torch.randn(2, 4, dtype=torch.float64)
    words = torch.tensor([[True] * 4, [True, False, False, False]])
    got = soft_top_k(scores, words, torch.tensor([4, 1]), 1.0)
    assert float((got - words.double()).abs().max()) <= 1e-12


def test_the_soft_top_k_has_a_finite_gradient_beside_padding() -> None:
    scores = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    words = torch.arange(6) < torch.tensor([[6], [2], [1]])
    assert torch.autograd.gradcheck(lambda s: soft_top_k(s, words, torch.tensor([2, 1, 1]), 1.0), scores)
    soft_top_k(scores, words, torch.tensor([2, 1, 1]), 0.02).sum().backward()
    assert bool(scores.grad.isfinite().all())


@torch.no_grad()
@pytest.mark.parametrize(("family", "task"), [("bert", TEXT), ("roberta", TEXT), ("t5", TEXT), ("vit", IMAGE)])
def test_each_record_passes_the_frozen_layer_with_its_own_few_words(lab: Any, family: str, task: str) -> None:
    adapter = lab.attach(family, task, "coda", options={"width": 4})
    lab.shaken(adapter, by=0.3)
    adapter.model.double()
    layers = {n: m for n, m in adapter.model.named_modules() if isinstance(m, ConditionalLayer)}
    assert len(layers) == 2, "the encoder's alone"
    batch = lab.batch(family, task, lab.records(family, task, LENGTHS))
    noted: dict[str, Any] = {}
    places = {name: adapter.model.get_submodule(name.removesuffix(".graft.default")) for name in layers}
    hooks = [
        place.register_forward_hook(
            lambda module, args, kwargs, result, name=name: noted.update({name: (args, kwargs, result)}),
            with_kwargs=True,
        )
        for name, place in places.items()
    ]
    lab.losses(adapter.model, batch)
    for hook in hooks:
        hook.remove()
    for name, part in layers.items():
        base, (args, kwargs, result) = places[name].base_layer, noted[name]
        given = inspect.signature(base.forward).bind(*args, **kwargs).arguments
        x = given["hidden_states"]
        out = result[0] if isinstance(result, tuple) else result
        for b in range(len(LENGTHS)):
            n = int(batch["attention_mask"][b].sum()) if "attention_mask" in batch else x.shape[1]
            z = x[b, :n]
            if family in ("t5", "vit"):
                z = (base.layer[0].layer_norm if family == "t5" else base.layernorm_before)(z)
            scores = [float(part.router.weight[0] @ word) for word in z]
            k = math.ceil(n / 3)
            found = best(scores, k, 1.0)
            order = sorted(range(n), key=lambda i: -scores[i])
            if family != "t5":
                found = [1.0, *(best(scores[1:], k - 1, 1.0) if k > 1 else [0.0] * (n - 1))]
                order = [0, *(i for i in order if i)]
            picked = sorted(order[:k])
            alone: dict[str, Any] = {"hidden_states": x[b : b + 1, picked]}
            if family == "t5":
                encoder = adapter.model.get_base_model().transformer.encoder
                first = encoder.block[0].base_layer.layer[0].SelfAttention
                whole = first.compute_bias(n, n)
                alone["position_bias"] = whole[:, :, picked][:, :, :, picked]
            passed = base(**alone)
            passed = passed[0] if isinstance(passed, tuple) else passed
            lower, upper = part.bottleneck.down, part.bottleneck.up
            inner = z @ lower.weight.T + lower.bias
            inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
            want = x[b, :n] + inner @ upper.weight.T + upper.bias
            for row, word in enumerate(picked):
                want[word] += found[word] * (passed[0, row] - x[b, word])
            assert float((out[b, :n] - want).abs().max()) <= 1e-11


@torch.no_grad()
@pytest.mark.parametrize(("family", "task"), [("bert", TEXT), ("t5", TEXT), ("vit", IMAGE)])
def test_where_every_word_is_picked_a_fresh_adapter_changes_nothing(lab: Any, family: str, task: str) -> None:
    base = lab.base(family, task).model.double()
    adapter = lab.attach(family, task, "coda", options={"reduction": 1})
    heads = {n.removeprefix("base_model.model."): p for n, p in adapter.model.named_parameters() if "modules_to" in n}
    for name, parameter in heads.items():
        base.get_parameter(name.replace(".modules_to_save.default", "")).copy_(parameter)
    adapter.model.double()
    batch = lab.batch(family, task, lab.records(family, task, LENGTHS))
    assert float((lab.losses(adapter.model, batch) - lab.losses(base, batch)).abs().max()) <= 1e-12


@torch.no_grad()
def test_the_frozen_layers_compute_a_third_of_the_words(lab: Any) -> None:
    adapter = lab.attach("bert", TEXT, "coda")
    batch = lab.batch("bert", TEXT, lab.records("bert", TEXT, (22, 4)))
    widths: list[int] = []
    for module in adapter.model.modules():
        if type(module).__name__ == "BertSelfAttention":
            module.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    lab.losses(adapter.model, batch)
    assert widths == [8, 8], "of 24, with the two special ones"
