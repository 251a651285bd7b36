"""The Laplace approximation over LoRA's factors, against dense matrices and loops in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fedgraft.core.errors import UserError
from fedgraft.methods.laplace import PRECISIONS, chances, curvature, factors_of, laplace, same_length

TEXT = "sequence-classification"


def trained(lab: Any, family: str) -> Any:
    """A model in float64 whose factors are far from where they began."""
    adapter = lab.attach(family, TEXT, "laplace-lora", rank=2, alpha=4, target_modules=())
    lab.shaken(adapter, by=0.3)
    return adapter.model.double()


def scores_of(model: Any) -> Any:
    return lambda batch: model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def batches_of(lab: Any, family: str, lengths: tuple[int, ...]) -> list[Any]:
    """A batch a record, so that there is no padding."""
    return [lab.batch(family, TEXT, [record]) for record in lab.records(family, TEXT, lengths)]


def jacobians(model: Any, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The scores (C,) of one record, and of each factor the (C, numbers) slopes of them."""
    weights = {name: factor.weight for name, factor in factors_of(model).items()}
    given = scores_of(model)(batch)[0]
    rows = [torch.autograd.grad(score, list(weights.values()), retain_graph=True) for score in given]
    found = {name: torch.stack([row[at].flatten() for row in rows]) for at, name in enumerate(weights)}
    return given.detach(), found


def test_of_one_word_it_is_the_dense_gauss_newton_posterior(lab: Any) -> None:
    """Where there is one record of one word the product of both Grams is exact."""
    model = trained(lab, "gpt2")
    (one,), (other,) = batches_of(lab, "gpt2", (1,)), batches_of(lab, "gpt2", (5,))
    assert one["input_ids"].shape == (1, 1)
    found = laplace(curvature(model, scores_of(model), [one]))
    given, at_one = jacobians(model, one)
    p = given.softmax(-1)
    hessian = torch.diag(p) - torch.outer(p, p)
    want_scores, at_other = jacobians(model, other)
    scores, covariances = found.predict(model, scores_of(model), other, [0.5, 20.0])
    assert torch.allclose(scores[0], want_scores, atol=1e-12)
    for precision, covariance in zip((0.5, 20.0), covariances, strict=True):
        want = torch.zeros(len(p), len(p), dtype=torch.float64)
        for name, j in at_one.items():
            matrix = j.T @ hessian @ j + precision * torch.eye(j.shape[1], dtype=torch.float64)
            want += at_other[name] @ torch.linalg.inv(matrix) @ at_other[name].T
        assert float((covariance[0] - want).abs().max()) <= 1e-9 * float(want.abs().max())


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_grams_are_sums_over_records_and_labels(lab: Any, family: str) -> None:
    """By the Fisher information's own definition: labels drawn from the model, slopes of their log chances."""
    model = trained(lab, family)
    batches = batches_of(lab, family, (3, 7, 3))
    found = curvature(model, scores_of(model), batches)
    given: dict[str, Any] = {}
    hooks = [
        factor.register_forward_hook(lambda module, args, out, name=name: given.update({name: (args[0], out)}))
        for name, factor in factors_of(model).items()
    ]
    inputs = {name: torch.zeros_like(gram) for name, gram in found.inputs.items()}
    slopes = {name: torch.zeros_like(gram) for name, gram in found.slopes.items()}
    for batch in batches:
        logs = scores_of(model)(batch)[0].log_softmax(-1)
        for name, (a, out) in given.items():
            mean = sum(a[0].detach()) / len(a[0])
            inputs[name] += torch.outer(mean, mean)
            for chance in logs:
                (g,) = torch.autograd.grad(chance, out, retain_graph=True)
                slopes[name] += chance.exp().item() * torch.outer(sum(g[0]), sum(g[0]))
    for hook in hooks:
        hook.remove()
    for name in inputs:
        assert torch.allclose(found.inputs[name], inputs[name] / len(batches), rtol=1e-10, atol=1e-14), name
        assert torch.allclose(found.slopes[name], slopes[name], rtol=1e-10, atol=1e-14), name


def test_a_batch_of_one_length_is_its_records(lab: Any) -> None:
    model = trained(lab, "bert")
    records = lab.records("bert", TEXT, (4, 4, 4))
    whole = curvature(model, scores_of(model), [lab.batch("bert", TEXT, records)])
    single = curvature(model, scores_of(model), [lab.batch("bert", TEXT, [record]) for record in records])
    for name in whole.inputs:
        assert torch.allclose(whole.inputs[name], single.inputs[name], atol=1e-12)
        assert torch.allclose(whole.slopes[name], single.slopes[name], atol=1e-12)
    posterior = laplace(whole)
    scores, (covariance,) = posterior.predict(model, scores_of(model), lab.batch("bert", TEXT, records), [3.0])
    for at, record in enumerate(records):
        one, (own,) = posterior.predict(model, scores_of(model), lab.batch("bert", TEXT, [record]), [3.0])
        assert torch.allclose(scores[at], one[0], atol=1e-12) and torch.allclose(covariance[at], own[0], rtol=1e-9)


def test_the_chances_are_the_integral_over_the_scores() -> None:
    """Of two labels it is one integral, over the difference of their scores."""
    scores = torch.tensor([[1.5, 0.0], [0.2, -0.1]], dtype=torch.float64)
    covariance = torch.tensor([[[3.0, 1.0], [1.0, 2.0]], [[0.5, 0.0], [0.0, 0.1]]], dtype=torch.float64)
    found = chances(scores, covariance, 40_000, 0)
    for row in range(2):
        mean = float(scores[row, 0] - scores[row, 1])
        deviation = math.sqrt(float(covariance[row, 0, 0] + covariance[row, 1, 1] - 2 * covariance[row, 0, 1]))
        at = torch.linspace(-8, 8, 4001, dtype=torch.float64)
        density = (-at.square() / 2).exp() / math.sqrt(2 * math.pi)
        want = float(((mean + deviation * at).sigmoid() * density).sum() * (at[1] - at[0]))
        # A draw's deviation is at most a half, and there are 40,000: five standard errors.
        assert float(found[row, 0]) == pytest.approx(want, abs=5 * 0.5 / math.sqrt(40_000))
    assert torch.allclose(found.sum(1), torch.ones(2, dtype=torch.float64))
    assert torch.allclose(chances(scores, 0 * covariance, 10, 0), scores.softmax(-1))


def test_batches_hold_records_of_one_length() -> None:
    lengths = [3, 5, 3, 3, 5, 1]
    found = list(same_length([{"length": length} for length in lengths], 2))
    assert sorted(at for places in found for at in places) == list(range(6))
    assert all(len(places) <= 2 and len({lengths[at] for at in places}) == 1 for places in found)


def test_an_adapter_without_lora_is_refused(lab: Any) -> None:
    with pytest.raises(UserError, match="over LoRA's factors of linear layers: train with laplace-lora"):
        factors_of(lab.attach("bert", TEXT, "pfeiffer").model)


def test_a_surer_prior_gives_a_smaller_covariance(lab: Any) -> None:
    model = trained(lab, "bert")
    found = laplace(curvature(model, scores_of(model), batches_of(lab, "bert", (3, 7))))
    (batch,) = batches_of(lab, "bert", (5,))
    _, (loose, tight, last) = found.predict(model, scores_of(model), batch, [1.0, 100.0, PRECISIONS[-1]])
    assert float(torch.linalg.eigvalsh(loose[0] - tight[0]).min()) >= -1e-12
    assert 0 < float(tight[0].diagonal().sum()) < float(loose[0].diagonal().sum())
    assert float(last[0].abs().max()) < 1e-4, "as sure as the adapter is by itself"
