"""Handwritten digits that come with a package: all of them dealt, none both trained on and held out."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import numpy as np
import pytest

from fedgraft.core.config import RunConfig
from fedgraft.core.errors import UserError
from fedgraft.core.tasks.image_classification import read_image
from fedgraft.simulations.scenario import load_scenario, site_data
from fedgraft.simulations.sources import digits

pytestmark = pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="scikit-learn is not installed")


def config(*overrides: str) -> RunConfig:
    return load_scenario("digits-dirichlet", overrides)


def parts(settings: RunConfig) -> tuple[list[Any], list[Any]]:
    sites = site_data(settings).values()
    return [i for site in sites for i in site.train.inputs], [i for site in sites for i in site.held_out.inputs]


def test_every_image_is_at_one_site_on_one_side() -> None:
    train, held_out = parts(config())
    assert len(train) + len(held_out) == 1797
    assert len({id(image) for image in [*train, *held_out]}) == 1797
    assert len(held_out) == pytest.approx(0.2 * 1797, abs=10)


def test_images_are_those_of_scikit_learn_and_their_labels_too() -> None:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    known = {
        np.round(image * 255 / 16).astype(np.uint8).tobytes(): label
        for image, label in zip(pixels, labels, strict=True)
    }
    for site in site_data(config()).values():
        for image, label in zip(site.train.inputs, site.train.labels, strict=True):  # type: ignore[arg-type]
            assert known[image.tobytes()] == label
    assert np.asarray(read_image(image)).shape == (8, 8, 3)


def test_records_are_known_by_their_pixels() -> None:
    site = next(iter(site_data(config()).values()))
    assert len(set(site.train.digests)) == len(site.train)
    assert site.fingerprint == next(iter(site_data(config("rounds=3")).values())).fingerprint


def test_classes_can_be_bounded() -> None:
    train, held_out = parts(config("data.max_per_class=100", "data.test_per_class=5", "train.batch_size=20"))
    assert (len(train), len(held_out)) == (1000, 50)


def test_the_held_out_part_has_the_mix_of_the_site() -> None:
    for site in site_data(config("data.sites=4", "data.alpha=0.3", "data.test_fraction=0.5")).values():
        train, held_out = (np.bincount(part.labels, minlength=10) / len(part) for part in (site.train, site.held_out))
        assert 0.5 * np.abs(train - held_out).sum() < 0.1


def test_the_seed_alone_decides() -> None:
    def first(*overrides: str) -> list[bytes]:
        return next(iter(site_data(config(*overrides)).values())).train.digests

    assert first() == first("rounds=2")
    assert first() != first("seed=8")


def test_a_column_is_refused() -> None:
    overrides = ['data.partition="flwr:natural-id"', 'data.partition_options={partition_by="writer"}', "data.sizes={}"]
    pytest.importorskip("flwr_datasets")
    with pytest.raises(UserError) as caught:
        site_data(config(*overrides))
    assert str(caught.value) == "data.partition_options.partition_by: the digits have no column `writer`"


def test_without_the_package_the_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    digits.images.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError) as caught:
        digits.images()
    assert str(caught.value) == "the digits source needs scikit-learn: pip install 'fedgraft[demo]'"
    digits.images.cache_clear()
