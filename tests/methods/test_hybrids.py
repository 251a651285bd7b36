"""Hybrids, prefixes, special tokens and the ladder against naive twins, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BertConfig

from fedgraft.core.config import MethodConfig
from fedgraft.core.errors import UserError
from fedgraft.server.traffic import skeleton_of

TEXT, LM = "sequence-classification", "causal-lm"
PREFIX = "base_model.model."
LENGTHS = (3, 11, 1, 6)


def shaken(lab: Any, family: str, task: str, method: str, **settings: Any) -> Any:
    adapter = lab.attach(family, task, method, **settings)
    lab.shaken(adapter, by=0.3)
    adapter.model.double()
    return adapter


def run(lab: Any, adapter: Any, family: str, task: str) -> Any:
    batch = lab.batch(family, task, lab.records(family, task, LENGTHS))
    return batch, lab.losses(adapter.model, batch)


def watch(noted: dict[str, Any], key: str) -> Any:
    def note(module: Any, args: Any, kwargs: Any, given: Any) -> None:
        noted[key] = (args, kwargs, given)

    return note


def close(got: torch.Tensor, want: torch.Tensor, by: float = 1e-12) -> None:
    assert got.dtype == want.dtype == torch.float64 and got.shape == want.shape
    assert float((got - want).abs().max()) <= by * max(1.0, float(want.abs().max()))


def attended(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """softmax(q . k_j / sqrt(w)) v_j summed over j, for one query."""
    scores = torch.stack([(query * key).sum() for key in keys]) / len(query) ** 0.5
    chances = (scores - scores.max()).exp()
    return sum(c / chances.sum() * value for c, value in zip(chances, values, strict=True))


@torch.no_grad()
def test_a_prefix_stands_before_what_each_word_of_bert_sees(lab: Any) -> None:
    adapter = shaken(lab, "bert", TEXT, "mam", virtual_tokens=3, options={"width": 4})
    place = adapter.model.get_submodule(PREFIX + "bert.encoder.layer.1.attention.self")
    prefix, base, noted = place.graft["default"].prefix, place.base_layer, {}
    place.register_forward_hook(watch(noted, "self"), with_kwargs=True)
    batch, _ = run(lab, adapter, "bert", TEXT)
    args, _, given = noted["self"]
    x = args[0]
    for b in range(len(LENGTHS)):
        words = [i for i in range(x.shape[1]) if batch["attention_mask"][b, i]]
        assert len(words) < x.shape[1] or b == 1
        for head in range(4):
            at = slice(8 * head, 8 * head + 8)
            keys = torch.cat([prefix.keys[:, at], base.key(x[b, words])[:, at]])
            values = torch.cat([prefix.values[:, at], base.value(x[b, words])[:, at]])
            for i in words:
                close(given[0][b, i, at], attended(base.query(x[b, i])[at], keys, values))


@torch.no_grad()
def test_a_prefix_stands_before_the_past_of_each_word_of_gpt2(lab: Any) -> None:
    adapter = shaken(lab, "gpt2", LM, "mam", virtual_tokens=3, options={"width": 4})
    place = adapter.model.get_submodule(PREFIX + "transformer.h.1.attn")
    prefix, base, noted = place.graft["default"].prefix, place.base_layer, {}
    base.c_proj.register_forward_hook(watch(noted, "mixed"), with_kwargs=True)
    base.c_attn.register_forward_hook(watch(noted, "made"), with_kwargs=True)
    batch, _ = run(lab, adapter, "gpt2", LM)
    mixed, made = noted["mixed"][0][0], noted["made"][2]
    for b in range(len(LENGTHS)):
        words = [i for i in range(made.shape[1]) if batch["attention_mask"][b, i]]
        for head in range(4):
            at = slice(8 * head, 8 * head + 8)
            query, keys, values = (made[b][:, 32 * part : 32 * part + 32][:, at] for part in range(3))
            for i in words:
                past = [j for j in words if j <= i]
                all_keys = torch.cat([prefix.keys[:, at], keys[past]])
                all_values = torch.cat([prefix.values[:, at], values[past]])
                close(mixed[b, i, at], attended(query[i], all_keys, all_values))


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_prefix_is_there_at_every_step_of_a_text_that_grows(lab: Any, family: str) -> None:
    adapter = shaken(lab, family, LM, "mam", virtual_tokens=3, options={"width": 4})
    ids = lab.batch(family, LM, lab.records(family, LM, (7,)))["input_ids"]
    whole = adapter.model(ids).logits
    cache, parts = None, []
    for i in range(ids.shape[1]):
        given = adapter.model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        cache = given.past_key_values
        parts.append(given.logits)
    close(torch.cat(parts, dim=1), whole, by=1e-10)


@torch.no_grad()
def test_unipelts_gates_are_means_over_the_words_of_a_text(lab: Any) -> None:
    adapter = shaken(lab, "bert", TEXT, "unipelt", rank=2, alpha=3.0, virtual_tokens=3, options={"width": 4})
    layer = "bert.encoder.layer.1.base_layer."
    find = {
        "query": adapter.model.get_submodule(PREFIX + layer + "attention.self.base_layer.query"),
        "self": adapter.model.get_submodule(PREFIX + layer + "attention.self"),
        "output": adapter.model.get_submodule(PREFIX + layer + "output"),
    }
    noted: dict[str, Any] = {}
    for key, place in find.items():
        place.register_forward_hook(watch(noted, key), with_kwargs=True)
    batch, _ = run(lab, adapter, "bert", TEXT)

    def gate(part: Any, x: torch.Tensor) -> torch.Tensor:
        each = [1 / (1 + (-(part.gate.ask.weight[0] @ row + part.gate.ask.bias[0])).exp()) for row in x]
        return sum(each) / len(each)

    update, base = find["query"].graft["default"], find["query"].base_layer
    adapted, join = find["output"].graft["default"], find["output"].base_layer
    prefix, inner = find["self"].graft["default"], find["self"].base_layer
    for b in range(len(LENGTHS)):
        words = [i for i in range(batch["input_ids"].shape[1]) if batch["attention_mask"][b, i]]
        x = noted["query"][0][0][b, words]
        dense = base(x) + gate(update, x) * 3.0 / 2 * x @ (update.b @ update.a).T
        close(noted["query"][2][b, words], dense)
        opened = gate(prefix, x)
        keys = torch.cat([opened * prefix.prefix.keys, inner.key(x)])
        value = inner.value
        changed = (
            value.base_layer(x)
            + gate(value.graft["default"], x) * 3.0 / 2 * x @ (value.graft["default"].b @ value.graft["default"].a).T
        )
        values = torch.cat([opened * prefix.prefix.values, changed])
        for head in range(4):
            at = slice(8 * head, 8 * head + 8)
            for row, i in enumerate(words):
                close(noted["self"][2][0][b, i, at], attended(dense[row, at], keys[:, at], values[:, at]))
        f, h = (t[b, words] for t in noted["output"][0])
        summed = join.dense(f) + h
        down, up = adapted.bottleneck.down, adapted.bottleneck.up
        added = torch.nn.functional.gelu(join.LayerNorm(summed) @ down.weight.T + down.bias) @ up.weight.T + up.bias
        close(noted["output"][2][b, words], join.LayerNorm(summed + gate(adapted, h) * added))


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_pastas_vectors_lie_on_the_special_tokens_alone(lab: Any, family: str) -> None:
    adapter = shaken(lab, family, TEXT, "pasta")
    tokenizer = lab.base(family, TEXT).processor
    first, separator = tokenizer.cls_token_id, tokenizer.sep_token_id
    if first is None:
        first, separator = tokenizer.bos_token_id, tokenizer.eos_token_id
    inside = f"{family}.base_layer."
    paths = [f"{inside}embeddings", f"{inside}encoder.layer.0"]
    assert len(adapter.model.peft_config["default"].places) == 3  # and the whole model
    for path in paths:
        noted: dict[str, Any] = {}
        place = adapter.model.get_submodule(PREFIX + path)
        handles = [
            place.register_forward_hook(watch(noted, "outer"), with_kwargs=True),
            place.base_layer.register_forward_hook(watch(noted, "inner"), with_kwargs=True),
        ]
        batch, _ = run(lab, adapter, family, TEXT)
        for handle in handles:
            handle.remove()
        vectors = place.graft["default"].vectors
        want = noted["inner"][2].clone()
        count = 0
        for b, row in enumerate(batch["input_ids"].tolist()):
            for i, token in enumerate(row):
                if token in (first, separator):
                    want[b, i] += vectors[0 if token == first else 1]
                    count += 1
        assert count == 2 * len(LENGTHS)
        close(noted["outer"][2], want)


def test_pasta_needs_to_see_the_ids(lab: Any) -> None:
    adapter = lab.attach("bert", TEXT, "pasta")
    with pytest.raises(UserError, match="give the model input_ids"):
        adapter.model(inputs_embeds=torch.zeros(1, 4, 32))


@torch.no_grad()
@pytest.mark.parametrize(("family", "task"), [("bert", TEXT), ("llama", LM)])
def test_a_ladder_climbs_beside_the_frozen_layers(lab: Any, family: str, task: str) -> None:
    adapter = shaken(lab, family, task, "ladder-side", options={"reduction": 4, "heads": 2})
    path = "bert.encoder" if family == "bert" else "model"
    place = adapter.model.get_submodule(PREFIX + path)
    side, base = place.graft["default"], place.base_layer
    noted: dict[str, Any] = {}
    layers = base.layer if family == "bert" else base.layers
    for index, layer in enumerate(layers):
        layer.register_forward_hook(watch(noted, str(index)), with_kwargs=True)
    place.register_forward_hook(watch(noted, "whole"), with_kwargs=True)
    batch, _ = run(lab, adapter, family, task)
    args, kwargs, _ = noted["0"]
    states = [args[0] if args else kwargs["hidden_states"], noted["0"][2], noted["1"][2]]
    last = states[2] if family == "bert" else base.norm(states[2])
    given = noted["whole"][2][0]
    for b in range(len(LENGTHS)):
        words = [i for i in range(given.shape[1]) if batch["attention_mask"][b, i]]
        g = side.rungs[0](states[0][b, words])
        for index, block in enumerate(side.blocks):
            m = 1 / (1 + (-side.gates[index] / 0.1).exp())
            x = m * side.rungs[index + 1](states[index + 1][b, words]) + (1 - m) * g
            y, own = block.attention_norm(x), block.attention
            rows = []
            for i in range(len(words)):
                past = range(len(words)) if family == "bert" else range(i + 1)
                heads = [
                    attended(own.query(y[i])[at], own.key(y[list(past)])[:, at], own.value(y[list(past)])[:, at])
                    for at in (slice(0, 4), slice(4, 8))
                ]
                rows.append(own.output(torch.cat(heads)))
            x = x + torch.stack(rows)
            g = x + block.down(torch.nn.functional.gelu(block.up(block.inner_norm(x))))
        close(given[b, words], last[b, words] + side.out(g), by=1e-11)


def test_no_gradient_is_taken_through_the_layers_beside_a_ladder(lab: Any) -> None:
    adapter = lab.attach("bert", TEXT, "ladder-side", options={"reduction": 4, "heads": 2})
    lab.shaken(adapter)
    tracked: list[bool] = []
    for layer in adapter.model.get_submodule(PREFIX + "bert.encoder").base_layer.layer:
        layer.register_forward_hook(lambda m, args, given: tracked.append(given.requires_grad))
    _, losses = run(lab, adapter, "bert", TEXT)
    losses.sum().backward()
    assert tracked == [False, False]
    assert all(p.grad is not None for p in adapter.trainables().values())


def test_a_ladder_refuses_two_stacks(lab: Any) -> None:
    with pytest.raises(UserError, match="has two: choose houlsby"):
        lab.attach("t5", TEXT, "ladder-side")


@torch.no_grad()
@pytest.mark.parametrize(("family", "task"), [("bert", TEXT), ("llama", LM)])
def test_fused_layers_are_mixed_token_by_token(lab: Any, family: str, task: str) -> None:
    adapter = shaken(lab, family, task, "attention-fusion")
    path = "bert.encoder" if family == "bert" else "model"
    place = adapter.model.get_submodule(PREFIX + path)
    part, base = place.graft["default"], place.base_layer
    noted: dict[str, Any] = {}
    for index, layer in enumerate(base.layer if family == "bert" else base.layers):
        layer.register_forward_hook(watch(noted, str(index)), with_kwargs=True)
    place.register_forward_hook(watch(noted, "whole"), with_kwargs=True)
    run(lab, adapter, family, task)
    states, given = [noted["0"][2], noted["1"][2]], noted["whole"][2][0]
    for b in range(len(LENGTHS)):
        for i in range(given.shape[1]):
            said = torch.stack([state[b, i] for state in states])
            mixed = attended(part.query, said, said)
            spread = ((mixed - mixed.mean()) ** 2).mean() + part.norm.eps
            close(given[b, i], (mixed - mixed.mean()) / spread.sqrt() * part.norm.weight + part.norm.bias)


def test_the_groups_of_s4_are_a_spindle_and_have_strategies_of_their_own() -> None:
    config = skeleton_of(BertConfig(), "bert").attach(MethodConfig(name="s4", rank=4, alpha=8)).model.peft_config
    found = [set() for _ in range(12)]
    for path, kind in config["default"].places.items():
        found[int(path.split(".")[3])] |= set(kind)
    assert found == [set(g) for g, n in zip(("AL", "AP", "APB", "PBL"), (2, 4, 4, 2), strict=True) for _ in range(n)]


@torch.no_grad()
def test_a_place_of_s4_has_an_update_a_bias_and_an_adapter_in_this_order(lab: Any) -> None:
    options = {"width": 5, "groups": ("AL", "APB", "PBL", "AL")}
    adapter = shaken(lab, "bert", TEXT, "s4", rank=2, alpha=6, options=options)
    x = torch.randn(4, 32, dtype=torch.float64)
    query = adapter.model.get_submodule(PREFIX + "bert.encoder.layer.1.attention.self.query")
    part, base = query.graft["default"], query.base_layer
    close(query(x), x @ (base.weight + 3 * part.b @ part.a).T + base.bias + part.shift)
    behind = adapter.model.get_submodule(PREFIX + "bert.encoder.layer.0.attention.output.dense")
    part, base = behind.graft["default"], behind.base_layer
    y = base(x) + part.shift
    down, up = part.bottleneck.down, part.bottleneck.up
    close(behind(x), y + torch.nn.functional.gelu(y @ down.weight.T + down.bias) @ up.weight.T + up.bias)


def narrow(bottleneck: Any, x: torch.Tensor) -> torch.Tensor:
    """U relu(D x + b) + c of one word, a number at a time."""
    down, up = bottleneck.down, bottleneck.up
    inner = [max(0.0, float((row * x).sum() + bias)) for row, bias in zip(down.weight, down.bias, strict=True)]
    return sum((v * column for v, column in zip(inner, up.weight.T, strict=True)), up.bias.clone())


def normalised(norm: Any, x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean()) / (x.var(unbiased=False) + norm.eps).sqrt() * norm.weight + norm.bias


@torch.no_grad()
@pytest.mark.parametrize(("serial", "parallel"), [(3, 5), (3, 0), (0, 5)])
def test_autopeft_adds_both_adapters_before_the_norm_of_bert(lab: Any, serial: int, parallel: int) -> None:
    sizes = {"serial": serial, "parallel": parallel, "prefix": 2}
    adapter = shaken(lab, "bert", TEXT, "autopeft", layers=(1,), options=sizes)
    place, noted = adapter.model.get_submodule(PREFIX + "bert.encoder.layer.1.output"), {}
    join, base = place.graft["default"], place.base_layer
    assert not hasattr(adapter.model.get_submodule(PREFIX + "bert.encoder.layer.0.output"), "graft")
    place.register_forward_hook(watch(noted, "out"), with_kwargs=True)
    run(lab, adapter, "bert", TEXT)
    (inner, x), _, given = noted["out"]
    for b, i in ((0, 0), (1, 10), (3, 2)):
        summed = base.dense.weight @ inner[b, i] + base.dense.bias + x[b, i]
        total = summed.clone()
        if serial:
            total += narrow(join.serial, normalised(base.LayerNorm, summed))
        if parallel:
            total += 4 * narrow(join.parallel, x[b, i])
        close(given[b, i], normalised(base.LayerNorm, total))


@torch.no_grad()
def test_autopeft_adapts_the_stream_of_gpt2(lab: Any) -> None:
    adapter = shaken(lab, "gpt2", LM, "autopeft", options={"serial": 3, "parallel": 5, "prefix": 0})
    place, noted = adapter.model.get_submodule(PREFIX + "transformer.h.1"), {}
    place.register_forward_hook(watch(noted, "layer"), with_kwargs=True)
    place.base_layer.ln_2.register_forward_hook(watch(noted, "norm"), with_kwargs=True)
    block = place.base_layer.mlp
    block.base_layer.register_forward_hook(watch(noted, "block"), with_kwargs=True)
    run(lab, adapter, "gpt2", LM)
    (stream,), _, x = noted["norm"]
    given = noted["layer"][2]
    given = given[0] if isinstance(given, tuple) else given
    for b, i in ((0, 0), (1, 10), (3, 2)):
        h = stream[b, i] + noted["block"][2][b, i] + 4 * narrow(block.graft["default"].bottleneck, x[b, i])
        close(given[b, i], h + narrow(place.graft["default"].bottleneck, h))


def test_autopeft_says_what_does_not_fit(lab: Any) -> None:
    with pytest.raises(UserError, match=r"no prefix fits T5ForSequenceClassification: set method\.options\.prefix = 0"):
        lab.attach("t5", TEXT, "autopeft", options={"prefix": 1})
    with pytest.raises(UserError, match="the model has the layers 0 to 1, and no 2"):
        lab.attach("bert", TEXT, "autopeft", layers=(0, 2))
    with pytest.raises(UserError, match=r"without any module: set method\.options\.serial, parallel or prefix above 0"):
        lab.attach("bert", TEXT, "autopeft", options={"serial": 0, "parallel": 0, "prefix": 0})


def test_autopefts_defaults_are_the_papers_find_scaled_to_the_width(lab: Any) -> None:
    spec = lab.attach("bert", TEXT, "autopeft").spec
    shapes = {
        tensor.name.split(".graft.default.")[1]: tensor.shape for tensor in spec.tensors if ".layer.0." in tensor.name
    }
    # A 64th of 32 would be none.
    assert shapes["serial.down.weight"] == (1, 32)
    assert shapes["parallel.down.weight"] == (4, 32)
    assert shapes["prefix.keys"] == (1, 32)
