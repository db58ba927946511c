"""Score sheets: their file, what is missing and why, and figures with intervals.

A figure is over *units*, whole items (or the two questions of a picture), since answers to one item are no independent evidence.
Its 95 % interval is the percentile bootstrap that draws units within each group, such as a category, so that groups keep their size
(Efron and Tibshirani, An introduction to the bootstrap, 1993).
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diptych.evaluation.benchmark import Score
from diptych.runs import atomic_text
from diptych.runtime import rng as make_rng

NUM_RESAMPLES = 2000
UNROUNDED = 15  # digits
CHUNK = 2**22  # numbers drawn at a time, which bounds the memory
Units = Sequence[Sequence[float | None]]  # the values of each unit; None: missing
Average = Callable[[Mapping[str, float | None]], float | None]  # means of aspects to one; None where it cannot be
Combine = Callable[[Mapping[str, Any], Mapping[str, int]], Any]  # means and counts of groups to one figure; means may be arrays


def write_scores(path: Path, scores: Sequence[Score]) -> None:
    lines = []
    for score in scores:
        line: dict[str, Any] = {"id": score.id, "answer": score.answer, "category": score.category, "values": score.values}
        line["cause"] = score.cause
        if score.facts:
            line["facts"] = score.facts
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    atomic_text(path, "".join(lines))


def read_scores(path: Path) -> list[Score]:
    """Raises ValueError naming the line that is no score."""
    scores = []
    for number, raw in enumerate(path.read_text().splitlines(), start=1):
        try:
            scores.append(Score(**json.loads(raw)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}:{number} is no line of a score sheet: {error}. Delete the file to score again.") from error
    return scores


def count(scores: Sequence[Score]) -> dict[str, Any]:
    """Answers, those with no value missing, and the others by cause."""
    missing = Counter(score.cause or "no cause given" for score in scores if None in score.values.values())
    return {"answers": len(scores), "scored": len(scores) - missing.total(), "missing": dict(missing.most_common())}


def summarise(scores: Sequence[Score], aspects: Sequence[str], lowest: float) -> dict[str, dict[str, Any]]:
    """For each aspect its `figure` over all answers ("all") and over each category, in raw values."""
    found: dict[str, dict[str, Any]] = {}
    for aspect in aspects:
        rows = [score for score in scores if aspect in score.values]
        if rows:
            found[aspect] = {"all": figure({"all": units(rows, aspect)}, lowest)}
            for category in dict.fromkeys(score.category for score in rows):
                found[aspect][category] = figure({category: units(rows, aspect, category)}, lowest)
    return found


def units(scores: Sequence[Score], aspect: str, category: str | None = None) -> list[list[float | None]]:
    """The values of an aspect, those of one item together."""
    found: dict[str, list[float | None]] = defaultdict(list)
    for score in scores:
        if aspect in score.values and category in (None, score.category):
            found[score.id].append(score.values[aspect])
    return list(found.values())


def micro_average(means: Mapping[str, Any], counts: Mapping[str, int]) -> Any:
    """The mean over all values, from the means of groups and how many values each has."""
    return sum(means[name] * counts[name] for name in means) / sum(counts[name] for name in means)


def macro_average(means: Mapping[str, Any], counts: Mapping[str, int]) -> Any:
    """The mean of the groups' means, whatever their size."""
    return sum(means.values()) / len(means)


def total(means: Mapping[str, Any], counts: Mapping[str, int]) -> Any:
    return sum(means.values())


def figure(
    groups: Mapping[str, Units], lowest: float, combine: Combine = micro_average, *,
    needs_all: bool = True, factor: float = 1.0, digits: int = 4,
) -> dict[str, Any]:  # fmt: skip
    """One number of a table, times `factor`: of what was scored, with its interval, and with missing values as `lowest`.

    `value` and `missing_as_lowest` are None where a group has no value (`needs_all`) or none has; `ci` also with fewer than two units.
    """
    kept = {name: [[v for v in unit if v is not None] for unit in group] for name, group in groups.items()}
    kept = {name: [unit for unit in group if unit] for name, group in kept.items()}
    filled = {name: [[lowest if v is None else v for v in unit] for unit in group] for name, group in groups.items()}
    scored, owed = (sum(_counts(grouped).values()) for grouped in (kept, filled))
    found: dict[str, Any] = {"value": None, "ci": None, "scored": scored, "missing": owed - scored, "missing_as_lowest": None}
    for name, grouped in (("value", kept), ("missing_as_lowest", filled)):
        present = {key: group for key, group in grouped.items() if group}
        if not present or (needs_all and len(present) < len(grouped)):
            continue
        counts = _counts(present)
        means = {key: math.fsum(v for unit in group for v in unit) / counts[key] for key, group in present.items()}
        found[name] = round(combine(means, counts) * factor, digits)
        if name == "value" and sum(map(len, present.values())) > 1:
            samples = combine({key: resampled_means(group, i) for i, (key, group) in enumerate(present.items())}, counts)
            found["ci"] = [round(float(end) * factor, digits) for end in np.percentile(samples, (2.5, 97.5))]
    return found


def resampled_means(group: Sequence[Sequence[float]], stream: int = 0) -> np.ndarray:
    """(NUM_RESAMPLES,) means of all values of as many units drawn with replacement; no unit is empty."""
    sums, sizes = (np.array([f(unit) for unit in group], dtype=np.float64) for f in (sum, len))
    rng, means = make_rng(0, 34, stream), []
    rows = max(1, CHUNK // len(group))
    for begin in range(0, NUM_RESAMPLES, rows):
        picks = rng.integers(len(group), size=(min(rows, NUM_RESAMPLES - begin), len(group)))
        means.append(sums[picks].sum(1) / sizes[picks].sum(1))
    return np.concatenate(means)


def _counts(groups: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, int]:
    return {name: sum(len(unit) for unit in group) for name, group in groups.items()}


# --- several aspects ------------------------------------------------------------------------------------------------------


def figures(
    scores: Sequence[Score], aspects: Sequence[str], average: Average, lowest: float, *, factor: float = 1.0, digits: int = 4
) -> dict[str, Any]:
    """`aspects`: a `figure` of every aspect that any score owes; `average` of them before they are rounded; answers by cause of what they
    miss."""
    owed = [aspect for aspect in aspects if any(aspect in score.values for score in scores)]
    exact = {aspect: figure({"all": units(scores, aspect)}, lowest, factor=factor, digits=UNROUNDED) for aspect in owed}
    averaged: dict[str, Any] = {key: average({aspect: one[key] for aspect, one in exact.items()}) for key in ("value", "missing_as_lowest")}
    interval = None if averaged["value"] is None else _interval(scores, owed)
    averaged["ci"] = interval and [end * factor for end in interval]
    found = {aspect: rounded(one, digits) for aspect, one in exact.items()}
    return {"aspects": found, "average": rounded(averaged, digits), "missing": count(scores)["missing"]}


def rounded(found: Mapping[str, Any], digits: int) -> dict[str, Any]:
    """A figure with its numbers to so many digits."""
    ends = found["ci"] and [round(end, digits) for end in found["ci"]]
    return {**{key: round(value, digits) if isinstance(value, float) else value for key, value in found.items()}, "ci": ends}


def average(means: Mapping[str, float | None]) -> float | None:
    """The plain mean of the means of aspects; None where one is missing."""
    known = [value for value in means.values() if value is not None]
    return sum(known) / len(known) if known and len(known) == len(means) else None


def _interval(scores: Sequence[Score], aspects: Sequence[str]) -> list[float] | None:
    """95 % bootstrap interval of the mean of the aspects' means; drawn are items, each with all its aspects, which go together.

    None for a single item, and where some draw holds no value of an aspect.
    """
    items = grouped(scores, lambda score: score.id)
    known = [[[v for s in group if (v := s.values.get(a)) is not None] for a in aspects] for group in items.values()]
    sums = np.array([[sum(values) for values in row] for row in known], dtype=np.float64)  # (N, A)
    counts = np.array([[len(values) for values in row] for row in known], dtype=np.float64)  # (N, A)
    drawn = make_rng(0, 35).multinomial(len(items), np.full(len(items), 1 / len(items)), size=NUM_RESAMPLES).astype(np.float64)  # (R, N)
    drawn_counts = drawn @ counts  # (R, A)
    if len(items) < 2 or not drawn_counts.all():
        return None
    return [float(end) for end in np.percentile((drawn @ sums / drawn_counts).mean(1), (2.5, 97.5))]


def grouped(scores: Sequence[Score], key: Callable[[Score], str]) -> dict[str, list[Score]]:
    """Scores by a key, in order of first appearance."""
    groups: dict[str, list[Score]] = {}
    for score in scores:
        groups.setdefault(key(score), []).append(score)
    return groups
