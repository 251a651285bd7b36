"""The drawings of an audit report as small inline SVG: numbers and fixed words only, no text from data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_WIDTH, _HEIGHT = 440, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 10, 34


def _plot(body: Iterable[str]) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" class="plot">{"".join(body)}</svg>'


class _Axes:
    """Maps numbers to places, and draws the frame."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        self._x, self._y = x, y

    def x(self, value: float) -> float:
        low, high = self._x
        return round(_LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        low, high = self._y
        return round(_HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM), 1)

    def frame(self, x_label: str, y_label: str, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> str:
        parts = []
        for tick in y_ticks:
            at = self.y(tick)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at}" y2="{at}"/>')
            parts.append(f'<text x="{_LEFT - 6}" y="{at + 4}" text-anchor="end">{tick:g}</text>')
        for tick in x_ticks:
            parts.append(f'<text x="{self.x(tick)}" y="{_HEIGHT - _BOTTOM + 14}" text-anchor="middle">{tick:g}</text>')
        middle = (_TOP + _HEIGHT - _BOTTOM) / 2
        parts.append(f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 4}" text-anchor="middle">{x_label}</text>')
        parts.append(f'<text transform="translate(11 {middle}) rotate(-90)" text-anchor="middle">{y_label}</text>')
        return "".join(parts)

    def line(self, xs: Sequence[float], ys: Sequence[float], kind: str) -> str:
        points = " ".join(f"{self.x(x)},{self.y(y)}" for x, y in zip(xs, ys, strict=True))
        return f'<polyline class="{kind}" points="{points}"/>'

    def bars(self, edges: Sequence[float], heights: Sequence[float], kind: str) -> str:
        return "".join(
            f'<rect class="{kind}" x="{self.x(a)}" width="{max(self.x(b) - self.x(a), 0.3):.1f}" '
            f'y="{self.y(height)}" height="{max(self.y(0) - self.y(height), 0):.1f}"/>'
            for a, b, height in zip(edges[:-1], edges[1:], heights, strict=True)
        )


def noise_histogram(drawing: Mapping[str, Any]) -> str:
    """The density of the standardised noise, and that of N(0, 1) over it."""
    edges, counts = drawing["edges"], drawing["counts"]
    total, width = max(1, sum(counts)), edges[1] - edges[0]
    density = [count / total / width for count in counts]
    top = max(0.45, *density) * 1.05
    axes = _Axes((edges[0], edges[-1]), (0, top))
    xs = [edges[0] + (edges[-1] - edges[0]) * i / 120 for i in range(121)]
    normal = [math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in xs]
    ticks = [0.0, 0.2, 0.4] if top < 1 else [0.0, round(top / 2, 1)]
    return _plot(
        [
            axes.frame("noise over its promised size", "density", [-4, -2, 0, 2, 4], ticks),
            axes.bars(edges, density, "bar"),
            axes.line(xs, normal, "curve"),
        ]
    )


def noise_quantiles(drawing: Mapping[str, Any]) -> str:
    """Quantiles of the noise against those of N(0, 1): on the diagonal where all is well."""
    normal, seen = drawing["normal"], [min(max(q, -4.0), 4.0) for q in drawing["quantiles"]]
    axes = _Axes((-2.6, 2.6), (-2.6 if min(seen) > -2.6 else -4.2, 2.6 if max(seen) < 2.6 else 4.2))
    ticks = [-2.0, -1.0, 0.0, 1.0, 2.0]
    dots = "".join(
        f'<circle class="dot" cx="{axes.x(a)}" cy="{axes.y(b)}" r="2"/>' for a, b in zip(normal, seen, strict=True)
    )
    return _plot(
        [
            axes.frame("quantile of N(0, 1)", "quantile of the noise", ticks, ticks),
            axes.line([-2.6, 2.6], [-2.6, 2.6], "curve"),
            dots,
        ]
    )


def canary_scores(drawing: Mapping[str, Any]) -> str:
    """How many canaries had which score, those that took part and those that did not."""
    inside, outside = drawing["in"], drawing["out"]
    values = [*inside, *outside] or [0.0]
    low, high = min(values), max(values)
    pad = (high - low) * 0.03 or 1.0
    low, high = low - pad, high + pad
    bins = 24
    edges = [low + (high - low) * i / bins for i in range(bins + 1)]

    def counted(scores: Sequence[float]) -> list[float]:
        counts = [0.0] * bins
        for score in scores:
            counts[min(bins - 1, int((score - low) / (high - low) * bins))] += 1
        return counts

    both = counted(inside), counted(outside)
    top = max(max(both[0]), max(both[1]), 1.0) * 1.08
    axes = _Axes((low, high), (0, top))
    ticks = [float(f"{low + (high - low) * part:.1g}") for part in (0.1, 0.5, 0.9)]
    return _plot(
        [
            axes.frame("score", "canaries", ticks, [0.0, float(round(top / 2)), float(int(top))]),
            axes.bars(edges, both[1], "bar out"),
            axes.bars(edges, both[0], "bar in"),
        ]
    )


def share_bar(share: float, allowed: float) -> str:
    """A bar of ``share`` on a scale where 1 is what is promised, with a mark there; red beyond ``allowed``."""
    scale = 120 / max(1.15, min(share, 4.0))
    kind = "bar" if share <= allowed else "bar over"
    return (
        f'<svg viewBox="0 0 124 12" class="share"><rect class="{kind}" x="0" y="2" height="8" '
        f'width="{min(share, 4.0) * scale:.1f}"/>'
        f'<line class="limit" x1="{scale:.1f}" x2="{scale:.1f}" y1="0" y2="12"/></svg>'
    )
