"""Real clinical terminology without a download: ICD-10-CM phrases, to be assigned to their chapter.

The phrases are the descriptions and inclusion terms of the ICD-10-CM table that the package ``simple-icd-10-cm``
carries. They are terminology, not patient records; the patients here are synthetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from ...client.data import Records, SiteData
from ...core.config import RunConfig
from ...core.errors import UserError
from ..dealing import deal_units, require_dealt
from ..partition import deal_patients

#: One category of this many is held out, whole, so that no phrase of a test category is trained on.
_HELD_OUT_CATEGORIES = 10
_MOST_RECORDS_A_PATIENT = 8


@lru_cache(maxsize=1)
def phrases() -> tuple[tuple[str, ...], dict[str, dict[str, list[str]]]]:
    """Chapter titles in order, and phrases by chapter number and three-character category.

    A phrase that stands in several chapters belongs to none; one that stands twice in a chapter is kept once, so that
    no text is both trained on and held out.
    """
    try:
        import simple_icd_10_cm as icd
    except ImportError:
        raise UserError("the icd10 source needs simple-icd-10-cm: pip install 'fedgraft[demo]'") from None
    first_place: dict[str, tuple[str, str, str]] = {}
    chapters_of: dict[str, set[str]] = {}
    chapter = ""
    titles = []
    for code in icd.get_all_codes(with_dots=True):
        if icd.is_chapter(code):
            chapter = code
            titles.append(f"{code}. {icd.get_description(code)}")
        elif not icd.is_block(code):
            category = code.split(".")[0]
            for phrase in (icd.get_description(code), *icd.get_inclusion_term(code)):
                key = " ".join(phrase.lower().split())
                first_place.setdefault(key, (phrase, chapter, category))
                chapters_of.setdefault(key, set()).add(chapter)
    found: dict[str, dict[str, list[str]]] = {title.split(".")[0]: {} for title in titles}
    for key, (phrase, chapter, category) in first_place.items():
        if len(chapters_of[key]) == 1:
            found[chapter].setdefault(category, []).append(phrase)
    return tuple(titles), found


def labels() -> tuple[str, ...]:
    """The 22 chapter titles."""
    return phrases()[0]


def dealt(config: RunConfig) -> Callable[[int], SiteData]:
    """Each site's data, by its number: chapters skewed over sites, whole categories held out, 1 to 8 phrases a patient.

    ``data.max_per_class`` and ``data.test_per_class`` bound the phrases of a chapter: half of the table is injuries.
    """
    rng = np.random.default_rng([config.seed, 10])
    texts: dict[str, list[str]] = {"train": [], "test": []}
    chapters: dict[str, list[int]] = {"train": [], "test": []}
    for label, (_, categories) in enumerate(sorted(phrases()[1].items(), key=lambda item: int(item[0]))):
        names = rng.permutation(sorted(categories))
        held_out = set(names[: max(1, len(names) // _HELD_OUT_CATEGORIES)])
        for part, most in (("train", config.data.max_per_class), ("test", config.data.test_per_class)):
            pool = [p for name in names if (name in held_out) == (part == "test") for p in categories[name]]
            chosen = rng.permutation(len(pool))[: most or None]
            texts[part] += [pool[i] for i in chosen]
            chapters[part] += [label] * len(chosen)
    classes = {part: np.array(labels, dtype=np.int64) for part, labels in chapters.items()}
    deal = deal_units(config, classes["train"], len(labels()), _no_column, rng)
    mine = {"train": deal.units, "test": deal.held_out(classes["test"], rng)}
    owners: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    for site, indices in zip(config.site_names, deal.units, strict=True):
        require_dealt(site, len(indices), "ICD-10-CM")
        for part in ("train", "test"):
            count = len(mine[part][len(owners[part])])
            owners[part].append(np.array(deal_patients(count, 1, _MOST_RECORDS_A_PATIENT, rng), dtype=np.int64))

    def build(number: int) -> SiteData:
        site = config.site_names[number]
        records = {
            part: Records(
                [texts[part][i] for i in mine[part][number]],
                classes[part][mine[part][number]],
                [f"{site}-{part}-{owner}" for owner in owners[part][number]],
            )
            for part in ("train", "test")
        }
        return SiteData(site, records["train"], records["test"], f"seed {config.seed}, by category")

    return build


def _no_column(name: str) -> Sequence[str]:
    raise UserError(f"data.partition_options.partition_by: the icd10 source has no column `{name}`")
