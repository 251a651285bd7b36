"""What the report says of client-level privacy: a second promise, by the server, to whole sites."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import elements as el
from .record import Record


def central(record: Record) -> str:
    """Terms for the section on what is promised; empty where central privacy is off."""
    told: Mapping[str, Any] | None = record.run.get("central")
    if not told:
        return ""
    lead = (
        ""
        if told.get("private_noise")
        else '<p class="bad"><b>The central noise was seeded: NOT private.</b> None of the following holds for this '
        "run.</p>"
    )
    return lead + el.terms(
        [
            ("The server's promise", _promise(told)),
            ("Whom one must trust for it", _TRUST),
            ("What it does not cover", _NOT_COVERED),
            ("How large the noise is", _noise(told)),
            ("How it is reckoned", _reckoned(told)),
        ]
    )


_TRUST = (
    "The server: it sees each site's update as the site sent it, clips and noises afterwards, and knows who was asked "
    "and who answered. What the site itself promises its patients is a statement of its own and adds nothing to this."
)
_NOT_COVERED = (
    "This page, <code>run.json</code> and <code>metrics.jsonl</code>, which tell of single sites, of who was asked and "
    "of held-out counts; that a site is on the list; that it answers, and so that a round had the answers it needed; "
    "other runs."
)


def _promise(told: Mapping[str, Any]) -> str:
    return (
        "To whoever sees only the global adapters of the rounds and the last one, a site's whole contribution to this "
        f"run is hidden: had its changes been left out of every round, each outcome would be at most e<sup>ε</sup> "
        f"times as likely or unlikely, at ε = {el.epsilon(told.get('epsilon'))}, but for a chance of about δ = "
        f"{el.number(told.get('delta'), 'g')}."
    )


def _noise(told: Mapping[str, Any]) -> str:
    return (
        f"On each number of the mean {el.number(told.get('noise_per_coordinate'), '.2g')} of the clip; over all shared "
        f"numbers {el.number(told.get('noise_norm'), ',.3g')} times the clip, which is the longest mean that all sites "
        "together can make."
    )


def _reckoned(told: Mapping[str, Any]) -> str:
    clips = told.get("clips") or [told.get("clip")]
    clip = el.number(clips[0], ".3g")
    if told.get("clip_quantile"):
        clip = f"{clip} at first and {el.number(clips[-1], '.3g')} at last (adapted to a noised quantile)"
    rate = told.get("sampling_rate")
    asked = "every site is asked" if rate == 1 else f"each site is asked with a chance of {el.number(rate, 'g')}"
    return (
        f"DP-FedAvg over {el.plural(int(told.get('rounds') or 0), 'round')}, those that were lost included: {asked}; a "
        f"site's change is clipped to an L2 norm of {clip}; the sum gets Gaussian noise "
        f"(multiplier {el.number(told.get('noise_multiplier'), '.3g')}) and is divided by a fixed number of sites, "
        "whatever the sites' records. Neighbours: one site added or removed. Accountant: privacy loss distributions."
    )
