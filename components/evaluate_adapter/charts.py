"""Charts made of SVG, coloured by the page's own variables so that they follow its theme."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from layerloop.components.evaluate_adapter.statistics import Comparison


@dataclass(frozen=True)
class Point:
    """Rewards of one iteration's valid candidates."""

    iteration: int
    mean: float
    low: float  # 10th percentile
    high: float  # 90th percentile
    valid: int
    candidates: int


def common_reach(comparisons: Iterable[Comparison]) -> float:
    """The scale of the whiskers of a table: the furthest end of their intervals as a share of the larger of the two
    means, at least 1 % and at most 100 %."""
    ends = [abs(end) for c in comparisons for end in _shares(c) or ()]
    return min(1.0, max(0.01, *ends, 0.0))


def _shares(c: Comparison) -> tuple[float, float, float] | None:
    """(low, difference, high) as shares of the larger of the two means; None where there is none."""
    size = max(abs(c.base or 0.0), abs(c.tuned or 0.0))
    if c.low is None or c.high is None or c.difference is None or not size:
        return None
    return c.low / size, c.difference / size, c.high / size


def whisker(comparison: Comparison, verdict: str, reach: float, *, width: int = 104, height: int = 16) -> str:
    """A difference and its interval about 0 as shares of the larger mean, from -reach to reach; what goes on beyond it
    ends in an arrow. `verdict` ("good", "bad", "") colours it."""
    shares = _shares(comparison)
    if shares is None:
        return ""

    def x(value: float) -> float:
        return width / 2 + min(1.0, max(-1.0, value / reach)) * (width / 2 - 6)

    low, difference, high = shares
    colour = {"good": "var(--good)", "bad": "var(--bad)"}.get(verdict, "var(--base)")
    middle = height / 2
    arrows = "".join(
        f'<path d="M{x(end) + 5 * sign:.1f} {middle} l{-5 * sign} -4 v8 z" fill="{colour}"/>'
        for end, sign in ((low, -1), (high, 1))
        if sign * end > reach * (1 + 1e-9)
    )
    return (
        f'<svg width="{width}" height="{height}" aria-hidden="true"><line x1="{width / 2}" x2="{width / 2}" y1="0" '
        f'y2="{height}" stroke="var(--dim)" stroke-width="1"/>'
        f'<line x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{middle}" y2="{middle}" '
        f'stroke="{colour}" stroke-width="3" stroke-linecap="round" opacity=".5"/>{arrows}'
        f'<circle cx="{x(difference):.1f}" cy="{middle}" r="3.6" fill="{colour}"/></svg>'
    )


def histogram(gains: Sequence[float], label: str, *, bins: int = 10, width: int = 200, height: int = 46) -> str:
    """How many gains lie how far from 0, worse to the left; those of 0 are the grey bar in the middle."""
    reach = max(abs(gain) for gain in gains) or 1.0
    counts = [0] * (2 * bins + 1)
    for gain in gains:
        step = min(bins, math.ceil(abs(gain) / reach * bins))
        counts[bins + (step if gain > 0 else -step)] += 1
    across, tallest = width / len(counts), max(counts)
    bars = []
    for index, count in enumerate(counts):
        if count:
            colour = "--base" if index == bins else "--good" if index > bins else "--bad"
            tall = max(2.0, (height - 4) * count / tallest)
            bars.append(
                f'<rect x="{index * across + 0.75:.2f}" y="{height - tall:.2f}" width="{across - 1.5:.2f}" '
                f'height="{tall:.2f}" rx="1" fill="var({colour})"/>'
            )
    return (
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" role="img" aria-label="{escape(label)}">'
        f'<line x1="0" x2="{width}" y1="{height}" y2="{height}" stroke="var(--dim)"/>{"".join(bars)}</svg>'
    )


@dataclass(frozen=True)
class _Axes:
    """Iterations from left to right and values from bottom to top of a chart, in its pixels."""

    width: int
    height: int
    margins: tuple[int, int, int, int]  # left, right, top, bottom
    first: int
    last: int
    ticks: tuple[float, ...]  # of the values, ascending

    def x(self, iteration: float) -> float:
        left, right, _, _ = self.margins
        share = (iteration - self.first) / (self.last - self.first) if self.last > self.first else 0.5
        return left + (self.width - left - right) * share

    def y(self, value: float) -> float:
        _, _, top, bottom = self.margins
        low, high = self.ticks[0], self.ticks[-1]
        return top + (self.height - top - bottom) * (1 - (value - low) / (high - low))

    def grid(self) -> list[str]:
        """A line and a number at every tick."""
        left, right, _, _ = self.margins
        return [
            f'<line x1="{left}" x2="{self.width - right}" y1="{self.y(tick):.1f}" y2="{self.y(tick):.1f}" '
            f'stroke="var(--line)"/><text x="{left - 6}" y="{self.y(tick) + 4:.1f}" text-anchor="end">'
            f"{text}</text>"
            for tick, text in zip(self.ticks, _tick_texts(self.ticks), strict=True)
        ]


@dataclass(frozen=True)
class Line:
    """One line of a chart: values by iteration."""

    name: str
    values: Mapping[int, float]


def lines(chart: Sequence[Line], title: str, *, width: int = 420, height: int = 170) -> str:
    """A figure of up to five lines over iterations, with a legend where there is more than one; lines differ in their
    dashes too, not in colour alone."""
    values = [value for line in chart for value in line.values.values()]
    iterations = sorted({iteration for line in chart for iteration in line.values})
    first, last = iterations[0], iterations[-1]
    axes = _Axes(width, height, (54, 14, 10, 26), first, last, tuple(_ticks(min(values), max(values))))
    x, y = axes.x, axes.y
    parts = [f'<svg viewBox="0 0 {width} {height}" width="100%" role="img" aria-label="{escape(title)} by iteration">']
    parts += axes.grid()
    for iteration in dict.fromkeys((first, last)):
        parts.append(f'<text x="{x(iteration):.1f}" y="{height - 8}" text-anchor="middle">{iteration}</text>')
    legend = []
    for line, (colour, dash) in zip(chart, _STYLES, strict=False):
        drawn = sorted(line.values.items())
        path = " ".join(f"{x(k):.1f},{y(v):.1f}" for k, v in drawn)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="var({colour})" stroke-width="2.2" '
            f'stroke-dasharray="{dash}"/>'
        )
        parts += [
            f'<circle cx="{x(k):.1f}" cy="{y(v):.1f}" r="3" fill="var({colour})">'
            f"<title>{escape(line.name)}, iteration {k}: {v:.4g}</title></circle>"
            for k, v in (drawn if len(drawn) <= 60 else ())
        ]
        style = "dashed" if dash else "solid"
        legend.append(
            f'<span><i style="border-top-style:{style};border-color:var({colour})"></i>{escape(line.name)}</span>'
        )
    named = f'<div class="legend">{"".join(legend)}</div>' if len(chart) > 1 else ""
    return f"<figure><figcaption>{escape(title)}</figcaption>{''.join(parts)}</svg>{named}</figure>"


_STYLES = (("--s1", ""), ("--s2", "6 3"), ("--s3", ""), ("--s4", "6 3"), ("--s5", ""))


def _tick_texts(ticks: Sequence[float]) -> list[str]:
    """Their numbers, to three digits or as many as tell them apart."""
    texts: list[str] = []
    for digits in range(3, 11):
        texts = [f"{value:.{digits}g}".replace("-", "−") for value in ticks]
        if len(set(texts)) == len(texts):
            break
    return texts


def curve(points: Sequence[Point], *, width: int = 1040, height: int = 260) -> str:
    """Mean reward by iteration with the band of the middle 80 % of candidates."""
    ticks = _ticks(min(p.low for p in points), max(p.high for p in points))
    first, last = points[0].iteration, points[-1].iteration
    axes = _Axes(width, height, (52, 18, 14, 34), first, last, tuple(ticks))
    x, y = axes.x, axes.y
    parts = [f'<svg viewBox="0 0 {width} {height + 8}" width="100%" role="img" aria-label="Reward by iteration">']
    parts += axes.grid()
    span = last - first + 1
    every = next(n for k in range(10) for n in (10**k, 2 * 10**k, 5 * 10**k) if span / n <= 20)
    for point in points:
        if point.iteration % every == 0 or len(points) == 1:
            parts.append(
                f'<text x="{x(point.iteration):.1f}" y="{height - 14}" text-anchor="middle">{point.iteration}</text>'
            )
    parts.append(f'<text x="{width - axes.margins[1]}" y="{height}" text-anchor="end">iteration</text>')
    upper = [f"{x(p.iteration):.1f},{y(p.high):.1f}" for p in points]
    lower = [f"{x(p.iteration):.1f},{y(p.low):.1f}" for p in reversed(points)]
    if len(points) > 1:
        parts.append(f'<polygon points="{" ".join(upper + lower)}" fill="var(--accent)" opacity=".13"/>')
        line = " ".join(f"{x(p.iteration):.1f},{y(p.mean):.1f}" for p in points)
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="var(--accent)" stroke-width="2.5" stroke-linejoin="round"/>'
        )
    for p in points if len(points) <= 60 else ():
        if len(points) == 1:
            parts.append(
                f'<line x1="{x(p.iteration)}" x2="{x(p.iteration)}" y1="{y(p.low):.1f}" y2="{y(p.high):.1f}" '
                'stroke="var(--accent)" stroke-width="10" stroke-linecap="round" opacity=".2"/>'
            )
        parts.append(
            f'<circle cx="{x(p.iteration):.1f}" cy="{y(p.mean):.1f}" r="4" fill="var(--accent)">'
            f"<title>iteration {p.iteration}: mean {p.mean:.3f}, {p.valid} of {p.candidates} candidates valid</title>"
            "</circle>"
        )
    parts.append("</svg>")
    return "".join(parts)


def _ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers that enclose [low, high]; two or three about a single value."""
    size = max(abs(low), abs(high))
    span = (high - low if high - low > 1e-6 * size else 0.02 * size) or 1.0
    step = 10 ** math.floor(math.log10(span / 4))
    for factor in (1, 2, 5, 10):
        if span / (step * factor) <= 6:
            step *= factor
            break
    start, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.10g}") for index in range(start, max(end, start + 1) + 1)]
