"""Two evaluations of the same benchmark, answer by answer: which is better in what, and what is chance.

Answers are paired by item and number of the answer. The mean difference B - A of an aspect has two companions, both over *items*,
because several answers to one item are no independent evidence:

- a 95 % percentile interval of the paired bootstrap that draws whole items (`sheets.resampled_means`);
- the two-sided p value of the sign-flip test: were the two models exchangeable, each item's difference could as well have the other
  sign. All sign patterns are tried up to `EXACT_ITEMS` items with a difference, else `NUM_FLIPS` random ones, of which the observed
  pattern counts as one more (Phipson and Smyth, Stat. Appl. Genet. Mol. Biol. 9, 2010), so p is never 0.

A pair with a missing value on either side is in no mean. It is counted with its cause, and a second mean counts missing values as lowest.

The figures by which the benchmark sums a model up are compared in `headlines.py`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from diptych.data.problems import NONSENSE, Problems
from diptych.data.readers import read_json
from diptych.evaluation.benchmark import Score
from diptych.evaluation.headlines import HeadlineDifference, headlines
from diptych.evaluation.registry import BENCHMARKS
from diptych.evaluation.sheets import CHUNK, resampled_means
from diptych.runtime import rng as make_rng

NUM_FLIPS, EXACT_ITEMS = 9999, 12
STORYBOARD = "storyboard"
ONE_SIDED = "answer that the other job does not have"
Key = tuple[str, int]  # id, number of the answer


@dataclasses.dataclass(frozen=True)
class Job:
    """A scored benchmark job; `folder` is a file for storyboard, which keeps no documents.

    `scores` in the order of its file; `settings`: its config.yaml and, as `scoring.`, its scoring.json, flat.
    """

    folder: Path
    benchmark: str
    model: str
    settings: dict[str, Any]
    scores: dict[Key, Score]


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of the pairs in which both sides have a value: means, B - A with its interval, and how many pairs each side wins.

    `low`, `high` and `p` are None where fewer than two items give nothing to estimate them from.
    """

    pairs: int
    items: int
    mean_a: float
    mean_b: float
    mean: float
    low: float | None
    high: float | None
    p: float | None
    wins_a: int
    ties: int
    wins_b: int


@dataclasses.dataclass(frozen=True)
class Aspect:
    """`scored`: None where no pair has both values. `lowest`: the same with missing values as the benchmark's lowest.

    `left_out`: pairs of which a value is missing; `causes_a` and `causes_b`: why, for each side.
    """

    scored: Difference | None
    lowest: Difference
    left_out: int
    causes_a: dict[str, int]
    causes_b: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """`headlines`: figures of the benchmark's own table, by name. `aspects`: of all pairs; `categories`: category -> aspect.

    `only_a`, `only_b`: answers that the other side does not have.
    """

    a: Job
    b: Job
    scale: tuple[float, float]
    keys: list[Key]
    only_a: list[Key]
    only_b: list[Key]
    headlines: dict[str, HeadlineDifference]
    aspects: dict[str, Aspect]
    categories: dict[str, dict[str, Aspect]]
    changed: dict[str, tuple[Any, Any]]
    problems: Problems


# --- reading -------------------------------------------------------------------------------------------------------------


def read_job(folder: Path, problems: Problems) -> Job:
    """What `diptych evaluate BENCHMARK ... --out FOLDER` left, or `diptych evaluate storyboard --out FILE`; broken and repeated lines are
    reported and left out.

    Raises ValueError for a folder that holds no such job, or one that is not scored.
    """
    if folder.is_file():
        return _read_storyboard(folder, problems)
    file = folder / "config.yaml"
    try:
        config = yaml.safe_load(file.read_text()) if file.is_file() else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("benchmark"), str):
        raise ValueError(
            f"{folder} is no output folder of a benchmark job (no config.yaml that names a benchmark); give the --out of "
            "`diptych evaluate mmie` or another benchmark, or the .json file that `diptych evaluate storyboard` wrote"
        )
    sheet = folder / "scores.jsonl"
    if not sheet.is_file():
        raise ValueError(
            f"{folder} is not scored yet (no scores.jsonl); run its `diptych evaluate {config['benchmark']}` command to the end"
        )
    lines = ((f"{sheet}:{number}", raw) for number, raw in enumerate(sheet.read_bytes().splitlines(), start=1))
    settings = {**config, "scoring": _scoring(folder)}
    if isinstance(config.get("fingerprint"), dict):  # of the model; that of each of its files would be listed one by one
        settings["fingerprint"] = {name: value for name, value in config["fingerprint"].items() if name != "files"}
    return Job(folder, config["benchmark"], str(config.get("model", "")), dict(_flat(settings)), _scores(lines, problems))


def _read_storyboard(file: Path, problems: Problems) -> Job:
    found = read_json(file)
    if not isinstance(found, dict) or not isinstance(found.get("settings"), dict) or not isinstance(found.get("prompts"), list):
        raise ValueError(
            f"{file} does not hold the results of single prompts; give what `diptych evaluate storyboard --out {file.name}` writes (a file "
            "of an earlier version has means only: evaluate again)"
        )
    lines = ((f"{file}:prompt {number}", json.dumps(line).encode()) for number, line in enumerate(found["prompts"], start=1))
    settings = found["settings"]
    return Job(file, STORYBOARD, str(settings.get("model", "")), dict(_flat(settings)), _scores(lines, problems))


def _scores(lines: Iterable[tuple[str, bytes]], problems: Problems) -> dict[Key, Score]:
    scores: dict[Key, Score] = {}
    for where, raw in lines:
        try:
            score = _score(json.loads(raw))
        except NONSENSE as error:
            problems.report(where, "broken line", f"{type(error).__name__}: {error}")
            continue
        key = (score.id, score.answer)
        if key in scores:
            problems.report(where, "repeated answer", f"answer {score.answer}; the first is kept", score.id)
        else:
            scores[key] = score
    return scores


def _scoring(folder: Path) -> dict[str, Any]:
    """What the job was scored with: the judge's options, or that it was an official file. Empty where that is not said."""
    file = folder / "scoring.json"
    try:
        said = json.loads(file.read_bytes()) if file.is_file() else {}
        return {**said, "official": None if said.get("official") is None else "yes"}  # its file and hash differ for every job
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _score(line: dict[str, Any]) -> Score:
    values = {str(name): None if value is None else float(value) for name, value in line["values"].items()}
    wrong = [name for name, value in values.items() if value is not None and not math.isfinite(value)]
    if wrong or not isinstance(line["id"], str):
        raise ValueError(f"{wrong[0]} is not finite" if wrong else f"id is {line['id']!r}; a string is needed")
    return Score(line["id"], str(line["category"]), values, int(line.get("answer", 0)), str(line.get("cause", "")))


def _flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def read_answers(job: Job, keys: Sequence[Key]) -> dict[Key, dict[str, Any]]:
    """The lines of `answers/batch_*.jsonl` for some keys; those that are not there, or broken, are left out."""
    wanted, found = set(keys), {}
    for path in sorted((job.folder / "answers").glob("batch_*.jsonl")):
        for raw in path.read_bytes().splitlines():
            try:
                line = json.loads(raw)
                key = (line["id"], int(line.get("answer", 0)))
            except NONSENSE:
                continue
            if key in wanted:
                found[key] = line
    return found


# --- comparing -----------------------------------------------------------------------------------------------------------


def scale_of(benchmark: str) -> tuple[float, float]:
    """Lowest and highest raw value of a known benchmark. Raises ValueError for another."""
    if benchmark == STORYBOARD:
        return 0.0, 1.0
    if benchmark not in BENCHMARKS:
        raise ValueError(f"benchmark is {benchmark!r}; known are {', '.join((*BENCHMARKS, STORYBOARD))}")
    return BENCHMARKS[benchmark].scale


def compare(a: Job, b: Job, problems: Problems, scale: tuple[float, float], seed: int = 0) -> Comparison:
    """`scale`: lowest and highest raw value; in the second mean a missing one counts as the lowest.

    Raises ValueError for different benchmarks, for jobs without a common answer, and, where `problems` are strict, for any gap.
    """
    if a.benchmark != b.benchmark:
        raise ValueError(f"{a.folder} is of benchmark {a.benchmark!r} and {b.folder} of {b.benchmark!r}; only jobs of one can be compared")
    keys = [key for key in a.scores if key in b.scores]
    if not keys:
        raise ValueError(f"{a.folder} and {b.folder} have no answer to the same item: different data, or different --ids or --limit?")
    only_a, only_b = [key for key in a.scores if key not in b.scores], [key for key in b.scores if key not in a.scores]
    for job, only in ((a, only_a), (b, only_b)):
        for id, answer in only:
            problems.report(f"{job.folder}", ONE_SIDED, f"answer {answer}", id)
    for key in keys:
        if a.scores[key].category != b.scores[key].category:
            detail = f"{b.scores[key].category!r} in {b.folder}, {a.scores[key].category!r} here, which is used"
            problems.report(f"{a.folder}", "category differs", detail, key[0])
    names = list(dict.fromkeys(name for key in keys for job in (a, b) for name in job.scores[key].values))
    categories = list(dict.fromkeys(a.scores[key].category for key in keys))
    members = {category: [key for key in keys if a.scores[key].category == category] for category in categories}
    aspects = _aspects(a, b, keys, names, scale[0], seed, test=True)
    for name, aspect in aspects.items():
        if aspect.left_out and problems.strict:
            raise ValueError(f"{name} is missing in {aspect.left_out} of the pairs (--strict stops at missing values)")
    per_category = {c: _aspects(a, b, members[c], names, scale[0], seed, test=False) for c in categories} if len(categories) > 1 else {}
    known = a.benchmark in BENCHMARKS
    both = [[job.scores[key] for key in keys] for job in (a, b)]
    figures = headlines(BENCHMARKS[a.benchmark](), both[0], both[1], seed) if known else {}
    return Comparison(a, b, scale, keys, only_a, only_b, figures, aspects, per_category, changed_settings(a, b), problems)


def changed_settings(a: Job, b: Job) -> dict[str, tuple[Any, Any]]:
    """Settings in which the jobs differ; None where one has none."""
    names = sorted(a.settings.keys() | b.settings.keys())
    return {name: (a.settings.get(name), b.settings.get(name)) for name in names if a.settings.get(name) != b.settings.get(name)}


def _aspects(
    a: Job, b: Job, keys: Sequence[Key], names: Sequence[str], lowest: float, seed: int, test: bool
) -> dict[str, Aspect]:  # fmt: skip
    found = {}
    for name in names:
        owed = [key for key in keys if name in a.scores[key].values or name in b.scores[key].values]
        if not owed:
            continue
        sides = [[job.scores[key].values.get(name) for key in owed] for job in (a, b)]
        have = [i for i, pair in enumerate(zip(*sides, strict=True)) if None not in pair]
        filled = [np.array([lowest if value is None else value for value in side], dtype=float) for side in sides]
        ids = [key[0] for key in owed]
        scored = difference(filled[0][have], filled[1][have], [ids[i] for i in have], seed, test) if have else None
        causes = [Counter(_cause(job.scores[key], name) for key in owed if job.scores[key].values.get(name) is None) for job in (a, b)]
        all_of_them = difference(filled[0], filled[1], ids, seed, test)
        found[name] = Aspect(scored, all_of_them, len(owed) - len(have), dict(causes[0]), dict(causes[1]))
    return found


def _cause(score: Score, name: str) -> str:
    return (score.cause or "no cause given") if name in score.values else "not asked for on this side"


def difference(a: np.ndarray, b: np.ndarray, ids: Sequence[str], seed: int = 0, test: bool = True) -> Difference:
    """B - A of pairs (N,), N at least 1, with the interval and, where `test` is true, the p value over the items `ids`."""
    gaps = b - a  # (N,)
    items: dict[str, list[float]] = {}
    for id, gap in zip(ids, gaps.tolist(), strict=True):
        items.setdefault(id, []).append(gap)
    low = high = p = None
    if len(items) > 1:
        low, high = np.percentile(resampled_means(list(items.values())), (2.5, 97.5)).tolist()
        p = sign_flip(np.array([math.fsum(item) for item in items.values()]), seed) if test else None
    wins_a, wins_b = int((gaps < 0).sum()), int((gaps > 0).sum())
    return Difference(
        len(gaps),
        len(items),
        float(a.mean()),
        float(b.mean()),
        float(gaps.mean()),
        low,
        high,
        p,
        wins_a,
        len(gaps) - wins_a - wins_b,
        wins_b,
    )


def sign_flip(sums: np.ndarray, seed: int = 0) -> float:
    """Two-sided p value of "the signs of the items' differences are chance": the share of sign patterns whose sum is as far from 0."""
    sums = sums[sums != 0]
    observed = abs(sums.sum()) - 1e-9 * np.abs(sums).sum()  # equal sums in another order differ by rounding
    if len(sums) <= EXACT_ITEMS:
        every = 1 - 2 * (np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums)) & 1)  # (2^items, items)
        return float((np.abs(every @ sums) >= observed).mean())
    random, rows = make_rng(seed, 41), max(1, CHUNK // len(sums))
    as_far = 0
    for begin in range(0, NUM_FLIPS, rows):
        signs = 1.0 - 2.0 * random.integers(2, size=(min(rows, NUM_FLIPS - begin), len(sums)), dtype=np.int8)
        as_far += int((np.abs(signs @ sums) >= observed).sum())
    return (1 + as_far) / (1 + NUM_FLIPS)


# --- examples ------------------------------------------------------------------------------------------------------------


def examples(found: Comparison, number: int, seed: int = 0) -> dict[str, list[tuple[Key, float | None]]]:
    """Pairs to look at with their difference, the mean over aspects of B - A: `b`, where B is furthest ahead, `a`, and `random` ones.

    The random ones are drawn from all pairs; their difference is None where no aspect has both values.
    """
    gaps: dict[Key, float | None] = {}
    for key in found.keys:
        a, b = found.a.scores[key].values, found.b.scores[key].values
        both = [b[name] - a[name] for name in a if a[name] is not None and b.get(name) is not None]  # type: ignore[operator]
        gaps[key] = math.fsum(both) / len(both) if both else None
    known = [(key, gap) for key, gap in gaps.items() if gap]
    ahead = sorted(known, key=lambda pair: (-pair[1], pair[0]))
    behind = sorted(known, key=lambda pair: (pair[1], pair[0]))
    drawn = sorted(make_rng(seed, 42).choice(len(found.keys), size=min(number, len(found.keys)), replace=False).tolist())
    return {
        "b": [(key, gap) for key, gap in ahead[:number] if gap > 0],
        "a": [(key, gap) for key, gap in behind[:number] if gap < 0],
        "random": [(found.keys[i], gaps[found.keys[i]]) for i in drawn],
    }
