"""What makes a site's records another site's: how it writes, what its scanner shows, which labels it gets wrong.

What becomes of one record hangs on the seed, the site and the record alone: one patient more changes no other's.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from ..client.data import Records
from ..core.config import (
    IMAGE_SHIFTS,
    TEXT_SHIFTS,
    TWO_WAY_SHIFTS,
    DataConfig,
    LabelNoiseConfig,
    RunConfig,
    ShiftConfig,
    SiteConfig,
)
from ..core.errors import UserError
from ..core.tasks import create_task
from ..core.tasks.image_classification import read_image
from ..privacy.sampling import shares
from .chance import uniform
from .wordlists import ABBREVIATIONS, DIALECT

_WORD = re.compile(r"[^\W\d_]+")


def check_shifts(config: RunConfig) -> None:
    """Raise :class:`UserError` for a shift of images in a task that reads texts, or the other way round; for wrong
    labels where there are none."""
    task = create_task(config.task)
    fits = TEXT_SHIFTS if task.input_kind == "text" else IMAGE_SHIFTS
    places = [("data", config.data.shift, config.data.label_noise)]
    places += [(f"data.sites[] {site.name}", site.shift, site.label_noise) for site in config.data.sites]
    for where, shift, noise in places:
        if shift.kind not in ("", "none", *fits):
            raise UserError(
                f"{where}: shift `{shift.kind}` is not for {task.input_kind}s, which {task.name} reads; choose one of "
                f"{', '.join(fits)}"
            )
        if noise.kind not in ("", "none") and not task.labelled:
            raise UserError(f"{where}: label_noise needs labels, and {task.name} has none; leave it out")


def shift_of(data: DataConfig, site: SiteConfig, seed: int) -> ShiftConfig | None:
    """What a site's records look like: its own shift, else one drawn within the strength of all; None: as they are.

    `invert` is there or not: its strength is the chance of a site to have it.
    """
    shift = site.shift
    if not shift.kind:
        shift = data.shift
        if shift.kind != "invert":
            strength = shift.strength * uniform(seed, site.name, "shift")
            if shift.kind in TWO_WAY_SHIFTS and uniform(seed, site.name, "shift", "way") < 0.5:
                strength = -strength
            shift = shift.model_copy(update={"strength": strength})
    if shift.kind == "invert" and uniform(seed, site.name, "invert") >= shift.strength:
        return None
    return shift if shift.strength and shift.kind not in ("", "none") else None


def noise_of(data: DataConfig, site: SiteConfig) -> LabelNoiseConfig | None:
    """A site's own wrong labels, else those of all; None: there are none."""
    noise = site.label_noise if site.label_noise.kind else data.label_noise
    return noise if noise.rate else None


def transition(noise: LabelNoiseConfig, classes: int) -> np.ndarray:
    """Chance that a record of one class (row) is labelled as another (column), shape (classes, classes).

    Symmetric: wrong with `rate`, then any other class alike. Asymmetric: wrong with `rate`, then the next class.
    """
    right = (1 - noise.rate) * np.eye(classes)
    if noise.kind == "asymmetric":
        return right + noise.rate * np.roll(np.eye(classes), 1, axis=1)
    return right + noise.rate / (classes - 1) * (1 - np.eye(classes))


def mislabelled(records: Records, noise: LabelNoiseConfig, classes: int, seed: int, site: str) -> Records:
    """``records`` with labels drawn from the row of :func:`transition` of their own."""
    if records.labels is None:
        return records
    drawn = shares(records.units(by_patient=False)[1], seed, site, "label-noise")
    wrong = drawn < noise.rate
    # Given that it is below the rate, the draw over the rate is uniform again.
    steps = 1 + np.minimum((drawn / noise.rate * (classes - 1)).astype(np.int64), classes - 2)
    if noise.kind == "asymmetric":
        steps = np.ones(len(records), dtype=np.int64)
    return replace(records, labels=np.where(wrong, (records.labels + steps) % classes, records.labels))


def shifted(records: Records, shift: ShiftConfig, seed: int, site: str) -> Records:
    """``records`` as they look at ``site``."""
    keys = records.units(by_patient=False)[1]
    if shift.kind in TEXT_SHIFTS:
        writer = _WRITERS[shift.kind](shift.strength, seed, site)
        return replace(records, inputs=[writer(str(text), key) for text, key in zip(records.inputs, keys, strict=True)])
    salt = f"{seed}|{site}".encode()
    return replace(
        records,
        inputs=[
            ShiftedImage(image, shift.kind, shift.strength, salt + key)
            for image, key in zip(records.inputs, keys, strict=True)
        ],
    )


# Texts: a writer takes a text and the key of its record.

Writer = Callable[[str, bytes], str]


def _habits(words: dict[str, str], kind: str) -> Callable[[float, int, str], Writer]:
    """A site that writes some of ``words`` its own way, and these always: each with the chance ``strength``."""

    def make(strength: float, seed: int, site: str) -> Writer:
        own = {word: other for word, other in words.items() if uniform(seed, site, kind, word) < strength}

        def replaced(match: re.Match[str]) -> str:
            word = match[0]
            other = own.get(word.lower())
            if other is None:
                return word
            return other[:1].upper() + other[1:] if word[0].isupper() else other

        return lambda text, key: _WORD.sub(replaced, text)

    return make


def _typos(strength: float, seed: int, site: str) -> Writer:
    """Of the words of three letters and more, ``strength`` have two letters swapped, one left out, or one doubled."""

    def write(text: str, key: bytes) -> str:
        draw = _draw(f"typos|{seed}|{site}|".encode() + key)

        def slip(match: re.Match[str]) -> str:
            word = match[0]
            if draw.random() >= strength or len(word) < 3:
                return word
            at, how = int(draw.integers(len(word) - 1)), int(draw.integers(3))
            if how == 0:
                return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
            return word[:at] + (word[at] * 2 if how == 1 else "") + word[at + 1 :]

        return _WORD.sub(slip, text)

    return write


def _capitals(strength: float, seed: int, site: str) -> Writer:
    """``strength`` of the texts are in capitals."""
    return lambda text, key: text.upper() if shares([key], seed, site, "capitals")[0] < strength else text


_WRITERS: dict[str, Callable[[float, int, str], Writer]] = {
    "abbreviations": _habits(ABBREVIATIONS, "abbreviations"),
    "dialect": _habits(DIALECT, "dialect"),
    "typos": _typos,
    "capitals": _capitals,
}


def _draw(text: bytes) -> np.random.Generator:
    return np.random.default_rng(list(hashlib.sha256(text).digest()))


# Images


@dataclass(frozen=True)
class ShiftedImage:
    """An image as a site's scanner shows it, read when a batch needs it. ``key``: of the site and the record."""

    source: Path | Image.Image
    kind: str
    strength: float
    key: bytes

    def picture(self) -> Image.Image:
        """Raises :class:`PrivateError` for a file that is no image."""
        return scanned(read_image(self.source), self.kind, self.strength, self.key)

    def content(self) -> bytes:
        """What tells it from other records."""
        return self.key + f"|{self.kind}|{self.strength!r}".encode()


def scanned(image: Image.Image, kind: str, strength: float, key: bytes = b"") -> Image.Image:
    """An RGB image as a scanner shows it that is off by ``strength``, -1 to 1.

    `rotate`: turned by 90 degrees times it, black at the corners; `contrast`: distance from mid-grey times 4 to its
    power; `brightness`: half of the scale times it added; `blur`: Gaussian, with a sixteenth of the shorter side times
    it; `noise`: Gaussian, with a quarter of the scale times it, drawn from ``key``; `invert`: the negative.
    """
    if kind == "rotate":
        return image.rotate(90 * strength, resample=Image.Resampling.BILINEAR)
    if kind == "blur":
        return image.filter(ImageFilter.GaussianBlur(strength * min(image.size) / 16))
    pixels = np.asarray(image, dtype=np.float64)
    changed = {
        "contrast": lambda: 127.5 + (pixels - 127.5) * 4**strength,
        "brightness": lambda: pixels + 127.5 * strength,
        "noise": lambda: pixels + 64 * strength * _draw(b"noise|" + key).standard_normal(pixels.shape),
        "invert": lambda: 255 - pixels,
    }[kind]()
    return Image.fromarray(np.clip(np.round(changed), 0, 255).astype(np.uint8))
