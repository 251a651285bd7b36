"""Sites whose records look different, or are labelled wrongly: as much as asked, and record by record."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fedgraft.client.data import Records
from fedgraft.core.config import LabelNoiseConfig, ShiftConfig, parse_config
from fedgraft.core.errors import UserError
from fedgraft.core.tasks.image_classification import read_image
from fedgraft.simulations.scenario import complete, site_data
from fedgraft.simulations.shift import ShiftedImage, mislabelled, scanned, shift_of, shifted, transition
from fedgraft.simulations.wordlists import ABBREVIATIONS, DIALECT

TEXT = "Acute fracture of the left tibia, subsequent encounter; unspecified anemia and tumor of the lung"


def records(count: int, classes: int, patients: bool = False) -> Records:
    return Records(
        [f"{TEXT} {number}" for number in range(count)],
        np.arange(count) % classes,
        [f"p{number // 3}" for number in range(count)] if patients else None,
    )


# Labels


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("rate", [0.1, 0.45])
@pytest.mark.parametrize("classes", [2, 5])
def test_labels_turn_into_others_as_the_matrix_says(kind: Any, rate: float, classes: int) -> None:
    noise, count = LabelNoiseConfig(kind=kind, rate=rate), 4000 * classes
    found = mislabelled(records(count, classes), noise, classes, 3, "east").labels
    assert found is not None
    seen = np.zeros((classes, classes))
    np.add.at(seen, (np.arange(count) % classes, found), 1 / 4000)
    want = transition(noise, classes)
    assert want.sum(1) == pytest.approx(np.ones(classes))
    # Five standard deviations of a share among 4,000 records of a class.
    np.testing.assert_allclose(seen, want, atol=5 * np.sqrt(0.25 / 4000))
    assert (seen[want == 0] == 0).all()


def test_the_matrix_of_wrong_labels_is_the_textbooks() -> None:
    third = transition(LabelNoiseConfig(kind="symmetric", rate=0.3), 4)
    assert third == pytest.approx(np.array([[0.7 if i == j else 0.1 for j in range(4)] for i in range(4)]))
    next_one = transition(LabelNoiseConfig(kind="asymmetric", rate=0.3), 3)
    assert next_one == pytest.approx(np.array([[0.7, 0.3, 0], [0, 0.7, 0.3], [0.3, 0, 0.7]]))


@given(without=st.integers(0, 29), seed=st.integers(0, 20))
def test_one_record_less_changes_nothing_of_the_others(without: int, seed: int) -> None:
    everybody = records(30, 3, patients=True)
    others = everybody.take(np.delete(np.arange(30), without))
    noise, shift = LabelNoiseConfig(kind="symmetric", rate=0.5), ShiftConfig(kind="typos", strength=0.5)

    def seen(some: Records) -> list[tuple[Any, ...]]:
        wrong = mislabelled(some, noise, 3, seed, "east")
        assert wrong.labels is not None
        written = shifted(some, shift, seed, "east")
        return list(zip(wrong.labels.tolist(), written.inputs, strict=True))

    whole = seen(everybody)
    assert seen(others) == whole[:without] + whole[without + 1 :]


# Texts


@pytest.mark.parametrize("kind", ["abbreviations", "dialect", "typos", "capitals"])
def test_a_writer_at_full_strength_changes_texts_and_at_none_leaves_them(kind: Any) -> None:
    some = records(20, 2)
    for strength, changed in ((1.0, 20), (0.0, 0)):
        found = shifted(some, ShiftConfig(kind=kind, strength=strength), 1, "east")
        assert sum(a != b for a, b in zip(found.inputs, some.inputs, strict=True)) == changed
        assert (found.labels == some.labels).all()


def test_words_are_replaced_by_the_lists_and_keep_their_capital() -> None:
    some = Records(["Fracture of the LEFT tibia", "fractured"])
    short = shifted(some, ShiftConfig(kind="abbreviations", strength=1), 1, "east").inputs
    assert short == ["Fx of the Lt tibia", "fractured"]
    british = shifted(Records(["Anemia", "tumor of the lung"]), ShiftConfig(kind="dialect", strength=1), 1, "e").inputs
    assert british == ["Anaemia", "tumour of the pulmonary"]
    for words in (ABBREVIATIONS, DIALECT):
        assert all(word == word.lower() and other and other != word for word, other in words.items())


def test_a_site_has_habits_and_sites_differ_in_them() -> None:
    text = Records([" ".join(ABBREVIATIONS)])
    found = {
        site: shifted(text, ShiftConfig(kind="abbreviations", strength=0.5), 1, site).inputs[0].split()
        for site in ("east", "west")
    }
    kept = {site: [a == b for a, b in zip(words, ABBREVIATIONS, strict=True)] for site, words in found.items()}
    assert kept["east"] != kept["west"]
    for habits in kept.values():
        assert 0.3 < np.mean(habits) < 0.7
    # A word that a site abbreviates it always abbreviates.
    twice = shifted(
        Records([" ".join(ABBREVIATIONS)] * 2, None, ["a", "b"]),
        ShiftConfig(kind="abbreviations", strength=0.5),
        1,
        "east",
    )
    assert twice.inputs[0] == twice.inputs[1]


def test_the_share_of_words_with_a_slip_is_the_strength() -> None:
    some = Records(["discharged patients yesterday evening"] * 500, None, [f"p{i}" for i in range(500)])
    found = shifted(some, ShiftConfig(kind="typos", strength=0.3), 1, "east").inputs
    wrong = np.mean([a != b for text in found for a, b in zip(text.split(), some.inputs[0].split(), strict=True)])
    # A swap or a doubling of equal letters may leave a word as it was.
    assert 0.2 < wrong <= 0.35


# Images


def test_a_scanner_does_what_its_name_says() -> None:
    pixels = np.random.default_rng(0).integers(60, 200, (16, 16, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)

    def seen(kind: str, strength: float, key: bytes = b"") -> np.ndarray:
        found = np.asarray(scanned(image, kind, strength, key)).astype(float)
        assert found.shape == pixels.shape
        return found

    assert (seen("rotate", 1.0) == np.rot90(pixels)).all()
    assert (seen("rotate", -1.0) == np.rot90(pixels, -1)).all()
    assert (seen("invert", 1.0) == 255.0 - pixels).all()
    assert seen("brightness", 0.2) == pytest.approx(pixels + 25.5, abs=0.51)
    assert seen("contrast", 0.25) == pytest.approx(127.5 + (pixels - 127.5) * 4**0.25, abs=0.51)
    assert seen("blur", 1.0).std() < 0.6 * pixels.std()
    noise = seen("noise", 0.5, b"a") - pixels
    assert noise.std() == pytest.approx(32, rel=0.1)
    assert (seen("noise", 0.5, b"a") == seen("noise", 0.5, b"a")).all()
    assert (seen("noise", 0.5, b"a") != seen("noise", 0.5, b"b")).any()
    for kind in ("rotate", "brightness", "contrast", "noise"):
        assert (seen(kind, 0.0) == pixels).all()


def test_a_shifted_image_is_read_when_it_is_asked_for_and_known_by_its_shift(tmp_path: Path) -> None:
    path = tmp_path / "scan.png"
    Image.fromarray(np.full((8, 8), 40, dtype=np.uint8)).save(path)
    given_ = Records([path], np.array([0]))
    found = shifted(given_, ShiftConfig(kind="brightness", strength=0.5), 1, "east")
    image = found.inputs[0]
    assert isinstance(image, ShiftedImage)
    assert np.asarray(read_image(image))[0, 0].tolist() == [104, 104, 104]
    assert found.digests != given_.digests
    same = shifted(given_, ShiftConfig(kind="brightness", strength=0.5), 1, "east")
    assert same.digests == found.digests
    path.unlink()
    with pytest.raises(UserError, match=r"scan\.png"):
        read_image(image)


# Which site has which


def with_sites(**data: Any) -> Any:
    sites = [{"name": f"s{number:03d}"} for number in range(200)]
    return parse_config({"model": "m", "data": {"sites": sites, **data}})


@pytest.mark.parametrize(("kind", "least"), [("rotate", -0.8), ("blur", 0.0)])
def test_the_strength_of_each_site_is_drawn_up_to_that_of_all(kind: str, least: float) -> None:
    config = with_sites(shift={"kind": kind, "strength": 0.8})
    drawn = [shift_of(config.data, site, 4) for site in config.data.sites]
    strengths = [shift.strength if shift is not None else 0.0 for shift in drawn]
    assert least <= min(strengths) < least + 0.1
    assert 0.7 < max(strengths) <= 0.8
    assert strengths == [shift_of(config.data, site, 4).strength for site in config.data.sites]  # type: ignore[union-attr]
    assert strengths != [shift_of(config.data, site, 5).strength for site in config.data.sites]  # type: ignore[union-attr]


def test_inverting_scanners_are_as_many_as_the_strength_says() -> None:
    config = with_sites(shift={"kind": "invert", "strength": 0.3})
    assert 40 <= sum(shift_of(config.data, site, 4) is not None for site in config.data.sites) <= 80


def test_a_site_of_its_own_kind_keeps_to_it() -> None:
    sites = [
        {"name": "a"},
        {"name": "b", "shift": {"kind": "none"}},
        {"name": "c", "shift": {"kind": "capitals", "strength": 1}},
    ]
    config = parse_config({"model": "m", "data": {"sites": sites, "shift": {"kind": "typos", "strength": 0.5}}})
    a, b, c = (shift_of(config.data, site, 0) for site in config.data.sites)
    assert a is not None and a.kind == "typos" and 0 < a.strength <= 0.5
    assert b is None
    assert c is not None and (c.kind, c.strength) == ("capitals", 1)
    assert config.simulated == ("data.shift", "data.sites[].shift")


# In a federation


def test_training_labels_are_wrong_and_held_out_ones_are_right(tiny_federation: Any) -> None:
    right = site_data(tiny_federation.config())
    noisy = site_data(tiny_federation.config(**{"data.label_noise": {"kind": "asymmetric", "rate": 0.4}}))
    for name, site in noisy.items():
        clean = right[name]
        assert list(site.train.inputs) == list(clean.train.inputs)
        assert (site.held_out.labels == clean.held_out.labels).all()
        wrong = site.train.labels != clean.train.labels
        assert 0.25 < wrong.mean() < 0.55
        assert (site.train.labels[wrong] == (clean.train.labels[wrong] + 1) % 3).all()  # type: ignore[index]


def test_only_the_sites_that_are_named_err_or_look_different(tiny_federation: Any) -> None:
    sites = [
        {"name": "east", "label_noise": {"kind": "symmetric", "rate": 1.0}},
        {"name": "north", "shift": {"kind": "capitals", "strength": 1.0}},
        "south",
    ]
    right, odd = site_data(tiny_federation.config()), site_data(tiny_federation.config(**{"data.sites": sites}))
    assert (odd["east"].train.labels != right["east"].train.labels).all()
    assert list(odd["east"].train.inputs) == list(right["east"].train.inputs)
    for part in ("train", "held_out"):
        texts = [text.upper() for text in getattr(right["north"], part).inputs]
        assert list(getattr(odd["north"], part).inputs) == texts
    assert dataclasses.astuple(odd["south"])[0] == "south"
    assert odd["south"].fingerprint == right["south"].fingerprint


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"data.shift": {"kind": "rotate", "strength": 0.5}},
            "data: shift `rotate` is not for texts, which sequence-classification reads; choose one of abbreviations, "
            "dialect, typos, capitals",
        ),
        (
            {"data.sites": ["a", {"name": "b", "shift": {"kind": "blur", "strength": 1}}]},
            "data.sites[] b: shift `blur` is not for texts",
        ),
        (
            {"task": {"name": "causal-lm"}, "data.label_noise": {"kind": "symmetric", "rate": 0.1}},
            "data: label_noise needs labels, and causal-lm has none; leave it out",
        ),
        (
            {"data.shift": {"kind": "typos", "strength": -0.5}},
            "`data.shift`: `typos` has no opposite: strength is 0 to 1",
        ),
        ({"data.shift": {"strength": 0.5}}, "`data.shift`: strength 0.5 of what? set kind to one of abbreviations"),
        ({"data.label_noise": {"rate": 0.5}}, "`data.label_noise`: rate 0.5 of what? set kind to"),
        ({"data.label_noise": {"kind": "symetric"}}, "`data.label_noise.kind`: Input should be"),
    ],
)
def test_a_shift_that_cannot_be_is_one_line(tiny_federation: Any, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError) as caught:
        complete(tiny_federation.config(**changes))
    assert reason in str(caught.value)
