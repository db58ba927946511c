"""The figures by which a benchmark sums a model up, for two jobs: B - A with its interval and a test.

Such a figure is a mean or a sum of the means of several cells (`benchmark.Headline`), so it is no mean of differences. Its values for A and
B are those of the benchmark's own table over the items that both have; what is missing on one side is missing there, as in the table.

- The interval is the paired percentile bootstrap: units are drawn within their strata, each with the values of A and of B, and both
  figures are computed from the draw. Draws that leave a cell without a value are passed over; it is None where these are over 5 %.
- The p value is that of the paired permutation test: were the two models exchangeable, the two values of each unit could as well be the
  other way round. All patterns up to `EXACT_UNITS` units that differ, else `NUM_SWAPS` random ones and the observed one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from diptych.evaluation.benchmark import Benchmark, Headline, Score
from diptych.evaluation.sheets import CHUNK, NUM_RESAMPLES, grouped
from diptych.runtime import rng as make_rng

NUM_SWAPS, EXACT_UNITS, MOST_LOST = 9999, 12, 0.05


@dataclasses.dataclass(frozen=True)
class HeadlineDifference:
    """`a` and `b` as the table rounds them, `mean` (B - A, not rounded before) with its interval; None where a table has no such figure.

    `lowest_a`, `lowest_b`, `lowest`: the same with missing values as the benchmark's lowest. `units`: how many are drawn.
    """

    a: float | None
    b: float | None
    mean: float | None
    low: float | None
    high: float | None
    p: float | None
    lowest_a: float | None
    lowest_b: float | None
    lowest: float | None
    units: int
    decimals: int


def headlines(benchmark: Benchmark, a: Sequence[Score], b: Sequence[Score], seed: int = 0) -> dict[str, HeadlineDifference]:
    """`a` and `b`: scores of the same answers, in the same order. Empty where the scores are not of this benchmark's aspects."""
    if not benchmark.headlines or not all(s.values and s.values.keys() <= set(benchmark.aspects) for s in (*a, *b)):
        return {}
    sides = [list(a), [dataclasses.replace(s, category=other.category) for s, other in zip(b, a, strict=True)]]
    tables = [benchmark.table(side) for side in sides]
    return {headline.name: _difference(headline, sides, tables, benchmark.scale[0], seed) for headline in benchmark.headlines}


def _difference(
    headline: Headline, sides: Sequence[Sequence[Score]], tables: Sequence[dict[str, Any]], lowest: float, seed: int
) -> HeadlineDifference:
    a, b = (_at(table, headline.path) for table in tables)
    figure, strata = _figure_of(headline), _strata(headline, sides)
    units = sum(map(len, strata))
    mean = low = high = p = None
    if a["value"] is not None and b["value"] is not None:
        mean = _gap(figure, strata)
        if units > 1:
            low, high = _interval(figure, strata)
            p = _swap(figure, np.concatenate(strata), seed)
    worst = (a["missing_as_lowest"], b["missing_as_lowest"])
    gap = None if None in worst else _gap(figure, _strata(headline, sides, lowest))
    return HeadlineDifference(a["value"], b["value"], mean, low, high, p, *worst, gap, units, headline.decimals)


def _at(table: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    for name in path:
        table = table[name]
    return table


# --- arrays --------------------------------------------------------------------------------------------------------------
# (U, 2, 2, C): for each unit and side (A, B) the sum of the known values in each cell, and how many they are

Figure = Callable[[np.ndarray], np.ndarray]  # (..., 2, C) sums and counts -> (...) figures; NaN where a cell is empty


def _strata(headline: Headline, sides: Sequence[Sequence[Score]], fill: float | None = None) -> list[np.ndarray]:
    """One array for each stratum; units without a value on either side are left out. `fill` stands for what is missing."""
    values: list[dict[str, dict[str, list[float]]]] = []
    for side in sides:
        cells = {unit: headline.cells(group) for unit, group in grouped(side, headline.unit).items()}
        kept = {unit: {name: [fill if v is None else v for v in found] for name, found in of.items()} for unit, of in cells.items()}
        values.append({unit: {name: [v for v in found if v is not None] for name, found in of.items()} for unit, of in kept.items()})
    names = sorted({name for known in values for of in known.values() for name, found in of.items() if found})
    strata = []
    for group in grouped(sides[0], headline.stratum).values():
        units = [unit for unit in dict.fromkeys(map(headline.unit, group)) if any(any(known[unit].values()) for known in values)]
        array = np.zeros((len(units), 2, 2, len(names)))
        for place, unit in enumerate(units):
            for which, known in enumerate(values):
                for number, name in enumerate(names):
                    found = known[unit].get(name, [])
                    array[place, which, :, number] = sum(found), len(found)
        strata += [array] if units else []
    return strata


def _figure_of(headline: Headline) -> Figure:
    def figure(parts: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            means = parts[..., 0, :] / parts[..., 1, :]  # (..., C)
        return (means.sum(-1) if headline.total else means.mean(-1)) * headline.factor

    return figure


def _gap(figure: Figure, strata: Sequence[np.ndarray]) -> float:
    whole = sum(array.sum(0) for array in strata)  # (2, 2, C)
    return float(figure(whole[1]) - figure(whole[0]))


def _interval(figure: Figure, strata: Sequence[np.ndarray]) -> tuple[float | None, float | None]:
    drawn = np.zeros((NUM_RESAMPLES, *strata[0].shape[1:]))  # (R, 2, 2, C)
    for stream, array in enumerate(strata):
        random, size = make_rng(0, 43, stream), len(array)
        rows = max(1, CHUNK // size)
        for begin in range(0, NUM_RESAMPLES, rows):
            end = min(begin + rows, NUM_RESAMPLES)
            weights = random.multinomial(size, np.full(size, 1 / size), size=end - begin).astype(np.float64)  # (rows, U)
            drawn[begin:end] += np.tensordot(weights, array, 1)
    gaps = figure(drawn[:, 1]) - figure(drawn[:, 0])  # (R,)
    if np.isnan(gaps).mean() > MOST_LOST:
        return None, None
    low, high = np.nanpercentile(gaps, (2.5, 97.5)).tolist()
    return low, high


def _swap(figure: Figure, units: np.ndarray, seed: int) -> float:
    """Two-sided p value of "which side a unit's values stand on is chance"."""
    whole = units.sum(0)  # (2, 2, C)
    differ = units[(units[:, 0] != units[:, 1]).any((1, 2))]
    change = differ[:, 1] - differ[:, 0]  # (U, 2, C): what A gains and B loses where a unit is turned round
    a, b = figure(whole[0]), figure(whole[1])
    observed = abs(b - a) - 1e-9 * (abs(a) + abs(b))  # equal sums in another order differ by rounding

    def as_far(turned: np.ndarray) -> int:
        moved = np.tensordot(turned.astype(np.float64), change, 1)  # (rows, 2, C)
        return int((~(np.abs(figure(whole[1] - moved) - figure(whole[0] + moved)) < observed)).sum())

    if len(differ) <= EXACT_UNITS:
        return as_far(np.arange(2 ** len(differ))[:, None] >> np.arange(len(differ)) & 1) / 2 ** len(differ)
    random, rows, found = make_rng(seed, 44), max(1, CHUNK // len(differ)), 0
    for begin in range(0, NUM_SWAPS, rows):
        found += as_far(random.integers(2, size=(min(rows, NUM_SWAPS - begin), len(differ)), dtype=np.int8))
    return (1 + found) / (1 + NUM_SWAPS)
