"""Gradients of several sites in one pass are those of each site's own pass, with privacy and without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fedgraft.core.errors import UserError
from fedgraft.privacy.engine.clippedsum import ClippedSum
from fedgraft.privacy.engine.grouped import each, in_parts
from fedgraft.privacy.engine.sites import Pass, Stacks
from fedgraft.privacy.engine.together import SitesRows, SitesSums
from fedgraft.privacy.noise import RandomStream

Case = tuple[str, str, str]
TEXT, IMAGE, LM = "sequence-classification", "image-classification", "causal-lm"
LORA = ("bert", TEXT, "lora")
#: Every way to run a layer, and every family and task; the others are among the slow tests.
SOME = [
    *[("bert", TEXT, method) for method in ("dora", "ia3", "ln", "lora", "prefix", "prompt")],
    *[("gpt2", TEXT, "bitfit"), ("llama", LM, "lora-sb"), ("t5", TEXT, "ravan"), ("vit", IMAGE, "bitfit")],
]
#: Words of the records of each site: as many rows and other ones, short and long.
LENGTHS = [(3, 11, 1), (11, 2), (6, 8, 11, 5), (2, 7)]
STREAM = RandomStream.seeded_not_private("test")


def ids(case: Case) -> str:
    return "-".join(case)


class Sites:
    """Adapters of several sites on one model in float64, and records of each."""

    def __init__(self, lab: Any, case: Case, lengths: Sequence[Sequence[int]] = LENGTHS) -> None:
        self.lab, self.case = lab, case
        self.adapter = lab.double(case)
        self.trainables = self.adapter.trainables()
        self.stacks = Stacks(self.trainables, len(lengths))
        self.records = [lab.records(*case[:2], own, seed=site) for site, own in enumerate(lengths)]
        for site in range(len(lengths)):
            lab.shaken(self.adapter, seed=site + 1)
            for parameter in self.trainables.values():
                self.stacks.of(parameter)[site] = parameter.detach()

    def alone(self, site: int) -> None:
        """Put the tensors of one site into the model."""
        with torch.no_grad():
            for parameter in self.trainables.values():
                parameter.copy_(self.stacks.of(parameter)[site])

    def summed(self, site: int) -> torch.Tensor:
        """The naive twin: the gradient of the site's summed loss, by a plain backward pass."""
        self.alone(site)
        batch = self.lab.batch(*self.case[:2], self.records[site])
        losses = self.lab.losses(self.adapter.model, batch)
        found: torch.Tensor = self.lab.gradients(list(self.trainables.values()), [losses.sum()])[0]
        return found

    def clipped(self, site: int, clip: float) -> torch.Tensor:
        """The naive twin under privacy: a loop over the site's examples."""
        self.alone(site)
        rows = self.lab.rows(self.adapter, self.case, self.records[site])
        found: torch.Tensor = self.lab.clipped(rows, clip)
        return found

    def losses(self, order: Sequence[int]) -> torch.Tensor:
        """The losses of the sites in ``order``, in one forward pass."""
        batch = self.lab.batch(*self.case[:2], [record for site in order for record in self.records[site]])
        losses: torch.Tensor = self.lab.losses(self.adapter.model, batch)
        return losses

    def passing(self, order: Sequence[int]) -> Pass:
        return Pass([(site, len(self.records[site])) for site in order])

    def blind(self) -> None:
        """The model's own tensors become NaN: whatever still used them would show."""
        with torch.no_grad():
            for parameter in self.trainables.values():
                parameter.fill_(torch.nan)

    def together(self, order: Sequence[int], trainables: Any = None) -> torch.Tensor:
        self.blind()
        with SitesSums(self.adapter.model, trainables or self.trainables, self.stacks) as engine:
            engine.expect(self.passing(order))
            losses = self.losses(order)
            engine.add(losses, torch.ones_like(losses))
        return self.stacks.gradients

    def clipped_together(self, order: Sequence[int], clips: Sequence[float], passes: int = 2) -> list[torch.Tensor]:
        """The sums of each site; the first pass is verified as a model's first is, the last one counts."""
        self.blind()
        sums = {site: ClippedSum(clips[site]) for site in order}
        with SitesRows(self.adapter.model, self.trainables, self.stacks) as engine:
            for _ in range(passes):
                for one in sums.values():
                    one.drop()
                engine.begin(self.passing(order))
                engine.add_for(self.losses(order), sums, dict.fromkeys(order))
        size, like = self.stacks.size, self.stacks.values
        return [sums[site].release(0.0, 1.0, STREAM, size, like) for site in sorted(order)]


def hold_all(lab: Any, case: Case) -> None:
    sites, order = Sites(lab, case), [1, 3, 0, 2]
    wanted = [sites.summed(site) for site in range(4)]
    clips = [0.5 * float(want.norm()) / len(sites.records[site]) for site, want in enumerate(wanted)]
    cut = [sites.clipped(site, clip) for site, clip in enumerate(clips)]
    for got, want in zip(sites.together(order), wanted, strict=True):
        lab.close(got, want)
    for got, want in zip(sites.clipped_together(order, clips), cut, strict=True):
        lab.close(got, want)


@pytest.mark.parametrize("case", SOME, ids=ids)
def test_each_site_gets_the_gradients_of_its_own_pass(lab: Any, case: Case) -> None:
    hold_all(lab, case)


@pytest.mark.slow
def test_each_site_gets_the_gradients_of_its_own_pass_whatever_the_method(lab: Any, fitting: Case) -> None:
    hold_all(lab, fitting)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=9), min_size=1, max_size=5),
    mixed=st.randoms(use_true_random=False),
)
def test_batches_may_be_as_uneven_as_they_like(lab: Any, lengths: list[list[int]], mixed: Any) -> None:
    sites = Sites(lab, LORA, lengths)
    order = list(range(len(lengths)))
    mixed.shuffle(order)
    wanted = [sites.summed(site) for site in range(len(lengths))]
    cut = [sites.clipped(site, 1.0) for site in range(len(lengths))]
    for got, want in zip(sites.together(order), wanted, strict=True):
        lab.close(got, want)
    for got, want in zip(sites.clipped_together(order, [1.0] * len(lengths)), cut, strict=True):
        lab.close(got, want)


def test_several_passes_add_up_in_each_site(lab: Any) -> None:
    sites = Sites(lab, LORA)
    once = sites.together([0, 1, 2, 3]).clone()
    lab.close(sites.together([2, 0]), once * torch.tensor([2.0, 1.0, 2.0, 1.0], dtype=once.dtype)[:, None])


@pytest.mark.parametrize("case", [LORA, ("bert", TEXT, "ia3"), ("bert", TEXT, "ln")], ids=ids)
def test_a_site_that_has_diverged_touches_nobody(lab: Any, case: Case) -> None:
    sites = Sites(lab, case)
    healthy = sites.together([0, 1, 2, 3]).clone()
    clips = [1e-3] * 4
    cut = sites.clipped_together([0, 1, 2, 3], clips)
    sites.stacks.values[1] = torch.nan
    sites.stacks.gradients.fill_(-0.0)
    got, got_cut = sites.together([0, 1, 2, 3]), sites.clipped_together([0, 1, 2, 3], clips)
    for site in (0, 2, 3):
        assert torch.equal(got[site], healthy[site])
        assert torch.equal(got_cut[site], cut[site])
    assert not torch.isfinite(got[1]).any()
    assert not got_cut[1].any()  # rows that are not finite are left out of the sum


@pytest.mark.parametrize("case", [LORA, ("bert", TEXT, "dora")], ids=ids)
def test_what_rests_keeps_each_sites_own_values(lab: Any, case: Case) -> None:
    sites = Sites(lab, case)
    wanted = [sites.summed(site) for site in range(4)]
    names = [name for name in sites.trainables if "lora_A" in name]
    for name, parameter in sites.trainables.items():
        parameter.requires_grad_(name in names)
    active = {name: sites.trainables[name] for name in names}
    got = sites.together([0, 1, 2, 3], active)
    at = 0
    for name, parameter in sites.trainables.items():
        part = slice(at, at + parameter.numel())
        at = part.stop
        for site in range(4 if name in names else 0):
            lab.close(got[site, part], wanted[site][part])
        assert bool(got[:, part].any()) == (name in names)


def test_patients_are_clipped_whole_within_their_site(lab: Any) -> None:
    sites = Sites(lab, LORA, [(3, 11, 1, 4), (5, 2, 6)])
    units = [torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1])]
    wanted = []
    for site in range(2):
        sites.alone(site)
        rows = lab.rows(sites.adapter, LORA, sites.records[site])
        own = torch.stack([rows[units[site] == unit].sum(0) for unit in range(2)])
        clip = float(own.norm(dim=1).mean())
        wanted.append((lab.clipped(own, clip), clip))
    sites.blind()
    sums = {site: ClippedSum(wanted[site][1]) for site in range(2)}
    with SitesRows(sites.adapter.model, sites.trainables, sites.stacks) as engine:
        engine.begin(sites.passing([0, 1]))
        engine.add_for(sites.losses([0, 1]), sums, dict(enumerate(units)))
    for site, (want, _) in enumerate(wanted):
        assert (sums[site].within, sums[site].over) == (1, 1)
        lab.close(sums[site].release(0.0, 1.0, STREAM, sites.stacks.size, sites.stacks.values), want)


def test_a_model_that_mixes_the_rows_of_sites_is_refused(lab: Any) -> None:
    sites = Sites(lab, LORA)
    sums = {site: ClippedSum(1.0) for site in range(4)}
    with SitesRows(sites.adapter.model, sites.trainables, sites.stacks) as engine:
        engine.begin(sites.passing(range(4)))
        losses = sites.losses(range(4))
        with pytest.raises(UserError, match="has no exact per-sample gradient"):
            engine.add_for(losses * losses.sum(), sums, dict.fromkeys(range(4)))


def test_the_model_is_left_as_it_was_found(lab: Any) -> None:
    sites = Sites(lab, ("bert", TEXT, "ia3"))
    before = {path: dict(vars(module)) for path, module in sites.adapter.model.named_modules()}
    sites.together([0, 1])
    sites.clipped_together([0, 1, 2, 3], [1.0] * 4)
    for path, module in sites.adapter.model.named_modules():
        assert vars(module).keys() == before[path].keys(), path
        for key, parameter in module._parameters.items():
            assert parameter is before[path]["_parameters"][key]


# The products


@pytest.mark.parametrize("shape", [(1, 1, 3), (7, 2, 3), (8, 16, 4), (40, 8, 64), (128, 64, 8)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_batched_product_rounds_like_its_parts(shape: tuple[int, int, int], bias: bool) -> None:
    p, q, r = shape
    draw = torch.Generator().manual_seed(p)
    a, b, c = (torch.randn(5, *size, generator=draw) for size in ((p, q), (q, r), (r,)))
    parts = [torch.addmm(z, x, y) if bias else x.mm(y) for x, y, z in zip(a, b, c, strict=True)]
    assert torch.equal(each(a, b, c if bias else None), torch.stack(parts))


@pytest.mark.parametrize("sizes", [(1, 2, 9), (9, 1, 10, 3), (8, 8), (1,), (2, 3)])
@pytest.mark.parametrize("positions", [None, 1, 5])
def test_rows_of_a_shared_layer_round_as_they_do_alone(sizes: tuple[int, ...], positions: int | None) -> None:
    draw = torch.Generator().manual_seed(sum(sizes))
    layer = nn.Linear(64, 48)
    shape = (sum(sizes), 64) if positions is None else (sum(sizes), positions, 64)
    x = torch.randn(shape, generator=draw)
    passing = Pass(list(enumerate(sizes)))
    got = in_parts(layer, x, passing)
    for part in passing.parts:
        own = x[part.start : part.stop].clone()
        assert torch.equal(got[part.start : part.stop], layer(own))


def test_a_stack_holds_each_tensor_of_each_site_where_it_says() -> None:
    parameters = {
        "a": nn.Parameter(torch.zeros(2, 3)),
        "b": nn.Parameter(torch.zeros(4)),
        "c": nn.Parameter(torch.zeros(())),
    }
    stacks = Stacks(parameters, 3)
    stacks.values.copy_(torch.arange(33.0).view(3, 11))
    assert stacks.of(parameters["a"])[1].tolist() == [[11, 12, 13], [14, 15, 16]]
    assert stacks.of(parameters["b"])[2].tolist() == [28, 29, 30, 31]
    assert stacks.of(parameters["c"]).tolist() == [10, 21, 32]
    with torch.no_grad():
        stacks.leaf(1, parameters["b"]).fill_(0.0)
    assert stacks.values[1, 6:10].tolist() == [0, 0, 0, 0]
    assert stacks.leaves(1).keys() == parameters.keys()
