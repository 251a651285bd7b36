"""A site's records: every file kind, every mistake in one, and the split by patient."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fedgraft.client.data import Records, SiteData, load_site, read_records, split
from fedgraft.core.config import RunConfig, parse_config
from fedgraft.core.errors import PrivateError, UserError
from fedgraft.core.records import label_indices

ROWS = [
    {"text": "acute fever", "label": "infection", "patient": "p1"},
    {"text": 'a "quoted", text\nof two lines', "label": "injury", "patient": "p2"},
    {"text": "größer — ünïcode", "label": "infection", "patient": "p1"},
]


def config(**changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "model": "m",
        "task": {"labels": ["infection", "injury"]},
        "privacy": {"unit": "patient"},
        "data": {"sites": ["north"], "path": "x"},
    }
    for key, value in changes.items():
        section, _, leaf = key.partition(".")
        values[section] = {**values.get(section, {}), leaf: value} if leaf else value
    return parse_config(values)


def _csv(path: Path, rows: list[dict[str, Any]], separator: str = ",") -> None:
    import csv

    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")


def _parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


KINDS: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    "r.csv": _csv,
    "R.CSV": _csv,
    "r.tsv": lambda path, rows: _csv(path, rows, "\t"),
    "r.jsonl": _jsonl,
    "r.ndjson": _jsonl,
    "r.parquet": _parquet,
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_table_is_read_alike(tmp_path: Path, name: str) -> None:
    KINDS[name](tmp_path / name, ROWS)
    records = read_records(tmp_path / name, config())
    assert list(records.inputs) == [row["text"] for row in ROWS]
    assert records.labels is not None
    assert records.labels.tolist() == [0, 1, 0]
    assert records.patients == ["p1", "p2", "p1"]


def test_the_columns_may_have_other_names(tmp_path: Path) -> None:
    _csv(tmp_path / "r.csv", [{"note": "a", "code": "injury", "who": "7"}])
    names = {"data.text_column": "note", "data.label_column": "code", "data.patient_column": "who"}
    records = read_records(tmp_path / "r.csv", config(**names))
    assert (list(records.inputs), records.patients) == (["a"], ["7"])


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    for name in ("r.csv", "r.jsonl"):
        KINDS[name](tmp_path / name, ROWS)
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
        assert len(read_records(tmp_path / name, config())) == 3


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_a_line_separator_inside_a_text_ends_no_line(tmp_path: Path, separator: str) -> None:
    """`str.splitlines` would cut a JSON line there."""
    line = json.dumps({**ROWS[0], "text": f"one{separator}two"}, ensure_ascii=False)
    assert separator in line
    (tmp_path / "r.jsonl").write_text(f"{line}\n", encoding="utf-8")
    assert list(read_records(tmp_path / "r.jsonl", config()).inputs) == [f"one{separator}two"]


def test_blank_lines_of_json_are_skipped(tmp_path: Path) -> None:
    text = "\n".join(json.dumps(row) for row in ROWS)
    (tmp_path / "r.jsonl").write_text(f"\n{text}\n   \n\n")
    assert len(read_records(tmp_path / "r.jsonl", config())) == 3


def test_labels_that_are_numbers_match_their_texts(tmp_path: Path) -> None:
    _parquet(tmp_path / "r.parquet", [{"text": "a", "label": 1, "patient": 7}, {"text": "b", "label": 0, "patient": 7}])
    records = read_records(tmp_path / "r.parquet", config(**{"task.labels": ["0", "1"]}))
    assert records.labels is not None
    assert records.labels.tolist() == [1, 0]
    assert records.patients == ["7", "7"]


def test_one_person_written_in_two_ways_is_one_patient(tmp_path: Path) -> None:
    rows = [{**ROWS[0], "patient": key} for key in ("p1", " p1", "p1 ", "p2")]
    _csv(tmp_path / "r.csv", rows)
    assert read_records(tmp_path / "r.csv", config()).patients == ["p1", "p1", "p1", "p2"]
    _jsonl(tmp_path / "r.jsonl", [{**ROWS[0], "patient": 1}, {**ROWS[0], "patient": "1"}])
    assert read_records(tmp_path / "r.jsonl", config()).patients == ["1", "1"]


def test_records_without_patients_are_their_own_units(tmp_path: Path) -> None:
    _csv(tmp_path / "r.csv", [{"text": "a", "label": "injury"}])
    assert read_records(tmp_path / "r.csv", config(**{"privacy.unit": "record"})).patients is None
    assert read_records(tmp_path / "r.csv", config(privacy={"enabled": False})).patients is None
    with pytest.raises(PrivateError) as caught:
        read_records(tmp_path / "r.csv", config())
    assert str(caught.value) == (
        f"{tmp_path}/r.csv: no column `patient` (columns: text, label); the privacy unit is the patient, so set "
        'data.patient_column, or privacy.unit = "record"'
    )


def test_text_without_labels_suits_a_language_model(tmp_path: Path) -> None:
    _csv(tmp_path / "r.csv", [{"text": "a b c", "patient": "p"}])
    records = read_records(tmp_path / "r.csv", config(**{"task.name": "causal-lm", "task.labels": []}))
    assert records.labels is None
    assert records.take(np.array([0])).labels is None


HEAD = "text,label,patient\n"
GOOD = '{"text": "a", "label": "injury", "patient": "p"}\n'
BAD: dict[str, tuple[str, str | bytes, str]] = {
    "missing text column": (
        "r.csv",
        "words,label,patient\na,injury,p\n",
        "no column `text` (columns: words, label, patient); set data.text_column",
    ),
    "missing label column": (
        "r.csv",
        "text,patient\na,p\n",
        "no column `label` (columns: text, patient); set data.label_column",
    ),
    "label outside the set": (
        "r.csv",
        f"{HEAD}a,injury,p\nb,cancer,p\n",
        "record 2 has the label `cancer`, which is not in task.labels",
    ),
    "empty text": ("r.csv", f"{HEAD}a,injury,p\n,injury,p\n", "record 2 has no `text`"),
    "blank text": ("r.csv", f"{HEAD}   ,injury,p\n", "record 1 has no `text`"),
    "empty label": ("r.csv", f"{HEAD}a,,p\n", "record 1 has no `label`"),
    "empty patient": ("r.csv", f"{HEAD}a,injury,\n", "record 1 has no `patient`"),
    "short line": ("r.csv", f"{HEAD}a,injury\n", "record 1 has no `patient`"),
    "header alone": ("r.csv", HEAD, "holds no records"),
    "empty file": ("r.csv", "", "holds no records"),
    "empty JSON file": ("r.jsonl", "", "holds no records"),
    "not UTF-8": ("r.csv", HEAD.encode() + b"\xff\xfe,injury,p\n", "cannot be read: 'utf-8' codec can't decode"),
    "broken JSON": ("r.jsonl", GOOD + '{"text":\n', "line 2 is not JSON: "),
    "JSON that is no object": ("r.jsonl", f"{GOOD}[1]\n", "line 2 is not a JSON object"),
    "JSON that is a number": ("r.jsonl", "1\n", "line 1 is not a JSON object"),
    "JSON null": ("r.jsonl", GOOD.replace('"a"', "null"), "record 1 has no `text`"),
    "JSON NaN": ("r.jsonl", GOOD.replace('"p"', "NaN"), "record 1 has no `patient`"),
    "a key in some lines only": ("r.jsonl", GOOD + '{"text": "b", "label": "injury"}\n', "record 2 has no `patient`"),
    "no Parquet": ("r.parquet", b"PAR0", "cannot be read: "),
    "another kind of file": ("r.xlsx", b"PK", "not a CSV, TSV, JSONL or Parquet file, nor an image folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_in_a_table_is_named(tmp_path: Path, name: str) -> None:
    file, content, reason = BAD[name]
    path = tmp_path / file
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(PrivateError) as caught:
        read_records(path, config())
    assert str(caught.value).startswith(f"{path}: {reason}")
    if name not in ("not UTF-8", "broken JSON", "no Parquet"):
        assert str(caught.value) == f"{path}: {reason}"


def test_a_null_in_parquet_is_an_empty_cell(tmp_path: Path) -> None:
    for empty in (None, float("nan")):
        table = {"text": ["a", "b"], "label": ["injury", "injury"], "patient": pyarrow.array([1.0, empty])}
        pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "r.parquet")
        with pytest.raises(PrivateError, match="record 2 has no `patient`"):
            read_records(tmp_path / "r.parquet", config())


def test_no_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PrivateError, match=r"nowhere\.csv: no such file"):
        read_records(tmp_path / "nowhere.csv", config())


def test_the_label_set_must_be_said(tmp_path: Path) -> None:
    with pytest.raises(PrivateError) as caught:
        label_indices(["b", "a", "b"], (), "r.csv")
    assert str(caught.value) == "r.csv: say the label set in task.labels; this file has ['a', 'b']"


# Images


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for label, count in (("infection", 3), ("injury", 2)):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / "pictures" / label / f"{number}.png")
    (tmp_path / "pictures" / "injury" / "notes.txt").write_text("not an image")
    return tmp_path / "pictures"


def test_a_folder_of_images_is_labelled_by_its_subfolders(images: Path) -> None:
    settings = config(**{"task.name": "image-classification", "privacy.unit": "record"})
    records = read_records(images, settings)
    assert [Path(p).name for p in records.inputs] == ["0.png", "1.png", "2.png", "0.png", "1.png"]
    assert records.labels is not None
    assert records.labels.tolist() == [0, 0, 0, 1, 1]
    assert records.patients is None


def test_mistakes_in_a_folder_of_images_are_named(images: Path, tmp_path: Path) -> None:
    task = {"task.name": "image-classification"}
    with pytest.raises(PrivateError, match=r"an image folder names no patients; .*privacy\.unit = \"record\"$"):
        read_records(images, config(**task))
    with pytest.raises(PrivateError, match=r"record 4 has the label `injury`, which is not in task\.labels"):
        read_records(images, config(**task, **{"privacy.unit": "record", "task.labels": ["infection", "x"]}))
    (tmp_path / "empty").mkdir()
    with pytest.raises(PrivateError, match="empty: no images in subfolders named by label"):
        read_records(tmp_path / "empty", config(**task, **{"privacy.unit": "record"}))


def test_a_table_of_images_may_name_patients(images: Path) -> None:
    rows = [{"image": "infection/0.png", "label": "infection", "patient": "p"}]
    _csv(images / "r.csv", rows)
    records = read_records(images / "r.csv", config(**{"task.name": "image-classification"}))
    assert list(records.inputs) == [images / "infection" / "0.png"]
    assert records.patients == ["p"]


# The split


@given(
    keys=st.lists(st.integers(0, 12).map(str), min_size=2, max_size=60).filter(lambda keys: len(set(keys)) > 1),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 100),
)
def test_the_split_keeps_every_record_once_and_every_patient_whole(keys: list[str], fraction: float, seed: int) -> None:
    records = Records([f"text {i}" for i in range(len(keys))], np.arange(len(keys)), keys)
    settings = config(seed=seed, **{"data.test_fraction": fraction})
    try:
        data = split(records, settings, "north")
    except PrivateError as error:
        assert "fell into the held-out part" in str(error)
        return
    assert sorted([*data.train.inputs, *data.held_out.inputs]) == sorted(records.inputs)
    assert data.train.patients is not None and data.held_out.patients is not None
    train, held_out = set(data.train.patients), set(data.held_out.patients)
    assert not train & held_out
    assert train and held_out
    # Texts, labels and patients stay together.
    for part in (data.train, data.held_out):
        assert part.labels is not None and part.patients is not None
        for text, label, patient in zip(part.inputs, part.labels, part.patients, strict=True):
            assert text == f"text {label}"
            assert keys[label] == patient


def test_the_split_depends_on_seed_and_site_alone() -> None:
    records = Records([str(i) for i in range(50)], np.zeros(50, dtype=np.int64))

    def held_out(seed: int, site: str) -> list[str]:
        return list(split(records, config(seed=seed), site).held_out.inputs)

    assert held_out(1, "north") == held_out(1, "north")
    assert held_out(1, "north") != held_out(2, "north")
    assert held_out(1, "north") != held_out(1, "south")


@pytest.mark.parametrize("by_patient", [True, False])
def test_a_patient_more_or_less_moves_no_other(by_patient: bool) -> None:
    """The promise compares data sets that differ in one unit: were the others dealt anew, it would say nothing."""
    keys = [f"p{i // 3}" for i in range(300)] if by_patient else None
    records = Records([f"text {i}" for i in range(300)], None, keys)
    less = records.take(np.array([i for i in range(300) if i // 3 != 40]))
    more, fewer = (split(each, config(), "north") for each in (records, less))
    gone = {f"text {i}" for i in (120, 121, 122)}
    assert set(more.train.inputs) - gone == set(fewer.train.inputs)
    assert set(more.held_out.inputs) - gone == set(fewer.held_out.inputs)
    assert more.split == fewer.split == "seed 0, 0.2 held out"


def test_about_the_asked_for_fraction_is_held_out() -> None:
    records = Records([str(i) for i in range(2000)], np.zeros(2000, dtype=np.int64))
    for fraction in (0.1, 0.5):
        held = len(split(records, config(**{"data.test_fraction": fraction}), "north").held_out)
        assert abs(held - 2000 * fraction) < 5 * (2000 * fraction * (1 - fraction)) ** 0.5


def test_equal_records_are_units_of_their_own() -> None:
    records = Records(["same"] * 60, np.zeros(60, dtype=np.int64))
    groups, keys = records.units(by_patient=False)
    assert len(groups) == len(set(keys)) == 60
    # One more of them adds one key and changes none.
    assert set(Records(["same"] * 61, np.zeros(61, dtype=np.int64)).units(by_patient=False)[1]) > set(keys)


def test_the_fingerprint_is_that_of_the_records_in_any_order_and_split(images: Path) -> None:
    texts, labels, keys = [f"text {i}" for i in range(50)], np.arange(50) % 3, [f"p{i // 2}" for i in range(50)]
    records = Records(texts, labels, keys)
    first = split(records, config(), "north").fingerprint
    assert split(records.take(np.arange(50)[::-1]), config(seed=9), "south").fingerprint == first
    for other in (
        Records(["text x", *texts[1:]], labels, keys),
        Records(texts, (labels + 1) % 3, keys),
        Records(texts, labels, ["px", "px", *keys[2:]]),
        records.take(np.arange(49)),
        Records([*texts, texts[0]], np.append(labels, labels[0]), [*keys, keys[0]]),
    ):
        assert split(other, config(), "north").fingerprint != first
    # Of an image its file counts, not its name.
    file = sorted(images.glob("*/*"))[0]
    copy = file.with_name(f"copy{file.suffix}")
    copy.write_bytes(file.read_bytes())
    assert Records([file]).digests == Records([copy]).digests
    copy.write_bytes(file.read_bytes() + b" ")
    assert Records([file]).digests != Records([copy]).digests
    with pytest.raises(PrivateError, match=r"gone\.png: cannot be read"):
        _ = Records([images / "gone.png"]).digests


def test_records_that_were_taken_bring_their_digests_along() -> None:
    records = Records(["a", "b", "c"], np.array([0, 1, 1]), ["p", "q", "r"])
    fresh = records.take(np.array([2, 0])).digests
    whole = records.digests
    assert records.take(np.array([2, 0])).digests == fresh == [whole[2], whole[0]]
    assert len(set(whole)) == 3


def test_a_split_that_leaves_one_side_empty_says_so() -> None:
    records = Records(["a", "b"], np.zeros(2, dtype=np.int64))
    for seed in range(20):
        plain = split(records, config(seed=seed, **{"privacy.enabled": False}), "north")
        assert len(plain.train) == len(plain.held_out) == 1, "without a promise one may move"
    seen = set()
    for seed in range(20):
        try:
            split(records, config(seed=seed), "north")
        except PrivateError as error:
            seen.add(str(error))
    assert seen == {
        f"site north: of its 2 patients or records {who} fell into the held-out part; change data.test_fraction or seed"
        for who in ("none", "all")
    }


@pytest.mark.parametrize("keys", [["p"], ["p", "p", "p"]])
def test_one_patient_is_too_few_to_split(keys: list[str]) -> None:
    records = Records(["a"] * len(keys), np.zeros(len(keys), dtype=np.int64), keys)
    with pytest.raises(PrivateError) as caught:
        split(records, config(), "north")
    assert str(caught.value) == "site north has one patient or record: too few to hold any out"


def test_a_patient_on_both_sides_is_refused() -> None:
    one = Records(["a", "b"], None, ["p", "q"])
    with pytest.raises(PrivateError, match="site north: 1 patients are both trained on and held out"):
        SiteData("north", one, one.take(np.array([1])))
    with pytest.raises(PrivateError, match="site north has no training records"):
        SiteData("north", one.take(np.array([], dtype=int)), one)


# What may be told


def test_a_mistake_in_the_data_names_the_site_and_stays_there(tmp_path: Path) -> None:
    _csv(tmp_path / "r.csv", [{"text": "a", "label": "a secret label", "patient": "p"}])
    with pytest.raises(PrivateError) as caught:
        load_site(config(), "north", str(tmp_path / "r.csv"))
    assert str(caught.value).startswith(f"site north: {tmp_path}/r.csv: record 1 has the label `a secret label`")
    with pytest.raises(PrivateError, match=r"^site north: no data path; set data\.sites\[\]\.path"):
        load_site(config(), "north", "")


def test_every_mistake_in_the_data_is_private(tmp_path: Path) -> None:
    """Whatever reading raises may quote a record; only a `PrivateError` is kept from the server."""
    (tmp_path / "r.csv").write_text("text,label,patient\na,b,c\n")
    with pytest.raises(UserError) as caught:
        load_site(config(**{"task.name": "no-such-task"}), "north", str(tmp_path / "r.csv"))
    assert type(caught.value) is PrivateError
