"""Dealing records to sites: nothing lost, nothing doubled, the skew that was asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgraft.client.data import SiteData
from fedgraft.core.config import RunConfig
from fedgraft.core.errors import UserError
from fedgraft.simulations.partition import class_shares, deal, deal_patients
from fedgraft.simulations.scenario import complete, load_scenario, named, site_data


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


# One file, dealt to sites


def texts(data: dict[str, SiteData], part: str) -> list[str]:
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
    assert str(caught.value).endswith(" raise data.alpha, or use fewer sites")
    assert str(table) in str(caught.value)


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


def test_every_scenario_that_comes_with_fedgraft_is_valid() -> None:
    assert "hospitals-icd10" in named()
    for name in named():
        config: RunConfig = load_scenario(name)
        assert config.name == name
        assert config.privacy.enabled
        assert len(config.task.labels) >= 2


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
