"""Words, numbers and HTML elements of the report; whatever comes from data is escaped here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from decimal import ROUND_CEILING, Decimal
from html import escape

from . import charts
from .style import CSS


def text(value: object) -> str:
    return escape(str(value))


def number(value: float | None, form: str = ",") -> str:
    """``value`` by a format specification; a dash where there is none."""
    return "–" if value is None else text(format(value, form))


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value * 100:.1f}&nbsp;%"


def epsilon(value: float | None) -> str:
    """Two decimals, never rounded down: a report must not promise more than the run kept."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "∞"
    return f"{rounded_up(value):,}"


def rounded_up(value: float) -> Decimal:
    return Decimal(repr(float(value))).quantize(Decimal("0.01"), ROUND_CEILING)


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def plural(count: int, word: str) -> str:
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


def bytes(value: float | None) -> str:
    return "–" if value is None else charts.byte_text(value)


# Parts of a page.


def document(title: str, sections: Iterable[str]) -> str:
    """A whole page of ``sections``, those that are empty left out; ``title`` is HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Whatever slipped into the page from the data, the browser neither runs nor fetches anything.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{title}</title><style>{CSS}</style></head>\n<body><main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main></body></html>\n"
    )


def banner(headline: str, text: str) -> str:
    return f'<p class="banner"><strong>{headline}</strong> {text}</p>'


def section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def figure(svg: str, title: str, caption: str, kind: str = "") -> str:
    drawing = svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    return (
        f'<figure class="chart {kind}"><h3>{title}</h3><div class="drawing">{drawing}</div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def no_figure(title: str, text: str, kind: str = "") -> str:
    return f'<figure class="chart {kind}"><h3>{title}</h3><p class="none">{text}</p></figure>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table in a box that scrolls; the cells are HTML."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<div class="box" tabindex="0"><table class="{kind}"><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def terms(pairs: Iterable[tuple[str, str]]) -> str:
    """A list of terms and what they mean; empty meanings are left out."""
    return f"<dl>{''.join(f'<dt>{term}</dt><dd>{meaning}</dd>' for term, meaning in pairs if meaning)}</dl>"


# The sections, from top to bottom.
