from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import ArrowConfig, create_arrow_model
from peft.tuners.lora import LoraLayer

from fedgraft.core.adapter import AdapterState
from fedgraft.core.errors import UserError
from fedgraft.methods.arrow import load_set, read_set, route, write_set
from fedgraft.methods.experts import carry, expert
from fedgraft.strategies.merging.arrow import routed

TEXT = "sequence-classification"


def states(lab: Any, family: str = "bert", settings: tuple[dict[str, Any], ...] = ({}, {}, {})) -> list[AdapterState]:
    return [lab.shaken(lab.attach(family, TEXT, "lora", **own), seed=i) for i, own in enumerate(settings)]


def batch(lab: Any, family: str = "bert") -> dict[str, torch.Tensor]:
    return lab.batch(family, TEXT, lab.records(family, TEXT, lab.lengths))


MIXED = ({"rank": 4}, {"rank": 2, "alpha": 3.0}, {"rank": 3})


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_each_adapter_on_a_shared_base_computes_what_it_computes_alone(lab: Any, family: str) -> None:
    held = states(lab, family, MIXED)
    shared = carry(lab.base(family, TEXT), held)
    for number, own in enumerate(MIXED):
        alone = lab.attach(family, TEXT, "lora", **own)
        alone.write(held[number])
        shared.set_adapter(expert(number))
        want, got = lab.losses(alone.model, batch(lab, family)), lab.losses(shared, batch(lab, family))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert not [name for name, p in carry(lab.base(family, TEXT), held).named_parameters() if p.requires_grad]


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_every_layer_routes_every_token_as_the_equation_says(lab: Any, family: str) -> None:
    held = states(lab, family, MIXED)
    model = route(lab.base(family, TEXT), held, most=2, temperature=0.5)
    model.double()
    seen: list[tuple[str, np.ndarray, np.ndarray]] = []

    def watch(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: torch.Tensor) -> None:
            x = inputs[0].detach()
            added = output.detach() - module.base_layer(x)
            seen.append((name, x.reshape(-1, x.shape[-1]).numpy(), added.reshape(-1, added.shape[-1]).numpy()))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            module.register_forward_hook(watch(name))
    with torch.no_grad():
        lab.losses(model, batch(lab, family))
    assert len(seen) == len(held[0].spec.pairs)
    for name, x, added in seen:
        want = routed(x, held, f"{name}.lora_A.default.weight", 2, 0.5)
        # The prototypes were rounded to the factors' float32.
        np.testing.assert_allclose(added, want, rtol=1e-4, atol=1e-5)


def test_the_router_has_the_mean_of_all_heads(lab: Any) -> None:
    held = states(lab)
    model = route(lab.base("bert", TEXT), held)
    parameters = dict(model.named_parameters())
    heads = [tensor.name for tensor in held[0].spec.tensors if tensor.role == "head"]
    assert heads
    for name in heads:
        got = parameters[name.replace(".default.", ".arrow_router.")].detach().numpy()
        np.testing.assert_allclose(got, np.mean([state[name] for state in held], axis=0), rtol=1e-6, atol=1e-7)
    assert not [name for name, parameter in parameters.items() if parameter.requires_grad]


def test_pefts_own_loader_would_leave_the_head_untrained(lab: Any, tmp_path: Path) -> None:
    """Why the router is built here."""
    adapter = lab.attach("bert", TEXT, "lora")
    folders = []
    for number, state in enumerate(states(lab)):
        folders.append(str(adapter.save_peft(tmp_path / str(number), state)))
    base = lab.base("bert", TEXT)
    fresh = base.model.classifier.weight.detach().clone()
    model = create_arrow_model(base.model, folders, ArrowConfig(top_k=2, rng_seed=0))
    wrapped = model.base_model.model.classifier
    torch.testing.assert_close(wrapped.modules_to_save["arrow_router"].weight, fresh)


def test_what_a_set_of_folders_holds_is_read_back(lab: Any, tmp_path: Path) -> None:
    adapter = lab.attach("bert", TEXT, "lora")
    sources = {}
    for number, state in enumerate(states(lab)):
        sources[f"site.{number}"] = adapter.save_peft(tmp_path / "in" / str(number), state)
    write_set(tmp_path / "set", sources, most=2, temperature=0.5)
    found, most, temperature = read_set(tmp_path / "set")
    assert (list(found), most, temperature) == (list(sources), 2, 0.5)
    for name, folder in found.items():
        assert adapter.load_peft(folder) == adapter.load_peft(sources[name])
    loaded = load_set(lab.base("bert", TEXT), tmp_path / "set")
    made = route(lab.base("bert", TEXT), states(lab), most=2, temperature=0.5)
    torch.testing.assert_close(lab.losses(loaded, batch(lab)), lab.losses(made, batch(lab)))


def test_folders_that_hold_no_set_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"it has no arrow\.json"):
        read_set(tmp_path)
    with pytest.raises(UserError, match=r"it has no adapter_config\.json"):
        write_set(tmp_path / "set", {"a": tmp_path})
    (tmp_path / "arrow.json").write_text('{"adapters": ["../a"], "most": 2, "temperature": 1.0}')
    with pytest.raises(UserError, match="is no name of a folder in it"):
        read_set(tmp_path)
    (tmp_path / "arrow.json").write_text('{"adapters": [], "most": 0, "temperature": 1.0}')
    with pytest.raises(UserError, match="most is 0"):
        read_set(tmp_path)


@pytest.mark.parametrize(
    ("methods", "told"),
    [
        (("lora",), "two or more"),
        (("lora", "dora"), "only plain low-rank adapters"),
        (("bitfit", "bitfit"), "only plain low-rank adapters"),
    ],
)
def test_what_cannot_lie_side_by_side_is_refused(lab: Any, methods: tuple[str, ...], told: str) -> None:
    held = [lab.attach("bert", TEXT, method).read() for method in methods]
    with pytest.raises(UserError, match=told):
        carry(lab.base("bert", TEXT), held)


def test_adapters_of_other_modules_are_refused_by_name(lab: Any) -> None:
    held = [lab.attach("bert", TEXT, "lora", target_modules=(name,)).read() for name in ("query", "key")]
    with pytest.raises(UserError, match=r"differ in their tensors: .*key"):
        carry(lab.base("bert", TEXT), held)
