"""AdaMix against naive twins, in float64: its routes, its loss of two passes, and the clipping of both together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fedgraft.core.config import MethodConfig
from fedgraft.core.errors import UserError
from fedgraft.core.tasks import Predictions
from fedgraft.methods.catalogue.adamix import MixedAdapter, TwoRoutes
from fedgraft.privacy.clipping import create_engine
from fedgraft.privacy.noise import RandomStream

TEXT, LM = "sequence-classification", "causal-lm"
LENGTHS = (3, 11, 1, 6, 8)


class Doubled:
    """The task's predictions without its rounding to float32."""

    def predictions(self, model: nn.Module, batch: Any) -> Predictions:
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        if "labels" in batch:
            return Predictions(logits[:, None], batch["labels"][:, None], logits.new_ones(len(logits), 1))
        mask = batch["attention_mask"][:, 1:].double()
        return Predictions(logits[:, :-1], batch["input_ids"][:, 1:], mask / mask.sum(1, keepdim=True))


def mixed(lab: Any, family: str, task: str, **options: Any) -> tuple[Any, Any]:
    adapter = lab.attach(family, task, "adamix", options=options)
    lab.shaken(adapter, by=0.3)
    adapter.model.double()
    config = MethodConfig(name="adamix", options=options)
    torch.manual_seed(0)
    own = adapter.steps(adapter, config, first=0, total=10)
    assert isinstance(own, TwoRoutes)
    own.before(0)
    return adapter, own


def parts(adapter: Any) -> list[Any]:
    return [module for module in adapter.model.modules() if isinstance(module, MixedAdapter)]


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"share_up": False}, {"share_down": True, "share_up": False, "experts": 3}])
def test_a_place_holds_the_projections_and_computes_with_their_mean(lab: Any, options: dict[str, Any]) -> None:
    adapter, _ = mixed(lab, "bert", TEXT, **options)
    made, experts = parts(adapter)[0], options.get("experts", 4)
    assert len(made.down.weight) == (1 if options.get("share_down") else experts)
    assert len(made.up.weight) == (1 if options.get("share_up", True) else experts)
    base = nn.Linear(5, made.up.weight.shape[1]).double()
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    h = base(x)
    down, up = sum(made.down.weight) / len(made.down.weight), sum(made.up.weight) / len(made.up.weight)
    inner = h @ down.T + sum(made.down.bias) / len(made.down.bias)
    # GELU by its definition.
    inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    want = h + inner @ up.T + sum(made.up.bias) / len(made.up.bias)
    assert float((made(base, x) - want).abs().max()) <= 1e-12


@pytest.mark.parametrize(("family", "task"), [("bert", TEXT), ("gpt2", LM)])
@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_the_loss_is_of_two_routes_that_shall_agree(lab: Any, family: str, task: str, weight: float) -> None:
    adapter, own = mixed(lab, family, task, share_up=False, consistency=weight)
    batch = lab.batch(family, task, lab.records(family, task, LENGTHS))
    with torch.no_grad():
        got = own.losses(Doubled(), batch)
        # The twin: an adapter of one expert, which holds what a route goes through.
        found = []
        for route in own.routes:
            twin = lab.attach(family, task, "adamix", options={"experts": 1})
            twin.model.double()
            own_names = dict(twin.model.named_parameters())
            chosen = iter(route)
            at = {name: next(chosen) for name, module in adapter.model.named_modules() if hasattr(module, "chosen")}
            for name, parameter in adapter.model.named_parameters():
                owner = name.rpartition(".")[0]
                own_names[name].copy_(parameter[at[owner]][None] if owner in at else parameter)
            found.append(Doubled().predictions(twin.model, batch))
    first, second = found
    for b in range(len(LENGTHS)):
        want = torch.zeros((), dtype=torch.float64)
        for t in range(first.logits.shape[1]):
            p, q = first.logits[b, t].softmax(0), second.logits[b, t].softmax(0)
            divergence = (p * (p / q).log()).sum() + (q * (q / p).log()).sum()
            want += first.shares[b, t] * (-p[first.targets[b, t]].log() + weight * divergence / 2)
        assert abs(float(got[b] - want)) <= 1e-12 * max(1.0, abs(float(want)))
    assert not torch.allclose(first.logits, second.logits), "two routes that are one would test nothing"


@pytest.mark.parametrize(("family", "task"), [("bert", TEXT), ("t5", TEXT), ("llama", LM)])
@pytest.mark.parametrize("options", [{}, {"share_up": False}])
def test_both_passes_of_a_record_are_clipped_together(
    lab: Any, family: str, task: str, options: dict[str, Any]
) -> None:
    adapter, own = mixed(lab, family, task, **options)
    records, parameters = lab.records(family, task, LENGTHS), list(adapter.trainables().values())
    alone = (own.losses(Doubled(), lab.batch(family, task, [record])).sum() for record in records)
    rows = lab.gradients(parameters, alone)
    clip = float(rows.norm(dim=1).median())
    with create_engine("exact", adapter.model, adapter.trainables(), clip) as engine:
        for some in (records[:2], records[2:]):
            engine.expect(len(some))
            engine.add(own.losses(Doubled(), lab.batch(family, task, some)))
        engine.release(0.0, 1.0, RandomStream.seeded_not_private("mixed"))
        got = lab.flat(adapter.trainables())
    lab.close(got, lab.clipped(rows, clip))
    assert float(rows.norm(dim=1).min()) < clip < float(rows.norm(dim=1).max())


def test_a_step_draws_every_projection_and_then_the_mean_is_back(lab: Any) -> None:
    adapter, own = mixed(lab, "bert", TEXT)
    batch = lab.batch("bert", TEXT, lab.records("bert", TEXT, LENGTHS))
    seen: set[tuple[int, ...]] = set()
    with torch.no_grad():
        before = lab.losses(adapter.model, batch)
        for step in range(40):
            own.before(step)
            one, same = own.losses(Doubled(), batch), own.losses(Doubled(), batch)
            assert torch.equal(one, same), "all parts of a batch take the routes of their step"
            seen |= {tuple(route) for route in own.routes}
        assert torch.equal(lab.losses(adapter.model, batch), before)
    assert {at for route in seen for at in route[::2]} == {0, 1, 2, 3}
    assert {at for route in seen for at in route[1::2]} == {0}, "one way up for all"
    assert len(seen) > 10


def test_layers_that_run_again_are_refused(lab: Any) -> None:
    adapter, own = mixed(lab, "bert", TEXT)
    adapter.model.gradient_checkpointing_enable()
    with pytest.raises(UserError, match=r"train\.gradient_checkpointing = false"):
        own.losses(Doubled(), lab.batch("bert", TEXT, lab.records("bert", TEXT, LENGTHS)))
