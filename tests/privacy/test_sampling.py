"""Poisson sampling of units is what the accountant believes it is.

Streams are seeded, so a test passes or fails for good; each p-value bound would be crossed by chance once in 10^4.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from fedgraft.core.errors import UserError
from fedgraft.privacy.noise import RandomStream
from fedgraft.privacy.sampling import group_by_unit, poisson_batch, shuffled_batches

_CHANCE = 1e-4
#: Twelve patients with 1 to 5 records each, interleaved.
_KEYS = [f"patient-{index % 12}" for index in range(12)] + [f"patient-{index % 5}" for index in range(20)]


def _stream(*parts: object) -> RandomStream:
    return RandomStream.seeded_not_private("test", *parts)


def test_without_keys_each_record_is_a_unit() -> None:
    assert [group.tolist() for group in group_by_unit(None, 3)] == [[0], [1], [2]]


def test_records_of_one_key_are_one_unit() -> None:
    groups = group_by_unit(["b", "a", "b", 3, "a", "b"], 6)
    assert [group.tolist() for group in groups] == [[0, 2, 5], [1, 4], [3]]


@pytest.mark.parametrize("missing", [None, float("nan"), np.float64("nan"), "", "  "])
def test_a_record_without_a_patient_is_refused(missing: object) -> None:
    with pytest.raises(UserError, match="record 1 has no patient key"):
        group_by_unit(["a", missing, "b"], 3)


def test_as_many_keys_as_records() -> None:
    with pytest.raises(UserError, match="2 patient keys for 3 records"):
        group_by_unit(["a", "b"], 3)


def test_each_unit_comes_with_its_rate_and_independently_of_the_others() -> None:
    groups, rate, steps = group_by_unit(_KEYS, len(_KEYS)), 0.3, 6000
    unit_of = {record: unit for unit, group in enumerate(groups) for record in group.tolist()}
    stream = _stream("poisson")
    seen = np.zeros((steps, len(groups)), dtype=int)
    for step in range(steps):
        for record in poisson_batch(groups, rate, stream).tolist():
            seen[step, unit_of[record]] += 1
    # Never two records of one unit in a step: a clipped row is a clipped unit.
    assert seen.max() == 1
    # A unit with five records is no likelier than one with a single record.
    for unit in range(len(groups)):
        assert stats.binomtest(int(seen[:, unit].sum()), steps, rate).pvalue > _CHANCE
    # Binomial batch sizes: a fixed-size sampler would have the right mean and no variance.
    sizes = seen.sum(1)
    want = stats.binom.pmf(np.arange(len(groups) + 1), len(groups), rate) * steps
    got = np.bincount(sizes, minlength=len(groups) + 1)
    keep = want > 5
    counts, expected = np.append(got[keep], got[~keep].sum()), np.append(want[keep], want[~keep].sum())
    assert stats.chisquare(counts, expected).pvalue > _CHANCE
    # Pairs of units, and one unit in neighbouring steps.
    for a, b in ((seen[:, 0], seen[:, 1]), (seen[:, 3], seen[:, 9]), (seen[:-1, 2], seen[1:, 2])):
        table = np.histogram2d(a, b, bins=2)[0]
        assert stats.chi2_contingency(table, correction=False).pvalue > _CHANCE


def test_a_sampled_unit_gives_each_of_its_records_as_often() -> None:
    groups, stream = group_by_unit(_KEYS, len(_KEYS)), _stream("within")
    counts = np.zeros(len(_KEYS), dtype=int)
    for _ in range(6000):
        counts[poisson_batch(groups, 0.5, stream)] += 1
    for group in groups:
        if len(group) > 1:
            assert stats.chisquare(counts[group]).pvalue > _CHANCE


def test_a_rate_of_one_takes_every_unit() -> None:
    groups = group_by_unit(None, 50)
    assert sorted(poisson_batch(groups, 1.0, _stream("all"))) == list(range(50))


def test_an_empty_sample_is_an_empty_batch() -> None:
    batch = poisson_batch(group_by_unit(None, 3), 1e-9, _stream("empty"))
    assert batch.shape == (0,) and batch.dtype == np.int64


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, float("nan")])
def test_a_rate_that_is_no_probability_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="sampling rate"):
        poisson_batch(group_by_unit(None, 3), rate, _stream("rate"))


@pytest.mark.parametrize(("records", "batch"), [(10, 3), (7, 7), (5, 8), (12, 5)])
def test_shuffled_batches_cover_every_record_once_an_epoch(records: int, batch: int) -> None:
    size = min(records, batch)
    batches = list(itertools.islice(shuffled_batches(records, batch, _stream("epochs")), 3 * records))
    assert {len(each) for each in batches} == {size}
    sequence = np.concatenate(batches)
    epochs = sequence[: len(sequence) // records * records].reshape(-1, records)
    for epoch in epochs:
        assert sorted(epoch) == list(range(records))
    assert len({tuple(epoch) for epoch in epochs.tolist()}) > 1


def test_shuffled_batches_follow_their_stream_alone() -> None:
    first, again = (list(itertools.islice(shuffled_batches(9, 4, _stream("same")), 7)) for _ in range(2))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))


def test_no_records_no_batches() -> None:
    with pytest.raises(UserError, match="no records"):
        next(shuffled_batches(0, 4, _stream("none")))
