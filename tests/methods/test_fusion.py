from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedgraft.core.adapter import AdapterState
from fedgraft.core.errors import UserError
from fedgraft.methods.catalogue.fusion import FusedLayer
from fedgraft.methods.experts import carry, expert
from fedgraft.privacy.clipping import create_engine
from fedgraft.privacy.noise import RandomStream

TEXT = "sequence-classification"
CASE = ("bert", TEXT, "adapterfusion")


@pytest.fixture(scope="module")
def folders(lab: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Three adapters of mixed ranks on the tiny BERT, as PEFT folders."""
    made = []
    for number, rank in enumerate((4, 2, 3)):
        adapter = lab.attach("bert", TEXT, "lora", rank=rank)
        folder = tmp_path_factory.mktemp("experts") / str(number)
        made.append(str(adapter.save_peft(folder, lab.shaken(adapter, seed=number))))
    return tuple(made)


def fused(lab: Any, folders: tuple[str, ...], **settings: Any) -> Any:
    return lab.attach(*CASE, experts=folders, **settings)


def experts(lab: Any, folders: tuple[str, ...]) -> list[AdapterState]:
    return [
        lab.attach("bert", TEXT, "lora", rank=rank).load_peft(folder)
        for folder, rank in zip(folders, (4, 2, 3), strict=True)
    ]


@pytest.mark.parametrize("width", [3, 7])
def test_a_layer_attends_as_the_equation_says(width: int) -> None:
    draw = torch.Generator().manual_seed(0)
    base = torch.nn.Linear(5, 7).double()
    factors = [
        (torch.randn(r, 5, generator=draw).double(), torch.randn(7, r, generator=draw).double()) for r in (2, 3, 1)
    ]
    layer = FusedLayer(base, factors, width).double()
    for parameter in (p for p in layer.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.5, generator=draw)
    x = torch.randn(2, 4, 5, generator=draw).double()
    with torch.no_grad():
        got = layer(x)
        query, key = layer.fusion_query.weight, layer.fusion_key.weight.T
        value = torch.eye(7).double() + layer.fusion_up.weight @ layer.fusion_down.weight
        for row in range(2):
            for token in range(4):
                h = base(x[row, token])
                outputs = [b @ a @ x[row, token] for a, b in factors]
                scores = torch.stack([(query @ h) @ (key @ z) for z in outputs])
                chances = torch.softmax(scores, 0)
                want = h + sum(c * (value @ z) for c, z in zip(chances, outputs, strict=True))
                torch.testing.assert_close(got[row, token], want, rtol=1e-10, atol=1e-12)
    assert float(scores.std()) > 0.1


def test_training_starts_from_the_mean_of_the_adapters_outputs(lab: Any, folders: tuple[str, ...]) -> None:
    states = experts(lab, folders)
    model = fused(lab, folders).model
    batch = lab.batch("bert", TEXT, lab.records("bert", TEXT, lab.lengths))
    shared = carry(lab.base("bert", TEXT), states)
    own = dict(model.named_modules())
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    hooks = [
        module.register_forward_hook(lambda m, args, out, name=name: seen.__setitem__(name, (args[0], out)))
        for name, module in own.items()
        if isinstance(module, FusedLayer)
    ]
    with torch.no_grad():
        lab.losses(model, batch)
        for name, (x, out) in seen.items():
            outputs = []
            for number in range(len(states)):
                shared.set_adapter(expert(number))
                outputs.append(shared.get_submodule(name)(x))
            torch.testing.assert_close(out, torch.stack(outputs).mean(0), rtol=1e-5, atol=1e-5)
    assert len(seen) == len(states[0].spec.pairs) == len(hooks)
    for name, parameter in model.named_parameters():
        if ".modules_to_save.default." in name:
            mean = np.mean([state[name] for state in states], axis=0)
            np.testing.assert_allclose(parameter.detach().numpy(), mean, rtol=1e-6, atol=1e-7)


def test_only_attention_and_head_train_and_the_adapters_cross_once(lab: Any, folders: tuple[str, ...]) -> None:
    adapter = fused(lab, folders, rank=5)
    trained = set(adapter.trainables())
    frozen = {tensor.name for tensor in adapter.spec.tensors if tensor.policy == "freeze"}
    assert trained | frozen == set(adapter.spec.names)
    assert all(".experts_" in name for name in frozen) and len(frozen) == 2 * 3 * 4
    assert {name for name, p in adapter.model.named_parameters() if p.requires_grad} == trained
    width = 32
    assert sum(adapter.spec.by_name[n].size for n in trained if ".fusion_" in n) == 4 * 4 * 5 * width


def test_without_the_adapter_the_model_is_the_base_model(lab: Any, folders: tuple[str, ...]) -> None:
    adapter = fused(lab, folders)
    plain = lab.base("bert", TEXT).model
    batch = lab.batch("bert", TEXT, lab.records("bert", TEXT, lab.lengths))
    with torch.no_grad(), adapter.model.disable_adapter():
        got = lab.losses(adapter.model, batch)
    torch.testing.assert_close(got, lab.losses(plain, batch))
    assert set(adapter.trainables()) == {n for n, p in adapter.model.named_parameters() if p.requires_grad}


def test_clipped_gradients_of_fused_layers_are_exact(lab: Any, folders: tuple[str, ...]) -> None:
    adapter = fused(lab, folders)
    draw = np.random.default_rng(0)
    fresh = adapter.read()
    adapter.write(fresh.map(lambda array: array + 0.1 * draw.standard_normal(array.shape)))
    adapter.model.double()
    records = lab.records("bert", TEXT, lab.lengths)
    rows = lab.rows(adapter, CASE, records)
    clip = float(rows.norm(dim=1).median())
    with create_engine("exact", adapter.model, adapter.trainables(), clip) as made:
        lab.add(made, adapter, CASE, records)
        made.release(0.0, 1.0, RandomStream.seeded_not_private("fusion"))
        got = lab.flat(adapter.trainables())
    lab.close(got, lab.clipped(rows, clip))


def test_a_fused_adapter_comes_back_from_its_folder(lab: Any, folders: tuple[str, ...], tmp_path: Path) -> None:
    adapter = fused(lab, folders)
    state = lab.shaken(adapter, seed=9)
    folder = adapter.save_peft(tmp_path / "fused", state)
    again = fused(lab, folders, seed=4)
    back = again.load_peft(folder)
    assert all(np.array_equal(back[name], state[name]) for name in state)
    other = fused(lab, folders[:2])
    with pytest.raises(UserError, match="is not of this adapter"):
        other.load_peft(folder)
    with pytest.raises(UserError, match=r"it has no fusion\.json"):
        other.load_peft(tmp_path)


@pytest.mark.parametrize(
    ("count", "told"), [(0, "give their PEFT folders in method.experts"), (1, "needs two or more of them")]
)
def test_too_few_adapters_are_refused(lab: Any, folders: tuple[str, ...], count: int, told: str) -> None:
    with pytest.raises(UserError, match=told):
        fused(lab, folders[:count])


def test_adapters_mean_nothing_to_other_methods(lab: Any, folders: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=r"method\.experts means nothing to method lora"):
        lab.attach("bert", TEXT, "lora", experts=folders)


@pytest.mark.parametrize("private", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_fusion_is_federated_with_an_averaging_strategy(
    tiny_federation: Any, tinyfederation: Any, lab: Any, folders: tuple[str, ...], tmp_path: Path, private: bool
) -> None:
    """Three sites train attention over the same three adapters, which stay as they were."""
    changes = {"method.name": "adapterfusion", "method.experts": list(folders), "strategy": "fedit"}
    make = tiny_federation.private if private else tiny_federation.config
    config = make(**changes)
    tiny_federation.run(config, tmp_path / "run")
    losses = [line["loss"] for line in tinyfederation.metrics(tmp_path / "run", "evaluate")]
    assert len(losses) >= 2
    state = AdapterState.load(tmp_path / "run" / "adapter" / "fusion.safetensors")
    fresh = fused(lab, folders).read()
    for name in fresh:
        if ".experts_" in name:
            np.testing.assert_array_equal(state[name], fresh[name])
    assert any(np.abs(state[name]).max() > 0 for name in state if ".fusion_key." in name)
    if not private:
        assert losses[-1] < losses[0]
