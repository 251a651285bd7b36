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
from fedgraft.privacy.sampling import draw, group_by_unit, shares, shuffled_batches

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
        for record in draw(groups, rate, stream).records.tolist():
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
        counts[draw(groups, 0.5, stream).records] += 1
    for group in groups:
        if len(group) > 1:
            assert stats.chisquare(counts[group]).pvalue > _CHANCE


def test_a_rate_of_one_takes_every_unit() -> None:
    groups = group_by_unit(None, 50)
    assert sorted(draw(groups, 1.0, _stream("all")).records) == list(range(50))


def test_an_empty_sample_is_an_empty_batch() -> None:
    sample = draw(group_by_unit(None, 3), 1e-9, _stream("empty"))
    assert sample.records.shape == sample.units.shape == (0,) and sample.records.dtype == np.int64
    assert sample.sizes.shape == (0,)
    assert not len(draw(group_by_unit(None, 3), 1.0, _stream("nobody"), candidates=np.empty(0, dtype=int)).records)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, float("nan")])
def test_a_rate_that_is_no_probability_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="sampling rate"):
        draw(group_by_unit(None, 3), rate, _stream("rate"))


@pytest.mark.parametrize("most", [1, 2, 4, 9])
def test_a_sampled_unit_gives_as_many_of_its_records_as_it_may(most: int) -> None:
    groups, stream = group_by_unit(_KEYS, len(_KEYS)), _stream("cap")
    counts = np.zeros(len(_KEYS), dtype=int)
    for _ in range(3000):
        sample = draw(groups, 0.5, stream, records_per_unit=most)
        for unit in range(len(sample.sizes)):
            own = sample.records[sample.units == unit]
            (group,) = [g for g in groups if own[0] in g]
            assert set(own.tolist()) <= set(group.tolist())
            assert len(set(own.tolist())) == len(own) == min(most, len(group))
        counts[sample.records] += 1
    for group in groups:
        if len(group) > most:
            # Each as often as any other of its unit; without replacement the counts vary less than a multinomial's.
            assert stats.chisquare(counts[group]).pvalue > _CHANCE
        assert abs(counts[group].sum() - 1500 * min(most, len(group))) < 6 * 28 * most


def test_a_sample_beyond_the_most_is_cut_down_at_random() -> None:
    groups, stream, steps = group_by_unit(None, 20), _stream("truncated"), 6000
    sizes, counts = np.zeros(21, dtype=int), np.zeros(20, dtype=int)
    for _ in range(steps):
        records = draw(groups, 0.4, stream, max_units=9).records
        sizes[len(records)] += 1
        counts[records] += 1
    assert not sizes[10:].any()
    want = stats.binom.pmf(np.arange(21), 20, 0.4)
    want = np.append(want[:9], want[9:].sum()) * steps
    keep = want > 5
    assert (
        stats.chisquare(
            np.append(sizes[:10][keep], sizes[:10][~keep].sum()), np.append(want[keep], want[~keep].sum())
        ).pvalue
        > _CHANCE
    )
    assert stats.chisquare(counts).pvalue > _CHANCE


def test_only_units_whose_turn_it_is_are_drawn() -> None:
    groups, turn = group_by_unit(_KEYS, len(_KEYS)), np.array([0, 2, 5])
    sample = draw(groups, 1.0, _stream("turn"), records_per_unit=50, candidates=turn)
    assert sorted(sample.records) == sorted(np.concatenate([groups[i] for i in turn]).tolist())
    assert sample.sizes.tolist() == [len(groups[i]) for i in turn]


def test_shares_are_uniform_and_hang_on_their_own_key_alone() -> None:
    keys = [f"patient {i}".encode() for i in range(20_000)]
    values = shares(keys, 7, "north", "held-out")
    assert stats.kstest(values, "uniform").pvalue > _CHANCE
    assert values.min() >= 0 and values.max() < 1
    # Without one of them, or in another order, no other moves.
    assert np.array_equal(shares(keys[:50] + keys[51:], 7, "north", "held-out"), np.delete(values, 50))
    assert np.array_equal(shares(keys[::-1], 7, "north", "held-out"), values[::-1])
    for other in ((8, "north", "held-out"), (7, "south", "held-out"), (7, "north", "turn")):
        assert abs(np.corrcoef(values, shares(keys, *other))[0, 1]) < 0.04
    assert shares([], 7).shape == (0,)


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
