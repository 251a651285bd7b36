"""Dealing records to sites: nothing lost, nothing doubled, the skew that was asked for."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgraft.client.data import SiteData
from fedgraft.core.config import SizesConfig, parse_config
from fedgraft.core.errors import UserError
from fedgraft.simulations.partition import (
    class_shares,
    deal,
    deal_patients,
    deal_sized,
    fit,
    grouped,
    site_shares,
)
from fedgraft.simulations.scenario import complete, load_scenario, site_data


@given(
    classes=st.integers(1, 8), sites=st.integers(1, 12), alpha=st.none() | st.floats(0.05, 100), seed=st.integers(0, 99)
)
def test_the_shares_of_a_class_sum_to_one(classes: int, sites: int, alpha: float | None, seed: int) -> None:
    shares = class_shares(classes, sites, alpha, np.random.default_rng(seed))
    assert shares.shape == (classes, sites)
    assert (shares >= 0).all()
    assert shares.sum(1) == pytest.approx(np.ones(classes))


def test_equal_shares_are_equal_and_dirichlet_shares_have_their_moments() -> None:
    rng = np.random.default_rng(0)
    assert (class_shares(3, 4, None, rng) == 0.25).all()
    for alpha in (0.3, 1.0, 10.0):
        shares = class_shares(20_000, 4, alpha, rng)
        assert shares.mean(0) == pytest.approx(np.full(4, 0.25), abs=0.015)
        # The variance of one component of Dirichlet(alpha, ..., alpha) over n sites.
        assert shares.var(0) == pytest.approx(np.full(4, 0.25 * 0.75 / (4 * alpha + 1)), rel=0.05)


@given(
    labels=st.lists(st.integers(0, 4), max_size=120),
    sites=st.integers(1, 7),
    alpha=st.none() | st.floats(0.05, 50),
    seed=st.integers(0, 99),
)
def test_every_record_goes_to_one_site(labels: list[int], sites: int, alpha: float | None, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shares = class_shares(5, sites, alpha, rng)
    dealt = deal(np.array(labels, dtype=np.int64), shares, rng)
    assert len(dealt) == sites
    assert sorted(int(i) for part in dealt for i in part) == list(range(len(labels)))
    for site, part in enumerate(dealt):
        assert (np.diff(part) > 0).all()
        for label in range(5):
            # Each class is cut by its own shares, to the next whole record.
            want = shares[label][: site + 1].sum() * labels.count(label)
            got = sum(int((np.array(labels)[dealt[s]] == label).sum()) if len(dealt[s]) else 0 for s in range(site + 1))
            assert abs(got - want) <= 0.5 + 1e-9


@given(records=st.integers(0, 300), low=st.integers(1, 3), more=st.integers(0, 6), seed=st.integers(0, 99))
def test_patients_have_as_many_records_as_asked(records: int, low: int, more: int, seed: int) -> None:
    owners = deal_patients(records, low, low + more, np.random.default_rng(seed))
    assert len(owners) == records
    sizes = np.bincount(np.array(owners, dtype=np.int64)) if records else np.array([], dtype=int)
    assert (sizes >= 1).all()
    assert (sizes <= low + more).all()
    # Only the last patient may have come too late for all of theirs.
    assert (sizes[:-1] >= low).all()


def test_patients_are_of_all_sizes() -> None:
    sizes = np.bincount(deal_patients(20_000, 1, 8, np.random.default_rng(0)))
    counts = np.bincount(sizes)[1:]
    assert len(counts) == 8
    assert counts == pytest.approx(np.full(8, len(sizes) / 8), rel=0.15)


# Sites of given sizes


@given(law=st.sampled_from(["equal", "power", "lognormal"]), sites=st.integers(1, 40), seed=st.integers(0, 99))
def test_sizes_follow_their_law(law: Any, sites: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shares = site_shares(SizesConfig(law=law, exponent=1.5), sites, rng)
    assert shares.shape == (sites,)
    assert shares.sum() == pytest.approx(1)
    assert (shares > 0).all()
    if law == "equal":
        assert shares == pytest.approx(np.full(sites, 1 / sites))
    if law == "power":
        ranked = np.sort(shares)[::-1]
        assert ranked / ranked[0] == pytest.approx(np.arange(1, sites + 1) ** -1.5)


def test_log_normal_sizes_have_the_sigma_that_is_asked_for() -> None:
    shares = site_shares(SizesConfig(law="lognormal", sigma=0.7), 20_000, np.random.default_rng(0))
    assert np.log(shares).std() == pytest.approx(0.7, rel=0.03)


@given(
    counts=st.lists(st.integers(0, 50), min_size=1, max_size=5).filter(sum),
    sites=st.integers(1, 8),
    alpha=st.floats(0.3, 20),
    seed=st.integers(0, 99),
)
def test_skewed_shares_are_fitted_to_the_sizes(counts: list[int], sites: int, alpha: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.dirichlet(np.full(sites, 5.0))
    given_ = class_shares(len(counts), sites, alpha, rng)
    found = fit(given_, np.array(counts), sizes)
    assert (found >= 0).all()
    assert found.sum(1) == pytest.approx(np.ones(len(counts)))
    missed = np.array(counts) @ found - sizes * sum(counts)
    # Where few classes leave no choice it comes as near as it gets, but it always comes nearer.
    assert np.abs(missed).sum() <= np.abs(np.array(counts) @ given_ - sizes * sum(counts)).sum() + 1e-6


def test_fitting_keeps_the_skew_and_meets_the_sizes() -> None:
    rng = np.random.default_rng(1)
    counts, sizes = np.array([400, 300, 500]), np.array([0.5, 0.3, 0.2])
    shares = class_shares(3, 3, 1.0, rng)
    found = fit(shares, counts, sizes)
    assert counts @ found == pytest.approx(600 * 2 * sizes, rel=1e-5)

    # Scaling rows and columns leaves every cross ratio as it was: that is what "as little as can be" means.
    def ratio(table: np.ndarray) -> float:
        return float(table[0, 0] * table[1, 1] / (table[0, 1] * table[1, 0]))

    assert ratio(found) == pytest.approx(ratio(shares), rel=1e-6)
    assert fit(class_shares(3, 3, None, rng), counts, sizes) == pytest.approx(np.tile(sizes, (3, 1)))


@given(
    labels=st.lists(st.integers(0, 4), min_size=24, max_size=120),
    sites=st.integers(1, 8),
    minimum=st.integers(1, 3),
    alpha=st.none() | st.floats(0.05, 50),
    seed=st.integers(0, 99),
)
def test_every_record_goes_to_one_site_of_the_least_size_or_more(
    labels: list[int], sites: int, minimum: int, alpha: float | None, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    dealt = deal_sized(np.array(labels), class_shares(5, sites, alpha, rng), minimum, rng)
    assert sorted(int(i) for part in dealt for i in part) == list(range(len(labels)))
    assert min(map(len, dealt)) >= minimum
    assert all((np.diff(part) > 0).all() for part in dealt)


def test_small_sites_get_their_share_of_each_class_rounded_by_chance_and_right_on_average() -> None:
    labels, shares = np.repeat(np.arange(4), 30), np.tile([0.5, 0.25, 0.15, 0.1], (4, 1))
    counts = np.zeros((4, 4))
    for seed in range(400):
        for site, part in enumerate(deal_sized(labels, shares, 1, np.random.default_rng(seed))):
            each = np.bincount(labels[part], minlength=4)
            assert (np.abs(each - 30 * shares[:, site]) < 1 + 1e-9).all()
            counts[:, site] += each / 400
    assert counts == pytest.approx(30 * shares, abs=0.15)


def test_sites_smaller_than_the_number_of_classes_all_get_records() -> None:
    labels, rng = np.arange(2200) % 22, np.random.default_rng(0)
    dealt = deal_sized(labels, class_shares(22, 400, None, rng), 1, rng)
    sizes = [len(part) for part in dealt]
    assert min(sizes) >= 1 and max(sizes) <= 22 // 2 + 4
    # The plain deal cuts all classes alike, and leaves sites with nothing.
    assert min(map(len, deal(labels, class_shares(22, 400, None, rng), rng))) == 0


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"law": "fractions", "fractions": [0.5, 0.5]}, "data.sizes.fractions: 2 fractions for 3 sites; give one each"),
        (
            {"law": "equal", "minimum": 200},
            "are too few for 3 sites of 200 or more; use fewer sites, or lower data.siz",
        ),
        ({"law": "fractions", "fractions": [0.5, 0.4]}, "fractions are above 0 and sum to 1, these to 0.9"),
        ({"law": "power", "fractions": [1.0]}, 'law = "fractions" and the list fractions go together'),
        ({"minimum": 5}, 'minimum needs a law; law = "equal" makes sites of one size'),
    ],
)
def test_sizes_that_cannot_be_are_one_line(tiny_federation: Any, sizes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError) as caught:
        site_data(tiny_federation.config(**{"data.sizes": sizes}))
    assert reason in str(caught.value)


def test_sites_have_the_fractions_of_the_patients_that_are_given(tiny_federation: Any) -> None:
    config = tiny_federation.config(
        **{"data.sizes": {"law": "fractions", "fractions": [0.6, 0.3, 0.1]}, "data.alpha": 1.0}
    )
    patients = [
        len({*(site.train.patients or ()), *(site.held_out.patients or ())}) for site in site_data(config).values()
    ]
    everybody = len({row["patient"] for row in tiny_federation.rows})
    assert sum(patients) == everybody
    assert patients == pytest.approx([0.6 * everybody, 0.3 * everybody, 0.1 * everybody], abs=3)


# Many sites


@given(owners=st.lists(st.integers(-1, 6), max_size=60))
def test_grouping_finds_what_looking_for_each_owner_finds(owners: list[int]) -> None:
    found = grouped(np.array(owners, dtype=np.int64), 7)
    for owner in range(7):
        assert found[owner].tolist() == np.flatnonzero(np.array(owners) == owner).tolist()


def test_five_thousand_sites_are_named_and_dealt_in_seconds(
    tiny_federation: Any, tinyfederation: Any, tmp_path: Any
) -> None:
    rows = [
        {"text": f"text {number}", "label": tinyfederation.LABELS[number % 3], "patient": f"p{number // 2}"}
        for number in range(60_000)
    ]
    table = tinyfederation.write_csv(tmp_path / "many.csv", rows)
    config = tiny_federation.config(
        **{"data.path": str(table), "data.sites": 5000, "data.partition": "iid", "data.sizes": {"law": "equal"}}
    )
    assert config.site_names[0] == "site-0001"
    assert config.site_names[-1] == "site-5000"
    assert len(config.site_names) == 5000
    began = time.perf_counter()
    sites = site_data(config)
    assert sum(len(site.train) + len(site.held_out) for site in sites.values()) == 60_000
    # Half a minute on a slow and busy machine; going through all records for each site took many times that.
    assert time.perf_counter() - began < 60


def test_a_number_of_sites_is_short_for_their_names(tiny_federation: Any) -> None:
    assert tiny_federation.config(**{"data.sites": 3}).site_names == ("site-1", "site-2", "site-3")
    assert tiny_federation.config(**{"data.sites": 10}).site_names[:2] == ("site-01", "site-02")
    assert load_scenario("digits-dirichlet", ["data.sites=12"]).site_names[-1] == "site-12"
    for wrong in (0, -3, 10**9, True):
        with pytest.raises(UserError, match=r"data\.sites"):
            parse_config({"model": "m", "data": {"sites": wrong}})


# One file, dealt to sites


def texts(data: Mapping[str, SiteData], part: str) -> list[str]:
    return [text for site in data.values() for text in getattr(site, part).inputs]


@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
@pytest.mark.parametrize("alpha", [0.3, 50.0])
def test_one_file_is_dealt_whole_and_patients_stay_together(tiny_federation: Any, partition: str, alpha: float) -> None:
    config = tiny_federation.config(**{"data.partition": partition, "data.alpha": alpha})
    data = site_data(config)
    assert list(data) == ["east", "north", "south"]
    everything = texts(data, "train") + texts(data, "held_out")
    assert sorted(everything) == sorted(row["text"] for row in tiny_federation.rows)
    patient_of = {row["text"]: row["patient"] for row in tiny_federation.rows}
    label_of = {row["text"]: row["label"] for row in tiny_federation.rows}
    seen: set[str] = set()
    for site in data.values():
        mine: set[str] = set()
        for part in (site.train, site.held_out):
            assert part.labels is not None and part.patients is not None
            for text, label, patient in zip(part.inputs, part.labels, part.patients, strict=True):
                assert patient == patient_of[text]
                assert config.task.labels[label] == label_of[text]
            assert not mine & set(part.patients), "a patient is both trained on and held out"
            mine |= set(part.patients)
        assert not seen & mine, "a patient is at two sites"
        seen |= mine


def test_skew_is_what_alpha_says(tiny_federation: Any) -> None:
    def spread(alpha: float) -> float:
        shares = []
        for seed in range(5):
            data = site_data(tiny_federation.config(seed=seed, **{"data.alpha": alpha, "data.sites": ["a", "b"]}))
            counts = np.array([len(site.train) for site in data.values()])
            shares.append(abs(counts[0] - counts[1]) / counts.sum())
        return float(np.mean(shares))

    assert spread(1000.0) < 0.1 < spread(0.3)


def test_the_deal_depends_on_the_seed_alone(tiny_federation: Any) -> None:
    def first(seed: int, **changes: Any) -> list[str]:
        return list(site_data(tiny_federation.config(seed=seed, **changes))["east"].train.inputs)

    assert first(1) == first(1, rounds=9, strategy="ffa")
    assert first(1) != first(2)


def test_a_site_without_records_is_named(tiny_federation: Any, tinyfederation: Any, tmp_path: Any) -> None:
    table = tinyfederation.write_csv(tmp_path / "few.csv", list(tiny_federation.rows[:6]))
    with pytest.raises(UserError) as caught:
        site_data(tiny_federation.config(**{"data.path": str(table), "data.alpha": 0.05}))
    told = f" got no records of {table}; give data.sizes a law with a minimum, raise data.alpha, or use fewer sites"
    assert str(caught.value).endswith(told)


# Files of their own


def test_sites_with_files_of_their_own_keep_them(tiny_federation: Any, tinyfederation: Any, tmp_path: Any) -> None:
    sites = []
    for number, name in enumerate(("b", "a")):
        rows = list(tiny_federation.rows[number * 50 : number * 50 + 50])
        sites.append({"name": name, "path": str(tinyfederation.write_csv(tmp_path / f"{name}.csv", rows))})
    config = tiny_federation.config(**{"data.sites": sites, "data.path": ""})
    data = site_data(config)
    assert list(data) == ["a", "b"]
    for number, name in enumerate(("b", "a")):
        mine = [*data[name].train.inputs, *data[name].held_out.inputs]
        assert sorted(mine) == sorted(row["text"] for row in tiny_federation.rows[number * 50 : number * 50 + 50])


def test_a_site_without_a_file_is_named(tiny_federation: Any) -> None:
    with pytest.raises(UserError, match=r"^site east: no data path; set data\.sites\[\]\.path"):
        site_data(tiny_federation.config(**{"data.path": ""}))


# Scenarios


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "hospitals-icd9",
            "hospitals-icd9: no such file and no scenario of that name; did you mean `hospitals-icd10`?",
        ),
        ("qqqq", "qqqq: no such file and no scenario of that name; there are "),
        ("nowhere/run.toml", "nowhere/run.toml: no such configuration file"),
        ("run.toml", "run.toml: no such configuration file"),
    ],
)
def test_a_scenario_that_is_not_there_is_named(
    name: str, reason: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load_scenario(name)
    assert str(caught.value).startswith(reason)


def test_a_file_beats_a_scenario_of_its_name(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hospitals-icd10").mkdir()
    with pytest.raises(UserError, match="hospitals-icd10: is a folder"):
        load_scenario("hospitals-icd10")


def test_an_unknown_source_is_named(tiny_federation: Any) -> None:
    with pytest.raises(UserError) as caught:
        complete(tiny_federation.config(**{"data.source": "icd11"}))
    assert str(caught.value) == "data.source `icd11` is unknown; there are digits, files, icd10"


def test_a_source_that_knows_its_labels_fills_them_in(tiny_federation: Any) -> None:
    config = tiny_federation.config(**{"data.source": "icd10", "task.labels": []})
    assert len(complete(config).task.labels) == 22
    assert complete(tiny_federation.config()) == tiny_federation.config()
