"""Lines that another process adds: each is read once, and only when it is whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedgraft.core.watching.follow import Follower


def test_a_file_that_is_not_there_yet_has_no_lines(tmp_path: Path) -> None:
    follower = Follower(tmp_path / "metrics.jsonl")
    assert follower.new() == [] and follower.begun == 0
    (tmp_path / "metrics.jsonl").write_text('{"round": 1}\n')
    assert follower.new() == [{"round": 1}]


@pytest.mark.parametrize("cut", range(1, 18))
def test_a_line_that_is_cut_anywhere_is_read_once_it_is_whole(tmp_path: Path, cut: int) -> None:
    path, lines = tmp_path / "metrics.jsonl", [{"a": "ü"}, {"b": 2}]
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    follower = Follower(path)
    path.write_bytes(content[:cut])
    first = follower.new()
    assert len(first) == content[:cut].count(b"\n")
    with path.open("ab") as file:
        file.write(content[cut:])
    assert first + follower.new() == lines
    assert follower.new() == []


def test_a_line_that_is_no_object_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"a": 1}\nnot json\n[1]\n\xff\xfe\n\n{"a": 2}\n')
    assert Follower(path).new() == [{"a": 1}, {"a": 2}]


def test_a_file_that_was_cut_or_replaced_is_read_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    follower = Follower(path)
    assert len(follower.new()) == 2 and follower.begun == 1
    path.write_text('{"a": 3}\n')
    assert follower.new() == [{"a": 3}] and follower.begun == 2
    beside = tmp_path / "beside"
    beside.write_text('{"a": 4}\n{"a": 5}\n{"a": 6}\n')
    beside.replace(path)
    assert [line["a"] for line in follower.new()] == [4, 5, 6] and follower.begun == 3
