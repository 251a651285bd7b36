"""The audit over the real trainer: honest training passes, and every known bug is caught by the layer meant for it.

Audits draw from the operating system, as they must. Honest ones are held at `RARE` here, so that these tests fail by
chance once in a hundred thousand times; the bugs lie many orders of magnitude below it.
"""

from __future__ import annotations

import hmac
from typing import Any

import numpy as np
import pytest
import torch

from fedgraft.client import trainer
from fedgraft.client.audit.canaries import canary_config, synthetic_records
from fedgraft.client.audit.faults import FAULTS
from fedgraft.client.audit.layers import LAYERS, Audit, independent
from fedgraft.client.audit.selftest import applicable, self_test
from fedgraft.client.audit.subject import Subject, subject
from fedgraft.client.audit.watching import watch
from fedgraft.client.data import Records
from fedgraft.client.resident import resident
from fedgraft.client.trainer import by_unit
from fedgraft.core.config import RunConfig, parse_config
from fedgraft.core.errors import UserError
from fedgraft.methods import Steps
from fedgraft.privacy.audit.exactness import clipped_sum
from fedgraft.privacy.correlated import CorrelatedNoise
from fedgraft.privacy.noise import RandomStream
from fedgraft.privacy.plan import PrivacyPlan
from fedgraft.privacy.sampling import Sample

RARE = 1e-6


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return canary_config(tmp_path_factory.mktemp("canary"))


def changed(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    values = config.model_dump(mode="json")
    for name, keys in sections.items():
        values[name] = {**values[name], **keys}
    return parse_config(values)


@pytest.fixture(scope="module")
def canaries(plan: RunConfig) -> Records:
    return synthetic_records(plan, 200)


@pytest.fixture(scope="module")
def audited(plan: RunConfig, canaries: Records) -> Subject:
    return subject(plan, "canary", canaries, units=96)


def test_honest_training_passes_every_layer(audited: Subject) -> None:
    seen: list[str] = []
    verdicts = Audit(audited, canaries=96, alpha=RARE).run(watch=seen.append)
    assert seen == [verdict.layer for verdict in verdicts] == list(LAYERS)
    assert all(verdict.good for verdict in verdicts), [verdict.findings for verdict in verdicts]
    exactness, sensitivity, noise, bound = verdicts
    assert exactness.statistics["largest"] < 1e-4 and len(exactness.statistics["cases"]) == 4
    assert 0.99 < sensitivity.statistics["largest"] <= 1.001, "a bound that nothing comes near was not tested"
    assert len(sensitivity.statistics["pairs"]) == 12
    assert noise.statistics["steps"] == [6] * 4 and noise.statistics["values"] == 24 * audited.reference.size
    assert 0 <= bound.statistics["bound"] < bound.statistics["claim"]


def test_every_known_bug_is_caught_by_the_layer_meant_for_it(audited: Subject) -> None:
    seen: list[str] = []
    found = self_test(audited, canaries=96, watch=seen.append)
    assert [caught.fault for caught in found] == seen == [fault.name for fault in FAULTS]
    assert {caught.fault: caught.by for caught in found} == {fault.name: fault.caught_by for fault in FAULTS}
    assert all(caught.good and caught.finding for caught in found)


@pytest.mark.parametrize(
    ("fault", "layers"),
    [
        ("half noise", {"noise"}),
        ("repeated noise", {"noise"}),
        ("shared noise", {"noise"}),
        ("unclipped head", {"exactness", "sensitivity", "noise"}),
        ("records for patients", {"exactness", "sensitivity", "noise"}),
    ],
)
def test_which_layers_see_a_bug(audited: Subject, fault: str, layers: set[str]) -> None:
    (broken,) = [known for known in FAULTS if known.name == fault]
    verdicts = Audit(audited, canaries=96, fault=broken).run(LAYERS[:3])
    assert {verdict.layer for verdict in verdicts if not verdict.good} == layers


def _fixed_size(self: Any, step: int) -> Sample:
    chosen = [group[0] for group in self._groups[step % 3 :][:4]]
    return Sample(np.array(chosen, dtype=np.int64), np.arange(len(chosen)))


def _one_unit_a_record(*given: Any) -> Any:
    for examples, units in by_unit(*given):
        yield examples, np.arange(len(units))


@pytest.mark.parametrize(
    ("place", "name", "broken", "layer"),
    [
        (trainer.RandomStream, "from_os", lambda: RandomStream.seeded_not_private("the run"), "noise"),
        (trainer.Sampler, "sample", _fixed_size, "noise"),
        (trainer, "by_unit", _one_unit_a_record, "exactness"),
        (PrivacyPlan, "gradient_noise", property(lambda plan: plan.noise_multiplier**2), "noise"),
    ],
    ids=["seeded stream", "fixed-size batches", "units forgotten", "variance for deviation"],
)
def test_a_bug_in_the_trainer_itself_is_seen(
    audited: Subject, monkeypatch: pytest.MonkeyPatch, place: Any, name: str, broken: Any, layer: str
) -> None:
    monkeypatch.setattr(place, name, broken)
    (verdict,) = Audit(audited).run([layer])
    assert not verdict.good


def test_the_lower_bound_alone_misses_half_the_noise(audited: Subject) -> None:
    """As the report says of it."""
    (half,) = [fault for fault in FAULTS if fault.name == "half noise"]
    (verdict,) = Audit(audited, canaries=96, fault=half).run(["lower bound"])
    assert verdict.good


@pytest.mark.parametrize("method", ["bitfit", "ln"])
def test_a_plan_of_single_records_passes_too(plan: RunConfig, canaries: Records, method: str) -> None:
    config = changed(
        plan,
        method={"name": method},
        privacy={"unit": "record", "records_per_patient": 1, "epsilon": 3.0},
        train={"optimizer": "adamw", "weight_decay": 0.1, "gradient_checkpointing": method == "ln"},
    )
    one = subject(config, "canary", canaries, units=48)
    assert len(one.groups) == 48 and {len(group) for group in one.groups} == {1}
    verdicts = Audit(one, canaries=48, steps=4, alpha=RARE).run()
    assert all(verdict.good for verdict in verdicts), [verdict.findings for verdict in verdicts]
    assert {fault.name for fault in applicable(one)} == {
        fault.name for fault in FAULTS if fault.name not in ("records for patients", "each record clipped")
    }


@pytest.mark.parametrize(
    "method", ["dylora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("adalora", "adamix"))]
)
def test_what_a_method_does_between_steps_is_no_fault(plan: RunConfig, canaries: Records, method: str) -> None:
    one = subject(changed(plan, method={"name": method}), "canary", canaries, units=48)
    own = one.resident.adapter.steps
    verdicts = Audit(one, steps=4, alpha=RARE).run(LAYERS[:3])
    assert all(verdict.good for verdict in verdicts), [verdict.findings for verdict in verdicts]
    assert one.resident.adapter.steps is own is not Steps, "left out for good"


@pytest.mark.parametrize(
    "privacy",
    [
        {"clip_quantile": 0.5},
        pytest.param({"sampler": "truncated_poisson", "max_batch": 20}, marks=pytest.mark.slow),
        {"sampler": "cyclic"},
        {"bands": 4},
        {"sampler": "cyclic", "bands": 3, "neighbours": "replace_one"},
        pytest.param({"engine": "opacus"}, marks=pytest.mark.slow),
    ],
    ids=lambda keys: " ".join(map(str, keys.values())),
)
def test_every_kind_of_plan_passes_and_half_its_noise_does_not(
    plan: RunConfig, canaries: Records, privacy: dict[str, Any]
) -> None:
    one = subject(changed(plan, privacy=privacy), "canary", canaries, units=64)
    verdicts = Audit(one, steps=4, alpha=RARE).run(LAYERS[:3])
    assert all(verdict.good for verdict in verdicts), [verdict.findings for verdict in verdicts]
    (half,) = [fault for fault in FAULTS if fault.name == "half noise"]
    verdict = Audit(one, steps=4, fault=half).noise()
    assert verdict.statistics["variance"] == pytest.approx(0.25, rel=0.1), (
        "of the plan's, also where noise is correlated"
    )
    assert not verdict.good


def test_correlated_noise_is_undone_into_what_it_was_made_of() -> None:
    key, bands, size = bytes(range(32)), 3, 7
    source = CorrelatedNoise(key, bands)
    rows = torch.stack([source.at(step).normal_like(torch.zeros(size, dtype=torch.float64)) for step in range(6)])
    plain = [RandomStream(hmac.digest(key, f"noise of step {t}".encode(), "sha256")).normal(size) for t in range(6)]
    assert np.allclose(independent(rows, bands).numpy(), plain, atol=1e-12)
    assert torch.equal(independent(rows, 1), rows)


def test_patients_of_one_to_fifty_records_keep_the_bound_until_the_cap_is_removed(plan: RunConfig) -> None:
    sizes = (1, 3, 50, 7, 20, 12)
    records = synthetic_records(changed(plan, privacy={"unit": "record", "records_per_patient": 1}), sum(sizes))
    owners = [f"patient-{number}" for number, size in enumerate(sizes) for _ in range(size)]
    config = changed(plan, privacy={"records_per_patient": 5}, train={"batch_size": 2})
    one = subject(config, "canary", Records(records.inputs, records.labels, owners), units=len(sizes))
    assert sorted(len(group) for group in one.groups) == sorted(sizes)
    assert Audit(one).sensitivity().good
    (uncapped,) = [fault for fault in FAULTS if fault.name == "records for patients"]
    verdict = Audit(one, fault=uncapped).sensitivity()
    assert any(
        finding.startswith("a patient with 50 records added: the sums differ by") for finding in verdict.findings
    )
    exactness = Audit(one, fault=uncapped).exactness()
    assert any("a unit gave 50 records to one step; it may give 5" in finding for finding in exactness.findings)


def test_an_audit_of_no_promise_is_refused(plan: RunConfig, canaries: Records) -> None:
    with pytest.raises(UserError, match="nothing is promised, so there is nothing to audit"):
        subject(changed(plan, privacy={"enabled": False}), "canary", canaries, units=16)
    with pytest.raises(UserError, match="site canary: the privacy unit is the patient, but its records name none"):
        subject(plan, "canary", Records(canaries.inputs, canaries.labels), units=16)
    with pytest.raises(UserError, match=r"train\.batch_size 16 is more than the site's"):
        subject(plan, "canary", canaries.take(np.arange(20)), units=16)


def test_what_is_watched_is_what_the_optimizer_was_given(audited: Subject) -> None:
    """Against gradients taken by hand: the records of each step, and the sum that was released."""
    config = changed(audited.config, train={"local_steps": 3, "micro_batch": 4})
    steps = watch(
        audited.resident,
        audited.state,
        audited.examples,
        audited.groups,
        config,
        audited.plan,
        site="canary",
        silent=True,
    )
    assert len(steps) == 3 and any(step.records for step in steps)
    model, task = audited.resident.adapter, audited.resident.task
    model.adopt(audited.state.spec)
    model.write(audited.state)
    for step in steps:
        units: dict[int, list[torch.Tensor]] = {}
        for record in step.records:
            loss = task.losses(model.model, task.collate([audited.examples[record]], audited.resident.base.processor))
            rows = torch.autograd.grad(loss.sum(), list(model.trainables().values()))
            flat = torch.cat([row.reshape(-1) for row in rows]).double()
            units.setdefault(int(audited.owner[record]), []).append(flat)
        want = torch.zeros(audited.reference.size, dtype=torch.float64)
        for mine in units.values():
            mean = sum(mine) / len(mine)
            want += mean * min(1.0, audited.plan.clip / float(mean.norm()))
        assert float((step.released - want).norm()) <= 1e-4 * max(1.0, float(want.norm()))
        assert max((len(mine) for mine in units.values()), default=0) <= 4


def test_a_model_that_moves_cannot_be_compared(audited: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.optim.SGD.step

    def step(self: Any, *rest: Any) -> Any:
        for group in self.param_groups:
            group["lr"] = 1.0
        return plain(self, *rest)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    with pytest.raises(UserError, match="the model moved while it was audited"):
        Audit(audited, steps=2).noise()


def test_the_reference_of_a_unit_is_the_mean_or_the_sum_of_its_records(plan: RunConfig, canaries: Records) -> None:
    one = subject(changed(plan, privacy={"patient_gradient": "sum"}), "canary", canaries, units=32)
    (group,) = [group for group in one.groups if len(group) >= 3][:1]
    rows = one.reference.records(group[:3].tolist())
    assert torch.allclose(one.reference.units(group[:3].tolist(), one.owner), rows.sum(0, keepdim=True))
    # An excerpt holds the unit with the most records and the one with the longest input.
    assert max(len(g) for g in one.groups) == max(np.bincount(np.unique(canaries.patients, return_inverse=True)[1]))
    verdict = Audit(one, canaries=32, steps=3).exactness()
    assert verdict.good, verdict.findings
    assert float(clipped_sum(rows, 1e9).norm()) == pytest.approx(float(rows.double().sum(0).norm()))


def test_synthetic_images_are_read_like_real_ones(tiny_model: Any) -> None:
    config = parse_config(
        {
            "model": tiny_model("vit", "image-classification"),
            "method": {"name": "lora", "rank": 2},
            "task": {"name": "image-classification", "labels": ["a", "b"]},
            "train": {"batch_size": 4, "device": "cpu"},
            "privacy": {"unit": "record", "delta": 1e-3},
            "data": {"sites": ["north"]},
        }
    )
    records = synthetic_records(config, 40)
    assert len(records) == 40 and resident(config).task.input_kind == "image"
    one = subject(config, "north", records, units=24)
    verdicts = Audit(one, canaries=24, steps=3, alpha=RARE).run()
    assert all(verdict.good for verdict in verdicts), [verdict.findings for verdict in verdicts]


def test_synthetic_texts_serve_a_language_model(tiny_model: Any) -> None:
    config = parse_config(
        {
            "model": tiny_model("gpt2", "causal-lm"),
            "method": {"name": "lora", "rank": 2},
            "task": {"name": "causal-lm", "max_length": 16},
            "train": {"batch_size": 4, "device": "cpu"},
            "privacy": {"unit": "record", "delta": 1e-3},
            "data": {"sites": ["north"]},
        }
    )
    records = synthetic_records(config, 40)
    assert records.labels is None
    one = subject(config, "north", records, units=24)
    verdicts = Audit(one, canaries=24, steps=3, alpha=RARE).run()
    assert all(verdict.good for verdict in verdicts), [verdict.findings for verdict in verdicts]
    # There is no head to leave unclipped; what there can be is caught.
    found = self_test(one, steps=3)
    assert "unclipped head" not in {caught.fault for caught in found} and len(found) == 10
    assert all(caught.good for caught in found), [caught.fault for caught in found if not caught.good]


def test_a_bug_that_a_plan_cannot_have_is_not_looked_for(plan: RunConfig, canaries: Records) -> None:
    config = changed(
        plan,
        privacy={"records_per_patient": 1},
        train={"batch_size": 1, "micro_batch": 1},
    )
    missing = {"noise over batch", "batch-mean loss", "clipped per batch", "each record clipped"}
    one = subject(config, "canary", canaries, units=16)
    assert {fault.name for fault in FAULTS} - {fault.name for fault in applicable(one)} == missing
