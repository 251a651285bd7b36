"""Where a simulation's records come from: files, and what installed packages carry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...client.data import SiteData
from ...core.config import RunConfig
from . import digits, files, icd10

#: A site's data by its number, made when asked for.
Build = Callable[[int], SiteData]


@dataclass(frozen=True)
class Source:
    """``labels``: its label set, where it has one of its own; ``dealt``: its records, dealt to the sites."""

    labels: Callable[[], tuple[str, ...]]
    dealt: Callable[[RunConfig], Build]


SOURCES: dict[str, Source] = {
    "digits": Source(digits.labels, digits.dealt),
    "files": Source(tuple, files.dealt),
    "icd10": Source(icd10.labels, icd10.dealt),
}
