"""Handwritten digits without a download: the 1,797 images of 8 x 8 pixels that scikit-learn carries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from PIL import Image

from ...client.data import Records, SiteData
from ...core.config import RunConfig
from ...core.errors import UserError
from ..dealing import deal_units, require_dealt

_DARKEST = 16


def labels() -> tuple[str, ...]:
    """The ten digits."""
    return tuple(str(digit) for digit in range(10))


@lru_cache(maxsize=1)
def images() -> tuple[list[Image.Image], np.ndarray]:
    """Every image, in grey, and its digit."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("the digits source needs scikit-learn: pip install 'fedgraft[demo]'") from None
    pixels, digits = load_digits(return_X_y=True)
    grey = np.round(pixels.reshape(-1, 8, 8) * (255 / _DARKEST)).astype(np.uint8)
    return [Image.fromarray(image) for image in grey], digits.astype(np.int64)


def dealt(config: RunConfig) -> Callable[[int], SiteData]:
    """Each site's data, by its number: `data.test_fraction` of the digits held out, both parts dealt alike."""
    pictures, digits = images()
    rng = np.random.default_rng([config.seed, 12])
    train: list[int] = []
    test: list[int] = []
    for digit in range(10):
        members = rng.permutation(np.flatnonzero(digits == digit)).tolist()
        cut = round(config.data.test_fraction * len(members))
        test += members[:cut][: config.data.test_per_class or None]
        train += members[cut:][: config.data.max_per_class or None]
    deal = deal_units(config, digits[train], 10, _no_column, rng)
    parts = [np.array(train), np.array(test)]
    mine = [[parts[0][at] for at in deal.units], [parts[1][at] for at in deal.held_out(digits[test], rng)]]
    for site, indices in zip(config.site_names, mine[0], strict=True):
        require_dealt(site, len(indices), "the digits")

    def build(number: int) -> SiteData:
        own, held_out = (Records([pictures[i] for i in part[number]], digits[part[number]]) for part in mine)
        return SiteData(config.site_names[number], own, held_out, f"seed {config.seed}")

    return build


def _no_column(name: str) -> Sequence[str]:
    raise UserError(f"data.partition_options.partition_by: the digits have no column `{name}`")
