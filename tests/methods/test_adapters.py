"""Adapters against naive twins: the papers' equations, position by position, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

TEXT, LM, IMAGE = "sequence-classification", "causal-lm", "image-classification"
PREFIX = "base_model.model."


def shaken(lab: Any, family: str, task: str, method: str, **settings: Any) -> Any:
    adapter = lab.attach(family, task, method, **settings)
    lab.shaken(adapter, by=0.3)
    adapter.model.double()
    return adapter


def seen(lab: Any, adapter: Any, family: str, task: str, path: str) -> tuple[Any, Any, torch.Tensor, Any]:
    """(part, base module, what the place at ``path`` was given, what it gave) over texts of uneven lengths."""
    place = adapter.model.get_submodule(PREFIX + path)
    found: dict[str, Any] = {}

    def note(module: Any, args: Any, kwargs: Any, given: Any) -> None:
        found.update(args=args, kwargs=kwargs, given=given)

    handle = place.register_forward_hook(note, with_kwargs=True)
    with torch.no_grad():
        lab.losses(adapter.model, lab.batch(family, task, lab.records(family, task, (3, 11, 1, 6))))
    handle.remove()
    return place.graft["default"], place.base_layer, found["args"], found["given"]


def by_position(function: Any, *tensors: torch.Tensor) -> torch.Tensor:
    """``function`` of single positions, put together again."""
    rows = [[function(*(t[b, i] for t in tensors)) for i in range(tensors[0].shape[1])] for b in range(len(tensors[0]))]
    return torch.stack([torch.stack(row) for row in rows])


def dense(part: Any, x: torch.Tensor) -> torch.Tensor:
    """W x + b as a sum over inputs."""
    out = part.bias.clone()
    for i in range(part.weight.shape[1]):
        out = out + part.weight[:, i] * x[i]
    return out


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def normal(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    return (x - x.mean()) / (((x - x.mean()) ** 2).mean() + eps).sqrt() * weight + bias


def bottleneck(part: Any, x: torch.Tensor) -> torch.Tensor:
    return dense(part.up, gelu(dense(part.down, x)))


def close(got: torch.Tensor, want: torch.Tensor, by: float = 1e-12) -> None:
    assert got.dtype == want.dtype == torch.float64 and got.shape == want.shape
    assert float((got - want).abs().max()) <= by * max(1.0, float(want.abs().max()))


@torch.no_grad()
def test_pfeiffers_adapter_reads_and_joins_the_normalised_sum(lab: Any) -> None:
    adapter = shaken(lab, "bert", TEXT, "pfeiffer", options={"width": 5})
    part, base, (inner, x), given = seen(lab, adapter, "bert", TEXT, "bert.encoder.layer.1.output")
    norm = base.LayerNorm

    def twin(inner: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        summed = dense(base.dense, inner) + x
        added = bottleneck(part.bottleneck, normal(summed, norm.weight, norm.bias, norm.eps))
        return normal(summed + added, norm.weight, norm.bias, norm.eps)

    close(given, by_position(twin, inner, x))


@torch.no_grad()
def test_pfeiffers_adapter_follows_a_layer_that_does_not_normalise_its_sum(lab: Any) -> None:
    adapter = shaken(lab, "vit", IMAGE, "pfeiffer", options={"width": 5})
    path = next(path for path in adapter.model.peft_config["default"].places if path.endswith(".1"))
    part, base, (x, *_), given = seen(lab, adapter, "vit", IMAGE, path)
    h = base(x)
    close(given, by_position(lambda h: h + bottleneck(part.bottleneck, h), h))


def test_adapterdrop_leaves_the_first_layers_alone_forward_and_back(lab: Any) -> None:
    from fedgraft.core.errors import UserError

    places = lab.attach("bert", TEXT, "adapterdrop", options={"skip": 1}).model.peft_config["default"].places
    assert list(places) == ["bert.encoder.layer.1.output"]
    towers = lab.attach("t5", TEXT, "adapterdrop", options={"skip": 1}).model.peft_config["default"].places
    assert len(towers) == 2 and all(path.endswith("block.1") for path in towers)
    with pytest.raises(UserError, match="lower it to 1"):
        lab.attach("bert", TEXT, "adapterdrop", options={"skip": 2})
    adapter = lab.attach("bert", TEXT, "adapterdrop", options={"skip": 1})
    first = adapter.model.get_submodule(PREFIX + "bert.encoder.layer.0")
    reached = []
    handle = first.register_forward_hook(lambda m, a, given: reached.append(given.requires_grad))
    lab.losses(adapter.model, lab.batch("bert", TEXT, lab.records("bert", TEXT, (3, 5)))).sum().backward()
    handle.remove()
    assert reached == [False]


@torch.no_grad()
def test_a_residual_adapter_normalises_what_a_layer_gives(lab: Any) -> None:
    adapter = shaken(lab, "bert", TEXT, "residual-adapter", options={"width": 5})
    part, base, args, given = seen(lab, adapter, "bert", TEXT, "bert.encoder.layer.1")
    h = base(*args)
    norm = part.norm

    def twin(h: torch.Tensor) -> torch.Tensor:
        inner = dense(part.bottleneck.down, normal(h, norm.weight, norm.bias, norm.eps))
        return h + dense(part.bottleneck.up, inner.clamp(min=0))

    # The layer alone was run without its mask: the longest text has no padding.
    close(given[1:2], by_position(twin, h[1:2]))


@torch.no_grad()
@pytest.mark.parametrize("path", ["bert.encoder.layer.0.output", "bert.encoder.layer.0.attention.output"])
def test_a_parallel_adapter_reads_what_the_block_reads(lab: Any, path: str) -> None:
    adapter = shaken(lab, "bert", TEXT, "parallel-adapter", options={"width": 5, "beside": "both", "scale": 3.0})
    part, base, (inner, x), given = seen(lab, adapter, "bert", TEXT, path)
    norm = base.LayerNorm

    def twin(inner: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        beside = dense(part.bottleneck.up, dense(part.bottleneck.down, x).clamp(min=0))
        return normal(dense(base.dense, inner) + x + 3.0 * beside, norm.weight, norm.bias, norm.eps)

    close(given, by_position(twin, inner, x))


@torch.no_grad()
def test_a_parallel_adapter_stands_beside_a_block_of_its_own(lab: Any) -> None:
    adapter = shaken(lab, "llama", LM, "parallel-adapter", options={"width": 5, "scale": 3.0})
    assert all(path.endswith(".mlp") for path in adapter.model.peft_config["default"].places)
    part, base, (x,), given = seen(lab, adapter, "llama", LM, "model.layers.1.mlp")
    fed = base(x)
    down, up = part.bottleneck.down, part.bottleneck.up
    close(given, by_position(lambda f, x: f + 3.0 * dense(up, dense(down, x).clamp(min=0)), fed, x))


@torch.no_grad()
@pytest.mark.parametrize("method", ["compacter", "compacter++"])
def test_a_compact_adapter_is_that_of_its_kronecker_products(lab: Any, method: str) -> None:
    adapter = shaken(lab, "bert", TEXT, method, options={"width": 12, "division": 4})
    places = adapter.model.peft_config["default"].places
    assert len(places) == (4 if method == "compacter" else 2)
    part, base, (x,), given = seen(lab, adapter, "bert", TEXT, "bert.encoder.layer.1.output.dense")
    rules = [p for name, p in adapter.model.named_parameters() if name.endswith("rule.a")]
    assert len(rules) == 1 and rules[0] is part.rule.a

    def matrix(layer: Any) -> torch.Tensor:
        return sum(torch.kron(rules[0][i], torch.outer(layer.s[i], layer.t[i])) for i in range(4))

    down, up = matrix(part.down), matrix(part.up)

    def twin(h: torch.Tensor) -> torch.Tensor:
        return h + up @ gelu(down @ h + part.down.bias) + part.up.bias

    close(given, by_position(twin, base(x)))


def test_compacter_asks_for_a_divisor(lab: Any) -> None:
    from fedgraft.core.errors import UserError

    with pytest.raises(UserError, match="common divisor"):
        lab.attach("bert", TEXT, "compacter", options={"division": 5})


@torch.no_grad()
@pytest.mark.parametrize(("family", "task"), [("bert", TEXT), ("llama", LM)])
def test_tiny_attention_looks_at_the_words_that_its_layer_sees(lab: Any, family: str, task: str) -> None:
    adapter = shaken(lab, family, task, "tiny-attention", options={"heads": 2, "width": 3})
    path = "bert.encoder.layer.1.attention" if family == "bert" else "model.layers.1.self_attn"
    tiny = adapter.model.get_submodule(PREFIX + path).graft["default"].attention
    noted: dict[str, Any] = {}
    handle = tiny.register_forward_hook(lambda m, args, given: noted.update(z=args[0], given=given))
    lengths = (3, 11, 1, 6)
    batch = lab.batch(family, task, lab.records(family, task, lengths))
    lab.losses(adapter.model, batch)
    handle.remove()
    z, given = noted["z"], noted["given"]
    for b in range(len(lengths)):
        words = [i for i in range(z.shape[1]) if batch["attention_mask"][b, i]]
        for i in words:
            out = []
            for head in range(2):
                at = slice(3 * head, 3 * head + 3)
                q = dense(tiny.query, z[b, i])[at]
                keys = [j for j in words if family == "bert" or j <= i]
                scores = torch.stack([(q * dense(tiny.key, z[b, j])[at]).sum() / 3**0.5 for j in keys])
                chances = (scores - scores.max()).exp() / (scores - scores.max()).exp().sum()
                out.append(sum(c * dense(tiny.value, z[b, j])[at] for c, j in zip(chances, keys, strict=True)))
            close(given[b, i], dense(tiny.output, torch.cat(out)))


def test_tiny_attention_refuses_a_text_that_is_half_in_a_cache(lab: Any) -> None:
    from fedgraft.core.errors import UserError

    adapter = lab.attach("llama", LM, "tiny-attention")
    batch = lab.batch("llama", LM, lab.records("llama", LM, (5,)))
    with torch.no_grad():
        cache = adapter.model(batch["input_ids"]).past_key_values
        with pytest.raises(UserError, match="use_cache = False"):
            adapter.model(batch["input_ids"][:, -1:], past_key_values=cache)


@torch.no_grad()
def test_a_sparse_adapter_is_a_dense_one_under_its_masks(lab: Any) -> None:
    options = {"width": 8, "sparsity": 0.75}
    adapter = shaken(lab, "bert", TEXT, "sparse-adapter", options=options)
    part, base, (x,), given = seen(lab, adapter, "bert", TEXT, "bert.encoder.layer.1.output.dense")
    matrices = []
    for matrix, shape in ((part.down, (8, 32)), (part.up, (32, 8))):
        assert matrix.values.shape == (64,)  # a quarter of 256
        whole = torch.zeros(shape, dtype=torch.float64)
        for value, at in zip(matrix.values, matrix.at.tolist(), strict=True):
            whole[at // shape[1], at % shape[1]] = value
        matrices.append(whole)
    down, up = matrices
    close(given, by_position(lambda h: h + up @ gelu(down @ h + part.down_bias) + part.up_bias, base(x)))


def test_what_a_sparse_adapter_keeps_is_the_largest_and_the_same_at_every_site(lab: Any) -> None:
    options = {"width": 8, "sparsity": 0.75, "spread": 0.5}
    path = PREFIX + "bert.encoder.layer.1.output.dense"
    one, other = (
        lab.attach("bert", TEXT, "sparse-adapter", seed=seed, options=options)
        .model.get_submodule(path)
        .graft["default"]
        for seed in (1, 2)
    )
    assert torch.equal(one.down.at, other.down.at) and torch.equal(one.up.at, other.up.at)
    assert torch.equal(one.down.values, other.down.values)
    assert not one.up.values.any()
    whole = lab.attach("bert", TEXT, "sparse-adapter", options={**options, "sparsity": 0.0})
    full = whole.model.get_submodule(path).graft["default"].down.values.detach()
    assert full[one.down.at].abs().min() >= full.abs().sort(descending=True).values[63]
    random = lab.attach("bert", TEXT, "sparse-adapter", options={**options, "score": "random"})
    assert not torch.equal(random.model.get_submodule(path).graft["default"].down.at, one.down.at)


def test_propetls_layers_see_one_bottleneck_through_masks_of_their_own(lab: Any) -> None:
    adapter = shaken(lab, "bert", TEXT, "propetl", options={"width": 8, "keep": 0.5})
    names = [name for name in adapter.trainables() if ".prototype." in name]
    assert len(names) == 4  # weights and biases of one bottleneck, for two layers
    with torch.no_grad():
        part, base, (x,), given = seen(lab, adapter, "bert", TEXT, "bert.encoder.layer.1.output.dense")
        masks = []
        for mask in (part.mask_down, part.mask_up):
            least = mask.scores.flatten().sort(descending=True).values[len(mask.scores.flatten()) // 2 - 1]
            masks.append((mask.scores >= least).double())
            assert masks[-1].mean() == 0.5
        down, up = masks[0] * part.prototype.down.weight, masks[1] * part.prototype.up.weight
        biases = part.prototype.down.bias, part.prototype.up.bias
        close(given, by_position(lambda h: h + up @ gelu(down @ h + biases[0]) + biases[1], base(x)))
    # Straight through: the mask's gradient is the score's.
    weight = part.prototype.down.weight
    probe = torch.randn_like(weight)
    scores, weights = torch.autograd.grad((part.mask_down(weight) * probe).sum(), [part.mask_down.scores, weight])
    close(scores, (probe * weight).detach())
    close(weights, probe * masks[0])


@torch.no_grad()
def test_propetls_low_rank_update_sees_common_factors_through_masks(lab: Any) -> None:
    settings = {"rank": 4, "alpha": 12, "options": {"keep": 0.25}}
    adapter = shaken(lab, "bert", TEXT, "propetl-lora", **settings)
    assert sum(".prototype." in name for name in adapter.trainables()) == 4  # A and B of queries, and of values
    part, base, (x,), given = seen(lab, adapter, "bert", TEXT, "bert.encoder.layer.1.attention.self.value")
    kept = []
    for mask, factor in ((part.mask_a, part.prototype.a), (part.mask_b, part.prototype.b)):
        ordered = sorted(mask.scores.flatten().tolist(), reverse=True)
        kept.append((mask.scores >= ordered[len(ordered) // 4 - 1]).double() * factor)
    close(given, by_position(lambda word: 3 * kept[1] @ (kept[0] @ word), x) + base(x))


@torch.no_grad()
def test_hyperformers_network_writes_each_adapter_from_where_it_is(lab: Any) -> None:
    options = {"width": 4, "embedding": 6, "hidden": 8}
    adapter = shaken(lab, "bert", TEXT, "hyperformer++", options=options)
    part, base, (x,), given = seen(lab, adapter, "bert", TEXT, "bert.encoder.layer.1.attention.output.dense")
    net = part.network
    assert len({id(p) for n, p in adapter.model.named_parameters() if "network" in n}) == 3 + 4 + 6
    # Of the layers the second, of "attention" and "ffn" the first.
    joined = torch.cat([net.task, net.layers[1], net.positions[0]])
    state = dense(net.join[2], dense(net.join[0], joined).clamp(min=0))
    own = {key: (writer.weight @ state).reshape(net.shapes[key]) for key, writer in net.write.items()}

    def twin(h: torch.Tensor) -> torch.Tensor:
        out = own["up"] @ gelu(own["down"] @ h + own["down_bias"]) + own["up_bias"]
        return h + normal(out, own["norm"], own["norm_bias"], 1e-5)

    close(given, by_position(twin, base(x)), by=1e-10)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "path"), [("bert", "bert.encoder.layer.1.attention.self.query"), ("gpt2", "transformer.h.1.attn.c_attn")]
)
def test_moeloras_experts_are_mixed_by_the_tasks_gate(lab: Any, family: str, path: str) -> None:
    adapter = shaken(lab, family, TEXT, "moelora", rank=4, alpha=6.0, options={"experts": 2, "embedding": 3})
    part, base, (x,), given = seen(lab, adapter, family, TEXT, path)
    logits = part.gate.weight @ part.gate.task
    chances = logits.exp() / logits.exp().sum()
    delta = sum(chances[i] * torch.outer(part.b[:, 2 * i + j], part.a[2 * i + j]) for i in range(2) for j in range(2))
    close(given, base(x) + 6.0 / 4 * by_position(lambda x: delta @ x, x))


@torch.no_grad()
@pytest.mark.parametrize("deep", [True, False])
def test_visual_prompts_stand_between_the_class_token_and_the_patches(lab: Any, deep: bool) -> None:
    adapter = shaken(lab, "vit", IMAGE, "visual-prompt", virtual_tokens=3, options={"deep": deep})
    base = lab.base("vit", IMAGE).model.double()
    batch = lab.batch("vit", IMAGE, lab.records("vit", IMAGE, (3, 5)))
    pixels = batch["pixel_values"].double()
    prompts = [p for name, p in adapter.model.named_parameters() if name.endswith(".tokens")]
    assert len(prompts) == (2 if deep else 1)
    (layers,) = [m for m in base.modules() if isinstance(m, torch.nn.ModuleList)]
    embedded = base.vit.embeddings(pixels)
    head = next(m for n, m in adapter.model.named_modules() if n.endswith("modules_to_save.default"))
    for b in range(2):
        words = [embedded[b, 0], *prompts[0], *embedded[b, 1:]]
        for index, layer in enumerate(layers):
            if index and deep:
                words = [words[0], *prompts[1], *words[4:]]
            words = list(layer(torch.stack(words)[None])[0])
        want = head(base.vit.layernorm(words[0]))
        close(adapter.model(pixel_values=pixels).logits[b], want)
