"""The grid of a sweep: keys with the values that each takes, and the points that they make."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...core.errors import UserError

_OPENING, _CLOSING = "[{(", "]})"
#: A folder's name is cut to so many characters; what it stood for is then told by a digest.
_LONGEST = 120


@dataclass(frozen=True)
class Axis:
    """One key of the configuration and the values that it takes, as a person wrote them."""

    key: str
    values: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Axis:
        """``key=a,b``; commas within brackets or quotes belong to a value. Raises :class:`UserError`."""
        key, equals, rest = text.partition("=")
        key, values = key.strip(), tuple(split_values(rest))
        if not equals or not key:
            raise UserError(f"--grid {text}: write it as key=value,value")
        if not all(values):
            raise UserError(f"--grid {text}: a value is empty; write it as key=value,value")
        twice = [value for at, value in enumerate(values) if value in values[:at]]
        if twice:
            raise UserError(f"--grid {text}: the value {twice[0]} is there twice")
        if key in ("seed", "name", "simulation.baseline"):
            mend = {"seed": "--seeds NUMBER", "name": "--output DIR", "simulation.baseline": "--baselines"}[key]
            raise UserError(f"--grid {text}: `{key}` is not for a grid; use {mend}")
        return cls(key, values)


def split_values(text: str) -> list[str]:
    """``text`` at its commas, but for those within brackets or quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        depth += 0 if quote else (character in _OPENING) - (character in _CLOSING)
        if character == "," and not quote and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


@dataclass(frozen=True)
class Point:
    """One run of a sweep: a value for each key of the grid, the baseline that it is (or none), its seed."""

    values: tuple[tuple[str, str], ...]
    baseline: str = ""
    seed: int = 0

    @property
    def group(self) -> tuple[tuple[str, str], ...]:
        """What the run has in common with those that differ in their seed alone."""
        return (*((("baseline", self.baseline),) if self.baseline else ()), *self.values)

    @property
    def overrides(self) -> list[str]:
        """The settings as ``--set`` takes them."""
        return [*(f"{key}={value}" for key, value in self.values), f"seed={self.seed}"]

    @property
    def text(self) -> str:
        """The point in words: ``strategy=fedit,seed=0``."""
        return ",".join(f"{key}={value}" for key, value in (*self.group, ("seed", str(self.seed))))

    @property
    def name(self) -> str:
        """A folder's name: the words where a file system takes them, else part of them and a digest."""
        safe = re.sub(r"[^A-Za-z0-9._,=+-]+", "_", self.text)
        if safe == self.text and len(safe) <= _LONGEST:
            return safe
        return f"{safe[: _LONGEST - 9]}-{hashlib.sha256(self.text.encode()).hexdigest()[:8]}"


def points(axes: Sequence[Axis], seeds: Sequence[int]) -> Iterator[Point]:
    """Every combination of values, all of a seed together: neighbours share base model and data."""
    keys = [axis.key for axis in axes]
    twice = [key for at, key in enumerate(keys) if key in keys[:at]]
    if twice:
        raise UserError(f"--grid {twice[0]}=...: the key is there twice; give all its values at once")
    for seed in seeds:
        for values in itertools.product(*(axis.values for axis in axes)):
            yield Point(tuple(zip(keys, values, strict=True)), seed=seed)
