"""Line charts as inline SVG."""

from __future__ import annotations

import html
from collections.abc import Sequence
from statistics import median

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 340, 190, 58, 26, 12

Series = tuple[str, str, Sequence[tuple[float, float]]]  # label, colour, points


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A centred running median over 5 points, or a 25th of a long curve: a single outlier leaves it as it is."""
    half = max(2, len(points) // 50)
    ys = [y for _, y in points]
    return [(x, median(ys[max(0, i - half) : i + half + 1])) for i, (x, _) in enumerate(points)]


def line_chart(title: str, series: Sequence[Series], x_label: str = "step") -> str:
    """One chart; the raw points are faint and their running median is drawn over them.

    The axis is that of the medians and half their range more; raw points beyond it are drawn at the edge.
    """
    points = [p for _, _, ps in series for p in ps]
    if not points:
        return ""
    low_x, high_x = min(x for x, _ in points), max(x for x, _ in points)
    typical = [y for _, _, ps in series for _, y in smooth(ps)]
    slack = (max(typical) - min(typical)) * 0.5 or abs(max(typical)) * 0.05 or 0.05
    low = max(min(typical) - slack, min(y for _, y in points))
    high = min(max(typical) + slack, max(y for _, y in points))
    pad = (high - low) * 0.08 or slack
    low, high = low - pad if low < 0 or low > pad else 0.0, high + pad

    def place(x: float, y: float) -> str:
        px = LEFT + (WIDTH - LEFT - 10) * (x - low_x) / ((high_x - low_x) or 1)
        py = TOP + (HEIGHT - TOP - BOTTOM) * (1 - (min(max(y, low), high) - low) / (high - low))
        return f"{px:.1f},{py:.1f}"

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">']
    for share in (0, 0.5, 1):
        value = low + (high - low) * share
        y = place(low_x, value).split(",")[1]
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 10}" y1="{y}" y2="{y}" stroke="var(--line)"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{value:.2g}</text>')
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 6}">{low_x:g}</text>')
    parts.append(f'<text x="{WIDTH - 10}" y="{HEIGHT - 6}" text-anchor="end">{x_label} {high_x:g}</text>')
    for _, colour, ps in series:
        raw, middle = " ".join(place(x, y) for x, y in ps), " ".join(place(x, y) for x, y in smooth(ps))
        parts.append(f'<polyline points="{raw}" fill="none" stroke="{colour}" stroke-opacity="0.25"/>')
        parts.append(f'<polyline points="{middle}" fill="none" stroke="{colour}" stroke-width="2"/>')
    parts.append("</svg>")
    legend = "".join(f'<span><i class="dot" style="background:{c}"></i>{html.escape(label)}</span>' for label, c, _ in series)
    return f'<div class="card"><h3>{html.escape(title)}</h3>{"".join(parts)}<div class="legend">{legend}</div></div>'
