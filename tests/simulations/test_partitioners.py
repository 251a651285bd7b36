"""The partitioners of flwr-datasets through their adapter: whole patients, each once, the same for the same seed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgraft.core.errors import UserError
from fedgraft.simulations.partitioners import KINDS, OWN, check_partition, partition, partitions
from fedgraft.simulations.scenario import complete, site_data

there = pytest.mark.skipif(importlib.util.find_spec("flwr_datasets") is None, reason="flwr-datasets is not installed")
SITES, CLASSES = 4, 4
#: What each needs to deal 60 units of 3 classes to 4 sites, and whether all of them are dealt.
OPTIONS: dict[str, dict[str, Any]] = {
    "iid": {},
    "linear": {},
    "square": {},
    "exponential": {},
    "size": {"partition_sizes": [30, 15, 10, 5]},
    "dirichlet": {"alpha": 0.5},
    "inner-dirichlet": {},
    "pathological": {"num_classes_per_partition": 2, "class_assignment_mode": "deterministic"},
    "shard": {"num_shards_per_partition": 3},
    "distribution": {
        "distribution_array": [[1, 3]] * 4,
        "num_unique_labels_per_partition": 2,
    },
    "natural-id": {"partition_by": "hospital"},
    "grouped-natural-id": {"partition_by": "ward", "group_size": 2},
    "continuous": {"partition_by": "age", "strictness": 0.7},
}
COLUMNS = {
    "hospital": [f"h{number % 4}" for number in range(60)],
    "ward": [number % 8 for number in range(60)],
    "age": [float(number * 7 % 60) for number in range(60)],
}
LABELS = np.arange(60) % CLASSES


def dealt(name: str, seed: int, labels: np.ndarray = LABELS, **changes: Any) -> list[np.ndarray]:
    options = check_partition(f"flwr:{name}", {**OPTIONS[name], **changes})
    assert options is not None
    rng = np.random.default_rng(seed)
    return partition(
        f"flwr:{name}", options, sites=SITES, labels=labels, alpha=1.0, column=lambda key: COLUMNS[key], rng=rng
    )


def test_the_table_of_this_test_is_whole() -> None:
    assert set(OPTIONS) == set(KINDS)


@there
@pytest.mark.parametrize("name", sorted(KINDS))
def test_every_partitioner_deals_every_unit_to_one_site_and_the_seed_decides(name: str) -> None:
    first = dealt(name, 1)
    assert len(first) == SITES
    assert sorted(np.concatenate(first).tolist()) == list(range(60))
    assert all((np.diff(part) > 0).all() and len(part) for part in first)
    assert [part.tolist() for part in first] == [part.tolist() for part in dealt(name, 1)]
    fixed = name == "natural-id"
    assert ([part.tolist() for part in first] == [part.tolist() for part in dealt(name, 2)]) == fixed


@there
@given(labels=st.lists(st.integers(0, 5), min_size=30, max_size=80), seed=st.integers(0, 99))
@settings(max_examples=15)
def test_no_unit_is_dealt_twice_whatever_the_labels(labels: list[int], seed: int) -> None:
    kept = np.array(labels)
    for name, changes in (("iid", {}), ("dirichlet", {"min_partition_size": 0}), ("shard", {}), ("linear", {})):
        mine = np.concatenate(dealt(name, seed, kept, **changes))
        assert len(set(mine.tolist())) == len(mine)
        if name != "shard":  # which leaves out what does not fill a block
            assert len(mine) == len(labels)


@there
def test_the_partitions_have_the_shapes_that_they_are_named_for() -> None:
    assert [len(part) for part in dealt("size", 0)] == [30, 15, 10, 5]
    assert [len(part) for part in dealt("linear", 0)] == [6, 12, 18, 24]
    assert all(len(set(LABELS[part])) == 2 for part in dealt("pathological", 0))
    for number, part in enumerate(dealt("natural-id", 0)):
        assert {COLUMNS["hospital"][unit] for unit in part} == {f"h{number}"}
    assert all(len({COLUMNS["ward"][unit] for unit in part}) == 2 for part in dealt("grouped-natural-id", 0))
    means = [np.mean([COLUMNS["age"][unit] for unit in part]) for part in dealt("continuous", 0, strictness=1.0)]
    assert means == sorted(means)
    # By chance, not by where a record stands: the library's own cuts the table into blocks.
    assert any(part.max() - part.min() > 30 for part in dealt("iid", 0))


@there
@pytest.mark.parametrize("name", ["iid", "dirichlet", "pathological", "natural-id"])
def test_patients_stay_whole(name: str, tiny_federation: Any, tinyfederation: Any, tmp_path: Path) -> None:
    rows = [{**row, "hospital": f"h{int(row['patient'][3:7]) % 3}"} for row in tiny_federation.rows]
    table = tinyfederation.write_csv(tmp_path / "records.csv", rows)
    options = {"pathological": {"num_classes_per_partition": 2}, "natural-id": {"partition_by": "hospital"}}
    changes = {"data.path": str(table), "data.partition": f"flwr:{name}", "data.alpha": 2.0}
    config = tiny_federation.config(**changes, **{"data.partition_options": options.get(name, {})})
    sites = site_data(complete(config))
    texts = [text for site in sites.values() for part in (site.train, site.held_out) for text in part.inputs]
    assert sorted(texts) == sorted(row["text"] for row in rows)
    patients = [set(site.train.patients or ()) | set(site.held_out.patients or ()) for site in sites.values()]
    assert sum(map(len, patients)) == len(set().union(*patients)) == len({row["patient"] for row in rows})


def test_every_partition_has_a_name_that_is_known() -> None:
    for name in OWN:
        assert check_partition(name, {}) is None
    assert len(partitions()) == len(OWN) + len(KINDS)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("dirchlet", {}, "data.partition `dirchlet` is unknown; did you mean `dirichlet`?"),
        ("pathological", {}, "data.partition `pathological` is unknown; did you mean `flwr:pathological`?"),
        ("flwr:shards", {}, "data.partition `flwr:shards` is unknown; did you mean `flwr:shard`?"),
        ("flwr:vertical-even", {}, "data.partition `flwr:vertical-even` deals columns of a table, and a site here"),
        ("vertical-size", {}, "data.partition `vertical-size` deals columns of a table, and a site here has whole"),
        ("iid", {"alpha": 1}, "data.partition_options: `iid` has none; data.alpha and data.sizes say"),
        ("flwr:iid", {"alpha": 1}, "data.partition_options.alpha: `flwr:iid` has no such option; it has none"),
        (
            "flwr:pathological",
            {"num_clases_per_partition": 2, "num_classes_per_partition": 2},
            "data.partition_options.num_clases_per_partition: `flwr:pathological` has no such option; did you mean "
            "`num_classes_per_partition`?",
        ),
        ("flwr:pathological", {}, "data.partition_options.num_classes_per_partition: is missing (data.partition"),
        ("flwr:shard", {"shard_size": "big"}, "data.partition_options.shard_size: Input should be a valid integer"),
        ("flwr:continuous", {"partition_by": "age", "strictness": 2}, "data.partition_options.strictness: Input"),
    ],
)
def test_a_wrong_partition_or_option_is_one_line_with_the_nearest_name(
    name: str, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError) as caught:
        check_partition(name, options)
    assert str(caught.value).startswith(reason)


@there
@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("dirichlet", {"alpha": 0}, "cannot deal these records: Alpha values should be strictly greater than zero"),
        ("size", {"partition_sizes": [90, 1, 1, 1]}, "cannot deal these records: The sum of partition sizes"),
        ("size", {"partition_sizes": [30, 30]}, "makes 2 sites of these records, data.sites has 4; set data.sites = 2"),
        ("natural-id", {"partition_by": "ward"}, "makes 8 sites of these records, data.sites has 4"),
        ("pathological", {"num_classes_per_partition": 9}, "is greater than the number of unique classes"),
    ],
)
def test_what_the_library_refuses_is_one_line(name: str, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError) as caught:
        dealt(name, 0, **changes)
    assert reason in str(caught.value)
    assert str(caught.value).startswith("data.partition")


def test_without_the_library_the_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flwr_datasets", None)
    monkeypatch.setitem(sys.modules, "flwr_datasets.partitioner", None)
    with pytest.raises(UserError) as caught:
        dealt("iid", 0)
    told = "data.partition `flwr:iid` needs flwr-datasets: pip install 'fedgraft[partition]'"
    assert str(caught.value) == told
