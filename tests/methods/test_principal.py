"""The principal part of base weights is that of their whole decomposition, and taking it out changes no function."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedgraft.core.adapter import AdapterState
from fedgraft.core.basemodel import fingerprint
from fedgraft.core.errors import UserError
from fedgraft.methods.offset import module_of
from fedgraft.methods.principal import principal_factors
from fedgraft.strategies import create_aggregator

TEXT = "sequence-classification"


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_the_factors_are_the_largest_singular_triples_of_the_base_weight(lab: Any, family: str, method: str) -> None:
    adapter = lab.attach(family, TEXT, method, rank=3, alpha=7.0)
    before = fingerprint(adapter.model)
    state = adapter.read()
    found = principal_factors(adapter, state)
    assert fingerprint(adapter.model) == before
    assert set(found) == {name for pair in state.spec.pairs for name in (pair.a, pair.b)}
    for pair in state.spec.pairs:
        stored = adapter.model.get_submodule(module_of(pair)).get_base_layer().weight.detach().double().numpy()
        u, s, vt = np.linalg.svd(stored.T if family == "gpt2" else stored)
        a, b = found[pair.a], found[pair.b]
        assert a.shape == state[pair.a].shape and b.shape == state[pair.b].shape
        np.testing.assert_allclose(pair.scaling * (b.astype(float) @ a), (u[:, :3] * s[:3]) @ vt[:3], atol=1e-6 * s[0])
        # Both factors carry the root of the singular values.
        np.testing.assert_allclose(a @ a.T, np.diag(s[:3]) / pair.scaling, atol=1e-5 * s[0])
        np.testing.assert_allclose(b.T @ b, np.diag(s[:3]) / pair.scaling, atol=1e-5 * s[0])
    again = principal_factors(adapter, state)
    assert all(np.array_equal(found[name], again[name]) for name in found)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_run_of_frlora_begins_with_the_function_of_the_base_model(lab: Any, family: str, method: str) -> None:
    adapter = lab.attach(family, TEXT, method)
    fresh = adapter.read()
    batch = lab.batch(family, TEXT, lab.records(family, TEXT, (3, 9, 1, 6)))
    with torch.no_grad():
        want = lab.losses(adapter.model, batch)
        rule = create_aggregator("frlora")
        rule.principal = lambda state: principal_factors(adapter, state)
        state = rule.prepare(fresh)
        adapter.write(state)
        got = lab.losses(adapter.model, batch)
        bare = AdapterState(state.spec.bare, {name: state[name] for name in state.spec.bare.names})
        adapter.write(bare)
        doubled = lab.losses(adapter.model, batch)
    assert float((got - want).abs().max()) < 1e-5
    assert float((doubled - want).abs().max()) > 1e-3, "the principal part must matter"


def test_a_rank_without_so_many_directions_is_refused(lab: Any) -> None:
    adapter = lab.attach("bert", TEXT, "lora", rank=33)
    with pytest.raises(UserError, match=r"layer .*query is 32 x 32, which has no 33 directions; lower method\.rank"):
        principal_factors(adapter, adapter.read())
