"""Charts with intervals as inline SVG: curves with whiskers, and rows of dots around a line at zero."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, TOP = 340, 220, 40, 14, 30, 12
COLOURS = ("#3b6cf6", "#e08a1e", "#1f9d55", "#c8372d", "#8b5cf6", "#0e9aa7", "#b0579a", "#7a8699")  # read on white and on black
ROW, LABEL, VALUE = 26, 250, 190
DODGE = 2.5  # pixels between the whiskers of neighbouring lines at the same x
SLACK = 0.5  # of the means' range: as far as intervals may stretch the axis on either side


@dataclass(frozen=True)
class Point:
    """`low` and `high` are None where there is no interval."""

    x: float
    mean: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    label: str
    colour: str
    points: Sequence[Point]
    dashed: bool = False


@dataclass(frozen=True)
class Row:
    """One dot with its whisker; `shown` is the number as text."""

    label: str
    colour: str
    point: Point
    shown: str


def interval_chart(title: str, lines: Sequence[Line], x_label: str = "step", bounds: tuple[float, float] | None = None) -> str:
    """Means over x with whiskers. The axis is that of the means and half their range more on either side, within `bounds`;
    whiskers beyond it end at the edge."""
    points = [point for line in lines for point in line.points]
    if not points:
        return ""
    low, high = _axis(points, bounds)
    first, last = min(p.x for p in points), max(p.x for p in points)

    def px(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((x - first) / (last - first) if last > first else 0.5)

    def py(y: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (min(max(y, low), high) - low) / (high - low))

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">']
    for tick in _ticks(low, high):
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(tick):.1f}" y2="{py(tick):.1f}" stroke="var(--line)"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{py(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for x in sorted({p.x for p in points}):
        parts.append(f'<text x="{px(x):.1f}" y="{HEIGHT - 12}" text-anchor="middle">{x:g}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 1}" text-anchor="end">{html.escape(x_label)}</text>')
    for i, line in enumerate(lines):
        shift = (i - (len(lines) - 1) / 2) * DODGE
        path = " ".join(f"{px(p.x) + shift:.1f},{py(p.mean):.1f}" for p in line.points)
        dash = ' stroke-dasharray="5 4"' if line.dashed else ""
        parts.append(f'<polyline points="{path}" fill="none" stroke="{line.colour}" stroke-width="2"{dash}/>')
        for p in line.points:
            x = px(p.x) + shift
            if p.low is not None and p.high is not None:
                parts.append(_whisker(x, x, py(p.low), py(p.high), line.colour))
            parts.append(
                f'<circle cx="{x:.1f}" cy="{py(p.mean):.1f}" r="3" fill="{line.colour}"><title>{_told(line.label, p)}</title></circle>'
            )
    return f'<div class="card"><h3>{html.escape(title)}</h3>{"".join(parts)}</svg></div>'


def dot_chart(title: str, rows: Sequence[Row]) -> str:
    """One row for each difference, around a line at zero; the axis holds every whisker."""
    if not rows:
        return ""
    ends = [0.0, *(end for row in rows for end in (row.point.mean, row.point.low, row.point.high) if end is not None)]
    pad = (max(ends) - min(ends)) * 0.06 or 0.1
    low, high = min(ends) - pad, max(ends) + pad
    height = ROW * len(rows) + 34
    width = LABEL + 330 + VALUE

    def px(value: float) -> float:
        return LABEL + 330 * (value - low) / (high - low)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}" style="max-width:{width}px">']
    for tick in _ticks(low, high):
        colour = "var(--soft)" if abs(tick) < 1e-12 else "var(--line)"
        parts.append(f'<line x1="{px(tick):.1f}" x2="{px(tick):.1f}" y1="4" y2="{height - 24}" stroke="{colour}"/>')
        parts.append(f'<text x="{px(tick):.1f}" y="{height - 8}" text-anchor="middle">{0 if abs(tick) < 1e-12 else tick:g}</text>')
    for i, row in enumerate(rows):
        y, p = ROW * i + ROW / 2 + 4, row.point
        parts.append(f'<text x="{LABEL - 14}" y="{y + 4:.1f}" text-anchor="end">{html.escape(row.label)}</text>')
        if p.low is not None and p.high is not None:
            parts.append(_whisker(px(p.low), px(p.high), y, y, row.colour))
        parts.append(f'<circle cx="{px(p.mean):.1f}" cy="{y:.1f}" r="4" fill="{row.colour}"/>')
        parts.append(f'<text x="{width - VALUE + 12}" y="{y + 4:.1f}">{html.escape(row.shown)}</text>')
    return f'<div class="card"><h3>{html.escape(title)}</h3>{"".join(parts)}</svg></div>'


def legend(lines: Sequence[tuple[str, str]]) -> str:
    """(label, colour) of the lines of one or more charts."""
    return '<div class="legend">' + "".join(
        f'<span><i class="dot" style="background:{colour}"></i>{html.escape(label)}</span>' for label, colour in lines
    ) + "</div>"  # fmt: skip


def _whisker(x1: float, x2: float, y1: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="1.5" stroke-opacity="0.6"/>'


def _told(label: str, p: Point) -> str:
    interval = f" ({p.low:.4g} to {p.high:.4g})" if p.low is not None and p.high is not None else ""
    return html.escape(f"{label}, {p.x:g}: {p.mean:.4g}{interval}")


def _axis(points: Sequence[Point], bounds: tuple[float, float] | None) -> tuple[float, float]:
    least, most = min(p.mean for p in points), max(p.mean for p in points)
    slack = (most - least) * SLACK or abs(most) * 0.1 or 0.1
    low = max(least - slack, min(p.mean if p.low is None else p.low for p in points))
    high = min(most + slack, max(p.mean if p.high is None else p.high for p in points))
    pad = (high - low) * 0.06 or slack
    low, high = low - pad, high + pad
    return (max(low, bounds[0]), min(high, bounds[1])) if bounds else (low, high)


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers within an axis."""
    raw = (high - low) / about
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    return [round(k * step, 10) for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
