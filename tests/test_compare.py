"""Two evaluations: pairs, means, intervals and tests by hand and against references; what is missing; the page; the command."""

from __future__ import annotations

import html.parser
import itertools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import yaml
from typer.testing import CliRunner

from diptych.cli import compare as command  # noqa: F401  adds the command
from diptych.cli.app import app
from diptych.data.problems import Problems
from diptych.evaluation.compare import ONE_SIDED, compare, difference, examples, read_answers, read_job, sign_flip
from diptych.models.storyboard import StoryboardModel
from diptych.report.compare import findings, summary
from diptych.report.compare_page import comparison_page

SCALE = (0.0, 5.0)
Line = tuple[str, int, str, dict[str, float | None], str]  # id, answer, category, values, cause


def make_job(folder: Path, lines: Sequence[Line], **config: Any) -> Path:
    folder.mkdir(parents=True)
    settings = {"benchmark": "mmie", "model": f"model-{folder.name}", "settings": {"seed": 0}, **config}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    names = ("id", "answer", "category", "values", "cause")
    (folder / "scores.jsonl").write_text("".join(json.dumps(dict(zip(names, line, strict=True))) + "\n" for line in lines))
    return folder


def plain(values: Sequence[float | None], name: str = "score", category: str = "SA") -> list[Line]:
    return [(f"i{i}", 0, category, {name: value}, "unparsed" if value is None else "") for i, value in enumerate(values)]


def compared(tmp_path: Path, a: Sequence[Line], b: Sequence[Line], strict: bool = False, **config: Any):
    problems = Problems(strict)
    jobs = [read_job(make_job(tmp_path / name, lines, **settings), problems) for name, lines, settings in (("a", a, {}), ("b", b, config))]
    return compare(jobs[0], jobs[1], problems, SCALE)


# --- numbers -------------------------------------------------------------------------------------------------------------


def test_means_wins_and_missing_values_by_hand(tmp_path):
    # pairs with both values: (1, 2), (3, 3), (4, 1), (0, 5): means 8/4 = 2 and 11/4 = 2.75; B wins 2, one tie, A wins 1
    # with missing values as 0: (1,2) (3,3) (4,1) (0,5) (0,4) (2,0) (0,0): means 10/7 and 15/7, difference 5/7
    found = compared(tmp_path, plain([1, 3, 4, 0, None, 2, None]), plain([2, 3, 1, 5, 4, None, None]))
    aspect = found.aspects["score"]
    assert aspect.scored is not None
    assert (aspect.scored.mean_a, aspect.scored.mean_b, aspect.scored.mean) == (2.0, 2.75, 0.75)
    assert (aspect.scored.pairs, aspect.scored.items) == (4, 4)
    assert (aspect.scored.wins_a, aspect.scored.ties, aspect.scored.wins_b) == (1, 1, 2)
    assert aspect.lowest.mean_a == pytest.approx(10 / 7)
    assert aspect.lowest.mean_b == pytest.approx(15 / 7)
    assert aspect.lowest.mean == pytest.approx(5 / 7)
    assert aspect.left_out == 3
    assert aspect.causes_a == {"unparsed": 2}
    assert aspect.causes_b == {"unparsed": 2}


def test_missing_values_count_as_the_lowest_of_the_scale(tmp_path):
    problems = Problems()
    jobs = [read_job(make_job(tmp_path / n, plain(v)), problems) for n, v in (("a", [3.0, 3.0]), ("b", [3.0, None]))]
    assert compare(jobs[0], jobs[1], problems, (1.0, 5.0)).aspects["score"].lowest.mean == pytest.approx(-1.0)  # (0 + (1 - 3)) / 2


def test_sign_flip_by_hand():
    # sums 1, 2, 3: of the 8 patterns only +++ and --- reach 6 in size, so p = 2/8
    assert sign_flip(np.array([1.0, 2.0, 3.0])) == 0.25
    # 3, -1, 0: zeros carry no sign. |2| is reached by 3-1, 3+1, -3-1, -3+1: all 4 patterns
    assert sign_flip(np.array([3.0, -1.0, 0.0])) == 1.0
    assert sign_flip(np.zeros(5)) == 1.0
    assert sign_flip(np.array([1.0, 2.0, 3.0, *np.zeros(20)])) == 0.25  # all patterns, not random ones: zeros do not count


def every_pattern(sums: np.ndarray) -> float:
    """The exact p value in plain loops."""
    observed = abs(math.fsum(sums))
    patterns = list(itertools.product((1, -1), repeat=len(sums)))
    return sum(abs(math.fsum(s * v for s, v in zip(signs, sums, strict=True))) >= observed - 1e-12 for signs in patterns) / len(patterns)


@pytest.mark.parametrize("size", [4, 12, 14])  # the last is drawn, not enumerated
def test_sign_flip_against_all_patterns(size):
    sums = np.random.default_rng(size).normal(0.35, 1, size)
    assert sign_flip(sums) == pytest.approx(every_pattern(sums), abs=1e-12 if size <= 12 else 0.015)


def test_equal_sums_are_as_far_whatever_their_order():
    """0.1 + 0.2 + 0.3 is not 0.3 + 0.2 + 0.1 in floating point; among tenths every tie must count."""
    sums = np.random.default_rng(3).integers(-5, 7, 12) / 10
    tenths = np.rint(sums * 10)
    assert sign_flip(sums) == sign_flip(tenths) == pytest.approx(every_pattern(tenths[tenths != 0]), abs=1e-12)


def test_p_of_many_items_is_never_zero_and_repeats():
    sums = np.full(200, 1.0)
    assert sign_flip(sums) == 1 / 10_000  # of 9,999 random patterns none is as far, and the observed one counts
    drawn = np.random.default_rng(0).normal(0.1, 1, 40)
    assert sign_flip(drawn, 1) == sign_flip(drawn, 1)
    assert sign_flip(drawn, 1) != sign_flip(drawn, 2)


def test_under_no_difference_one_in_twenty_is_called_one():
    random = np.random.default_rng(5)
    called = sum(sign_flip(random.normal(0, 1, 10)) < 0.05 for _ in range(600))
    assert 12 <= called <= 50  # 30 expected, standard deviation 5.3


def test_interval_is_the_normal_one_for_many_items():
    gaps = np.random.default_rng(1).normal(0.3, 1, 800)
    found = difference(np.zeros(800), gaps, [str(i) for i in range(800)])
    half = 1.96 * gaps.std() / math.sqrt(800)
    assert found.mean == pytest.approx(gaps.mean())
    assert (found.low, found.high) == pytest.approx((gaps.mean() - half, gaps.mean() + half), abs=0.012)


def test_answers_to_one_item_are_one_cluster():
    """Four equal answers to each of 100 items: the interval of 100 values, twice as wide as that of 400."""
    gaps = np.random.default_rng(2).normal(0, 1, 100)
    four = np.repeat(gaps, 4)
    ids = [str(i) for i in np.repeat(np.arange(100), 4)]
    clustered, naive = difference(np.zeros(400), four, ids), difference(np.zeros(400), four, [str(i) for i in range(400)])
    assert (clustered.items, clustered.pairs, naive.items) == (100, 400, 400)
    assert clustered.low is not None
    assert clustered.high is not None
    assert naive.low is not None
    assert naive.high is not None
    assert (clustered.high - clustered.low) / (naive.high - naive.low) == pytest.approx(2, rel=0.12)
    assert clustered.p == pytest.approx(sign_flip(gaps * 4))  # sums of items are flipped, not answers


def test_swapping_the_sides_turns_everything_round(tmp_path):
    a, b = plain([1, 3, 4, 0, 2, None]), plain([2, 3, 1, 5, 4, 1])
    there, back = compared(tmp_path / "1", a, b).aspects["score"], compared(tmp_path / "2", b, a).aspects["score"]
    assert there.scored is not None
    assert back.scored is not None
    assert there.scored.mean == -back.scored.mean
    assert (there.scored.wins_a, there.scored.wins_b) == (back.scored.wins_b, back.scored.wins_a)
    assert there.scored.p == back.scored.p
    assert (there.causes_a, there.causes_b) == (back.causes_b, back.causes_a)


def test_one_item_has_no_interval(tmp_path):
    found = compared(tmp_path, plain([1]), plain([2]))
    scored = found.aspects["score"].scored
    assert scored is not None
    assert (scored.mean, scored.low, scored.high, scored.p) == (1.0, None, None, None)
    assert "No difference can be told in score (+1.00, one item)." in summary(found)["findings"]


def test_categories_and_holm(tmp_path):
    # "x": 8 items, each +1: p = 2 / 256. "y": 8 items, each 0 but one: p = 1. Holm over two: x twice as large
    a = [(f"i{i}", 0, "SA" if i < 5 else "PBL", {"x": 1.0, "y": 1.0}, "") for i in range(8)]
    b = [(f"i{i}", 0, "SA" if i < 5 else "PBL", {"x": 2.0, "y": 1.0 if i else 3.0}, "") for i in range(8)]
    record = summary(compared(tmp_path, a, b))
    assert record["aspects"]["x"]["scored"]["p"] == 2 / 256
    assert record["aspects"]["x"]["p_holm"] == 4 / 256
    assert record["aspects"]["y"]["p_holm"] == 1.0
    assert {c: parts["y"]["scored"]["mean"] for c, parts in record["categories"].items()} == {"SA": 2 / 5, "PBL": 0.0}
    assert [parts["x"]["scored"]["pairs"] for parts in record["categories"].values()] == [5, 3]
    assert record["findings"][0].startswith("B is better in x (+1.00")
    assert record["findings"][1].startswith("No difference can be told in y (+0.25")


def test_aspects_that_do_not_apply_are_in_no_mean(tmp_path):
    a = [("i0", 0, "edit", {"image": 1.0}, ""), ("i1", 0, "story", {"image": 2.0, "text": 4.0}, "")]
    found = compared(tmp_path, a, a)
    assert found.aspects["text"].lowest.pairs == 1
    assert found.aspects["text"].left_out == 0
    assert "text" not in found.categories["edit"]


def test_an_aspect_that_one_side_was_not_asked_for_is_counted(tmp_path):
    found = compared(tmp_path, [("i0", 0, "", {"x": 1.0, "y": 1.0}, "")], [("i0", 0, "", {"x": 1.0, "z": 1.0}, "")])
    assert found.aspects["z"].causes_a == {"not asked for on this side": 1}
    assert found.aspects["y"].scored is None
    assert found.aspects["y"].causes_b == {"not asked for on this side": 1}
    assert "Nothing can be said about y, z: no pair has both values." in summary(found)["findings"]


# --- what is left out ----------------------------------------------------------------------------------------------------


def test_other_benchmarks_and_other_items_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is of benchmark 'mmie' and .* of 'ueval'; only jobs of one"):
        compared(tmp_path / "1", plain([1]), plain([1]), benchmark="ueval")
    with pytest.raises(ValueError, match="have no answer to the same item"):
        compared(tmp_path / "2", plain([1]), [("other", 0, "SA", {"score": 1.0}, "")])


def test_answers_of_one_side_are_counted(tmp_path):
    found = compared(
        tmp_path, plain([1, 2, 3]), [*plain([1, 2]), ("more", 0, "SA", {"score": 1.0}, ""), ("i0", 1, "SA", {"score": 1.0}, "")]
    )
    assert (found.only_a, found.only_b) == ([("i2", 0)], [("more", 0), ("i0", 1)])
    record = summary(found)
    assert (record["pairs"], record["only_a"], record["only_b"]) == (2, 1, 2)
    assert "1 of 3 answers of A are not compared: B has none to them." in record["notes"]
    assert "2 of 4 answers of B are not compared: A has none to them." in record["notes"]
    assert record["problems"] == {ONE_SIDED: 3}
    assert not any(note.startswith("Problems") for note in record["notes"])  # said once


@pytest.mark.parametrize(
    ("line", "detail"),
    [
        ("{", "JSONDecodeError"), ("[]", "TypeError"), ('{"id": "x", "category": ""}', "KeyError"),
        ('{"id": 7, "category": "", "values": {}}', "id is 7"), ('{"id": "x", "category": "", "values": {"score": NaN}}', "not finite"),
        ('{"id": "x", "category": "", "values": {"score": "good"}}', "could not convert"),
    ],
)  # fmt: skip
def test_broken_lines_are_reported_with_their_place(tmp_path, line, detail):
    folder = make_job(tmp_path / "a", plain([1, 2]))
    with (folder / "scores.jsonl").open("a") as stream:
        stream.write(line + "\n")
    problems = Problems()
    assert len(read_job(folder, problems).scores) == 2
    (problem,) = problems.found
    assert (problem.where, problem.cause) == (f"{folder / 'scores.jsonl'}:3", "broken line")
    assert detail in problem.detail
    with pytest.raises(ValueError, match=r"scores.jsonl:3: broken line"):
        read_job(folder, Problems(strict=True))


def test_repeated_answers_are_reported_and_the_first_is_kept(tmp_path):
    problems = Problems()
    job = read_job(make_job(tmp_path / "a", [*plain([1]), *plain([5])]), problems)
    assert job.scores[("i0", 0)].values == {"score": 1.0}
    assert problems.by_cause() == {"repeated answer": 1}


def test_strict_refuses_gaps(tmp_path):
    with pytest.raises(ValueError, match="score is missing in 1 of the pairs"):
        compared(tmp_path / "1", plain([1, None]), plain([1, 2]), strict=True)
    with pytest.raises(ValueError, match="answer that the other job does not have"):
        compared(tmp_path / "2", plain([1, 2]), plain([1]), strict=True)
    assert compared(tmp_path / "3", plain([1, 2]), plain([1, 2]), strict=True).keys == [("i0", 0), ("i1", 0)]


def test_folders_that_are_no_scored_job(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(
            ValueError, match=r"(?s)no output folder of a benchmark job.*or the \.json file that `diptych evaluate storyboard` wrote"
        ):
            read_job(folder, Problems())
    unscored = make_job(tmp_path / "unscored", [])
    (unscored / "scores.jsonl").unlink()
    with pytest.raises(ValueError, match=r"is not scored yet .* run its `diptych evaluate mmie` command"):
        read_job(unscored, Problems())
    (unscored / "config.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"config.yaml cannot be read"):
        read_job(unscored, Problems())


# --- words ---------------------------------------------------------------------------------------------------------------


def test_notes_say_when_missing_values_decide(tmp_path):
    # scored pairs: A 1, B 2, ten times; in five more B is missing where A has 5: (10 * 1 - 5 * 5) / 15 = -1
    notes = summary(compared(tmp_path, plain([1.0] * 10 + [5.0] * 5), plain([2.0] * 10 + [None] * 5)))["notes"]
    assert "score: 5 of 15 pairs are left out, because a value is missing in B (unparsed: 5)." in notes
    assert any(re.match(r"score: with missing values counted as 0 the difference is −1\.00, .* what is missing decides", n) for n in notes)
    assert "score: only 10 items, for which an interval is rough." in notes


def test_notes_say_when_scorers_or_data_differ(tmp_path):
    a, b = (make_job(tmp_path / name, plain([1, 2]), data={"hash": name}) for name in ("a", "b"))
    judges = (
        {"official": {"hash": "x"}, "judge": None},
        {"official": {"hash": "y"}, "judge": None},
        {"official": None, "judge": {"model": "m"}},
    )
    (a / "scoring.json").write_text(json.dumps(judges[0]))
    for judge, said in ((judges[1], []), (judges[2], ["scoring.judge.model", "scoring.official"])):
        (b / "scoring.json").write_text(json.dumps(judge))
        found = summary(compare(read_job(a, Problems()), read_job(b, Problems()), Problems(), SCALE))
        assert [name for name in found["changed_settings"] if name.startswith("scoring.")] == said
        assert any("scored in different ways (scoring.judge.model, scoring.official)" in note for note in found["notes"]) == bool(said)
        assert any("different data (data.hash)" in note for note in found["notes"])
    for name, folder in (("a", a), ("b", b)):  # what was only moved is no other data, and the files of a model are not told one by one
        hashes = {"hash": name, "files": {"model.safetensors": name}}
        settings = {"benchmark": "mmie", "model": name, "fingerprint": hashes, "data": {"folder": name, "texts": "x"}}
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (b / "scoring.json").unlink()
    found = summary(compare(read_job(a, Problems()), read_job(b, Problems()), Problems(), SCALE))
    assert not any("different data" in note for note in found["notes"])
    assert [name for name in found["changed_settings"] if name.startswith(("data", "finger"))] == ["data.folder", "fingerprint.hash"]
    (b / "scoring.json").write_text("[")
    with pytest.raises(ValueError, match=r"scoring.json cannot be read"):
        read_job(b, Problems())


def test_only_a_small_corrected_p_is_called_better(tmp_path):
    record = summary(compared(tmp_path, plain([1.0] * 8), plain([2.0] * 8)))
    for p, said in ((0.049, "B is better in score"), (0.05, "No difference can be told in score"), (None, "No difference can be told")):
        record["aspects"]["score"]["p_holm"] = p
        assert findings(record)[1].startswith(said)
    record["aspects"]["score"]["scored"]["mean"] = -1.0
    record["aspects"]["score"]["p_holm"] = 0.01
    assert findings(record)[1].startswith("A is better in score (−1.00")


# --- examples and the page -----------------------------------------------------------------------------------------------


def test_examples_are_the_furthest_both_ways(tmp_path):
    # gaps of i0..i5: +1, -2, +4, 0, -1, and none where a value is missing
    found = compared(tmp_path, plain([1, 3, 0, 2, 2, None]), plain([2, 1, 4, 2, 1, 4]))
    shown = examples(found, 2)
    assert shown["b"] == [(("i2", 0), 4.0), (("i0", 0), 1.0)]
    assert shown["a"] == [(("i1", 0), -2.0), (("i4", 0), -1.0)]
    assert len({key for key, _ in shown["random"]}) == 2
    assert examples(found, 2) == shown
    assert dict(examples(found, 6)["random"])[("i5", 0)] is None
    assert len({tuple(key for key, _ in examples(found, 2, seed)["random"]) for seed in range(8)}) > 1
    assert examples(found, 0) == {"a": [], "b": [], "random": []}


def answered(folder: Path, texts: dict[str, str], picture: str | None = "images/p.png", prompt: str | None = None) -> None:
    (folder / "answers" / "images").mkdir(parents=True)
    PIL.Image.new("RGB", (512, 384), "teal").save(folder / "answers" / "images" / "p.png")
    lines = []
    for id, text in texts.items():
        blocks = [{"type": "text", "text": text}, *([{"type": "image", "image": picture}] if picture else [])]
        asked = {} if prompt is None else {"prompt": [{"type": "text", "text": prompt}]}
        lines.append(json.dumps({"id": id, "answer": 0, "blocks": blocks, **asked}) + "\n")
    (folder / "answers" / "batch_000000.jsonl").write_text("".join(lines[:1]))
    (folder / "answers" / "batch_000001.jsonl").write_text("{broken\n" + "".join(lines[1:]))


class Tags(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


EVIL = '<script>alert("x")</script>&amp;'


@pytest.fixture
def evil(tmp_path) -> tuple[Path, Path]:
    """Two jobs in which every string that a page could show tries to be HTML; some answers and pictures are not there."""
    lines = [
        (f"{EVIL}{i}", 0, f"{EVIL}{i % 2}", {EVIL: value}, "" if value is not None else EVIL) for i, value in enumerate((1, 2, 3, None))
    ]
    a = make_job(tmp_path / "a", lines, model=EVIL, settings={EVIL: 1})
    b = make_job(tmp_path / "b", [(id, n, c, {EVIL: 3.0}, "") for id, n, c, _, _ in lines], model=EVIL, settings={EVIL: EVIL})
    answered(a, {f"{EVIL}{i}": EVIL for i in range(4)}, prompt=EVIL)
    answered(b, {f"{EVIL}{i}": EVIL for i in range(3)}, picture=f"images/{EVIL}.png")
    return a, b


def test_the_page_is_escaped_self_contained_and_says_what_is_not_there(evil):
    jobs = [read_job(folder, Problems()) for folder in evil]
    found = compare(jobs[0], jobs[1], Problems(), SCALE)
    shown = examples(found, 4)
    answers = [read_answers(job, found.keys) for job in jobs]
    assert [len(side) for side in answers] == [4, 3]  # the broken line of a batch costs no other
    assert list(read_answers(jobs[0], found.keys[1:2])) == found.keys[1:2]
    text = comparison_page(found, summary(found), shown, answers)
    tags = Tags(text).tags
    assert not [tag for tag, _ in tags if tag == "script"]
    addresses = [attrs[name] for _, attrs in tags for name in ("src", "href") if name in attrs]
    assert addresses
    assert all(address and address.startswith("data:image/jpeg;base64,") for address in addresses)
    assert "http" not in re.sub(r"data:image[^\"]*", "", text)
    assert f"(this answer is not in {evil[1] / 'answers'})" in text
    assert "cannot be opened)" in text
    # in all sections: 2 pairs where B is ahead, none where A is, 4 at random
    assert text.count('<div class="task card">') == 6
    assert "Where A is furthest ahead" not in text


def test_bars_stand_where_the_numbers_are(tmp_path):
    found = compared(tmp_path, plain([1.0, 1.0, 1.0]), plain([3.0, 3.0, 3.0]))
    text = comparison_page(found, summary(found), {"a": [], "b": [], "random": []}, [{}, {}])
    (dot,) = [attrs for tag, attrs in Tags(text).tags if tag == "circle"]
    assert dot["cx"] == "145.0"  # the only difference, +2, is the reach: half of 150 and 75 - 5 to the right


# --- the command ---------------------------------------------------------------------------------------------------------


def test_the_command(evil, tmp_path, monkeypatch):
    monkeypatch.setattr("diptych.evaluation.compare.scale_of", lambda name: SCALE)
    page, numbers = tmp_path / "page.html", tmp_path / "numbers.json"
    arguments = ["evaluate", "compare", *map(str, evil), "--out", str(page), "--json", str(numbers), "--num-examples", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    record = json.loads(numbers.read_text())
    assert record["aspects"][EVIL]["scored"]["mean"] == 1.0  # (2 + 1 + 0) / 3
    assert record["aspects"][EVIL]["lowest"]["mean"] == 1.5  # (2 + 1 + 0 + 3) / 4
    assert record["changed_settings"][f"settings.{EVIL}"] == [1, EVIL]
    assert all(sentence in result.output for sentence in record["findings"] + record["notes"])
    assert page.read_text().count('<div class="task card">') == 2
    again = tmp_path / "again.html"
    CliRunner().invoke(app, [*arguments[:5], str(again), *arguments[6:]])
    assert again.read_text() == page.read_text()
    assert isinstance(CliRunner().invoke(app, [*arguments, "--strict"]).exception, ValueError)
    for option, ending in (("--out", ".html"), ("--json", ".json")):
        error = CliRunner().invoke(app, [*arguments[:4], option, str(tmp_path / "x.txt")]).exception
        assert f"the allowed ending is {ending}" in str(error)
    assert not (tmp_path / "x.txt").exists()


def test_a_benchmark_that_is_not_known_is_named(tmp_path):
    registry = pytest.importorskip("diptych.evaluation.registry")
    from diptych.evaluation.compare import scale_of

    assert scale_of("mmie") == registry.BENCHMARKS["mmie"].scale == (0, 6)
    with pytest.raises(ValueError, match="benchmark is 'nonsense'; known are mmie"):
        scale_of("nonsense")


def test_storyboard_from_the_command_to_the_comparison(tiny_model, tmp_path):
    """Prompt by prompt; the means are those of the evaluation itself."""
    other = StoryboardModel(tiny_model.config, tiny_model.tokenizer)
    for name, model in (("a", tiny_model), ("b", other)):
        model.save_pretrained(tmp_path / name)
    small = ["--num_prompts", "6", "--num_retention", "4", "--max_images", "1", "--max_text_tokens", "4", "--batch_size", "6"]
    runs = {"a": ("a", []), "b": ("b", []), "same": ("a", []), "seed": ("a", ["--seed", "7"]), "fewer": ("a", ["--num_retention", "2"])}
    for out, (model, more) in runs.items():
        options = ["--model", str(tmp_path / model), "--out", str(tmp_path / f"{out}.json"), "--device", "cpu"]
        done = CliRunner().invoke(app, ["evaluate", "storyboard", *options, *small, *more])
        assert done.exit_code == 0, done.output
    written = {out: json.loads((tmp_path / f"{out}.json").read_text()) for out in runs}
    jobs = {out: read_job(tmp_path / f"{out}.json", Problems()) for out in runs}
    found = compare(jobs["a"], jobs["b"], Problems(), (0, 1))
    assert len(found.keys) == 6 + 4 + 4
    for mode in ("greedy", "sampled"):
        for rate in ("format", "text", "image", "order", "document", "score"):
            scored = found.aspects[f"{mode} {rate}"].scored
            assert (scored.mean_a, scored.mean_b) == pytest.approx([written[side][mode][rate] for side in "ab"], abs=1e-4)
            assert scored.items == 6
    for skill in ("text_to_image", "understanding"):
        scored = found.aspects[skill].scored
        assert (scored.mean_a, scored.mean_b) == tuple(written[side]["retention"][skill]["accuracy"] for side in "ab")
    assert found.aspects["greedy format"].left_out == 0  # a turn of a retained skill owes no rate
    assert set(found.changed) == {"model", "fingerprint.hash"}
    same = compare(jobs["a"], jobs["same"], Problems(), (0, 1))
    assert not same.changed
    assert all(aspect.scored.mean == 0 for aspect in same.aspects.values())
    with pytest.raises(ValueError, match="have no answer to the same item"):
        compare(jobs["a"], jobs["seed"], Problems(), (0, 1))
    assert len(compare(jobs["a"], jobs["fewer"], Problems(), (0, 1)).keys) == 6  # other turns
    arguments = ["evaluate", "compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--out", str(tmp_path / "page.html")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "greedy score" in (tmp_path / "page.html").read_text()
    (tmp_path / "old.json").write_text(json.dumps({name: written["a"][name] for name in ("greedy", "sampled", "retention")}))
    with pytest.raises(ValueError, match=r"old.json does not hold the results of single prompts.*evaluate again"):
        read_job(tmp_path / "old.json", Problems())


def test_many_aspects_without_a_difference_are_named_and_left_to_the_table():
    even = {"mean": 0.0, "low": -0.1, "high": 0.1}
    for count, shown in (
        (6, "No difference can be told in a0 (+0.000, 95 % interval −0.100 to +0.100), "),
        (7, "No difference can be told in a0, a1, "),
    ):
        aspects = {f"a{i}": {"scored": even, "p_holm": 1.0} for i in range(count)}
        (line,) = findings({"aspects": aspects, "headlines": {}, "scale": [0, 1]})
        assert line.startswith(shown)
