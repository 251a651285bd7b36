"""From a run directory to `report.html`: read, put into words and tables, write. All data are escaped."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

from ..files import write_text
from ..rundir import read_metrics, read_run
from . import charts

NO_PRIVACY = "No differential privacy"
SEEDED = "The noise was seeded: NOT private"
KEPT = "kept at the sites"


def write_report(rundir: Path) -> Path:
    """Write ``report.html`` from the ``run.json`` and ``metrics.jsonl`` in ``rundir``; returns its path.

    The same run directory gives the same bytes. Raises :class:`~fedgraft.core.errors.UserError` when
    ``run.json`` cannot be used or the page cannot be written.
    """
    path = Path(rundir) / "report.html"
    write_text(path, render(read_record(Path(rundir))))
    return path


@dataclass(frozen=True)
class Record:
    """What is known of a run: ``run.json`` and the lines of ``metrics.jsonl``."""

    run: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]

    @property
    def sites(self) -> Mapping[str, Mapping[str, Any]]:
        return self.run.get("sites") or {}

    def config(self, section: str) -> Mapping[str, Any]:
        return (self.run.get("config") or {}).get(section) or {}

    def by_round(self, kind: str) -> dict[int, Mapping[str, Any]]:
        """The lines of one kind by round."""
        return {line["round"]: line for line in self.lines if line.get("kind") == kind}

    @cached_property
    def privacy(self) -> Mapping[str, Mapping[str, Any]]:
        """The privacy statement of every site that made one."""
        return {name: site["privacy"] for name, site in self.sites.items() if site.get("privacy")}

    @property
    def private(self) -> bool:
        """Whether differential privacy was asked for; what single sites did is told beside it."""
        return bool(self.config("privacy").get("enabled", False))

    @property
    def seeded(self) -> bool:
        """Whether any noise came from a seed, so that whoever knows the seed can take it off again."""
        return self.private and (
            bool(self.config("privacy").get("seeded_noise_not_private"))
            or any(told.get("enabled") and not told.get("private_noise", True) for told in self.privacy.values())
        )

    @property
    def worst(self) -> Mapping[str, Any] | None:
        """The statement with the largest epsilon: that of the federation."""
        enabled = [told for told in self.privacy.values() if told.get("enabled") and told.get("epsilon") is not None]
        return max(enabled, key=lambda told: told["epsilon"], default=None)

    @property
    def unit(self) -> str:
        return str(self.config("privacy").get("unit", "record"))

    @property
    def releases_nothing(self) -> bool:
        return bool(self.config("evaluate").get("release") == "none")


def read_record(rundir: Path) -> Record:
    """Read a run directory. Raises ``UserError`` when ``run.json`` is missing, broken or of another schema."""
    run = read_run(rundir)
    lines = [line for line in read_metrics(rundir) if isinstance(line, dict) and isinstance(line.get("round"), int)]
    return Record(run, lines)


# Values in words. What these return is safe inside HTML.


def _text(value: object) -> str:
    return escape(str(value))


def _number(value: float | None, form: str = ",") -> str:
    """``value`` by a format specification; a dash where there is none."""
    return "–" if value is None else _text(format(value, form))


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value * 100:.1f}&nbsp;%"


def _epsilon(value: float | None) -> str:
    """Two decimals, never rounded down: a report must not promise more than the run kept."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "∞"
    return f"{_rounded_up(value):,}"


def _rounded_up(value: float) -> Decimal:
    return Decimal(repr(float(value))).quantize(Decimal("0.01"), ROUND_CEILING)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _plural(count: int, word: str) -> str:
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


def _bytes(value: float | None) -> str:
    return "–" if value is None else charts.byte_text(value)


# Parts of a page.


def _banner(headline: str, text: str) -> str:
    return f'<p class="banner"><strong>{headline}</strong> {text}</p>'


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def _figure(svg: str, title: str, caption: str, kind: str = "") -> str:
    drawing = svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    return (
        f'<figure class="chart {kind}"><h3>{title}</h3><div class="drawing">{drawing}</div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _no_figure(title: str, text: str, kind: str = "") -> str:
    return f'<figure class="chart {kind}"><h3>{title}</h3><p class="none">{text}</p></figure>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table in a box that scrolls; the cells are HTML."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<div class="box" tabindex="0"><table class="{kind}"><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _terms(pairs: Iterable[tuple[str, str]]) -> str:
    """A list of terms and what they mean; empty meanings are left out."""
    return f"<dl>{''.join(f'<dt>{term}</dt><dd>{meaning}</dd>' for term, meaning in pairs if meaning)}</dl>"


# The sections, from top to bottom.


def render(record: Record) -> str:
    """The whole page."""
    name = _text(record.run.get("name") or record.run.get("run") or "run")
    sections = (
        _header(record, name),
        _section("Warnings", _warnings(record)),
        _section("Course of the run", _charts(record)),
        _section("Sites", _sites(record)),
        _section("What is promised", _promise(record)),
        _section("Missing sites", _missing(record)),
        _section("Configuration", _configuration(record)),
        _section("Provenance", _provenance(record)),
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Whatever slipped into the page from the data, the browser neither runs nor fetches anything.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{name}: fedgraft report</title><style>{_CSS}</style></head>\n<body><main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main></body></html>\n"
    )


def _header(record: Record, name: str) -> str:
    status = _text(record.run.get("status", ""))
    kind = status if status in ("finished", "failed") else ""
    when = _text(record.run.get("finished") or record.run.get("started") or "")
    return (
        f'<header><p class="over">fedgraft run report · {when}</p>'
        f'<h1>{name} <span class="status {kind}">{status}</span></h1>'
        f'{"".join(_banners(record))}<p class="summary">{_summary(record)}</p>{_notes(record)}</header>'
        f"{_key_figures(record)}"
    )


def _banners(record: Record) -> Iterator[str]:
    """What must not be overlooked, in red."""
    if record.run.get("status") == "failed":
        yield _banner("The run failed.", _text(record.run.get("error") or "No reason was recorded."))
    if not record.private:
        yield _banner(
            f"{NO_PRIVACY}.",
            "The sites' adapters were sent as they were trained, neither clipped nor noised. They and the final "
            "adapter may reveal what single records held.",
        )
        return
    if record.seeded:
        yield _banner(
            f"{SEEDED}.",
            "Whoever knows the seed can take the noise off again. The ε in this report protects nobody; it only says "
            "what the same run would reach with secret noise.",
        )
    bare = [name for name, told in record.privacy.items() if not told.get("enabled")]
    if bare:
        yield _banner(f"{NO_PRIVACY} at {_plural(len(bare), 'site')}:", _text(", ".join(bare)))
    budget = record.config("privacy").get("epsilon")
    worst = record.worst
    if worst and budget is not None and worst["epsilon"] > budget * (1 + 1e-6):
        yield _banner("Over budget.", f"ε reached {_epsilon(worst['epsilon'])}; the budget was {budget:g}.")


def _accuracy_change(record: Record) -> tuple[float | None, float | None]:
    accuracy = record.run.get("accuracy") or {}
    return accuracy.get("before"), accuracy.get("after")


def _no_accuracy(record: Record) -> str:
    return KEPT if record.releases_nothing else "not measured"


def _summary(record: Record) -> str:
    """The run in one sentence."""
    run = record.run
    before, after = _accuracy_change(record)
    planned, done = (run.get("config") or {}).get("rounds", 0), run.get("rounds") or 0
    rounds = _plural(done, "round") if done == planned else f"{done} of {_plural(planned, 'round')}"
    if after is None:
        accuracy = f"Accuracy was {_no_accuracy(record)} over"
    elif before is None:
        accuracy = f"Accuracy on held-out data was <b>{_percent(after)}</b> after"
    else:
        accuracy = f"Accuracy on held-out data went from {_percent(before)} to <b>{_percent(after)}</b> in"
    method, strategy, model = (
        f"<b>{_text((run.get(key) or {}).get('name', 'unknown'))}</b>" for key in ("method", "strategy", "model")
    )
    return (
        f"{accuracy} {rounds} at {_plural(len(record.sites), 'site')}, training {method} adapters of {model} combined "
        f"by {strategy}, {_summary_of_privacy(record)}."
    )


def _summary_of_privacy(record: Record) -> str:
    worst = record.worst
    if not record.private:
        return "with <b>no differential privacy</b>"
    if worst is None:
        return "under differential privacy, of which nothing is spent yet"
    kind = "a nominal, not private" if record.seeded else "a privacy loss of at most"
    return (
        f"with {kind} <b>ε&nbsp;=&nbsp;{_epsilon(worst['epsilon'])}</b> at δ = {_number(worst.get('delta'), 'g')} for "
        f"each {_text(record.unit)}"
    )


def _notes(record: Record) -> str:
    notes = []
    if record.run.get("status") == "running":
        notes.append("The run had not ended when this was written.")
    if record.run.get("engine") == "inprocess":
        notes.append("The sites were simulated on one machine.")
    if record.config("data").get("source") == "icd10":
        notes.append(
            "The records are phrases of the ICD-10-CM terminology dealt to synthetic patients, not patient records."
        )
    return f'<p class="note">{" ".join(notes)}</p>' if notes else ""


def _key_figures(record: Record) -> str:
    run = record.run
    before, after = _accuracy_change(record)
    adapter, model = run.get("adapter") or {}, run.get("model") or {}
    up, full = run.get("bytes_up_round"), run.get("bytes_full_model")
    figures = (
        (
            "accuracy",
            _no_accuracy(record) if after is None else _percent(after),
            "" if before is None else f"before: {_percent(before)}",
        ),
        (
            "privacy, worst site",
            *_key_privacy(record),
        ),
        (
            "sent, a site and round",
            _bytes(up),
            (f"{full / up:,.0f} × less than" if full and up else "beside") + f" the full model, {_bytes(full)}",
        ),
        (
            "trained parameters",
            _number(adapter.get("parameters")),
            f"of {_number(model.get('parameters'))} in the base model",
        ),
    )
    cells = (f"<div><dt>{name}</dt><dd>{value}<small>{more}</small></dd></div>" for name, value, more in figures)
    return f'<dl class="key">{"".join(cells)}</dl>'


def _key_privacy(record: Record) -> tuple[str, str]:
    worst = record.worst
    if not record.private:
        return '<span class="bad">none</span>', ""
    if worst is None:
        return "–", "nothing spent yet"
    terms = f"δ {_number(worst.get('delta'), 'g')}, unit: {_text(record.unit)}"
    seeded = '<br><span class="bad">seeded noise: NOT private</span>' if record.seeded else ""
    return f"ε {_epsilon(worst['epsilon'])}", terms + seeded


def _warnings(record: Record) -> str:
    warnings = [_text(warning) for warning in record.run.get("warnings") or ()]
    if not record.lines:
        warnings.append("metrics.jsonl holds no rounds; there is nothing to draw.")
    return f"<ul>{''.join(f'<li>{warning}</li>' for warning in warnings)}</ul>" if warnings else ""


def _charts(record: Record) -> str:
    if not record.lines:
        return ""
    return f'{_site_key(record)}<div class="charts">{_accuracy(record)}{_privacy(record)}{_traffic(record)}</div>'


def _swatch(index: int, count: int) -> str:
    return f'<i style="background:{charts.site_colour(index, count)}"></i>'


def _site_key(record: Record) -> str:
    count = len(record.sites)
    if count > charts.COLOURED_SITES:
        return f'<p class="legend"><span>{_swatch(0, count)}each of the {count} sites</span></p>'
    return (
        '<p class="legend">'
        + "".join(f"<span>{_swatch(index, count)}{_text(name)}</span>" for index, name in enumerate(record.sites))
        + "</p>"
    )


def _accuracy(record: Record) -> str:
    title = "Accuracy by round"
    lines = record.by_round("evaluate")
    overall = {number: line["accuracy"] for number, line in lines.items() if line.get("accuracy") is not None}
    sites = {name: dict(_site_accuracy(lines, name)) for name in record.sites}
    if not overall and not any(sites.values()):
        why = f"Accuracy was {_no_accuracy(record)}" + ("; nothing was released." if record.releases_nothing else ".")
        return _no_figure(title, why, "wide")
    caption = (
        "On held-out data. Bold: all sites together, every held-out example counted once. Round 0: before training."
    )
    return _figure(charts.accuracy_chart(overall, sites), title, caption, "wide")


def _site_accuracy(lines: Mapping[int, Mapping[str, Any]], name: str) -> Iterator[tuple[int, float]]:
    for number, line in lines.items():
        counts = (line.get("sites") or {}).get(name) or {}
        if counts.get("correct") is not None and counts.get("examples"):
            yield number, counts["correct"] / counts["examples"]


def _privacy(record: Record) -> str:
    title = "ε spent by round"
    if not record.private:
        return f'<figure class="chart"><h3>{title}</h3>{_banner(f"{NO_PRIVACY}.", "There is no ε to draw.")}</figure>'
    sites = {name: _epsilon_points(record, name) for name in record.sites}
    if not any(sites.values()):
        return _no_figure(title, "No noisy step was reported.")
    worst = record.worst
    svg = charts.epsilon_chart(
        sites, record.config("privacy").get("epsilon"), _epsilon(worst["epsilon"]) if worst else ""
    )
    bold = " Bold: the largest." if len(sites) > charts.COLOURED_SITES else ""
    delta = f" at δ = {_number(worst.get('delta'), 'g')}" if worst else ""
    seeded = " Nominal: the noise was seeded." if record.seeded else ""
    return _figure(svg, title, f"By site{delta}, for each {_text(record.unit)}; dashed: the budget.{bold}{seeded}")


def _told_epsilon(answer: Mapping[str, Any]) -> float | None:
    """The epsilon in a site's answer to a round, which holds it by itself or in the whole privacy statement."""
    value = answer.get("epsilon", (answer.get("privacy") or {}).get("epsilon"))
    return None if value is None else float(value)


def _epsilon_points(record: Record, name: str) -> dict[int, float]:
    """Epsilon by round from nothing before the first.

    The last point never shows less than the final statement, which also counts lost rounds.
    """
    points = {
        number: value
        for number, line in record.by_round("train").items()
        if (value := _told_epsilon((line.get("sites") or {}).get(name) or {})) is not None and math.isfinite(value)
    }
    final = record.privacy.get(name, {}).get("epsilon")
    if points and final is not None and math.isfinite(final):
        points[max(points)] = max(points[max(points)], final)
    return {0: 0.0, **points} if points else {}


def _traffic(record: Record) -> str:
    title = "Bytes by round, all sites"
    train, evaluate = record.by_round("train"), record.by_round("evaluate")
    up, down = (
        {
            number: float((line.get(way) or 0) + (evaluate.get(number, {}).get(way) or 0))
            for number, line in train.items()
        }
        for way in ("bytes_up", "bytes_down")
    )
    if not up:
        return _no_figure(title, "No round of training was recorded.")
    whole = record.run.get("bytes_full_model") or 0
    full = {number: float(whole * len(line.get("sites") or {})) for number, line in train.items()}
    ways = "".join(
        f"<span>{_swatch(index, 2)}{way}</span>"
        for index, way in enumerate(("up, to the server", "down, to the sites"))
    )
    run = record.run
    return _figure(
        charts.bytes_chart(up, down, full),
        title,
        f'<span class="legend">{ways}</span> Logarithmic. Dashed: the whole model from each site that answered; '
        f"the arrow: down to the busier way. In all, {_bytes(run.get('bytes_up'))} up and "
        f"{_bytes(run.get('bytes_down'))} down.",
    )


_SITE_HEAD = (
    *("site", "records", "units", "held out", "accuracy before", "accuracy after"),
    *("ε", "δ", "unit", "noise multiplier", "sampling rate", "noisy steps", "rounds answered"),
)


def _sites(record: Record) -> str:
    if not record.sites:
        return "<p>No site had joined.</p>"
    rounds = record.run.get("rounds") or 0
    count = len(record.sites)
    rows = [
        _site_row(record, name, _swatch(index, count) if count <= charts.COLOURED_SITES else "", rounds)
        for index, name in enumerate(record.sites)
    ]
    seeded = " ε in red: its noise was seeded, so nothing is protected." if record.seeded else ""
    kept = f" Accuracy was {KEPT}." if record.releases_nothing else ""
    return (
        _table(_SITE_HEAD, rows, "sites")
        + '<p class="note">ε is rounded up. The noise multiplier is the standard deviation of the noise over the '
        f"clipping bound; the sampling rate is the chance of a unit to be in a step.{seeded}{kept}</p>"
    )


def _site_row(record: Record, name: str, swatch: str, rounds: int) -> tuple[str, ...]:
    site = record.sites[name]
    told = record.privacy.get(name, {})
    privacy: tuple[str, ...] = ('<b class="bad">none</b>' if told or not record.private else "–", *["–"] * 5)
    before, after = (
        "kept" if record.releases_nothing and site.get(key) is None else _percent(site.get(key))
        for key in ("accuracy_before", "accuracy")
    )
    if told.get("enabled"):
        epsilon = _epsilon(told.get("epsilon"))
        privacy = (
            epsilon if told.get("private_noise", True) else f'<b class="bad">{epsilon}</b>',
            _number(told.get("delta"), "g"),
            _text(told.get("unit", "–")),
            _number(told.get("noise_multiplier"), ".3f"),
            _number(told.get("sampling_rate"), ".4f"),
            _number(told.get("steps")),
        )
    return (
        f"{swatch}{_text(name)}",
        *(_number(site.get(key)) for key in ("records", "units", "held_out")),
        before,
        after,
        *privacy,
        f"{_number(site.get('rounds'))} of {rounds}",
    )


def _promise(record: Record) -> str:
    if not record.private:
        return (
            "<p><b>Nothing.</b> Training ran without differential privacy. Each site sent its adapter as trained; the "
            "server, whoever reads the traffic and whoever holds the final adapter may learn about single records. "
            "Only the records themselves stayed where they were.</p>"
            + _terms([("Evaluation", _evaluation_words(record)), ("Treated as public", _PUBLIC)])
        )
    lead = (
        f'<p class="bad"><b>{SEEDED}.</b> None of the following holds for this run; it is what the same run would '
        "promise with secret noise.</p>"
        if record.seeded
        else ""
    )
    return lead + _terms(
        [
            ("The promise", _promise_words(record)),
            ("Whose data", _unit_words(record.unit)),
            ("Whom one must trust", _TRUST),
            ("What ε covers", _COVERED),
            ("What ε does not cover", _NOT_COVERED),
            ("Evaluation", _evaluation_words(record)),
            ("Treated as public", _PUBLIC),
            ("The federation", _FEDERATION),
            ("How it is reckoned", _accounting_words(record)),
        ]
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
    unit, worst = _text(record.unit), record.worst
    neighbours = {told.get("neighbours") for told in record.privacy.values()} - {None}
    change = "adding or removing" if neighbours <= {"add_remove"} else _text(", ".join(map(str, neighbours)))
    words = (
        f"Neighbouring data sets differ by {change} one {unit}. Whatever the training releases, the "
        "neighbouring data set would have led to it with a probability that differs at most "
    )
    if worst is None:
        return words + "by a factor of e<sup>ε</sup>, but for a chance of about δ. No noisy step was reported yet."
    shown = _epsilon(worst["epsilon"])
    factor = math.exp(_rounded_up(worst["epsilon"])) if worst["epsilon"] < 20 else None
    value = "" if factor is None else f" = {factor:,.0f}" if factor >= 100 else f" = {factor:.3g}"
    return (
        words + f"by a factor of e<sup>ε</sup>{value} at ε = {shown}, but for a "
        f"chance of about δ = {_number(worst.get('delta'), 'g')}. The smaller both, the less can be told of a {unit}."
    )


def _unit_words(unit: str) -> str:
    if unit == "patient":
        return "One patient: all records that share a patient key at a site are protected together."
    if unit == "record":
        return (
            "One record. Somebody with several records at a site is protected less than ε says; the unit "
            "<i>patient</i> would protect them together."
        )
    return f"One {_text(unit)}."


def _evaluation_words(record: Record) -> str:
    release = record.config("evaluate").get("release")
    if release == "none":
        return "Each site tests the adapter on its held-out records and releases nothing of it."
    if release == "exact":
        return (
            "After a round each site tests the adapter on its held-out records, which are not trained on, and sends "
            "the number tested, the number right and the summed loss. These counts leave the site <b>un-noised and are "
            'outside ε</b> (<code>evaluate.release = "none"</code> keeps them).'
        )
    return f"Results on held-out records are released as <code>{_text(release)}</code>." if release else ""


_IN_WORDS = {
    "poisson": "Poisson",
    "pld": "privacy loss distributions",
    "add_remove": "one unit added or removed",
}


def _accounting_words(record: Record) -> str:
    if not record.privacy:
        return ""

    def told(key: str) -> str:
        values = {each[key] for each in record.privacy.values() if each.get("enabled") and key in each}
        return _text(", ".join(sorted(_IN_WORDS.get(value, str(value)) for value in values)) or "unknown")

    return (
        f"DP-SGD: the gradient of each {_text(record.unit)} is clipped to an L2 norm of {told('clip')}, summed over a "
        f"random sample ({told('sampler')} sampling), and given Gaussian noise. Accountant: {told('accountant')}; "
        f"neighbours: {told('neighbours')}."
    )


def _missing(record: Record) -> str:
    rows = [row for line in record.lines for row in _missing_rows(line)]
    if rows:
        return _table(("round", "in", "sites", "reason"), rows, "missing")
    return "<p>Every site answered in every round.</p>" if record.lines else ""


def _missing_rows(line: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """One row a reason: two hundred sites that time out together are one line, not two hundred."""
    sites_by_reason: dict[str, list[str]] = {}
    for site, reason in sorted((line.get("missing") or {}).items()):
        sites_by_reason.setdefault(str(reason).removeprefix(f"{site}: "), []).append(site)
    kind = {"train": "training", "evaluate": "evaluation"}.get(line.get("kind", ""), _text(line.get("kind", "")))
    for reason, sites in sites_by_reason.items():
        names = _text(", ".join(sites))
        yield str(line["round"]), kind, f"{len(sites)} sites: {names}" if len(sites) > 3 else names, _text(reason)


def _configuration(record: Record) -> str:
    rows = [
        (f"<code>{_text(key)}</code>", f"<code>{_text(json.dumps(value, ensure_ascii=False))}</code>")
        for key, value in _flat(record.run.get("config") or {})
    ]
    summary = f"<summary>All {len(rows)} settings, defaults included</summary>"
    return f"<details>{summary}{_table(('setting', 'value'), rows, 'plain')}</details>" if rows else ""


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values, sections expanded."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _provenance(record: Record) -> str:
    run = record.run
    model, adapter = run.get("model") or {}, run.get("adapter") or {}
    return _terms(
        [
            ("Run", _code(run.get("run"))),
            ("Engine", f"{_text(run.get('engine', '–'))}, fedgraft {_text(run.get('fedgraft', '–'))}"),
            (
                "Time",
                f"started {_text(run.get('started') or '–')}, finished {_text(run.get('finished') or '–')}; "
                f"{_duration(run.get('seconds'))} in all, {_duration(run.get('seconds_round'))} a round",
            ),
            ("Resumed", _resumes(run.get("resumed") or ())),
            ("Strategy", _named(run.get("strategy") or {})),
            ("Method", _named(run.get("method") or {})),
            (
                "Base model",
                f"{_code(model.get('name'))}, {_number(model.get('parameters'))} parameters, "
                f"{_bytes(model.get('bytes'))}<br>fingerprint {_code(model.get('fingerprint'))}",
            ),
            (
                "Adapter",
                f"{_number(adapter.get('parameters'))} parameters, {_number(adapter.get('shared'))} exchanged<br>"
                f"digest {_code(run.get('digest') or adapter.get('digest'))}<br>"
                f"folder {_code(run.get('adapter_path') or adapter.get('folder'))}",
            ),
            ("Configuration", f"digest {_code(run.get('config_digest'))}"),
        ]
    )


def _code(value: object) -> str:
    return f"<code>{_text(value)}</code>" if value else "–"


def _named(thing: Mapping[str, Any]) -> str:
    """Name, summary, source and declared capabilities of a strategy or method."""
    declared = thing.get("capabilities") or {}
    able = [str(key) for key, value in declared.items() if value] if isinstance(declared, Mapping) else declared
    return "".join(
        (
            f"<b>{_text(thing.get('name', '–'))}</b>",
            f": {_text(thing['summary'])}" if thing.get("summary") else "",
            f"<br>{_text(thing['source'])}" if thing.get("source") else "",
            f"<br>declares {_text(', '.join(map(str, able)))}" if able else "",
        )
    )


def _resumes(resumes: Iterable[Mapping[str, Any]]) -> str:
    return "<br>".join(
        f"{_text(each.get('at', ''))}, from round {_text(each.get('from_round', '–'))}"
        + (f": {_text(each['note'])}" if each.get("note") else "")
        for each in resumes
    )


_CSS = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1d21;--muted:#646a73;--rule:#dcdfe4;--bad:#b3141f;--tint:#fdf0f0;
--good:#176c43;--s0:#0b6fb8;--s1:#d05a00;--s2:#00896a;--s3:#b04f8c;--s4:#a97c00;--s5:#3f9fd1;--s6:#7a5646;--s7:#6560cf}
@media (prefers-color-scheme:dark){:root{--paper:#15171a;--ink:#e7e9ec;--muted:#9aa1ab;--rule:#34383e;--bad:#ff7d80;
--tint:#331a1c;--good:#5fc793;--s0:#58aef0;--s1:#ff9a4d;--s2:#35c79f;--s3:#e58fc4;--s4:#e0b63a;--s5:#8fd3f5;--s6:#c4a08f;
--s7:#a6a2ff}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:960px;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.9rem;line-height:1.2;margin:.2rem 0 1rem;font-weight:650;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.6rem 0 .8rem;padding-top:.7rem;border-top:1px solid var(--rule);font-weight:650}
h3{font-size:.95rem;margin:0 0 .3rem;font-weight:600}
p{margin:0 0 .8rem}
code{font:.9em ui-monospace,"SF Mono",Menlo,Consolas,monospace;overflow-wrap:anywhere}
.over,.note,figcaption,.legend,.none{color:var(--muted);font-size:.875rem}
.over{margin:0}
.status{font-size:.8rem;font-weight:600;vertical-align:.35em;margin-left:.4rem;padding:.1rem .5rem;border:1px solid;
border-radius:1rem;color:var(--muted)}
.finished{color:var(--good)}
.failed,.bad{color:var(--bad)}
.banner{background:var(--tint);border-left:4px solid var(--bad);padding:.6rem .9rem;overflow-wrap:anywhere}
.banner strong{color:var(--bad)}
.summary{font-size:1.125rem;overflow-wrap:anywhere}
.key{display:grid;grid-template-columns:repeat(4,1fr);gap:1rem;margin:1.6rem 0 0}
.key div{border-top:2px solid var(--ink);padding-top:.45rem}
.key dt{color:var(--muted);font-size:.8rem;font-weight:400}
.key dd{margin:0;font-size:1.35rem;line-height:1.3;font-weight:600;font-variant-numeric:tabular-nums}
.key small{display:block;font-size:.8rem;font-weight:400;color:var(--muted)}
.charts{display:grid;grid-template-columns:1fr 1fr;gap:1.6rem 1.5rem}
.chart{margin:0;min-width:0}
.wide{grid-column:1/-1}
.drawing{overflow-x:auto}
svg{display:block;width:100%;height:auto}
svg *{stroke-linejoin:round}
.legend span{margin-right:1rem;white-space:nowrap}
i{display:inline-block;width:.9em;height:.25em;margin-right:.4em;vertical-align:.2em;border-radius:1px}
.box{overflow:auto;max-height:30rem;margin-bottom:.8rem}
table{border-collapse:collapse;width:100%;font-size:.8125rem;line-height:1.35;font-variant-numeric:tabular-nums}
th{position:sticky;top:0;background:var(--paper);color:var(--muted);font-weight:500;vertical-align:bottom;
box-shadow:inset 0 -1px var(--rule)}
td{border-bottom:1px solid var(--rule);vertical-align:top}
th,td{padding:.35rem .4rem;text-align:left}
.sites th,.sites td{text-align:right}
.sites th:first-child,.sites td:first-child{text-align:left;min-width:7rem;overflow-wrap:anywhere}
.sites td+td{white-space:nowrap}
.plain td{overflow-wrap:anywhere}
.plain td:first-child,.missing td:nth-child(-n+2){white-space:nowrap}
.missing td:last-child{min-width:12rem;overflow-wrap:anywhere}
section>dl{display:grid;grid-template-columns:10rem 1fr;gap:.5rem 1.25rem;margin:0}
section>dl dt{font-weight:600}
section>dl dd{margin:0;overflow-wrap:anywhere}
summary{cursor:pointer}
ul{padding-left:1.1rem;margin:0;overflow-wrap:anywhere}
@media (max-width:700px){.charts,.key{grid-template-columns:1fr 1fr}.charts>*{grid-column:1/-1}
.wide svg{min-width:38rem}
section>dl{display:block}section>dl dd{margin-bottom:.7rem}}
@media print{.box{max-height:none;overflow:visible}main{padding:0;max-width:none}h2{break-after:avoid}
.chart,tr{break-inside:avoid}}
"""
