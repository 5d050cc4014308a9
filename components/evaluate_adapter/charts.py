"""Charts made of SVG, coloured by the page's own variables so that they follow its theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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


def whisker(comparison: Comparison, verdict: str, *, width: int = 116, height: int = 16) -> str:
    """A difference and its interval about 0, on a scale of its own; `verdict` ("good", "bad", "") colours it."""
    low, high, difference = comparison.low, comparison.high, comparison.difference
    if low is None or high is None or difference is None:
        return ""
    reach = max(abs(low), abs(high), abs(difference)) * 1.12

    def x(value: float) -> float:
        return width / 2 + (value / reach if reach else 0) * (width / 2 - 3)

    colour = {"good": "var(--good)", "bad": "var(--bad)"}.get(verdict, "var(--base)")
    middle = height / 2
    return (
        f'<svg width="{width}" height="{height}" aria-hidden="true"><line x1="{width / 2}" x2="{width / 2}" y1="0" '
        f'y2="{height}" stroke="var(--line)" stroke-width="1.5"/>'
        f'<line x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{middle}" y2="{middle}" '
        f'stroke="{colour}" stroke-width="3" stroke-linecap="round" opacity=".45"/>'
        f'<circle cx="{x(difference):.1f}" cy="{middle}" r="3.6" fill="{colour}"/></svg>'
    )


def curve(points: Sequence[Point], *, width: int = 1040, height: int = 260) -> str:
    """Mean reward by iteration with the band of the middle 80 % of candidates."""
    left, right, top, bottom = 52, 18, 14, 34
    ticks = _ticks(min(p.low for p in points), max(p.high for p in points))
    low, high = ticks[0], ticks[-1]
    first, last = points[0].iteration, points[-1].iteration

    def x(iteration: float) -> float:
        return left + (width - left - right) * ((iteration - first) / (last - first) if last > first else 0.5)

    def y(value: float) -> float:
        return top + (height - top - bottom) * (1 - (value - low) / (high - low))

    parts = [f'<svg viewBox="0 0 {width} {height + 8}" width="100%" role="img" aria-label="Reward by iteration">']
    for tick in ticks:
        parts.append(
            f'<line x1="{left}" x2="{width - right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="var(--line)"/>'
            f'<text x="{left - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.3g}</text>'
        )
    span = last - first + 1
    every = next(n for k in range(10) for n in (10**k, 2 * 10**k, 5 * 10**k) if span / n <= 20)
    for point in points:
        if point.iteration % every == 0 or len(points) == 1:
            parts.append(
                f'<text x="{x(point.iteration):.1f}" y="{height - 14}" text-anchor="middle">{point.iteration}</text>'
            )
    parts.append(f'<text x="{width - right}" y="{height}" text-anchor="end">iteration</text>')
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
    """Four to eight round numbers that enclose [low, high]."""
    span = max(high - low, 1e-3)
    step = 10 ** math.floor(math.log10(span / 4))
    for factor in (1, 2, 5, 10):
        if span / (step * factor) <= 6:
            step *= factor
            break
    start, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 10) for index in range(start, max(end, start + 1) + 1)]
