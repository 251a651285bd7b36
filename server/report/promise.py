"""What the report says is promised, to whom, and what is not, in plain words."""

from __future__ import annotations

import math

from . import elements as el
from .record import Record

SEEDED = "The noise was seeded: NOT private"


def promise(record: Record) -> str:
    if not record.private:
        return (
            f"<p><b>Nothing{' by the sites' if record.run.get('central') else ''}.</b> Training ran without "
            f"differential privacy. {_UNPROTECTED[bool(record.run.get('secure_sum'))]} may learn about single "
            "records. Only the records themselves stayed where they were.</p>"
            + el.terms([("Evaluation", _evaluation_words(record)), ("Treated as public", _PUBLIC)])
        )
    lead = (
        f'<p class="bad"><b>{SEEDED}.</b> None of the following holds for this run; it is what the same run would '
        "promise with secret noise.</p>"
        if record.seeded
        else ""
    )
    return lead + el.terms(
        [
            ("The promise", _promise_words(record)),
            ("Whose data", _unit_words(record)),
            ("Whom one must trust", _TRUST),
            ("What ε covers", _COVERED),
            ("What ε does not cover", _NOT_COVERED),
            ("Evaluation", _evaluation_words(record)),
            ("Treated as public", _PUBLIC),
            ("The federation", _FEDERATION),
            ("How it is reckoned", _accounting_words(record)),
        ]
    )


#: Without and with a secure sum.
_UNPROTECTED = (
    "Each site sent its adapter as trained; the server, whoever reads the traffic and whoever holds the final adapter",
    "Each site's adapter was masked, but the sum was not noised: whoever knows it or holds the final adapter",
)
_TRUST = (
    "The site alone. It clips and noises on its own machine before anything leaves. The server, the other sites, "
    "whoever reads the traffic and whoever is given the adapter need not be trusted for this."
)
_COVERED = (
    "The training of the adapter: every noisy step ever taken on the site's data in this run, those of lost and "
    "repeated rounds included. So it covers all that was sent in training, every round's adapter and the final one, "
    "whatever is done with them later. Shown is what a site told in its last answer; steps of a round whose answer "
    "never came are in the site's own ledger and show once it answers again."
)
_NOT_COVERED = (
    "Other runs over the same data, such as a search for good settings or the run whose adapter this one started from: "
    "their ε adds to this one. And what the base model already held before the run."
)
_PUBLIC = (
    "The number of records, of units and of held-out records at each site (they weigh the average and show in the "
    "sampling rate), that the site takes part, and when it answers."
)
_FEDERATION = (
    "The sites' patients are assumed disjoint, so the ε of the federation is the maximum over sites. If one person's "
    "data lie at two sites, the ε of both add up for that person."
)


def _promise_words(record: Record) -> str:
    unit, worst = el.text(record.unit), record.worst
    neighbours = {told.get("neighbours") for told in record.privacy.values()} - {None}
    change = "replacing" if neighbours == {"replace_one"} else "adding or removing"
    words = (
        f"Neighbouring data sets differ by {change} one {unit}. Whatever the training releases, the "
        "neighbouring data set would have led to it with a probability that differs at most "
    )
    if worst is None:
        return words + "by a factor of e<sup>ε</sup>, but for a chance of about δ. No noisy step was reported yet."
    shown = el.epsilon(worst["epsilon"])
    factor = math.exp(el.rounded_up(worst["epsilon"])) if worst["epsilon"] < 20 else None
    value = "" if factor is None else f" = {factor:,.0f}" if factor >= 100 else f" = {factor:.3g}"
    return (
        words + f"by a factor of e<sup>ε</sup>{value} at ε = {shown}, but for a "
        f"chance of about δ = {el.number(worst.get('delta'), 'g')}. The smaller both, the less can be told of a {unit}."
    )


def _unit_words(record: Record) -> str:
    if record.unit == "patient":
        most = record.config("privacy").get("records_per_patient", 1)
        gradient = record.config("privacy").get("patient_gradient", "mean")
        how = (
            "one record, drawn anew"
            if most == 1
            else f"up to {el.number(most)} records, whose gradients' {el.text(gradient)} is clipped once"
        )
        return (
            "One patient: all records that share a patient key at a site are protected together. In a step a sampled "
            f"patient gives {how}."
        )
    return (
        "One record. Somebody with several records at a site is protected less than ε says; the unit "
        "<i>patient</i> would protect them together."
    )


def _evaluation_words(record: Record) -> str:
    if record.evaluation == "none":
        return "Each site tests the adapter on its held-out records and releases nothing of it."
    after = "After a round each site tests the adapter on its held-out records, which are not trained on, and sends "
    if record.evaluation == "exact_not_private":
        return after + (
            "the number tested, the number right and the summed loss. These counts leave the site <b>un-noised and are "
            'outside ε</b> (<code>evaluate.release = "noised"</code> or <code>"none"</code> protect them).'
        )
    unit = el.text(record.unit)
    return after + (
        f"the number right and the summed loss <b>with Gaussian noise</b>, each {unit} counted once. The site's ledger "
        f"pays for them: a held-out {unit} is held out in the whole run and gives nothing to the training, so its ε is "
        "that of the counts, kept below the same budget. The accuracies here are therefore off by about the noise, "
        "which shows most where few are held out."
    )


_IN_WORDS = {
    "poisson": "each drawn independently (Poisson)",
    "truncated_poisson": "each drawn independently and cut down to a largest batch (truncated Poisson)",
    "cyclic": "each in its turn, as its own key says",
    "pld": "privacy loss distributions",
    "rdp": "Rényi differential privacy",
    "add_remove": "one unit added or removed",
    "replace_one": "one unit replaced by another",
}


def _accounting_words(record: Record) -> str:
    if not record.privacy:
        return ""

    def told(key: str) -> str:
        values = {each[key] for each in record.privacy.values() if each.get("enabled") and key in each}
        return el.text(", ".join(sorted(_IN_WORDS.get(value, str(value)) for value in values)) or "unknown")

    return (
        f"DP-SGD: the gradient of each {el.text(record.unit)} is clipped to an L2 norm of {told('clip')}"
        f"{_adapts(record)}, summed over a step's units ({told('sampler')}), and given Gaussian noise{_bands(record)}. "
        f"Accountant: {told('accountant')}; neighbours: {told('neighbours')}."
    )


def _adapts(record: Record) -> str:
    quantile = record.config("privacy").get("clip_quantile")
    return f" at first, adapted to the {el.number(quantile, 'g')} quantile of the norms under noise" if quantile else ""


def _bands(record: Record) -> str:
    bands = record.config("privacy").get("bands", 1)
    return f" that is correlated over {el.number(bands)} steps (banded matrix factorisation)" if bands > 1 else ""
