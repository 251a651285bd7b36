"""Wherever a record meets a trainable, in whatever operation: rows equal to a backward pass of each loss alone."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedgraft.core.errors import UserError
from fedgraft.privacy.clipping import ExactGradients, create_engine
from fedgraft.privacy.noise import RandomStream

STREAM = RandomStream.seeded_not_private("meeting")
ROWS, LENGTH, WIDTH = 4, 3, 6
Work = Callable[[Any, torch.Tensor], torch.Tensor]


class _Layer(nn.Module):
    """Trainables of several shapes, and one piece of work that uses some of them."""

    def __init__(self, work: Work, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator)))
        self.work = work

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.work(self, x)


class _Model(nn.Module):
    """``first``: a layer before, so that the records come with a graph of their own."""

    def __init__(self, layer: nn.Module, first: bool) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH) if first else nn.Identity()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.first(x)).sin().flatten(1).sum(1)


SQUARE, VECTOR = (WIDTH, WIDTH), (WIDTH,)
WORK: dict[str, tuple[dict[str, tuple[int, ...]], Work]] = {
    "linear": ({"w": SQUARE}, lambda m, x: F.linear(x, m.w)),
    "linear with bias": ({"w": SQUARE, "b": VECTOR}, lambda m, x: F.linear(input=x, weight=m.w, bias=m.b)),
    "a bias alone": ({"b": VECTOR}, lambda m, x: F.linear(x, torch.eye(WIDTH).to(x), m.b)),
    "matmul": ({"w": SQUARE}, lambda m, x: x @ m.w),
    "matmul with a transpose": ({"w": SQUARE}, lambda m, x: torch.matmul(x, m.w.T)),
    "matmul from the left": ({"w": (5, LENGTH)}, lambda m, x: m.w @ x),
    "an effective weight": ({"a": (2, WIDTH), "b": (WIDTH, 2)}, lambda m, x: F.linear(x, m.b @ m.a)),
    "a weight that is scaled": ({"w": SQUARE, "s": VECTOR}, lambda m, x: F.linear(x, m.w * m.s[:, None])),
    "a scale": ({"s": VECTOR}, lambda m, x: x * m.s),
    "a scale from the left": ({"s": VECTOR}, lambda m, x: 2.0 * m.s * x),
    "a scale with ones in its shape": ({"s": (1, 1, WIDTH)}, lambda m, x: x * m.s),
    "a scale for each place": ({"s": (LENGTH, 1)}, lambda m, x: x * m.s),
    "a scale of one number": ({"s": (1,)}, lambda m, x: x * m.s),
    "a scale without dimension": ({"s": ()}, lambda m, x: x * m.s),
    "a scale that widens": ({"s": VECTOR}, lambda m, x: x[..., :1] * m.s),
    "a part of a scale": ({"s": (2 * WIDTH,)}, lambda m, x: x * m.s[2 : 2 + WIDTH]),
    "a scale stretched first": ({"s": (1,)}, lambda m, x: x * m.s.expand(WIDTH)),
    "a division": ({"s": VECTOR}, lambda m, x: x / (2 + m.s.exp())),
    "a shift": ({"b": VECTOR}, lambda m, x: x + m.b),
    "a shift from the left": ({"b": VECTOR}, lambda m, x: m.b + x),
    "a difference": ({"b": VECTOR}, lambda m, x: x - m.b),
    "a difference from the left": ({"b": VECTOR}, lambda m, x: m.b - x),
    "a normalised layer": ({"w": VECTOR, "b": VECTOR}, lambda m, x: F.layer_norm(x, (WIDTH,), m.w, m.b)),
    "root mean squares": ({"w": VECTOR}, lambda m, x: F.rms_norm(x, (WIDTH,), m.w)),
    "einsum": ({"w": SQUARE}, lambda m, x: torch.einsum("btd,dk->btk", x, m.w)),
    "einsum with an ellipsis": (
        {"w": (2, 3, 3)},
        lambda m, x: torch.einsum("...nh,nhk->...nk", x.unflatten(-1, (2, 3)), m.w).flatten(-2),
    ),
    "einsum the other way": ({"w": SQUARE}, lambda m, x: torch.einsum("kd,btd->btk", m.w, x)),
    "one tensor twice": ({"w": SQUARE, "s": VECTOR}, lambda m, x: F.linear(torch.tanh(x * m.s), m.w) * m.s + x @ m.w),
    "a product with itself": ({"s": VECTOR}, lambda m, x: x * (m.s * m.s) + x * m.s),
    "a lookup": ({"w": (5, WIDTH)}, lambda m, x: x + F.embedding((x[..., 0] > 0).long(), m.w)),
    "a convolution": ({"w": (4, 1, 2, 3)}, lambda m, x: F.conv2d(x[:, None], m.w, stride=(1, 2), padding=1)),
    "a convolution in groups": (
        {"w": (4, 1, 1, 2), "b": (4,)},
        lambda m, x: F.conv2d(torch.stack([x, x.sin()], 1), m.w, m.b, groups=2, dilation=2),
    ),
    # Operations without a rule: the examples pass one by one.
    "a row for each example": ({"s": VECTOR}, lambda m, x: x * m.s.expand(len(x), 1, WIDTH)),
    "a power": ({"s": VECTOR}, lambda m, x: (2 + x.cos()) ** m.s),
    "something in place": ({"b": VECTOR}, lambda m, x: (x * 1.0).add_(m.b)),
    "rows run together": ({"w": SQUARE}, lambda m, x: (x.flatten(0, 1) @ m.w).view_as(x)),
    "a joint": ({"p": (1, 2, WIDTH)}, lambda m, x: torch.cat([m.p.expand(len(x), -1, -1), x], 1).cumsum(1)),
}
SLOW = ("a row for each example", "a power", "something in place", "rows run together", "a joint")


def _rows(model: nn.Module, x: torch.Tensor, lab: Any) -> torch.Tensor:
    return lab.gradients(list(dict(model.named_parameters()).values()), (model(row[None])[0] for row in x))


@pytest.mark.parametrize("first", [True, False], ids=["after a layer", "at the input"])
@pytest.mark.parametrize("name", list(WORK))
def test_every_meeting_gives_the_rows_of_a_loop(lab: Any, name: str, first: bool) -> None:
    shapes, work = WORK[name]
    torch.manual_seed(0)
    model = _Model(_Layer(work, shapes), first).double()
    x = torch.randn(ROWS, LENGTH, WIDTH, dtype=torch.float64)
    parameters = dict(model.named_parameters())
    rows = _rows(model, x, lab)
    clip = float(rows.norm(dim=1).median())
    with ExactGradients(model, parameters, clip) as engine:
        engine.expect(ROWS)
        engine.add(model(x))
        engine.release(0.0, 1.0, STREAM)
        lab.close(lab.flat(parameters), lab.clipped(rows, clip))
        assert set(engine.one_by_one) == ({"layer"} if name in SLOW else set())


@pytest.mark.parametrize("name", ["a scale", "a shift", "matmul", "a normalised layer", "an effective weight"])
def test_rows_of_one_vector_each_are_rows_too(lab: Any, name: str) -> None:
    shapes, work = WORK[name]
    torch.manual_seed(0)
    model = _Model(_Layer(work, shapes), True).double()
    x = torch.randn(ROWS, WIDTH, dtype=torch.float64)
    parameters = dict(model.named_parameters())
    with ExactGradients(model, parameters, 0.5) as engine:
        engine.expect(ROWS)
        engine.add(model(x))
        engine.release(0.0, 1.0, STREAM)
        lab.close(lab.flat(parameters), lab.clipped(_rows(model, x, lab), 0.5))
        assert not engine.one_by_one


@pytest.mark.parametrize(("limit", "numbers"), [("_LARGE", 0), ("_AT_ONCE", 1), ("_AT_ONCE", 2 * WIDTH**2)])
def test_large_effective_weights_pass_their_rows_on_at_once_and_in_parts(
    lab: Any, monkeypatch: pytest.MonkeyPatch, limit: str, numbers: int
) -> None:
    from fedgraft.privacy.engine import derived

    monkeypatch.setattr(derived, limit, numbers)
    for name in ("an effective weight", "one tensor twice", "a product with itself"):
        test_every_meeting_gives_the_rows_of_a_loop(lab, name, True)


def test_a_graph_that_takes_no_batch_of_gradients_is_walked_row_by_row(lab: Any) -> None:
    class Own(torch.autograd.Function):
        """Its backward pass asks for a number, which a batch of gradients cannot give."""

        @staticmethod
        def forward(ctx: Any, w: torch.Tensor) -> torch.Tensor:
            return 3 * w

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return 3 * gradients[0] if float(gradients[0].sum()) != 1e9 else None

    torch.manual_seed(0)
    model = _Model(_Layer(lambda m, x: x * Own.apply(m.s) + x * m.b.exp(), {"s": VECTOR, "b": VECTOR}), True).double()
    x = torch.randn(ROWS, LENGTH, WIDTH, dtype=torch.float64)
    parameters = dict(model.named_parameters())
    with ExactGradients(model, parameters, 0.5) as engine:
        engine.expect(ROWS)
        engine.add(model(x))
        engine.release(0.0, 1.0, STREAM)
        lab.close(lab.flat(parameters), lab.clipped(_rows(model, x, lab), 0.5))
        assert not engine.one_by_one


def test_an_autograd_function_of_a_layers_own_is_not_overlooked(lab: Any) -> None:
    """What it does is out of sight: its examples pass one by one."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x, w)
            return x * w

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            x, w = ctx.saved_tensors
            return gradients[0] * w, (gradients[0] * x).sum((0, 1))

    torch.manual_seed(0)
    model = _Model(_Layer(lambda m, x: Product.apply(x, m.s), {"s": VECTOR}), False).double()
    x = torch.randn(ROWS, LENGTH, WIDTH, dtype=torch.float64)
    parameters = dict(model.named_parameters())
    with ExactGradients(model, parameters, 0.5) as engine:
        engine.expect(ROWS)
        engine.add(model(x))
        engine.release(0.0, 1.0, STREAM)
        lab.close(lab.flat(parameters), lab.clipped(_rows(model, x, lab), 0.5))
        assert engine.one_by_one == {"layer": "an autograd function of its own"}


@pytest.mark.parametrize(
    "layer",
    [nn.GRU(WIDTH, 5, batch_first=True), nn.LSTM(WIDTH, 5, batch_first=True), nn.PReLU(), nn.Bilinear(WIDTH, WIDTH, 3)],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_that_no_rule_knows_are_exact_too(lab: Any, layer: nn.Module) -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner = nn.Linear(WIDTH, WIDTH), layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            made = self.inner(x, x.sin()) if isinstance(self.inner, nn.Bilinear) else self.inner(x)
            return (made[0] if isinstance(made, tuple) else made).flatten(1).sum(1)

    torch.manual_seed(0)
    model = Around().double()
    x = torch.randn(ROWS, LENGTH, WIDTH, dtype=torch.float64)
    parameters = dict(model.named_parameters())
    rows = _rows(model, x, lab)
    clip = float(rows.norm(dim=1).median())
    with ExactGradients(model, parameters, clip) as engine:
        engine.expect(ROWS)
        engine.add(model(x))
        engine.release(0.0, 1.0, STREAM)
        lab.close(lab.flat(parameters), lab.clipped(rows, clip))
        assert set(engine.one_by_one) == {"inner"}


def test_a_parameter_whose_memory_is_turned_keeps_its_own_order(lab: Any) -> None:
    torch.manual_seed(0)
    model = _Model(nn.Linear(WIDTH, 5), True).double()
    model.layer.weight = nn.Parameter(torch.randn(WIDTH, 5, dtype=torch.float64).t())
    assert not model.layer.weight.is_contiguous()
    x = torch.randn(ROWS, LENGTH, WIDTH, dtype=torch.float64)
    parameters = dict(model.named_parameters())
    with ExactGradients(model, parameters, 0.5) as engine:
        engine.expect(ROWS)
        engine.add(model(x))
        engine.release(0.0, 1.0, STREAM)
        lab.close(lab.flat(parameters), lab.clipped(_rows(model, x, lab), 0.5))


def test_a_layer_that_somebody_gave_another_forward_pass_is_followed_there(lab: Any) -> None:
    torch.manual_seed(0)
    model = _Model(nn.Linear(WIDTH, WIDTH), True).double()
    layer: Any = model.layer
    layer.forward = lambda x: F.linear(x.sin(), 2 * layer.weight, layer.bias) * layer.bias
    x = torch.randn(ROWS, LENGTH, WIDTH, dtype=torch.float64)
    parameters, theirs = dict(model.named_parameters()), layer.forward
    with ExactGradients(model, parameters, 0.5) as engine:
        engine.expect(ROWS)
        engine.add(model(x))
        engine.release(0.0, 1.0, STREAM)
        lab.close(lab.flat(parameters), lab.clipped(_rows(model, x, lab), 0.5))
    assert layer.forward is theirs


@pytest.mark.parametrize("name", ["a power", "one tensor twice", "a division"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_either_kind_suits_every_meeting(lab: Any, name: str, reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(_Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.layer, self.first(x), use_reentrant=reentrant).sin().flatten(1).sum(1)

    shapes, work = WORK[name]
    torch.manual_seed(0)
    model = Checkpointed(_Layer(work, shapes), True).double()
    x = torch.randn(ROWS, LENGTH, WIDTH, dtype=torch.float64)
    parameters = dict(model.named_parameters())
    rows = lab.gradients(list(parameters.values()), (_Model.forward(model, row[None])[0] for row in x))
    with ExactGradients(model, parameters, 0.5) as engine:
        for part in (x[:2], x[2:]):
            engine.expect(2)
            engine.add(model(part))
        engine.release(0.0, 1.0, STREAM)
        lab.close(lab.flat(parameters), lab.clipped(rows, 0.5))


@pytest.mark.parametrize("name", ["sigmoid", "softmax", "exp", "square root", "quotient", "inverse"])
def test_nothing_of_a_batch_stays(name: str) -> None:
    """Operations keep their own results for the backward pass; a derived weight's must go with its batch."""
    work: dict[str, Work] = {
        "sigmoid": lambda m, x: F.linear(x, m.w.sigmoid()),
        "softmax": lambda m, x: F.linear(x, m.w.softmax(-1)),
        "exp": lambda m, x: F.linear(x, m.w.exp()),
        "square root": lambda m, x: F.linear(x, m.w.square().add(1).sqrt()),
        "quotient": lambda m, x: x / m.w[0].exp(),
        "inverse": lambda m, x: F.linear(x, torch.linalg.inv(m.w + 9 * torch.eye(WIDTH))),
    }
    model = _Model(_Layer(work[name], {"w": SQUARE}), True)
    x, alive = torch.randn(ROWS, LENGTH, WIDTH), []
    with ExactGradients(model, dict(model.named_parameters()), 0.5) as engine:
        for _ in range(6):
            engine.expect(ROWS)
            engine.add(model(x))
            gc.collect()
            alive.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))
    assert alive[2] == alive[-1], "tensors stay of every batch"


# --- refusals ------------------------------------------------------------------------------------------------------


def test_a_layer_that_mixes_its_examples_is_refused_by_tensor() -> None:
    """Its rows, one by one, would be those of another model than the one that runs."""
    mixing: list[Work] = [
        lambda m, x: x * (m.s.expand(len(x), 1, WIDTH) * x.mean(0, keepdim=True).detach()),
        lambda m, x: (x.reshape(-1, WIDTH) * m.s).softmax(0).view_as(x),
    ]
    for work in mixing:
        model = _Model(_Layer(work, {"s": VECTOR}), True)
        with create_engine("exact", model, dict(model.named_parameters()), 1.0) as engine:
            engine.expect(ROWS)
            with pytest.raises(UserError, match=r"tensor layer\.s .*its layer mixes the examples of a batch"):
                model(torch.randn(ROWS, LENGTH, WIDTH))


def test_a_layer_that_takes_no_single_example_is_refused_by_tensor() -> None:
    def pairs(m: Any, x: torch.Tensor) -> torch.Tensor:
        return (x.unflatten(0, (2, -1)) * m.s).flatten(0, 1)

    model = _Model(_Layer(pairs, {"s": VECTOR}), True)
    with create_engine("exact", model, dict(model.named_parameters()), 1.0) as engine:
        engine.expect(ROWS)
        with pytest.raises(UserError, match=r"tensor layer\.s .*its layer takes no single example: RuntimeError"):
            model(torch.randn(ROWS, LENGTH, WIDTH))


def test_an_effective_weight_too_large_for_the_memory_is_refused_with_the_size_that_is_not() -> None:
    model = _Model(_Layer(lambda m, x: F.linear(x, m.b @ m.a), {"a": (2, WIDTH), "b": (WIDTH, 2)}), False)
    size = 4 * WIDTH * WIDTH
    with ExactGradients(model, dict(model.named_parameters()), 1.0, memory=3 * size) as engine:
        engine.expect(4)
        with pytest.raises(UserError, match=r"layer layer: .* set train\.micro_batch to 3 or less"):
            model(torch.randn(4, LENGTH, WIDTH))
        engine.expect(3)
        engine.add(model(torch.randn(3, LENGTH, WIDTH)))


def test_a_layer_that_normalises_over_the_batch_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(UserError, match=r"tensor 1\.weight .*BatchNorm1d normalises over records"):
        create_engine("exact", model, dict(model.named_parameters()), 1.0)


def test_a_tensor_that_no_layer_runs_is_refused() -> None:
    model = nn.Linear(4, 1)
    model.extra = nn.ParameterDict({"spare": nn.Parameter(torch.zeros(3))})
    with pytest.raises(UserError, match=r"tensor extra\.spare .*no layer that runs owns it"):
        create_engine("exact", model, dict(model.named_parameters()), 1.0)
