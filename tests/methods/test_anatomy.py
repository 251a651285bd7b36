"""The layers of a transformer, whatever its family calls them."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from transformers import AutoConfig, AutoModel, DistilBertConfig, MistralConfig, Qwen2Config, T5Config

from fedgraft.core.errors import UserError
from fedgraft.methods.anatomy import hidden_width, is_turned, layers_of, shape_of

WIDTH = 32
_TINY: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama", "t5", "vit"])
def test_every_family_has_its_layers_with_all_their_parts(family: str, tiny_model: Any) -> None:
    model = AutoModel.from_config(AutoConfig.from_pretrained(tiny_model(family)))
    layers, modules = layers_of(model), dict(model.named_modules())
    assert [layer.index for layer in layers] == ([0, 1, 0, 1] if family == "t5" else [0, 1])
    assert hidden_width(model) == WIDTH
    for layer in layers:
        for attention in layer.attentions:
            assert shape_of(modules[attention.query])[0] == WIDTH
            assert shape_of(modules[attention.output])[1] == WIDTH
            assert attention.fused == (family == "gpt2")
        assert shape_of(modules[layer.up])[0] == WIDTH == shape_of(modules[layer.down])[1]
        assert bool(layer.ffn) != bool(layer.joins)
        assert bool(layer.gate) == (family == "llama")
        owned = {f"{layer.path}.{name}" for name, m in modules[layer.path].named_modules() if _is_linear(m)}
        assert set(layer.linears) == owned
        assert layer.attended in layer.norms
        assert layer.attended.endswith(
            ("attention.output.LayerNorm", "post_attention_layernorm", "ln_2", "layernorm_after", "layer_norm")
        )
        assert len(layer.norms) == (3 if family == "t5" and layer.stack else 2)
    if family == "t5":
        assert [len(layer.attentions) for layer in layers] == [1, 1, 2, 2]
    assert any(is_turned(modules[path]) for path in layers[0].linears) == (family == "gpt2")


@pytest.mark.parametrize(
    "config",
    [
        DistilBertConfig(n_layers=2, dim=32, hidden_dim=64, n_heads=4, vocab_size=50),
        MistralConfig(num_hidden_layers=2, **_TINY),
        Qwen2Config(num_hidden_layers=2, **_TINY),
        T5Config(num_layers=2, d_model=32, d_kv=8, d_ff=64, num_heads=4, vocab_size=50, feed_forward_proj="gated-gelu"),
    ],
    ids=lambda config: config.model_type,
)
def test_their_kin_are_known_too(config: Any) -> None:
    model = AutoModel.from_config(config)
    layers, modules = layers_of(model), dict(model.named_modules())
    assert len(layers) == (4 if config.model_type == "t5" else 2)
    for layer in layers:
        owned = {f"{layer.path}.{name}" for name, m in modules[layer.path].named_modules() if _is_linear(m)}
        assert set(layer.linears) == owned


def test_another_family_is_one_line() -> None:
    with pytest.raises(UserError, match="the layers of a Sequential model are not known to this method; choose lora"):
        layers_of(nn.Sequential(nn.Linear(2, 2)))


def _is_linear(module: nn.Module) -> bool:
    try:
        shape_of(module)
    except UserError:
        return False
    return True
