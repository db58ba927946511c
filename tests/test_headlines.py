"""The figures of a benchmark's table for two jobs: its own numbers, intervals and tests against plain loops and exact patterns."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable

import numpy as np
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from diptych.cli import app
from diptych.evaluation.benchmark import Benchmark, Score
from diptych.evaluation.geneval import TAGS
from diptych.evaluation.headlines import HeadlineDifference, headlines
from diptych.evaluation.interleavedbench import ASPECTS
from diptych.evaluation.mme import COGNITION, PERCEPTION
from diptych.evaluation.opening import CRITERIA
from diptych.evaluation.registry import BENCHMARKS
from diptych.evaluation.sheets import write_scores

Draw = Callable[[float, int], float | None]


def drawer(seed: int, missing: float = 0.1) -> Draw:
    """Whole numbers from 0 to `top`, higher for a higher strength; some are missing."""
    random = np.random.default_rng(seed)

    def draw(strength: float, top: int) -> float | None:
        value = float(random.binomial(top, strength))
        return None if random.random() < missing else value

    return draw


def mmie(draw: Draw, strength: float) -> list[Score]:
    sizes = {"SA": 12, "PBL": 30, "MSR": 9, "x": 4}  # "x": of no category, in no figure
    return [Score(f"{c}-{n}", "other" if c == "x" else c, {"score": draw(strength, 6)}) for c, size in sizes.items() for n in range(size)]


def interleavedbench(draw: Draw, strength: float) -> list[Score]:
    owed = {"context-based/image_editing": tuple(ASPECTS)[1:3], "context-free/story": tuple(ASPECTS)}
    return [Score(f"{c}{n}", c, {a: draw(strength, 5) for a in aspects}) for c, aspects in owed.items() for n in range(14)]


def opening(draw: Draw, strength: float) -> list[Score]:
    scores = []
    for n in range(25):
        whole = {name: draw(strength, 10) for name in CRITERIA}
        scores.append(Score(str(n), f"task {n % 3}", dict.fromkeys(CRITERIA) if None in whole.values() else whole))
    return scores


def ueval(draw: Draw, strength: float) -> list[Score]:
    scores = []
    for n in range(30):
        text, image, overall = (draw(strength, 4) for _ in range(3))
        values = {"text_rate": text, "image_rate": image, "overall_rate": overall}
        scores.append(Score(str(n), ("art", "space", "paper")[n % 3], {k: v if v is None else v / 4 for k, v in values.items()}))
    return scores


def geneval(draw: Draw, strength: float) -> list[Score]:
    return [
        Score(f"{t}{n:03d}", tag, {"correct": draw(strength, 1)}, k) for t, tag in enumerate(TAGS) for n in range(3 + t) for k in range(4)
    ]


def mme(draw: Draw, strength: float) -> list[Score]:
    names = [(c, n, k) for c in PERCEPTION + COGNITION for n in range(8) for k in range(2)]
    return [Score(f"{c}/{n}#{k}", c, {"correct": draw(strength, 1)}) for c, n, k in names]


MAKERS = {
    "mmie": mmie, "interleavedbench": interleavedbench, "opening": opening, "ueval": ueval, "geneval": geneval, "mme": mme,
}  # fmt: skip
PLACES = {  # where the table has the figure that papers print
    "mmie": {"AVG": ("AVG",)}, "interleavedbench": {"AVG": ("average",)}, "opening": {"Overall": ("average",)},
    "ueval": {"Avg": ("avg",), "text and image": ("text_and_image",)}, "geneval": {"overall": ("overall",)},
    "mme": {"MME-P": ("MME-P",), "MME-C": ("MME-C",)},
}  # fmt: skip
ROUNDING = {"mmie": 0.005, "interleavedbench": 5e-5, "opening": 0.011, "ueval": 0.011, "geneval": 5e-5, "mme": 0.005}


def in_table(benchmark: Benchmark, scores: list[Score], place: tuple[str, ...], key: str = "value") -> float:
    found = benchmark.table(scores)
    for name in place:
        found = found[name]
    return found[key]


@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_they_are_the_numbers_of_the_benchmarks_own_table(name):
    bench, draw = BENCHMARKS[name](), drawer(1)
    a, b = MAKERS[name](draw, 0.4), MAKERS[name](draw, 0.7)
    found = headlines(bench, a, b)
    assert list(found) == list(PLACES[name])
    for title, place in PLACES[name].items():
        one = found[title]
        assert (one.a, one.b) == (in_table(bench, a, place), in_table(bench, b, place))
        assert (one.lowest_a, one.lowest_b) == tuple(in_table(bench, side, place, "missing_as_lowest") for side in (a, b))
        assert one.mean == pytest.approx(one.b - one.a, abs=2 * ROUNDING[name] + 1e-9)
        assert one.lowest == pytest.approx(one.lowest_b - one.lowest_a, abs=2 * ROUNDING[name] + 1e-9)
        assert one.low < one.mean < one.high
        assert one.p < 0.2


@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_the_interval_is_that_of_tables_of_drawn_items(name):
    """120 draws of whole items within each category (of all items where the table draws so), each through the benchmark's own table."""
    bench, draw, random = BENCHMARKS[name](), drawer(2, missing=0.0), np.random.default_rng(0)
    a, b = MAKERS[name](draw, 0.4), MAKERS[name](draw, 0.5)
    title, place = next(iter(PLACES[name].items()))
    unit = (lambda s: s.id.rsplit("#", 1)[0]) if name == "mme" else (lambda s: s.id)
    whole = name in ("interleavedbench", "opening")
    groups: dict[str, list[str]] = {}
    for id, category in {unit(s): s.category for s in a}.items():
        groups.setdefault("" if whole else category, []).append(id)
    sides = [{id: [s for s in side if unit(s) == id] for ids in groups.values() for id in ids} for side in (a, b)]
    monkey, gaps = pytest.MonkeyPatch(), []
    monkey.setattr("diptych.evaluation.sheets.NUM_RESAMPLES", 2)
    for _ in range(120):
        picks = [str(id) for ids in groups.values() for id in random.choice(ids, size=len(ids))]
        drawn = [[Score(f"{k}:{s.id}", s.category, s.values, s.answer) for k, id in enumerate(picks) for s in side[id]] for side in sides]
        gaps.append(in_table(bench, drawn[1], place) - in_table(bench, drawn[0], place))
    monkey.undo()
    found = headlines(bench, a, b)[title]
    spread = np.std(gaps)
    # quantiles of 120 draws are off by about 0.25 standard deviations
    assert found.low == pytest.approx(np.percentile(gaps, 2.5), abs=0.7 * spread)
    assert found.high == pytest.approx(np.percentile(gaps, 97.5), abs=0.7 * spread)
    assert (found.high - found.low) / 3.92 == pytest.approx(spread, rel=0.25)


def test_pairing_takes_out_what_items_have_in_common():
    """B is A plus one on every item, and items differ much: the interval is the single number of the difference."""
    random = np.random.default_rng(3)
    a = [Score(str(n), "task", {name: float(random.integers(9)) for name in CRITERIA}) for n in range(40)]
    b = [Score(s.id, s.category, {name: value + 1 for name, value in s.values.items()}) for s in a]
    found = headlines(BENCHMARKS["opening"](), a, b)["Overall"]
    assert (found.low, found.high, found.mean) == pytest.approx((1.0, 1.0, 1.0))
    assert found.p == 1 / 10_000


def swapped(bench: Benchmark, a: list[Score], b: list[Score], place: tuple[str, ...]) -> float:
    """The exact p value through the table: all ways to exchange the sides of each item."""
    gaps = []
    for pattern in itertools.product((False, True), repeat=len(a)):
        sides = [[(y if turn else x) for x, y, turn in zip(*pair, pattern, strict=True)] for pair in ((a, b), (b, a))]
        gaps.append(in_table(bench, sides[1], place) - in_table(bench, sides[0], place))
    return float(np.mean([abs(gap) >= abs(gaps[0]) - 1e-9 for gap in gaps]))


def test_the_test_is_exact_for_few_items(monkeypatch):
    monkeypatch.setattr("diptych.evaluation.sheets.NUM_RESAMPLES", 2)
    bench, random = BENCHMARKS["mme"](), np.random.default_rng(4)
    names = [(c, k) for c in COGNITION for k in range(2)]
    a, b = ([Score(f"{c}/0#{k}", c, {"correct": float(random.random() < p)}) for c, k in names] for p in (0.4, 0.9))
    pairs = [[side[i : i + 2] for i in range(0, 8, 2)] for side in (a, b)]
    gaps = []
    for pattern in itertools.product((False, True), repeat=4):  # MME exchanges pictures, each with its two questions
        turned = [[s for x, y, t in zip(*pair, pattern, strict=True) for s in (y if t else x)] for pair in (pairs, pairs[::-1])]
        gaps.append(in_table(bench, turned[1], ("MME-C",)) - in_table(bench, turned[0], ("MME-C",)))
    found = headlines(bench, a, b)["MME-C"]
    assert found.p == np.mean([abs(gap) >= abs(gaps[0]) - 1e-9 for gap in gaps])
    assert headlines(bench, a, b)["MME-P"].mean is None  # of no subtask there is no sum

    bench = BENCHMARKS["interleavedbench"]()
    a, b = ([Score(str(n), "context-free/x", {k: float(random.integers(6)) for k in ASPECTS}) for n in range(7)] for _ in range(2))
    assert headlines(bench, a, b)["AVG"].p == swapped(bench, a, b, ("average",))


def test_what_is_missing_on_one_side_is_missing_there():
    # SA: A 6, 0 and missing, so 50 %; B 3, 3, 3, so 50 %; with 0 for what is missing A has 6 / 18 = 33.33 %
    a = [Score(f"SA-{n}", "SA", {"score": v}) for n, v in enumerate((6.0, 0.0, None))]
    b = [Score(f"SA-{n}", "SA", {"score": 3.0}) for n in range(3)]
    found = headlines(BENCHMARKS["mmie"](), a, b)["AVG"]
    assert (found.a, found.b, found.mean) == (50.0, 50.0, 0.0)
    assert (found.lowest_a, found.lowest_b) == (33.33, 50.0)
    assert found.lowest == pytest.approx(100 / 6)
    assert found.units == 3
    assert found.p == 1.0


def test_a_figure_that_one_table_does_not_have():
    scores = geneval(drawer(5, missing=0.0), 0.5)
    few = [Score(s.id, s.category, {"correct": None if s.category == "colors" else s.values["correct"]}, s.answer) for s in scores]
    found = headlines(BENCHMARKS["geneval"](), scores, few)["overall"]
    assert (found.b, found.mean, found.low, found.p) == (None, None, None, None)
    assert found.a is not None
    assert found.lowest < 0
    assert headlines(BENCHMARKS["geneval"](), [Score("x", "y", {"other": 1.0})], [Score("x", "y", {"other": 1.0})]) == {}


def test_an_interval_is_none_where_a_draw_can_lose_a_cell():
    scores = [Score(str(n), "c/t", {"helpfulness": 3.0, **({"text_quality": 2.0} if n == 0 else {})}) for n in range(4)]
    found = headlines(BENCHMARKS["interleavedbench"](), scores, scores)["AVG"]
    assert (found.low, found.high, found.mean) == (None, None, 0.0)


def test_the_command_says_them_first(tmp_path, monkeypatch):
    monkeypatch.setattr("diptych.cli.compare.console", Console(width=160))
    draw = drawer(6)
    for name, strength in (("a", 0.3), ("b", 0.8)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump({"benchmark": "mme", "model": name}))
        write_scores(tmp_path / name / "scores.jsonl", mme(draw, strength))
    arguments = ["--out", str(tmp_path / "page.html"), "--json", str(tmp_path / "numbers.json")]
    done = CliRunner().invoke(app, ["evaluate", "compare", str(tmp_path / "a"), str(tmp_path / "b"), *arguments])
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "numbers.json").read_text())
    figure = record["headlines"]["MME-P"]
    assert set(figure) == {*HeadlineDifference.__dataclass_fields__, "p_holm"}
    assert record["headlines"]["MME-C"]["p_holm"] >= record["headlines"]["MME-C"]["p"]
    told = record["findings"][0]
    assert told.startswith(f"MME-P: A {figure['a']:.2f}, B {figure['b']:.2f}; B is better (+{figure['mean']:.2f}, 95 % interval +")
    assert told in done.output
    assert "The figures of the benchmark's own table" in (tmp_path / "page.html").read_text()
