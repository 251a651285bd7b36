"""The contract of a method on a model: what trains is what is described and exchanged, and nothing else moves."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedgraft.core.adapter import AdapterState
from fedgraft.core.errors import UserError
from fedgraft.methods import AttachedAdapter

Case = tuple[str, str, str]
LENGTHS = (3, 9, 1, 6)
#: Methods that train between frozen tensors of their own, which every site needs as well.
WITH_FROZEN = ("lora-sb", "ravan")
#: Attention does not see the bias of its keys (softmax is blind to a constant), so no output hangs on it.
BLIND = ("key.bias", "k_proj.bias")


def _frozen_bytes(adapter: AttachedAdapter) -> dict[str, str]:
    trained = set(adapter.trainables())
    held = [*adapter.model.named_parameters(), *adapter.model.named_buffers()]
    return {n: hashlib.sha256(t.detach().numpy().tobytes()).hexdigest() for n, t in held if n not in trained}


def test_the_spec_describes_exactly_what_trains(lab: Any, fitting: Case) -> None:
    adapter = lab.attach(*fitting)
    raw = {name: p for name, p in adapter.model.named_parameters() if p.requires_grad}
    assert adapter.spec.select("share") == tuple(raw) == tuple(adapter.trainables())
    assert all(adapter.trainables()[name] is raw[name] for name in raw)
    every = dict(adapter.model.named_parameters())
    assert all(t.shape == tuple(every[t.name].shape) for t in adapter.spec.tensors)
    assert {t.dtype for t in adapter.spec.tensors} == {"float32"}
    frozen = {"freeze"} if fitting[2] in WITH_FROZEN else set()
    assert {t.policy for t in adapter.spec.tensors} == {"share"} | frozen
    assert adapter.spec.method == fitting[2]
    roles = {t.role for t in adapter.spec.tensors}
    assert roles - {"head"}
    heads = [name for name, _ in adapter.model.named_parameters() if ".modules_to_save." in name]
    assert [t.name for t in adapter.spec.tensors if t.role == "head"] == heads
    assert bool(heads) == (fitting[1] != "causal-lm")
    assert not any(module.training for module in adapter.model.modules())


def test_only_what_the_spec_names_moves_in_a_step(lab: Any, fitting: Case) -> None:
    adapter = lab.attach(*fitting)
    family, task, _ = fitting
    lab.shaken(adapter)
    before, frozen = adapter.read(), _frozen_bytes(adapter)
    assert frozen
    optimizer = torch.optim.AdamW(adapter.trainables().values(), lr=0.1, weight_decay=0.1)
    lab.losses(adapter.model, lab.batch(family, task, lab.records(family, task, LENGTHS))).sum().backward()
    optimizer.step()
    assert _frozen_bytes(adapter) == frozen
    after = adapter.read()
    assert tuple(name for name in after if np.array_equal(after[name], before[name])) == after.spec.select("freeze")


def test_write_then_read_is_the_identity_and_in_place(lab: Any, fitting: Case) -> None:
    adapter = lab.attach(*fitting)
    parameters = adapter.trainables()
    places = [parameter.data_ptr() for parameter in parameters.values()]
    state = lab.shaken(adapter, seed=3)
    assert adapter.read() == state
    assert [parameter.data_ptr() for parameter in adapter.trainables().values()] == places
    assert all(adapter.trainables()[name] is parameter for name, parameter in parameters.items())
    adapter.write(adapter.read())
    assert adapter.read() == state


def test_a_snapshot_does_not_follow_the_model(lab: Any) -> None:
    adapter = lab.attach("bert", "sequence-classification", "lora")
    snapshot = adapter.read()
    copy = {name: array.copy() for name, array in snapshot.items()}
    lab.shaken(adapter)
    assert all(np.array_equal(snapshot[name], copy[name]) for name in copy)


def test_a_receiver_computes_what_the_sender_computes(lab: Any, fitting: Case) -> None:
    """Everything that the function needs is in the state: a receiver drawn from another seed has only that."""
    family, task, _ = fitting
    sender, receiver = lab.attach(*fitting, seed=1), lab.attach(*fitting, seed=2)
    assert receiver.spec.digest == sender.spec.digest
    batch = lab.batch(family, task, lab.records(family, task, LENGTHS))
    with torch.no_grad():
        before = lab.losses(receiver.model, batch)
        receiver.write(AdapterState(receiver.spec, dict(lab.shaken(sender))))
        sent, received = lab.losses(sender.model, batch), lab.losses(receiver.model, batch)
    assert float((before - received).abs().max()) > 1e-3
    assert float((sent - received).abs().max()) <= 1e-6


def test_every_tensor_has_an_effect(lab: Any, fitting: Case) -> None:
    family, task, _ = fitting
    adapter = lab.attach(*fitting)
    batch = lab.batch(family, task, lab.records(family, task, LENGTHS))
    state = lab.shaken(adapter)
    random = np.random.default_rng(7)
    dead = []
    with torch.no_grad():
        base = lab.losses(adapter.model, batch)
        for name in state:
            moved = state[name] + random.standard_normal(state[name].shape).astype("float32")
            adapter.write(AdapterState(state.spec, {**state, name: moved}))
            if float((lab.losses(adapter.model, batch) - base).abs().max()) < 1e-5:
                dead.append(name)
    assert [name for name in dead if not name.endswith(BLIND)] == []


def test_a_records_loss_does_not_hang_on_its_neighbours(lab: Any, fitting: Case) -> None:
    """Padding, prompts and position counting included: without this no clipping bounds one person's influence."""
    family, task, _ = fitting
    adapter = lab.attach(*fitting)
    lab.shaken(adapter)
    adapter.model.double()
    records = lab.records(family, task, LENGTHS)
    with torch.no_grad():
        together = lab.losses(adapter.model, lab.batch(family, task, records))
        alone = torch.cat([lab.losses(adapter.model, lab.batch(family, task, [record])) for record in records])
    assert float((together - alone).abs().max()) < 1e-9


def test_the_same_seed_draws_the_same_adapter_and_leaves_the_global_stream_alone(lab: Any) -> None:
    before = torch.get_rng_state()
    first, same, other = (lab.attach("bert", "sequence-classification", "lora", seed=s).read() for s in (1, 1, 2))
    assert first == same and first != other
    assert torch.equal(torch.get_rng_state(), before)


def test_a_combination_that_does_not_fit_is_refused_in_one_line(lab: Any, unfitting: Case) -> None:
    with pytest.raises(UserError) as refusal:
        lab.attach(*unfitting)
    text = str(refusal.value)
    assert "\n" not in text and len(text) < 250
    assert "choose" in text, "it must say the mend"


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "ln"])
def test_an_unknown_target_is_refused_by_name(lab: Any, method: str) -> None:
    with pytest.raises(UserError, match=r"method\.target_modules: the model has no module `encoder\.query`"):
        lab.attach("bert", "sequence-classification", method, target_modules=("output.dense", "encoder.query"))


def test_targets_and_layers_narrow_where_lora_goes(lab: Any) -> None:
    adapter = lab.attach("bert", "sequence-classification", "lora", target_modules=("attention.self.key",), layers=(1,))
    assert [pair.a for pair in adapter.spec.pairs] == [
        "base_model.model.bert.encoder.layer.1.attention.self.key.lora_A.default.weight"
    ]


def test_a_layer_that_does_not_exist_is_refused(lab: Any) -> None:
    with pytest.raises(UserError, match=r"method\.layers: BertForSequenceClassification has no layer 2"):
        lab.attach("bert", "sequence-classification", "lora", layers=(0, 2))


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("bitfit", {"target_modules": ("query",)}),
        ("prefix", {"target_modules": ("query",)}),
        ("prompt", {"layers": (0,)}),
        ("ln", {"layers": (0,)}),
        ("ia3", {"dropout": 0.1}),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused(lab: Any, method: str, settings: dict[str, Any]) -> None:
    with pytest.raises(
        UserError, match=f"method.{next(iter(settings))} means nothing to method {method}; leave it out"
    ):
        lab.attach("bert", "sequence-classification", method, **settings)


def test_a_state_that_is_not_whole_is_refused(lab: Any) -> None:
    adapter = lab.attach("bert", "sequence-classification", "lora")
    state = adapter.read()
    with pytest.raises(UserError, match="not the whole adapter: " + state.spec.names[0].replace(".", r"\.")):
        adapter.write(state.only(state.spec.names[1:]))


def test_adopting_a_frozen_tensor_stops_its_training_and_no_other(lab: Any) -> None:
    adapter = lab.attach("bert", "sequence-classification", "lora")
    frozen = {pair.a for pair in adapter.spec.pairs}
    whole = adapter.spec
    adapter.adopt(whole.with_policy("freeze", lambda tensor: tensor.name in frozen))
    assert set(adapter.trainables()) == set(whole.names) - frozen
    assert not any(p.requires_grad for n, p in adapter.model.named_parameters() if n in frozen)
    assert set(adapter.read()) == set(whole.names)
    adapter.adopt(whole.with_policy("local", lambda tensor: tensor.role == "head"))
    assert set(adapter.trainables()) == set(whole.names)


def test_only_some_tensors_can_be_read(lab: Any) -> None:
    adapter = lab.attach("bert", "sequence-classification", "lora")
    head = [t.name for t in adapter.spec.tensors if t.role == "head"]
    assert tuple(adapter.read(head)) == tuple(head)


def test_half_precision_trainables_travel_as_float32(lab: Any) -> None:
    adapter = lab.attach("bert", "sequence-classification", "lora")
    adapter.model.bfloat16()
    again = AttachedAdapter(adapter.model, adapter.spec)
    state = again.read()
    assert {array.dtype.name for array in state.values()} == {"float32"}
    again.write(state)
    assert again.read() == state


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_spec_of_a_model_in_another_precision(lab: Any, dtype: torch.dtype) -> None:
    from fedgraft.core.config import MethodConfig
    from fedgraft.methods import attach

    base = lab.base("bert", "sequence-classification")
    base = replace(base, model=base.model.to(dtype))
    spec = attach(base, MethodConfig(name="ln"), lab.task("sequence-classification"), 0).spec
    assert {t.dtype for t in spec.tensors} == {"float64" if dtype == torch.float64 else "float32"}
