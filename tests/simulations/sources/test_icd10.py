"""The clinical terminology: 22 chapters, categories held out whole, synthetic patients."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from fedgraft.client.data import SiteData
from fedgraft.core.config import RunConfig
from fedgraft.core.errors import UserError
from fedgraft.simulations.scenario import load_scenario, site_data
from fedgraft.simulations.sources import icd10

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("simple_icd_10_cm") is None, reason="simple-icd-10-cm is not installed"
)


def config(*overrides: str) -> RunConfig:
    return load_scenario("hospitals-icd10", ["data.max_per_class=120", "data.test_per_class=15", *overrides])


@pytest.fixture(scope="module")
def data() -> Mapping[str, SiteData]:
    return site_data(config())


def normal(text: str) -> str:
    return " ".join(text.lower().split())


def category_of() -> dict[str, tuple[str, str]]:
    """Chapter and category of each phrase."""
    return {
        normal(phrase): (chapter, category)
        for chapter, categories in icd10.phrases()[1].items()
        for category, phrases in categories.items()
        for phrase in phrases
    }


def test_there_are_22_chapters_and_every_phrase_has_one() -> None:
    titles, found = icd10.phrases()
    assert len(titles) == len(set(titles)) == 22
    assert titles[0].startswith("1. Certain infectious and parasitic diseases")
    assert titles[21].startswith("22. ")
    assert list(found) == [str(number) for number in range(1, 23)]
    everything = [normal(p) for categories in found.values() for phrases in categories.values() for p in phrases]
    assert len(everything) == len(set(everything)) > 90_000
    assert all(len(category) == 3 for categories in found.values() for category in categories)


def test_a_phrase_of_several_chapters_belongs_to_none() -> None:
    import simple_icd_10_cm as icd

    chapters: dict[str, set[str]] = {}
    chapter = ""
    for code in icd.get_all_codes(with_dots=True):
        if icd.is_chapter(code):
            chapter = code
        elif not icd.is_block(code):
            for phrase in (icd.get_description(code), *icd.get_inclusion_term(code)):
                chapters.setdefault(normal(phrase), set()).add(chapter)
    several = {phrase for phrase, where in chapters.items() if len(where) > 1}
    assert several
    assert set(category_of()) == set(chapters) - several


def test_no_phrase_and_no_category_is_both_trained_on_and_held_out(data: Mapping[str, SiteData]) -> None:
    place = category_of()
    train = {normal(text) for site in data.values() for text in site.train.inputs}
    held_out = {normal(text) for site in data.values() for text in site.held_out.inputs}
    assert not train & held_out
    assert not {place[text] for text in train} & {place[text] for text in held_out}


def test_labels_are_the_chapters_of_the_phrases(data: Mapping[str, SiteData]) -> None:
    place = category_of()
    for site in data.values():
        for part in (site.train, site.held_out):
            assert part.labels is not None
            assert [place[normal(text)][0] for text in part.inputs] == [str(label + 1) for label in part.labels]


@pytest.mark.parametrize(("part", "most"), [("train", 120), ("held_out", 15)])
def test_every_chapter_is_there_up_to_its_bound(data: Mapping[str, SiteData], part: str, most: int) -> None:
    labels = np.concatenate([getattr(site, part).labels for site in data.values()])
    counts = np.bincount(labels, minlength=22)
    assert len(counts) == 22
    assert (counts > 0).all()
    assert counts.max() == most
    texts = [text for site in data.values() for text in getattr(site, part).inputs]
    assert len({normal(text) for text in texts}) == len(texts)


def test_patients_have_one_to_eight_records_and_one_site(data: Mapping[str, SiteData]) -> None:
    seen: set[Any] = set()
    sizes: list[int] = []
    for site in data.values():
        for part in (site.train, site.held_out):
            assert part.patients is not None
            assert not seen & set(part.patients)
            seen |= set(part.patients)
            sizes += [list(part.patients).count(patient) for patient in set(part.patients)]
    assert min(sizes) == 1
    assert max(sizes) == 8
    assert 3.5 < np.mean(sizes) < 5.5


def test_the_chapters_are_skewed_over_the_sites_as_asked() -> None:
    def largest_share(*overrides: str) -> float:
        sites = site_data(config(*overrides))
        counts = np.array([np.bincount(site.train.labels, minlength=22) for site in sites.values()])  # type: ignore[arg-type]
        return float((counts.max(0) / counts.sum(0)).mean())

    assert largest_share('data.partition="iid"') == pytest.approx(0.25, abs=0.01)
    assert largest_share("data.alpha=0.1") > largest_share() > 0.45


def test_the_held_out_categories_change_with_the_seed_alone() -> None:
    def held_out(*overrides: str) -> list[str]:
        return sorted(text for site in site_data(config(*overrides)).values() for text in site.held_out.inputs)

    assert held_out() == held_out("rounds=2", "data.alpha=3")
    assert held_out() != held_out("seed=8")


def test_without_the_package_the_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    icd10.phrases.cache_clear()
    monkeypatch.setitem(sys.modules, "simple_icd_10_cm", None)
    with pytest.raises(UserError) as caught:
        icd10.phrases()
    assert str(caught.value) == "the icd10 source needs simple-icd-10-cm: pip install 'fedgraft[demo]'"
    icd10.phrases.cache_clear()
