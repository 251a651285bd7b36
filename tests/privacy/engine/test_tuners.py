"""Every tuner of PEFT: the clipped sum is that of a loop over examples, or a line names the tensor and says why not."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from fedgraft.core.errors import UserError
from fedgraft.privacy.clipping import ExactGradients
from fedgraft.privacy.noise import RandomStream

#: By name, so that the cases are known before any library is loaded; held against `tests/tuners.py` below.
FAST = (
    *("lora, own biases", "lora, biases of B", "lora, embedding", "lora, tokens", "dora, embedding", "qalora", "alora"),
    *("adalora", "loha", "lokr", "vera", "pvera", "oft", "oft, cayley", "boft", "hra"),
    *("hra, orthogonal", "fourierft", "waveft", "vblora", "unilora", "tinylora", "randlora", "gralora", "delora"),
    *("hira", "glora", "psoft", "peanut", "frod", "miss", "miss, bat", "shira", "road", "road, variant 4", "beft"),
    *("c3a", "ia3, all outputs", "trainable tokens", "p-tuning", "p-tuning, lstm", "prefix, projection", "cartridge"),
)
ONE_BY_ONE = {"alora", "frod", "c3a", "lily"}
STREAM = RandomStream.seeded_not_private("tuners")


def _check(lab: Any, tuners: ModuleType, name: str, family: str) -> ExactGradients:
    model, case = tuners.build(lab, name, family)
    records = lab.records(*case, lab.lengths)
    trainables = {n: p for n, p in model.named_parameters() if p.requires_grad}
    rows = lab.gradients(
        list(trainables.values()), (lab.losses(model, lab.batch(*case, [record])).sum() for record in records)
    )
    norms = rows.norm(dim=1)
    clip = float(norms[norms > 0].median())
    with ExactGradients(model, trainables, clip) as engine:
        for part in (records[:2], records[2:]):
            engine.expect(len(part))
            engine.add(lab.losses(model, lab.batch(*case, part)))
        engine.release(0.0, 1.0, STREAM)
        lab.close(lab.flat(trainables), lab.clipped(rows, clip))
    return engine


@pytest.mark.parametrize("name", FAST)
def test_every_tuner_is_clipped_as_by_a_loop_over_examples(lab: Any, tuners: ModuleType, name: str) -> None:
    engine = _check(lab, tuners, name, "bert")
    # Only layers that cannot do otherwise pass their examples one by one.
    assert bool(engine.one_by_one) == (name in ONE_BY_ONE)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["roberta", "gpt2", "llama", "t5", "vit"])
@pytest.mark.parametrize("name", FAST)
def test_every_tuner_on_every_family_is_too(lab: Any, tuners: ModuleType, name: str, family: str) -> None:
    try:
        _check(lab, tuners, name, family)
    except tuners.UnfitError as error:
        pytest.skip(f"PEFT: {error}")
    except (NotImplementedError, ValueError, RuntimeError) as error:
        virtual = ("p-tuning", "p-tuning, lstm", "prefix, projection", "cartridge", "trainable tokens")
        if family != "t5" or name not in virtual:
            raise
        pytest.skip(f"PEFT: {error}")
    except UserError as error:
        # PEFT looks T5's embedding up past its wrapper: nothing trains there, in private or otherwise.
        if family != "t5" or "took no part in this batch" not in str(error):
            raise


@pytest.mark.parametrize(
    ("name", "family"), [("lily", "bert"), ("osf", "bert"), ("cpt", "gpt2"), ("llama-adapter", "llama")]
)
def test_what_cannot_be_clipped_is_refused_by_tensor(lab: Any, tuners: ModuleType, name: str, family: str) -> None:
    model, case = tuners.build(lab, name, family)
    trainables = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with (
        pytest.raises(UserError, match=tuners.REFUSED[name]) as refusal,
        ExactGradients(model, trainables, 1.0) as engine,
    ):
        engine.expect(5)
        engine.add(lab.losses(model, lab.batch(*case, lab.records(*case, lab.lengths))))
    assert str(refusal.value).split()[1] in trainables
    assert "\n" not in str(refusal.value)


def test_every_tuner_of_the_table_is_tried(tuners: ModuleType) -> None:
    assert set(FAST) | set(tuners.REFUSED) == set(tuners.TUNERS)
    assert not set(FAST) & set(tuners.REFUSED)


def test_trained_tokens_of_a_large_vocabulary_need_no_table_for_each_example(lab: Any, tuners: ModuleType) -> None:
    """The memory that a single table would take is refused; the trained rows are not."""
    model, case = tuners.build(lab, "trainable tokens", "bert")
    trainables = {n: p for n, p in model.named_parameters() if p.requires_grad}
    records = lab.records(*case, lab.lengths)
    table = model.get_base_model().bert.embeddings.word_embeddings.base_layer.weight
    assert 5 * 8 * sum(p.numel() for p in trainables.values()) < 5 * 8 * table.numel()
    memory = 5 * 8 * table.numel() - 1
    with ExactGradients(model, trainables, 1.0, memory=memory) as engine:
        engine.expect(5)
        engine.add(lab.losses(model, lab.batch(*case, records)))


@pytest.mark.parametrize("name", ["hra", "hra, orthogonal", "boft"])
def test_another_form_of_a_layer_computes_what_the_layer_does(lab: Any, tuners: ModuleType, name: str) -> None:
    from fedgraft.privacy.engine.forms import form_of

    model, _ = tuners.build(lab, name, "bert")
    layers = [layer for layer in model.modules() if form_of(layer) is not None]
    assert len(layers) == 4
    x = torch.randn(3, 5, 32, dtype=torch.float64)
    for layer in layers:
        form: Any = form_of(layer)
        lab.close(form(x), layer(x))
    layers[0].merge()
    assert form_of(layers[0]) is None


def test_butterflies_of_several_factors_turn_in_the_order_that_their_product_has(lab: Any, tuners: ModuleType) -> None:
    """PEFT builds several only where its CUDA extension is; their dense product is the naive twin."""
    from fedgraft.privacy.engine.forms import form_of

    model, _ = tuners.build(lab, "boft", "bert")
    layer: Any = next(layer for layer in model.modules() if form_of(layer) is not None)
    generator = torch.Generator().manual_seed(0)
    width, blocks, size = 32, 8, 4
    layer.boft_R["default"] = torch.nn.Parameter(torch.randn(3, blocks, size, size, generator=generator).double())
    orders = [torch.randperm(width, generator=generator) for _ in range(3)]
    layer.boft_P = torch.stack([torch.eye(width, dtype=torch.float64)[order] for order in orders])
    rotation = torch.eye(width, dtype=torch.float64)
    for index in range(3):
        blocks_of_one = layer.cayley_batch(layer.boft_R["default"][index])
        dense = layer.boft_P[index] @ torch.block_diag(*blocks_of_one) @ layer.boft_P[index].T
        rotation = dense @ rotation
    x = torch.randn(3, 5, width, dtype=torch.float64)
    base = layer.get_base_layer()
    form: Any = form_of(layer)
    want = torch.nn.functional.linear(x @ rotation, base.weight) * layer.boft_s["default"].squeeze(-1) + base.bias
    lab.close(form(x), want)
