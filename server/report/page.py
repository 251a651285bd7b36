"""From a run directory to `report.html`: read, put into words and tables, write. All data are escaped."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_text
from . import charts, faults
from . import elements as el
from .central import central
from .promise import SEEDED, promise
from .record import Record, read_record, told_accuracy, told_epsilon
from .secure_sum import secure_sum
from .sites import KEPT, sites, some, swatch
from .times import times

#: More characters of a setting are not shown.
_LONGEST = 4_000
NO_PRIVACY = "No differential privacy"


def write_report(rundir: Path) -> Path:
    """Write ``report.html`` from the ``run.json`` and ``metrics.jsonl`` in ``rundir``; returns its path.

    The same run directory gives the same bytes. Raises :class:`~fedgraft.core.errors.UserError` when
    ``run.json`` cannot be used or the page cannot be written.
    """
    path = Path(rundir) / "report.html"
    write_text(path, render(read_record(Path(rundir))))
    return path


def render(record: Record) -> str:
    """The whole page."""
    name = el.text(record.run.get("name") or record.run.get("run") or "run")
    sections = (
        _header(record, name),
        el.section("Warnings", _warnings(record)),
        el.section("Course of the run", _charts(record)),
        el.section("Sites", sites(record)),
        el.section("What is promised", promise(record) + central(record) + secure_sum(record)),
        el.section("Missing sites", faults.counts(record) + _missing(record)),
        el.section("Virtual time", faults.virtual_time(record)),
        el.section("Backdoor", faults.backdoor(record)),
        el.section("Where the time went", times(record)),
        el.section("Configuration", _configuration(record)),
        el.section("Provenance", _provenance(record)),
    )
    return el.document(f"{name}: fedgraft report", sections)


def _header(record: Record, name: str) -> str:
    status = el.text(record.run.get("status", ""))
    kind = status if status in ("finished", "failed") else ""
    when = el.text(record.run.get("finished") or record.run.get("started") or "")
    return (
        f'<header><p class="over">fedgraft run report · {when}</p>'
        f'<h1>{name} <span class="status {kind}">{status}</span></h1>'
        f'{"".join(_banners(record))}<p class="summary">{_summary(record)}</p>{_notes(record)}</header>'
        f"{_key_figures(record)}"
    )


def _banners(record: Record) -> Iterator[str]:
    """What must not be overlooked, in red."""
    if record.run.get("status") == "failed":
        yield el.banner("The run failed.", el.text(record.run.get("error") or "No reason was recorded."))
    if not record.private:
        yield el.banner(
            f"{NO_PRIVACY}{' at the sites' if record.run.get('central') else ''}.",
            "The sites' adapters were sent as they were trained, neither clipped nor noised. They and the final "
            "adapter may reveal what single records held.",
        )
        return
    if record.seeded:
        yield el.banner(
            f"{SEEDED}.",
            "Whoever knows the seed can take the noise off again. The ε in this report protects nobody; it only says "
            "what the same run would reach with secret noise.",
        )
    bare = [name for name, told in record.privacy.items() if not told.get("enabled")]
    if bare:
        yield el.banner(f"{NO_PRIVACY} at {el.plural(len(bare), 'site')}:", some(bare))
    budget = record.config("privacy").get("epsilon")
    worst = record.worst
    if worst and budget is not None and worst["epsilon"] > budget * (1 + 1e-6):
        yield el.banner("Over budget.", f"ε reached {el.epsilon(worst['epsilon'])}; the budget was {budget:g}.")


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
    rounds = el.plural(done, "round") if done == planned else f"{done} of {el.plural(planned, 'round')}"
    if after is None:
        accuracy = f"Accuracy was {_no_accuracy(record)} over"
    elif before is None:
        accuracy = f"Accuracy on held-out data was <b>{el.percent(after)}</b> after"
    else:
        accuracy = f"Accuracy on held-out data went from {el.percent(before)} to <b>{el.percent(after)}</b> in"
    method, strategy, model = (
        f"<b>{el.text((run.get(key) or {}).get('name', 'unknown'))}</b>" for key in ("method", "strategy", "model")
    )
    return (
        f"{accuracy} {rounds} at {el.plural(len(record.sites), 'site')}, training {method} adapters of {model} "
        f"combined by {strategy}, {_summary_of_privacy(record)}."
    )


def _summary_of_privacy(record: Record) -> str:
    worst = record.worst
    if not record.private:
        return "with <b>no differential privacy</b>"
    if worst is None:
        return "under differential privacy, of which nothing is spent yet"
    kind = "a nominal, not private" if record.seeded else "a privacy loss of at most"
    return (
        f"with {kind} <b>ε&nbsp;=&nbsp;{el.epsilon(worst['epsilon'])}</b> at δ = {el.number(worst.get('delta'), 'g')} "
        f"for each {el.text(record.unit)}"
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
            _no_accuracy(record) if after is None else el.percent(after),
            "" if before is None else f"before: {el.percent(before)}",
        ),
        (
            "privacy, worst site",
            *_key_privacy(record),
        ),
        (
            "sent, a site and round",
            el.bytes(up),
            (f"{full / up:,.0f} × less than" if full and up else "beside") + f" the full model, {el.bytes(full)}",
        ),
        (
            "trained parameters",
            el.number(adapter.get("parameters")),
            f"of {el.number(model.get('parameters'))} in the base model",
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
    terms = f"δ {el.number(worst.get('delta'), 'g')}, unit: {el.text(record.unit)}"
    seeded = '<br><span class="bad">seeded noise: NOT private</span>' if record.seeded else ""
    return f"ε {el.epsilon(worst['epsilon'])}", terms + seeded


def _warnings(record: Record) -> str:
    warnings = [el.text(warning) for warning in record.run.get("warnings") or ()]
    if not record.lines:
        warnings.append("metrics.jsonl holds no rounds; there is nothing to draw.")
    return f"<ul>{''.join(f'<li>{warning}</li>' for warning in warnings)}</ul>" if warnings else ""


def _charts(record: Record) -> str:
    if not record.lines:
        return ""
    return f'{_site_key(record)}<div class="charts">{_accuracy(record)}{_privacy(record)}{_traffic(record)}</div>'


def _site_key(record: Record) -> str:
    count = len(record.sites)
    if record.many:
        shade = f'<i style="background:{charts.SPREAD};opacity:'
        dark, light = f'{shade}.5"></i>', f'{shade}.2"></i>'
        return f'<p class="legend"><span>{dark}half of the {count:,} sites</span><span>{light}all of them</span></p>'
    if count > charts.COLOURED_SITES:
        return f'<p class="legend"><span>{swatch(0, count)}each of the {count} sites</span></p>'
    return (
        '<p class="legend">'
        + "".join(f"<span>{swatch(index, count)}{el.text(name)}</span>" for index, name in enumerate(record.sites))
        + "</p>"
    )


def _accuracy(record: Record) -> str:
    title = "Accuracy by round"
    lines = record.by_round("evaluate")
    overall = {number: line["accuracy"] for number, line in lines.items() if line.get("accuracy") is not None}
    by_site = {} if record.many else {name: _accuracies(lines, name) for name in record.sites}
    spreads = _spreads(lines, "accuracies")
    if not overall and not spreads and not any(by_site.values()):
        why = f"Accuracy was {_no_accuracy(record)}" + ("; nothing was released." if record.releases_nothing else ".")
        return el.no_figure(title, why, "wide")
    caption = (
        "On held-out data. Bold: all sites together, every held-out example counted once. Round 0: before training."
    )
    return el.figure(charts.accuracy_chart(overall, by_site, spreads), title, caption, "wide")


def _accuracies(lines: Mapping[int, Mapping[str, Any]], name: str) -> dict[int, float]:
    told = {number: told_accuracy((line.get("sites") or {}).get(name) or {}) for number, line in lines.items()}
    return {number: value for number, value in told.items() if value is not None}


def _privacy(record: Record) -> str:
    title = "ε spent by round"
    if not record.private:
        return f'<figure class="chart"><h3>{title}</h3>{el.banner(f"{NO_PRIVACY}.", "There is no ε to draw.")}</figure>'
    lines = record.by_round("train")
    by_site = {} if record.many else {name: _epsilon_points(record, lines, name) for name in record.sites}
    spreads = _spreads(lines, "epsilons")
    if spreads:
        spreads[0] = (0.0,) * 5
    if not spreads and not any(by_site.values()):
        return el.no_figure(title, "No noisy step was reported.")
    worst = record.worst
    if spreads and worst and math.isfinite(worst["epsilon"]):
        # Lost rounds, which only the final statement counts.
        *others, largest = spreads[max(spreads)]
        spreads[max(spreads)] = (*others, max(largest, worst["epsilon"]))
    svg = charts.epsilon_chart(
        by_site, record.config("privacy").get("epsilon"), el.epsilon(worst["epsilon"]) if worst else "", spreads
    )
    bold = " Bold: the largest." if len(record.sites) > charts.COLOURED_SITES else ""
    delta = f" at δ = {el.number(worst.get('delta'), 'g')}" if worst else ""
    seeded = " Nominal: the noise was seeded." if record.seeded else ""
    return el.figure(svg, title, f"By site{delta}, for each {el.text(record.unit)}; dashed: the budget.{bold}{seeded}")


def _spreads(lines: Mapping[int, Mapping[str, Any]], key: str) -> dict[int, Sequence[float]]:
    """How very many sites spread, by round."""
    return {number: line[key] for number, line in lines.items() if line.get(key)}


def _epsilon_points(record: Record, lines: Mapping[int, Mapping[str, Any]], name: str) -> dict[int, float]:
    """Epsilon by round from nothing before the first.

    The last point never shows less than the final statement, which also counts lost rounds.
    """
    points = {
        number: value
        for number, line in lines.items()
        if (value := told_epsilon((line.get("sites") or {}).get(name) or {})) is not None
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
        return el.no_figure(title, "No round of training was recorded.")
    whole = record.run.get("bytes_full_model") or 0
    full = {number: float(whole * line.get("answered", len(line.get("sites") or {}))) for number, line in train.items()}
    ways = "".join(
        f"<span>{swatch(index, 2)}{way}</span>" for index, way in enumerate(("up, to the server", "down, to the sites"))
    )
    run = record.run
    return el.figure(
        charts.bytes_chart(up, down, full),
        title,
        f'<span class="legend">{ways}</span> Logarithmic. Dashed: the whole model from each site that answered; '
        f"the arrow: down to the busier way. In all, {el.bytes(run.get('bytes_up'))} up and "
        f"{el.bytes(run.get('bytes_down'))} down.",
    )


def _missing(record: Record) -> str:
    rows = [row for line in record.lines for row in _missing_rows(line)]
    if rows:
        return el.table(("round", "in", "sites", "reason"), rows, "missing")
    return "<p>Every site answered in every round.</p>" if record.lines else ""


def _missing_rows(line: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """One row a reason: two hundred sites that time out together are one line, not two hundred."""
    sites_by_reason: dict[str, list[str]] = {}
    for site, reason in sorted((line.get("missing") or {}).items()):
        sites_by_reason.setdefault(str(reason).removeprefix(f"{site}: "), []).append(site)
    kind = {"train": "training", "evaluate": "evaluation"}.get(line.get("kind", ""), el.text(line.get("kind", "")))
    for reason, affected in sites_by_reason.items():
        names = some(affected)
        shown = f"{len(affected)} sites: {names}" if len(affected) > 3 else names
        yield str(line["round"]), kind, shown, el.text(reason)


def _configuration(record: Record) -> str:
    rows = [
        (f"<code>{el.text(key)}</code>", f"<code>{el.text(_cut(json.dumps(value, ensure_ascii=False)))}</code>")
        for key, value in _flat(record.run.get("config") or {})
    ]
    summary = f"<summary>All {len(rows)} settings, defaults included</summary>"
    return f"<details>{summary}{el.table(('setting', 'value'), rows, 'plain')}</details>" if rows else ""


def _cut(value: str) -> str:
    """``value``, or the beginning of a very long one: the entries of thousands of sites are in run.json."""
    return value if len(value) <= _LONGEST else f"{value[:_LONGEST]} … ({len(value):,} characters, see run.json)"


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
    return el.terms(
        [
            ("Run", _code(run.get("run"))),
            ("Engine", f"{el.text(run.get('engine', '–'))}, fedgraft {el.text(run.get('fedgraft', '–'))}"),
            (
                "Time",
                f"started {el.text(run.get('started') or '–')}, finished {el.text(run.get('finished') or '–')}; "
                f"{el.duration(run.get('seconds'))} in all, {el.duration(run.get('seconds_round'))} a round",
            ),
            ("Resumed", _resumes(run.get("resumed") or ())),
            ("Strategy", _named(run.get("strategy") or {})),
            ("Method", _named(run.get("method") or {})),
            (
                "Base model",
                f"{_code(model.get('name'))}, {el.number(model.get('parameters'))} parameters, "
                f"{el.bytes(model.get('bytes'))}<br>fingerprint {_code(model.get('fingerprint'))}",
            ),
            (
                "Adapter",
                f"{el.number(adapter.get('parameters'))} parameters, {el.number(adapter.get('shared'))} exchanged<br>"
                f"digest {_code(run.get('digest') or adapter.get('digest'))}<br>"
                f"folder {_code(run.get('adapter_path') or adapter.get('folder'))}",
            ),
            ("Configuration", f"digest {_code(run.get('config_digest'))}"),
        ]
    )


def _code(value: object) -> str:
    return f"<code>{el.text(value)}</code>" if value else "–"


def _named(thing: Mapping[str, Any]) -> str:
    """Name, summary, source and declared capabilities of a strategy or method."""
    declared = thing.get("capabilities") or {}
    able = [str(key) for key, value in declared.items() if value] if isinstance(declared, Mapping) else declared
    return "".join(
        (
            f"<b>{el.text(thing.get('name', '–'))}</b>",
            f": {el.text(thing['summary'])}" if thing.get("summary") else "",
            f"<br>{el.text(thing['source'])}" if thing.get("source") else "",
            f"<br>declares {el.text(', '.join(map(str, able)))}" if able else "",
        )
    )


def _resumes(resumes: Iterable[Mapping[str, Any]]) -> str:
    return "<br>".join(
        f"{el.text(each.get('at', ''))}, from round {el.text(each.get('from_round', '–'))}"
        + (f": {el.text(each['note'])}" if each.get("note") else "")
        for each in resumes
    )
