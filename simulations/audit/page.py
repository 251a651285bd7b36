"""From an audit report to one self-contained page. All data are escaped; the report itself lies in it as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from ...server.report import elements as el
from ...server.report.style import CSS
from . import charts

_MOST_FINDINGS = 8
_STYLE = """
.verdict{font-size:.8rem;font-weight:600;padding:.05rem .5rem;border:1px solid;border-radius:1rem;margin-left:.5rem}
.verdict.good{color:var(--good)}.verdict.bad{color:var(--bad)}
.layers td:nth-child(2){white-space:nowrap}
.plot text{font-size:11px;fill:var(--muted)}
.plot .grid{stroke:var(--rule);stroke-width:.7}
.bar{fill:var(--s0);opacity:.75}.bar.in{fill:var(--s1);opacity:.6}.bar.out{fill:var(--s0);opacity:.45}
.bar.over{fill:var(--bad);opacity:1}
.curve{fill:none;stroke:var(--ink);stroke-width:1.4}.dot{fill:var(--s0)}
.limit{stroke:var(--ink);stroke-width:1.2}
.share{width:7.8rem;height:.75rem}
.charts+.box{margin-top:1.2rem}
div.banner{margin-bottom:1rem}
"""
_TITLES = {
    "exactness": "1. Each example is clipped by itself",
    "sensitivity": "2. Nobody moves the sum by more than the clip",
    "noise": "3. The noise is there",
    "lower bound": "4. Guessing who took part",
}
_WHAT = {
    "exactness": (
        "A few units of the first batch went through the real trainer without noise. The sum it handed to its "
        "optimizer is held against a loop that takes one example at a time, clips it in float64 and adds up."
    ),
    "sensitivity": (
        "Neighbouring data sets, made to stretch the bound, went through the real trainer without noise. The bar is "
        "how far the sum moved, as a share of what the guarantee allows (the mark)."
    ),
    "noise": (
        "The real trainer ran with all its noise: at the site, at the site again, at another site, and on empty "
        "batches. What was released, less the clean clipped sum, over the promised standard deviation must be "
        "independent standard normals, in every tensor, at every step."
    ),
    "lower bound": (
        "Canaries were put in by fair coins; who saw the noisy sums guessed the coins. How many guesses are right "
        "bounds epsilon from below (Steinke, Nasr and Jagielski 2023)."
    ),
}
_CANNOT = (
    "a bug that shows only on records, lengths or model states that the excerpt does not hold;",
    "a leak beside the training: metrics, logs, timing, files on the disk, or what the base model knew before;",
    "a noise source that is predictable to somebody but passes for fresh: the audit sees its output, not its key;",
    "an accountant that adds up wrongly: epsilon is computed from the plan, its bounds are tested elsewhere;",
    "a site that audits other code than it trains with, or signs what it made up: the signature says who, not whether;",
    "what optimizer, aggregation and server do with the released sums: none of it can undo the noise.",
)


def render(report: Mapping[str, Any], signature: Mapping[str, str]) -> str:
    """The page of ``report``, whose own ``signature`` it also carries."""
    site = el.text(report["site"])
    embedded = json.dumps({"report": report, "signature": signature}, sort_keys=True).replace("<", "\\u003c")
    sections = (
        _header(report, site),
        el.section("The four layers", _overview(report)),
        *(el.section(_TITLES[layer["layer"]], _layer(layer)) for layer in report["layers"]),
        el.section("The audit put to the test", _self_test(report)),
        el.section("What this audit would catch", _items(f"{text};" for text in report["catches"])),
        el.section("What it cannot catch", _items(_CANNOT)),
        el.section("The plan", _plan(report)),
        el.section("Provenance", _provenance(report, signature)),
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{site}: fedgraft privacy audit</title><style>{CSS}{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(section for section in sections if section)
        + f'\n</main>\n<script type="application/json" id="fedgraft-audit">{embedded}</script>\n</body></html>\n'
    )


def _badge(good: bool) -> str:
    return f'<span class="verdict {"good" if good else "bad"}">{"good" if good else "failed"}</span>'


def _header(report: Mapping[str, Any], site: str) -> str:
    claim = report["claim"]
    failed = [_TITLES[layer["layer"]] for layer in report["layers"] if not layer["good"]]
    missed = [caught["fault"] for caught in report["self_test"] or [] if not caught["by"]]
    banners = ""
    if failed:
        banners += el.banner("Do not rely on the claimed ε.", el.text(f"Failed: {'; '.join(failed)}."))
    if missed:
        banners += el.banner("The audit missed a known bug.", el.text(", ".join(missed)))
    if not claim["private_noise"]:
        banners += el.banner("The noise is seeded: NOT private.", "Whoever knows the seed can take it off again.")
    data = report["data"]
    source = (
        f"{data['excerpt_units']:,} of the site's {data['units']:,} {el.text(claim['unit'])}s"
        if data["source"] == "site"
        else f"{data['excerpt_units']:,} made-up canaries"
    )
    figures = (
        ("claimed ε", el.epsilon(claim["epsilon"]), f"budget {claim['budget']:g}"),
        ("δ", el.number(claim["delta"], "g"), f"for each {el.text(claim['unit'])}"),
        ("layers", f"{sum(layer['good'] for layer in report['layers'])} of {len(report['layers'])} good", ""),
        ("known bugs caught", *_caught(report)),
    )
    cells = "".join(f"<div><dt>{a}</dt><dd>{b}<small>{c}</small></dd></div>" for a, b, c in figures)
    return (
        f'<header><p class="over">fedgraft privacy audit · {el.text(report["time"])}</p>'
        f"<h1>{site} {_badge(report['good'])}</h1>{banners}"
        f'<p class="summary">The plan promises each {el.text(claim["unit"])} of this site '
        f"(ε&nbsp;=&nbsp;{el.epsilon(claim['epsilon'])}, δ&nbsp;=&nbsp;{el.number(claim['delta'], 'g')}) under "
        f"{el.text(claim['neighbours'].replace('_', '/'))} of one {el.text(claim['unit'])}. The audit ran the site's "
        f"own trainer, engine and sampler on {source}.</p>"
        '<p class="note">Its figures come from those records and are not noised: share this page with care.</p>'
        "</header>"
        f'<dl class="key">{cells}</dl>'
    )


def _caught(report: Mapping[str, Any]) -> tuple[str, str]:
    tested = report["self_test"]
    if tested is None:
        return "–", "run with --self-test"
    return f"{sum(bool(caught['by']) for caught in tested)} of {len(tested)}", "self-test on the same plan"


def _overview(report: Mapping[str, Any]) -> str:
    rows = [
        (el.text(_TITLES[layer["layer"]]), _badge(layer["good"]), el.text(layer["said"])) for layer in report["layers"]
    ]
    return el.table(("layer", "", "what it found"), rows, "plain layers")


def _layer(layer: Mapping[str, Any]) -> str:
    findings = layer["findings"]
    shown = [el.text(finding) for finding in findings[:_MOST_FINDINGS]]
    if len(findings) > _MOST_FINDINGS:
        shown.append(f"and {len(findings) - _MOST_FINDINGS:,} more, in audit.json")
    bad = f'<div class="banner"><strong>Failed.</strong> {_items(shown)}</div>' if shown else ""
    return f"<p>{_WHAT[layer['layer']]}</p><p><b>{el.text(layer['said'])}</b></p>{bad}{_BODIES[layer['layer']](layer)}"


def _exactness(layer: Mapping[str, Any]) -> str:
    statistics = layer["statistics"]
    rows = [
        (el.text(case["case"]), el.number(case["clip"], ".3g"), f"{case['error']:.1e}", f"{case['worst']:.1e}")
        for case in statistics["cases"]
    ]
    note = f'<p class="note">A tensor may be {statistics["tolerance"]:g} of its norm away, which is rounding.</p>'
    return el.table(("case", "clip", "error of the whole sum", "of the worst tensor"), rows, "plain") + note


def _sensitivity(layer: Mapping[str, Any]) -> str:
    slack = layer["statistics"]["slack"]
    rows = [
        (
            el.text(pair["name"]),
            el.number(pair["clip"], ".3g"),
            f"{pair['distance'] / pair['clip']:.4f} C",
            "2 C" if pair["replaced"] else "1 C",
            charts.share_bar(pair["share"], 1 + slack),
        )
        for pair in layer["statistics"]["pairs"]
    ]
    return el.table(("neighbours", "clip C", "moved by", "allowed", ""), rows, "plain")


def _noise(layer: Mapping[str, Any]) -> str:
    statistics = layer["statistics"]
    if "tests" not in statistics:
        return ""
    words = {
        "size": "its size, by tensor and by step (χ², two-sided)",
        "shape": "its shape, by tensor (Kolmogorov and Smirnov)",
        "steps": "two steps of one training (correlation)",
        "runs": "two trainings or sites (correlation)",
        "tensors": "two tensors of one size (correlation)",
        "sampling": "how many units were sampled (binomial)",
    }
    rows = [(words.get(kind, el.text(kind)), f"{p:.2g}") for kind, p in statistics["smallest_p"].items()]
    drawn = (
        '<div class="charts">'
        + el.figure(charts.noise_histogram(layer["drawing"]), "Noise over its promised size", "Line: N(0, 1).")
        + el.figure(charts.noise_quantiles(layer["drawing"]), "Quantiles", "On the line where the noise is normal.")
        + "</div>"
    )
    return (
        drawn
        + el.table(("looked at", "smallest p-value"), rows, "plain")
        + f'<p class="note">{statistics["tests"]:,} tests, each held at {statistics["threshold"]:.1e}, so that an '
        f"honest training fails {statistics['alpha']:g} of all audits at most. {statistics['values']:,} values.</p>"
    )


def _lower_bound(layer: Mapping[str, Any]) -> str:
    s = layer["statistics"]
    figure = el.figure(
        charts.canary_scores(layer["drawing"]),
        "Scores of the canaries",
        '<i style="background:var(--s1)"></i>took part <i style="background:var(--s0);margin-left:1em"></i>did not',
    )
    text = (
        f"<p>Epsilon is at least <b>{s['bound']:.2f}</b> with {100 * (1 - s['doubt']):g} % confidence "
        f"({s['bound_for_verdict']:.2f} with {100 * (1 - s['doubt_for_verdict']):g} %, which is what the verdict goes "
        f"by). The steps that the guesser saw claim {s['claim']:.2f}. With {s['guesses']} guesses about "
        f"{s['canaries']} canaries, no more than {s['ceiling']:.2f} could have come out.</p>"
        "<p><b>This bound is loose.</b> It lies far below the true ε even where all is well, and it alone misses noise "
        "of half the size: a mechanism that spends 4.4 where 2.0 is claimed shows about 1.2 here, with 256 canaries "
        "that have nothing in common. It needs no trust in the other three layers, but it does not prove the claim.</p>"
    )
    return f'<div class="charts">{figure}<div>{text}</div></div>'


_BODIES = {"exactness": _exactness, "sensitivity": _sensitivity, "noise": _noise, "lower bound": _lower_bound}


def _self_test(report: Mapping[str, Any]) -> str:
    tested = report["self_test"]
    if tested is None:
        return "<p>Not run. <code>--self-test</code> puts known bugs into the same path and must see each.</p>"
    rows = [
        (
            el.text(caught["fault"]),
            el.text(caught["text"]),
            el.text(caught["by"]) if caught["by"] else '<b class="bad">missed</b>',
            el.text(caught["finding"]),
        )
        for caught in tested
    ]
    lead = (
        "<p>Each bug was put into the same trainer, engine and plan on purpose. An audit that lets one pass is worth "
        "nothing.</p>"
    )
    return lead + el.table(("bug", "what was broken", "caught by", "what it said"), rows, "plain")


def _items(texts: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{text}</li>' for text in texts)}</ul>"


def _plan(report: Mapping[str, Any]) -> str:
    plan, claim = report["plan"], report["claim"]
    rows = [
        (el.text(key.replace("_", " ")), el.text(f"{value:g}" if isinstance(value, float) else value))
        for key, value in plan.items()
    ]
    rows += [("accountant", el.text(claim["accountant"])), ("neighbours", el.text(claim["neighbours"]))]
    return el.table(("setting", "value"), rows, "plain")


def _provenance(report: Mapping[str, Any], signature: Mapping[str, str]) -> str:
    data, model, ledger = report["data"], report["model"], report["ledger"]
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    return el.terms(
        [
            (
                "Signed by",
                f"{signature['algorithm']} key <code>{signature['fingerprint']}</code><br>"
                "<code>fedgraft audit --verify</code> checks every byte of this page and of audit.json. Ask the site "
                "for its key's fingerprint by another way.",
            ),
            (
                "Data",
                f"{data['records']:,} records of {data['units']:,} {el.text(report['claim']['unit'])}s; audited on "
                f"{data['excerpt_records']:,} records of {data['excerpt_units']:,}"
                + (f"<br>fingerprint <code>{el.text(data['fingerprint'])}</code>" if data["fingerprint"] else "")
                + ("<br>made up for the audit" if data["source"] == "canaries" else ""),
            ),
            (
                "Ledger",
                f"<code>{el.text(ledger['path'])}</code>: {ledger['entries']} entries, ε "
                f"{el.epsilon(ledger['epsilon'])} in all at most"
                f"<br>last line <code>{el.text(ledger['head'] or '–')}</code>"
                if ledger
                else "none was given (audit a run directory, or give --ledger)",
            ),
            (
                "Base model",
                f"<code>{el.text(model['name'])}</code>, {model['parameters']:,} parameters, {model['trained']:,} "
                f"trained in {model['tensors']} tensors<br>fingerprint <code>{el.text(model['fingerprint'])}</code>",
            ),
            (
                "Method",
                f"{el.text(report['method'])}, {el.text(report['strategy'])}, engine {el.text(report['engine'])}",
            ),
            ("Configuration", f"<code>{el.text(report['name'])}</code>, digest <code>{report['config_digest']}</code>"),
            ("Versions", el.text(f"fedgraft {report['fedgraft']}, {versions}")),
            ("Time", f"{el.text(report['time'])}, {el.duration(report['seconds'])}"),
        ]
    )
