"""What the report says of each site; of very many, how they spread, and of the worst by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from . import charts
from . import elements as el
from .record import Record, spread

KEPT = "kept at the sites"
#: Of very many sites so many are listed.
_LISTED = 50
#: More names than these are not written side by side.
_NAMED = 8
_HEAD = (
    *("site", "records", "units", "held out", "accuracy before", "accuracy after"),
    *("ε", "δ", "unit", "noise multiplier", "sampling rate", "noisy steps", "rounds answered"),
)
_COUNTS = {"records": "records", "units": "units", "held out": "held_out"}
_SHARES = {"accuracy before": "accuracy_before", "accuracy after": "accuracy"}
_QUARTILES = ("least", "lower quartile", "median", "upper quartile", "largest")


def sites(record: Record) -> str:
    """The table of sites."""
    if not record.sites:
        return "<p>No site had joined.</p>"
    count = len(record.sites)
    names, which = _worst(record) if record.many else ([*record.sites], "")
    rows = [
        _row(record, name, swatch(index, count) if count <= charts.COLOURED_SITES else "")
        for index, name in enumerate(names)
    ]
    seeded = " ε in red: its noise was seeded, so nothing is protected." if record.seeded else ""
    kept = f" Accuracy was {KEPT}." if record.releases_nothing else ""
    return (
        (_spread(record) + f"<p>{which}</p>" if record.many else "")
        + el.table(_HEAD, rows, "sites")
        + '<p class="note">ε is rounded up. The noise multiplier is the standard deviation of the noise over the '
        f"clipping bound; the sampling rate is the chance of a unit to be in a step.{seeded}{kept}</p>"
    )


def swatch(index: int, count: int) -> str:
    """The colour of site number ``index`` among ``count`` in the charts."""
    return f'<i style="background:{charts.site_colour(index, count)}"></i>'


def some(names: Iterable[str]) -> str:
    """``names`` as HTML, not more of them than a person would read."""
    every = list(names)
    more = f" and {len(every) - _NAMED:,} more" if len(every) > _NAMED else ""
    return el.text(", ".join(every[:_NAMED])) + more


def _worst(record: Record) -> tuple[list[str], str]:
    """The sites to list of very many, and which those are."""
    scores = {name: site.get("accuracy") for name, site in record.sites.items()}
    spent = {name: told.get("epsilon") for name, told in record.privacy.items() if told.get("enabled")}
    if any(score is not None for score in scores.values()):
        order = sorted(scores, key=lambda name: (scores[name] is None, scores[name] or 0.0, name))
        which = "those with the lowest accuracy after the run"
    elif spent:
        order, which = sorted(spent, key=lambda name: (-(spent[name] or 0.0), name)), "those with the largest ε"
    else:
        order, which = sorted(record.sites), "the first by name"
    told = f"{_LISTED} of {len(record.sites):,} sites, {which}; <code>run.json</code> has them all."
    return order[:_LISTED], told


def _spread(record: Record) -> str:
    """Quartiles over all sites, of what can be ordered."""
    every = list(record.sites.values())
    promised = [told for told in record.privacy.values() if told.get("enabled")]
    columns = [
        *((name, _of(every, key), _count) for name, key in _COUNTS.items()),
        *((name, _of(every, key), el.percent) for name, key in _SHARES.items()),
        ("ε", _of(promised, "epsilon"), el.epsilon),
        ("noisy steps", _of(promised, "steps"), _count),
        ("rounds answered", _of(every, "rounds"), _count),
    ]
    columns = [(name, values, shown) for name, values, shown in columns if values]
    rows = [
        (f"<b>{quartile}</b>", *(shown(values[at]) for _, values, shown in columns))
        for at, quartile in enumerate(_QUARTILES)
    ]
    return el.table((f"all {len(every):,} sites", *(name for name, _, _ in columns)), rows, "sites")


def _of(told: Iterable[Mapping[str, Any]], key: str) -> tuple[float, ...]:
    return spread(one.get(key) for one in told)


def _count(value: float) -> str:
    return el.number(round(value))


def _row(record: Record, name: str, colour: str) -> tuple[str, ...]:
    site, rounds = record.sites[name], record.run.get("rounds") or 0
    told = record.privacy.get(name, {})
    privacy: tuple[str, ...] = ('<b class="bad">none</b>' if told or not record.private else "–", *["–"] * 5)
    before, after = (
        "kept" if record.releases_nothing and site.get(key) is None else el.percent(site.get(key))
        for key in ("accuracy_before", "accuracy")
    )
    if told.get("enabled"):
        epsilon = el.epsilon(told.get("epsilon"))
        privacy = (
            epsilon if told.get("private_noise", True) else f'<b class="bad">{epsilon}</b>',
            el.number(told.get("delta"), "g"),
            el.text(told.get("unit", "–")),
            el.number(told.get("noise_multiplier"), ".3f"),
            el.number(told.get("sampling_rate"), ".4f"),
            el.number(told.get("steps")),
        )
    return (
        f"{colour}{el.text(name)}",
        *(el.number(site.get(key)) for key in ("records", "units", "held_out")),
        before,
        after,
        *privacy,
        f"{el.number(site.get('rounds'))} of {rounds}",
    )
