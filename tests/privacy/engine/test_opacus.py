"""Opacus and the engine of one's own agree where Opacus is right; where it is not, it refuses by the tensor's name."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from fedgraft.core.errors import UserError
from fedgraft.privacy.clipping import OpacusGradients, create_engine, require_exact

Case = tuple[str, str, str]
TEXT = "sequence-classification"
BERT = ("bert", TEXT)


def test_both_engines_give_the_same_clipped_sum(lab: Any, hooked: Case) -> None:
    adapter = lab.double(hooked)
    records = lab.records(*hooked[:2], lab.lengths)
    batches = [records[:3], records[3:]]
    clip = float(lab.rows(adapter, hooked, records).norm(dim=1).median())
    own = lab.summed(adapter, hooked, batches, clip)
    lab.close(lab.summed(adapter, hooked, batches, clip, engine="opacus"), own)


@pytest.mark.parametrize("method", ["lora", "bitfit"])
def test_both_engines_agree_on_convolutions(lab: Any, method: str) -> None:
    case = ("vit", "image-classification", method)
    adapter = lab.double(case, **({"target_modules": ("projection", "q_proj")} if method == "lora" else {}))
    assert any("patch_embeddings.projection" in name for name in adapter.trainables())
    records = lab.records(*case[:2], lab.lengths)
    own = lab.summed(adapter, case, [records], 0.5)
    lab.close(lab.summed(adapter, case, [records], 0.5, engine="opacus"), own)


@pytest.mark.parametrize("method", ["lora", "bitfit"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_reentrant_checkpointing_changes_nothing(lab: Any, family: str, method: str) -> None:
    case = (family, TEXT, method)
    adapter = lab.double(case)
    records = lab.records(family, TEXT, lab.lengths)
    rows = lab.rows(adapter, case, records)
    clip = float(rows.norm(dim=1).median())
    runs = lab.checkpointed(adapter, reentrant=True)
    got = lab.summed(adapter, case, [records[:3], records[3:]], clip, engine="opacus")
    lab.close(got, lab.clipped(rows, clip))
    assert any(not grad for _, grad in runs) and any(grad for _, grad in runs)


def test_other_checkpointing_is_refused_not_wrong(lab: Any) -> None:
    adapter = lab.double((*BERT, "lora"))
    lab.checkpointed(adapter, reentrant=False)
    with pytest.raises(UserError, match=r"lora_A\.default\.weight got no per-sample gradient.*must be reentrant"):
        lab.summed(adapter, (*BERT, "lora"), [lab.records(*BERT, lab.lengths)], 1.0, engine="opacus")


@pytest.mark.parametrize(
    ("family", "method", "names"),
    [
        ("bert", "dora", "query.lora_A.default.weight"),
        ("gpt2", "dora", "c_attn.lora_A.default.weight"),
        ("bert", "ia3", "key.ia3_l.default"),
        ("t5", "ia3", "ia3_l.default"),
        ("bert", "prompt", "prompt_encoder.default.embedding.weight"),
    ],
)
def test_methods_that_opacus_is_wrong_for_are_refused_by_tensor(lab: Any, family: str, method: str, names: str) -> None:
    adapter = lab.attach(family, TEXT, method)
    with pytest.raises(UserError) as refusal:
        require_exact(adapter.model, adapter.trainables(), "opacus")
    text = str(refusal.value)
    assert names in text and "no exact per-sample gradient" in text and 'privacy.engine = "exact"' in text
    assert "\n" not in text
    assert text.split()[1] in adapter.trainables()


def test_the_engines_differ_in_what_they_take_as_they_say(lab: Any, fitting: Case) -> None:
    adapter = lab.attach(*fitting)
    if fitting[2] in ("lora", "rslora", "lora-sb", "bitfit", "ln", "prefix"):
        assert isinstance(create_engine("opacus", adapter.model, adapter.trainables(), 1.0), OpacusGradients)
    else:
        with pytest.raises(UserError, match="no exact per-sample gradient in Opacus"):
            create_engine("opacus", adapter.model, adapter.trainables(), 1.0)


def test_two_layers_that_share_a_tensor_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(UserError, match="two layers share it"):
        require_exact(model, dict(model.named_parameters()), "opacus")


def test_layers_without_an_exact_rule_are_refused() -> None:
    for layer in (nn.Embedding(5, 4), nn.GRU(4, 4), nn.Bilinear(4, 4, 4), nn.PReLU(), nn.BatchNorm1d(4)):
        with pytest.raises(UserError, match=f"its layer is {type(layer).__name__}"):
            require_exact(layer, dict(layer.named_parameters()), "opacus")


def test_a_forward_pass_without_its_backward_is_never_taken_for_another(lab: Any) -> None:
    adapter = lab.double((*BERT, "lora"))
    batch = lab.batch(*BERT, lab.records(*BERT, lab.lengths))
    with create_engine("opacus", adapter.model, adapter.trainables(), 1.0) as engine:
        lab.losses(adapter.model, batch)
        with pytest.raises(UserError, match="got no per-sample gradient"):
            engine.add(lab.losses(adapter.model, batch))


def test_a_different_row_count_is_refused(lab: Any) -> None:
    adapter = lab.attach(*BERT, "lora")
    batch = lab.batch(*BERT, lab.records(*BERT, (3, 4, 5, 6)))
    with create_engine("opacus", adapter.model, adapter.trainables(), 1.0) as engine:
        losses = lab.losses(adapter.model, batch)
        with pytest.raises(UserError, match="does not have one row for each example"):
            engine.add(losses.reshape(2, 2).mean(1))
