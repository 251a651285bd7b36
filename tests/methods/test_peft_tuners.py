"""What the methods on PEFT's tuners add to them, against dense matrices and loops in float64."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from peft import C3AConfig, DeftConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from fedgraft.core.config import MethodConfig
from fedgraft.core.errors import UserError
from fedgraft.methods import AttachedAdapter, attach
from fedgraft.methods.catalogue import c3a, deft
from fedgraft.methods.catalogue.adalora import AdaLoraOptions, Allocation, budget
from fedgraft.methods.catalogue.pissa import FirstA
from fedgraft.methods.wrapping import computed_bases

TEXT = "sequence-classification"


class Tiny(nn.Module):
    """One linear layer, by itself."""

    def __init__(self, inputs: int = 12, outputs: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = {"model_type": "none"}
        self.layer = nn.Linear(inputs, outputs).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def layers(adapter: AttachedAdapter, attribute: str) -> list[Any]:
    return [module for module in adapter.model.modules() if attribute in dict(module.named_children())]


# --- PiSSA and OLoRA ---


@pytest.mark.parametrize("name", ["pissa", "olora"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_part_of_the_weight_trains_and_the_base_stays(lab: Any, name: str, family: str) -> None:
    """W0 + s (B A - B0 A0), where s B0 A0 is the truncated SVD, or B0 A0 of Q R."""
    adapter = lab.attach(family, TEXT, name)
    lab.shaken(adapter)
    fresh = lab.attach(family, TEXT, name)
    for layer, first in zip(layers(adapter, "lora_A"), layers(fresh, "lora_A"), strict=True):
        base = layer.get_base_layer().weight.detach().double()
        w0 = base.T if layer.fan_in_fan_out else base
        a0, b0 = (first_of(first, side) for side in "AB")
        if name == "pissa":
            u, s, vt = np.linalg.svd(w0.numpy(), full_matrices=False)
            want = (u[:, :4] * s[:4]) @ vt[:4]
            np.testing.assert_allclose(2.0 * b0 @ a0, want, atol=1e-5)
        else:
            q, r = np.linalg.qr(w0.numpy())
            np.testing.assert_allclose(b0 @ a0, q[:, :4] @ r[:4], atol=1e-5)
        a, b = (getattr(layer, f"lora_{side}")["default"] for side in "AB")
        dense = w0 + 2.0 * (b.weight.double() @ a.weight.double() - b.first.double() @ a.first.double())
        x = torch.randn(3, w0.shape[1])
        bias = layer.get_base_layer().bias
        want = x.double() @ dense.T + (0 if bias is None else bias.double())
        torch.testing.assert_close(layer(x).double(), want, atol=2e-4, rtol=1e-4)


def first_of(layer: Any, side: str) -> np.ndarray:
    return getattr(layer, f"lora_{side}")["default"].first.detach().double().numpy()


def test_a_fresh_pissa_computes_what_the_base_computes(lab: Any) -> None:
    batch = lab.batch("bert", TEXT, lab.records("bert", TEXT, lab.lengths))
    base = lab.base("bert", TEXT).model
    with torch.no_grad():
        torch.testing.assert_close(
            lab.losses(lab.attach("bert", TEXT, "pissa").model.eval(), batch), lab.losses(base.eval(), batch)
        )


def test_pissa_is_pefts_own_but_for_the_bytes_of_the_base() -> None:
    """PEFT's PiSSA takes s B0 A0 out of the base weight; the products that train are equal."""
    model = Tiny().float()
    theirs = get_peft_model(
        copy.deepcopy(model), LoraConfig(target_modules=["layer"], r=3, lora_alpha=6, init_lora_weights="pissa")
    )
    layer: Any = theirs.base_model.model.layer
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    u, s, vt = torch.linalg.svd(model.layer.weight.detach().double(), full_matrices=False)
    ours = (u[:, :3] * s[:3]) @ vt[:3] / 2.0
    torch.testing.assert_close(product.double(), ours, atol=1e-5, rtol=1e-4)


def test_first_factors_side_by_side_take_apart_what_they_put_together() -> None:
    factor = FirstA(torch.randn(3, 5))
    with torch.no_grad():
        factor.weight.mul_(2.0)
        whole = factor.whole()
        factor.take(whole * 3.0)
    torch.testing.assert_close(factor.whole(), whole * 3.0)


# --- AdaLoRA ---


def _allocate(adapter: AttachedAdapter, first: int, total: int) -> Allocation:
    config = MethodConfig(name="adalora", rank=4, alpha=8.0)
    steps = Allocation(adapter, config, first=first, total=total)
    steps.before(0)
    return steps


def test_the_budget_falls_by_the_cube_from_the_warm_up_to_the_end() -> None:
    options = AdaLoraOptions(warmup=0.1, final=0.3)
    found = [budget(step, 100, 60, 40, options) for step in (0, 10, 40, 69, 70, 100)]
    assert found == [60, 60, 40 + int(20 * 0.5**3), 40, 40, 40]


def test_the_strongest_triplets_of_all_layers_stay(lab: Any) -> None:
    """A loop over every triplet, as a rank-one matrix, tells which."""
    adapter = lab.attach("bert", TEXT, "adalora")
    lab.shaken(adapter)
    parts = []
    for index, layer in enumerate(layers(adapter, "lora_E")):
        a, b, e = (getattr(layer, f"lora_{key}")["default"].detach().double() for key in "ABE")
        parts += [(float((b[:, [i]] * e[i] @ a[[i]]).norm()), index, i) for i in range(len(e))]
    assert len(parts) == 4 * 6
    want = {(index, i) for _, index, i in sorted(parts, reverse=True)[:16]}
    steps = _allocate(adapter, first=100, total=100)
    held = {
        (index, i)
        for index, layer in enumerate(layers(adapter, "lora_E"))
        for i in range(6)
        if float(layer.lora_E["default"][i].detach()) != 0.0
    }
    assert held == want
    # What is pruned stays at zero, whatever the optimizer does.
    with torch.no_grad():
        for layer in layers(adapter, "lora_E"):
            layer.lora_E["default"].add_(1.0)
    steps.after(0)
    zeros = sum(int((layer.lora_E["default"] == 0).sum()) for layer in layers(adapter, "lora_E"))
    assert zeros == 24 - 16


def test_sites_prune_alike_though_they_train_apart(lab: Any) -> None:
    """The mean of what two sites send has no more triplets than the budget."""
    one, two = lab.attach("bert", TEXT, "adalora", seed=1), lab.attach("bert", TEXT, "adalora", seed=2)
    state = lab.shaken(one)
    two.write(state)
    for site, seed in ((one, 3), (two, 4)):
        steps = _allocate(site, first=100, total=100)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in site.trainables().values():
                parameter.add_(torch.randn_like(parameter))
        steps.after(0)
    mean = [(one.read()[name] + two.read()[name]) / 2 for name in state if ".lora_E." in name]
    assert sum(int((values != 0).sum()) for values in mean) == 16


def test_the_factors_are_pulled_towards_orthonormal_ones(lab: Any) -> None:
    """By the gradient of the penalty, which torch finds by itself."""
    adapter = lab.attach("bert", TEXT, "adalora")
    lab.shaken(adapter)
    adapter.model.double()
    steps = _allocate(adapter, first=0, total=100)
    factors = [layer_factor for layer in layers(adapter, "lora_E") for layer_factor in _factors(layer)]
    total = torch.zeros((), dtype=torch.float64)
    for a, tall in factors:
        gram = a.T @ a if tall else a @ a.T
        total = total + 0.1 / len(factors) * torch.linalg.norm(gram - torch.eye(len(gram), dtype=torch.float64))
    want = torch.autograd.grad(total, [a for a, _ in factors])
    for a, _ in factors:
        a.grad = torch.zeros_like(a)
    steps.gradients(0)
    for (a, _), wanted in zip(factors, want, strict=True):
        lab.close(a.grad, wanted)


def _factors(layer: Any) -> list[tuple[torch.Tensor, bool]]:
    return [(layer.lora_A["default"], False), (layer.lora_B["default"], True)]


# --- layers in any precision ---


def test_circulant_blocks_are_pefts_fourier_transform_and_a_loop() -> None:
    theirs: Any = get_peft_model(Tiny(), C3AConfig(target_modules=["layer"], block_size=4)).eval()
    ours = copy.deepcopy(theirs)
    c3a._build(ours, MethodConfig(name="c3a"))
    layer = ours.base_model.model.layer
    layer.double()
    x = torch.randn(3, 12, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    kernel = layer.c3a_kernel["default"].detach()
    dense = torch.zeros(8, 12, dtype=torch.float64)
    for i in range(8):
        for j in range(12):
            dense[i, j] = kernel[i // 4, j // 4, (j % 4 - i % 4) % 4] / 12
    base = layer.get_base_layer()
    torch.testing.assert_close(ours(x), x @ (base.weight + dense).T + base.bias, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("way", [{}, {"decomposition_method": "qr"}, {"para": True, "decomposition_method": "qr"}])
def test_a_projected_subspace_is_pefts_and_a_dense_matrix(way: dict[str, Any]) -> None:
    theirs: Any = get_peft_model(Tiny(), DeftConfig(target_modules=["layer"], r=3, **way)).eval()
    held: Any = theirs.base_model.model.layer
    torch.manual_seed(2)
    with torch.no_grad():
        for factors in (held.deft_P, held.deft_R):
            for factor in factors.values():
                factor.add_(0.3 * torch.randn_like(factor))
    ours = copy.deepcopy(theirs)
    deft._build(ours, MethodConfig(name="deft"))
    x = torch.randn(3, 12, dtype=torch.float64)
    torch.testing.assert_close(ours.double()(x), theirs(x), atol=1e-4, rtol=1e-4)
    layer = ours.base_model.model.layer
    p, base = layer.deft_P["default"].detach(), layer.get_base_layer()
    left, right = (torch.linalg.qr(p)[0],) * 2 if way else (p, p.clamp(min=0))
    dense = base.weight - left @ right.T @ base.weight
    if not way.get("para"):
        dense = dense + left @ layer.deft_R["default"]
    torch.testing.assert_close(ours(x), x @ dense.T + base.bias, atol=1e-12, rtol=1e-12)
    layer.merge()
    torch.testing.assert_close(layer.get_base_layer().weight, dense, atol=1e-12, rtol=1e-12)


# --- bases that sites compute ---


def test_a_site_that_finds_other_singular_vectors_has_another_description(lab: Any) -> None:
    adapter = lab.attach("bert", TEXT, "psoft")
    again = lab.attach("bert", TEXT, "psoft", seed=9)
    assert adapter.spec.digest == again.spec.digest
    rows = torch.randn(4, 9)
    made = [
        computed_bases(lambda _, turned=turned: [turned])(adapter.model, adapter.spec).spec.digest
        for turned in (rows, rows + 1e-6, rows * torch.tensor([[1.0], [-1.0], [1.0], [1.0]]), rows[[1, 0, 2, 3]])
    ]
    assert made[0] == made[1]
    assert len(set(made)) == 3


@pytest.mark.parametrize("name", ["psoft", "tinylora", "frod", "adamss"])
def test_what_bases_a_site_has_stands_in_the_description(lab: Any, name: str) -> None:
    settings = {"rank": 2, "options": {"u": 8}} if name == "tinylora" else {}
    found = lab.attach("bert", TEXT, name, **settings).spec.options["bases"]
    assert len(found) == 16
    base = lab.base("bert", TEXT)
    weight = base.model.bert.encoder.layer[0].attention.self.query.weight
    with torch.no_grad():
        weight.copy_(weight.roll(1, dims=1))
    config = MethodConfig(name=name, **{"rank": 4, "alpha": 8.0, **settings})
    assert attach(base, config, lab.task(TEXT), 1).spec.options["bases"] != found


# --- prompts that a network makes ---


@pytest.mark.parametrize("name", ["p-tuning", "mpt"])
def test_a_folder_with_the_finished_prompt_alone_cannot_be_trained_on(lab: Any, name: str, tmp_path: Any) -> None:
    adapter = lab.attach("bert", TEXT, name)
    folder = adapter.save_peft(tmp_path / "adapter", lab.shaken(adapter))
    (folder / "prompt_encoder.safetensors").unlink()
    with pytest.raises(UserError, match="only the finished prompt; choose method prompt"):
        adapter.load_peft(folder)
    # Plain PEFT has no need of it.
    assert isinstance(PeftModel.from_pretrained(lab.base("bert", TEXT).model, str(folder)), PeftModel)


def test_the_prompt_of_a_task_is_the_common_one_times_a_low_rank_matrix(lab: Any) -> None:
    adapter = lab.attach("bert", TEXT, "mpt")
    lab.shaken(adapter)
    encoder: Any = adapter.model.prompt_encoder["default"].requires_grad_(False)
    found = encoder(torch.arange(3)[None])[0]
    common = encoder.embedding.weight
    for token in range(3):
        for place in (0, 7, 31):
            own = sum(
                float(encoder.prefix_task_cols[0, token, r] * encoder.prefix_task_rows[0, r, place]) for r in range(4)
            )
            assert float(found[token, place]) == pytest.approx(float(common[token, place]) * own, rel=1e-4, abs=1e-7)


# --- what trains, and what is switched on ---


def test_pvera_draws_while_it_trains_and_not_after(lab: Any) -> None:
    adapter = lab.attach("bert", TEXT, "pvera")
    lab.shaken(adapter)
    batch = lab.batch("bert", TEXT, lab.records("bert", TEXT, lab.lengths))
    steps = adapter.steps(adapter, MethodConfig(name="pvera"), first=0, total=3)
    with torch.no_grad():
        before = lab.losses(adapter.model, batch)
        steps.before(0)
        one, two = lab.losses(adapter.model, batch), lab.losses(adapter.model, batch)
        assert float((one - two).abs().min()) > 1e-6
        steps.close()
        assert torch.equal(lab.losses(adapter.model, batch), before)


def test_the_frozen_factor_of_lora_fa_crosses_and_does_not_train(lab: Any) -> None:
    adapter = lab.attach("bert", TEXT, "lora-fa")
    roles = {tensor.role: tensor.policy for tensor in adapter.spec.tensors}
    assert roles["lora_A"] == "freeze" and roles["lora_B"] == "share"
    assert len(adapter.spec.pairs) == 4


def test_krona_is_a_kronecker_product_of_whole_factors(lab: Any) -> None:
    adapter = lab.attach("bert", TEXT, "krona", alpha=1.5)
    lab.shaken(adapter)
    for layer in layers(adapter, "lokr_w1"):
        a, b = layer.lokr_w1["default"].detach(), layer.lokr_w2["default"].detach()
        change = layer.get_delta_weight("default").detach()
        for i in range(0, 32, 5):
            for j in range(0, 32, 3):
                rows, columns = b.shape
                want = 1.5 * float(a[i // rows, j // columns] * b[i % rows, j % columns])
                assert float(change[i, j]) == pytest.approx(want, rel=1e-5, abs=1e-8)


def test_glora_scales_a_bias_that_there_is(lab: Any) -> None:
    adapter = lab.attach("bert", TEXT, "glora")
    layer = layers(adapter, "glora_D")[0]
    x = torch.randn(2, 32)
    with torch.no_grad():
        layer.get_base_layer().bias.copy_(torch.arange(32.0))
        before = layer(x)
        layer.glora_D["default"].X.fill_(0.5)
        torch.testing.assert_close(layer(x) - before, (0.5 * torch.arange(32.0)).expand(2, 32), atol=1e-4, rtol=1e-4)


def test_a_layer_that_a_tuner_does_not_take_is_named(lab: Any) -> None:
    with pytest.raises(UserError, match=r"c_attn, which is a Conv1D: choose lora"):
        lab.attach("gpt2", TEXT, "hra")
    with pytest.raises(UserError, match=r"leave bert\.embeddings\.word_embeddings out of method\.target_modules"):
        lab.attach("bert", TEXT, "loha", target_modules=("word_embeddings",))


def test_tokens_that_the_model_does_not_have_are_refused(lab: Any) -> None:
    with pytest.raises(UserError, match=r"name them in method\.options\.token_indices"):
        lab.attach("bert", TEXT, "trainable-tokens")
    with pytest.raises(UserError, match="the model has no token 99999"):
        lab.attach("bert", TEXT, "trainable-tokens", options={"token_indices": [99999]})


@pytest.mark.parametrize("name", ["adalora", "pvera", "pissa", "mpt", "psoft"])
def test_a_federation_trains_with_it_under_privacy(tiny_federation: Any, name: str, tmp_path: Any) -> None:
    """A folder comes out, and what is pruned is pruned in the mean of the sites."""
    config = tiny_federation.private(**{"method.name": name})
    tiny_federation.run(config, tmp_path / "run")
    folder = tmp_path / "run" / "adapter"
    weights = load_file(folder / "adapter_model.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())
    if name == "adalora":
        # Of 4 layers with 6 triplets the last round started at the final budget, 4 a layer.
        kept = sum(int((tensor != 0).sum()) for key, tensor in weights.items() if key.endswith("lora_E"))
        assert kept == 16
