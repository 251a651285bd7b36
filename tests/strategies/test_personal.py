"""FedPer, FedRep and FedBN: what stays, what is averaged, and in which order a site trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedgraft.core.adapter import AdapterSpec, AdapterState, TensorSpec
from fedgraft.core.errors import UserError
from fedgraft.strategies import create_aggregator
from fedgraft.strategies.personal import is_head, is_norm


def start_of(play: Any) -> AdapterState:
    return play.rule.prepare(play.draw(0))


@pytest.mark.parametrize("name", ["fedper", "fedrep"])
def test_the_head_stays_and_the_rest_is_shared(toy: Callable[..., Any], name: str) -> None:
    play = toy(create_aggregator(name))
    start = start_of(play)
    assert {t.name: t.policy for t in start.spec.tensors} == {"a": "share", "b": "share", "head": "local"}
    end = play.one(start)
    assert all(set(update.state) == {"a", "b"} for update in play.sent)
    assert np.array_equal(end["head"], start["head"]), "the global head stays as it began"


def test_three_rounds_of_fedper_are_the_plain_loop(toy: Callable[..., Any]) -> None:
    play = toy(create_aggregator("fedper"))
    start = start_of(play)
    *_, got = play.rounds(start, 3)
    total = sum(site.weight for site in play.sites)
    body, heads = {n: start[n] for n in ("a", "b")}, {site.name: start["head"] for site in play.sites}
    for number in (1, 2, 3):
        mean = {name: np.zeros(array.shape) for name, array in body.items()}
        for site in play.sites:
            for name in start:
                y = heads[site.name] if name == "head" else body[name]
                for step in range(site.steps):
                    y = y - site.lr * site.gradient(name, y, number, step)
                if name == "head":
                    heads[site.name] = y
                else:
                    mean[name] = mean[name] + site.weight / total * y
        body = mean
    for name in body:
        np.testing.assert_allclose(got[name], body[name], rtol=1e-13)
    for site, head in heads.items():
        np.testing.assert_allclose(play.memories[site]["own"]["head"], head, rtol=1e-13)


@pytest.mark.parametrize(("fraction", "steps", "head_steps"), [(0.5, 4, 2), (0.25, 8, 2), (0.01, 5, 1), (0.99, 5, 4)])
def test_fedrep_trains_the_head_first_at_a_fixed_body(
    toy: Callable[..., Any], fraction: float, steps: int, head_steps: int
) -> None:
    play = toy(create_aggregator("fedrep", {"head_fraction": fraction}), steps=steps)
    start = start_of(play)
    *_, got = play.rounds(start, 2)
    total = sum(site.weight for site in play.sites)
    body, heads = {n: start[n] for n in ("a", "b")}, {site.name: start["head"] for site in play.sites}
    for number in (1, 2):
        mean = {name: np.zeros(array.shape) for name, array in body.items()}
        for site in play.sites:
            for step in range(head_steps):
                head = heads[site.name]
                heads[site.name] = head - site.lr * site.gradient("head", head, number, step)
            for name, array in body.items():
                y = array
                for step in range(head_steps, steps):
                    y = y - site.lr * site.gradient(name, y, number, step)
                mean[name] = mean[name] + site.weight / total * y
        body = mean
    for name in body:
        np.testing.assert_allclose(got[name], body[name], rtol=1e-13)
    for site, head in heads.items():
        np.testing.assert_allclose(play.memories[site]["own"]["head"], head, rtol=1e-13)


def test_fedrep_needs_two_steps(toy: Callable[..., Any]) -> None:
    play = toy(create_aggregator("fedrep"), steps=1)
    with pytest.raises(UserError, match=r"site p: strategy `fedrep` .*train\.local_steps to 2"):
        play.one(start_of(play))


@pytest.mark.parametrize("name", ["fedper", "fedrep", "fedbn"])
def test_an_adapter_without_such_tensors_is_refused(toy: Callable[..., Any], name: str) -> None:
    spec = AdapterSpec("lora", (TensorSpec("a", (2, 3), role="lora_A"),))
    with pytest.raises(UserError, match=rf"strategy `{name}` keeps .* and the lora adapter of this model trains none"):
        create_aggregator(name).prepare(AdapterState(spec, {"a": np.zeros((2, 3), np.float32)}))


def test_an_adapter_that_would_stay_as_a_whole_is_refused() -> None:
    spec = AdapterSpec("ln", (TensorSpec("base.norm1.weight", (2,), role="norm"),))
    with pytest.raises(UserError, match=r"strategy `fedbn` keeps normalisation tensors .* is nothing else"):
        create_aggregator("fedbn").prepare(AdapterState(spec, {"base.norm1.weight": np.zeros(2, np.float32)}))


@pytest.mark.parametrize(
    ("name", "role", "norm"),
    [
        ("bert.encoder.layer.0.output.LayerNorm.bias", "bias", True),
        ("transformer.h.0.ln_1.bias", "bias", True),
        ("vit.encoder.layer.1.layernorm_before.bias", "bias", True),
        ("model.layers.0.input_layernorm.weight", "norm", True),
        ("resnet.bn1.bias", "bias", True),
        ("block.norm2.bias", "bias", True),
        ("bert.encoder.layer.0.output.dense.bias", "bias", False),
        ("bert.abnormal.dense.bias", "bias", False),
        ("vlnet.dense.bias", "bias", False),
        ("base.layernorm.lora_A.default.weight", "lora_A", False),
        ("classifier.bias", "head", False),
    ],
)
def test_normalisation_tensors_are_told_by_role_and_name(name: str, role: str, norm: bool) -> None:
    assert is_norm(TensorSpec(name, (2,), role=role)) == norm


@pytest.mark.parametrize(
    "case",
    [
        ("bert", "sequence-classification", "ln"),
        ("bert", "sequence-classification", "bitfit"),
        ("gpt2", "sequence-classification", "bitfit"),
        ("llama", "sequence-classification", "ln"),
        ("t5", "sequence-classification", "ln"),
        ("vit", "image-classification", "bitfit"),
    ],
    ids="-".join,
)
def test_fedbn_keeps_the_norms_of_real_models_and_shares_the_rest(case: tuple[str, str, str], lab: Any) -> None:
    fresh = lab.attach(*case).read()
    prepared = create_aggregator("fedbn").prepare(fresh)
    own = prepared.spec.select("local")
    assert own and prepared.spec.select("share")
    modules = dict(lab.attach(*case).model.named_modules())
    for tensor in prepared.spec.tensors:
        module = modules[tensor.name.rsplit(".", 1)[0]]
        normalises = "Norm" in type(module).__name__ and tensor.role != "head"
        assert normalises == (tensor.name in own), tensor.name
    assert not any(is_head(prepared.spec.by_name[name]) for name in own)


def test_fedbn_averages_all_but_the_norms(toy: Callable[..., Any]) -> None:
    play = toy(create_aggregator("fedbn"))
    spec = play.spec
    spec = replace(spec, tensors=(*spec.tensors[:2], replace(spec.tensors[2], role="norm")))
    start = play.rule.prepare(play.draw(0).with_spec(spec))
    got, plain = play.one(start), toy(create_aggregator("fedit"))
    want = plain.one(plain.draw(0))
    assert np.array_equal(got["a"], want["a"]) and np.array_equal(got["b"], want["b"])
    assert np.array_equal(got["head"], start["head"])
    assert not np.array_equal(play.memories["p"]["own"]["head"], play.memories["q"]["own"]["head"])


@pytest.mark.parametrize("name", ["fedper", "fedrep"])
@pytest.mark.slow
def test_a_whole_run_keeps_heads_at_their_sites(tiny_federation: Any, tmp_path: Path, name: str) -> None:
    run = tiny_federation.run(tiny_federation.config(strategy=name, **{"train.local_steps": 4}), tmp_path / "run")
    assert run["status"] == "finished"
    assert run["accuracy"]["after"] > run["accuracy"]["before"]
    plain = tiny_federation.run(tiny_federation.config(**{"train.local_steps": 4}), tmp_path / "plain")
    assert run["bytes_up"] < plain["bytes_up"]
