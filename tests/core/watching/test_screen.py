"""What a page is drawn with."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from rich.text import Text

from fedgraft.core.watching.screen import age, bar, moment, show, size, sparkline

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("values", "drawn"),
    [([], ""), ([0.5], "▄"), ([1, 1], "▄▄"), ([0, 7], "▁█"), (list(range(8)), "▁▂▃▄▅▆▇█"), ([9, 0, 1], "▁█")],
)
def test_a_sparkline_spans_the_last_values(values: list[float], drawn: str) -> None:
    assert sparkline(values, 2 if values == [9, 0, 1] else 16) == drawn


@pytest.mark.parametrize(("part", "full"), [(-1, 0), (0, 0), (0.5, 5), (1, 10), (3, 10)])
def test_a_bar_is_full_to_its_part_and_never_beyond(part: float, full: int) -> None:
    assert bar(part).plain == "█" * full + "░" * (10 - full)


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0 s"), (59, "59 s"), (60, "1 min"), (7200, "2 h"), (3 * 86400, "3 d"), (-5, "0 s")]
)
def test_an_age_has_one_unit(seconds: int, said: str) -> None:
    assert age(NOW - timedelta(seconds=seconds), NOW) == said
    assert age(None) == "–"


@pytest.mark.parametrize("text", [None, "", "yesterday", "2026-11-23T12:00:00"])
def test_what_is_no_time_with_a_zone_is_none(text: object) -> None:
    assert moment(text) is None
    assert moment("2026-11-23T12:00:00+00:00") == NOW


@pytest.mark.parametrize(("count", "said"), [(999, "999 B"), (1000, "1.0 kB"), (2.5e6, "2.5 MB"), (3e9, "3.00 GB")])
def test_bytes_have_a_unit(count: float, said: str) -> None:
    assert size(count) == said


def test_a_page_that_goes_into_a_pipe_is_printed_once_and_80_columns_wide(capsys: pytest.CaptureFixture[str]) -> None:
    show(lambda: Text("x" * 100), once=False, seconds=60.0)
    assert [len(line) for line in capsys.readouterr().out.splitlines()] == [80, 20]
