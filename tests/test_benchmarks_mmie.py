"""MMIE: the published layouts in, the scorer's layout out, its loader and parser repeated, its table and ours beside it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import PIL.Image
import pytest

from diptych.data.problems import Problems
from diptych.document import Document, Image, Text
from diptych.evaluation.benchmark import Item, Score, Scoring, StoredImage
from diptych.evaluation.mmie import DROPPED, MMIE, category_of, find_score, judge_view, parts_of_answer
from diptych.evaluation.registry import BENCHMARKS
from diptych.evaluation.sheets import micro_average

# --- the published layouts, made by hand ---------------------------------------------------------------------------------


def picture(path: Path, colour: str = "red", size: tuple[int, int] = (20, 14)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", size, colour).save(path)
    return path


def record(id: str, *question: tuple[str | None, str | None], reference: str = "boat") -> dict:
    """As the scorer's README shows a record."""
    parts = [{"text": text, "image": image} for text, image in question]
    return {"id": id, "question": parts, "answer": [], "model": "gt", "gt_answer": [{"text": reference, "image": "images/gt.png"}]}


def mmie_folder(folder: Path, records: list[dict] | None = None) -> Path:
    """Twelve records of all categories, with zero to two pictures, as MMIE/MMIE with its archive unpacked."""
    if records is None:
        records = [
            record(
                f"{kind}-{n:06d}", (f"a red ball {n}", "images/a.png" if n else None), *([("and now", "images/b.png")] if n == 2 else [])
            )
            for kind in ("SA", "PBL", "MSR")
            for n in range(4)
        ]
    for name, colour in (("a", "red"), ("b", "blue"), ("gt", "green")):
        picture(folder / "images" / f"{name}.png", colour)
    (folder / "data.json").write_text(json.dumps(records))
    return folder


def read(folder: Path, strict: bool = False) -> tuple[list[Item], Problems]:
    problems = Problems(strict)
    return MMIE().read(folder, problems), problems


def drawn(colour: str = "white") -> Image:
    return Image(PIL.Image.new("RGB", (8, 8), colour))


# --- reading -------------------------------------------------------------------------------------------------------------


def test_a_question_is_its_segments_in_order_and_nothing_else(tmp_path):
    folder = mmie_folder(tmp_path, [record("PBL-1", ("How?", "images/a.png"), ("First line", None), ("second", "images/b.png"))])
    (item,), problems = read(folder)
    how, first, lines, second = item.prompt
    assert (how, lines) == (Text("How?"), Text("First line\nsecond"))
    assert first.pixels.getpixel((0, 0)) == (255, 0, 0)
    assert second.pixels.getpixel((0, 0)) == (0, 0, 255)
    assert item.category == "PBL"
    assert item.max_images is None
    assert not problems.found


def test_the_hubs_layout_gives_the_same_items(tmp_path):
    """lmms-eval reads `conversations` of MMIE/MMIE; its paths may begin with ./"""
    ours = mmie_folder(tmp_path / "ours", [record("MSR-1", ("How many?", "images/a.png"))])
    content = [{"text": "How many?", "image": "./images/a.png"}]
    turns = [{"from": "human", "content": content}, {"from": "gpt", "content": [{"text": "boat", "image": "images/gt.png"}]}]
    theirs = mmie_folder(tmp_path / "theirs", [{"id": "MSR-1", "catagory": "x", "field": "y", "conversations": turns}])
    (one,), (other,) = read(ours)[0], read(theirs)[0]
    assert one.record == other.record
    assert [s.text for s in other.prompt if isinstance(s, Text)] == ["How many?"]
    assert len(other.prompt.images) == 1


def test_broken_records_are_reported_with_index_and_id_and_the_others_stay(tmp_path):
    records = [
        record("SA-0", ("fine", None)),
        record("SA-0", ("the id again", None)),
        record("SA-1", ("lost", "images/none.png")),
        record("SA-2", ("outside", "../secret.png")),
        {"id": "SA-3"},
        "no object",
        record("", ("no id", None)),
        {"id": "MSR-4", "question": [{"text": "no reference", "image": None}]},
        record("SA-5", (None, None)),
        record("other-6", ("kept", None)),
        record("PBL-7", ("last", None)),
        {"id": "SA-8", "conversations": [{"from": "gpt", "content": []}]},
        record("SA-9", (7, None)),  # type: ignore[arg-type]
    ]
    folder = mmie_folder(tmp_path / "in", records)
    picture(tmp_path / "secret.png")
    items, problems = read(folder)
    assert [item.id for item in items] == ["SA-0", "other-6", "PBL-7"]
    assert [(p.where, p.cause, p.id) for p in problems.found] == [
        ("data.json[1]", "duplicate id", "SA-0"),
        ("data.json[2]", "missing picture", "SA-1"),
        ("data.json[3]", "missing picture", "SA-2"),
        ("data.json[4]", "broken record", "SA-3"),
        ("data.json[5]", "broken record", ""),
        ("data.json[6]", "broken record", ""),
        ("data.json[7]", "broken record", "MSR-4"),
        ("data.json[8]", "broken record", "SA-5"),
        ("data.json[9]", "unknown category", "other-6"),
        ("data.json[11]", "broken record", "SA-8"),
        ("data.json[12]", "broken record", "SA-9"),
    ]
    with pytest.raises(ValueError, match=r"data.json\[1\]: duplicate id"):
        read(folder, strict=True)


def test_other_layouts_are_refused_and_the_overview_will_do(tmp_path):
    with pytest.raises(ValueError, match="has no data"):
        read(tmp_path)
    (tmp_path / "overview.json").write_text(json.dumps([record("SA-1", ("x", None))]))
    assert [item.id for item in read(tmp_path)[0]] == ["SA-1"]
    (tmp_path / "data.json").write_text("{}")
    with pytest.raises(ValueError, match="no list of records"):
        read(tmp_path)


def test_categories_by_substring_in_the_scorers_order():
    assert [category_of(id) for id in ("x-SA-1", "PBL-SA", "MSR-PBL", "9MSR", "sa-1")] == ["SA", "SA", "PBL", "MSR", "other"]


# --- submitting ----------------------------------------------------------------------------------------------------------


def test_each_text_carries_the_picture_behind_it():
    answer = Document((drawn(), Text("a"), drawn(), Text("b"), Text("c"), drawn(), drawn()))
    parts, pictures = parts_of_answer(answer, "images/x")
    assert parts == [
        {"text": None, "image": "images/x_0.png"},
        {"text": "a", "image": "images/x_1.png"},
        {"text": "b", "image": None},
        {"text": "c", "image": "images/x_2.png"},
        {"text": None, "image": "images/x_3.png"},
    ]
    assert [pictures[f"images/x_{k}.png"] for k in range(4)] == answer.images


def test_the_submission_is_the_scorers_layout_and_every_path_resolves(tmp_path):
    records = [
        record("MSR-1", ("q", "images/a.png"), ("r", "images/answer_000000_0.png")),
        record("other-2", ("q", None)),
        record("SA-3", ("q", None)),
    ]
    picture(tmp_path / "in/images/answer_000000_0.png", "yellow")
    items, _ = read(mmie_folder(tmp_path / "in", records))
    mine = picture(tmp_path / "mine.png", "white", (8, 8))
    out = tmp_path / "out"
    out.mkdir()
    answers = [[Document((Text("one"), StoredImage(mine)))], [Document((Text("two"),))], [Document((Text(""),))]]
    MMIE().submit(items, answers, out, "my/model")
    lines = json.loads((out / "data.json").read_text())
    name = lines[0]["answer"][0]["image"]
    assert lines == [
        {
            "id": "MSR-1", "model": "my/model", "question": records[0]["question"], "gt_answer": records[0]["gt_answer"],
            "answer": [{"text": "one", "image": name}],
        },
        {
            "id": "SA-3", "model": "my/model", "question": records[2]["question"], "gt_answer": records[2]["gt_answer"],
            "answer": [{"text": "", "image": None}],
        },
    ]  # fmt: skip
    colours = {
        path: PIL.Image.open(out / path).convert("RGB").getpixel((0, 0)) for path in ("images/a.png", "images/answer_000000_0.png", name)
    }
    assert list(colours.values()) == [(255, 0, 0), (255, 255, 0), (255, 255, 255)]
    assert re.fullmatch(r"images/[^/]+\.png", name)
    assert (tmp_path / "in/images/a.png").stat().st_nlink == 1  # the user's files are copied, not linked


def test_what_to_run_names_the_options_that_exist(tmp_path):
    said = MMIE().how_to_score(tmp_path, tmp_path / "my submission")
    assert f"--input_dir '{tmp_path}/my submission' --input_name data.json" in said
    assert "--output_name eval_result.json" in said
    assert "git checkout eb0fd6e" in said


# --- the judge's view, independently -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "given", "texts", "pictures"),
    [(0, 4, 3, 3), (1, 4, 2, 2), (2, 4, 1, 1), (3, 4, 1, 0), (4, 4, 1, 0), (0, 2, 2, 2)],  # of the official loader, run on made-up records
)
def test_what_the_judge_sees(question, given, texts, pictures):
    parts = [{"text": f"t{n}", "image": f"i{n}"} for n in range(given)]
    view = judge_view(question, parts)
    assert (view.texts, view.pictures) == (texts, pictures)
    lines = []
    for n in range(texts):  # by hand: numbers of pictures go on from the question's
        lines += [f"t{n}\n"] + ([f"Image-{question + n}: <image>\n"] if n < pictures else [])
    assert view.text == "".join(lines)


def test_texts_without_pictures_are_seen_until_the_third_picture():
    parts = [{"text": "a", "image": None}, {"text": None, "image": "x"}, {"text": "b", "image": "y"}, {"text": "c", "image": None}]
    assert judge_view(0, parts).text == "a\nImage-0: <image>\nb\nImage-1: <image>\nc\n"
    assert judge_view(1, parts).text == "a\nImage-1: <image>\nb\nImage-2: <image>\n"
    assert judge_view(3, parts).text == "a\n"


# --- parsing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "value", "cause"),
    [
        ("Good.\n### Score\n4", 4, ""),
        ("4 pictures.\n### Score: 5 of 6", 5, ""),  # the first number behind the mark
        ("### Score\nout of six\n\n  3", 3, ""),
        ("### Score 2.5", 2, ""),  # ties to even
        ("### Score 3.5", 4, ""),
        ("### Score 4.5", 4, ""),
        ("### Score 0", 0, ""),
        ("### Score 6.4", 6, ""),
        ("### Score 7", None, "score out of range"),
        ("### Score -1", None, "score out of range"),
        ("Score: 4", None, "no score in the reply"),
        ("### Score: four", None, "no score in the reply"),
        ("", None, "no score in the reply"),
        (None, None, "no score in the reply"),
    ],
)
def test_the_score_of_a_reply(reply, value, cause):
    assert find_score(reply) == (value, cause)


def judged(path: Path, lines: list[dict]) -> Scoring:
    path.write_text(json.dumps(lines))
    return Scoring(path.parent, official=path)


def test_records_are_matched_by_id_and_every_missing_one_has_its_cause(tmp_path):
    five = [(f"t{n}", "images/a.png") for n in range(5)]
    records = [record("SA-1", ("q", None)), record("PBL-2", *five), record("MSR-3", ("q", None)), record("SA-4", ("q", None)),
               record("SA-5", ("q", None)), record("SA-6", ("q", None)), record("other-7", ("q", None))]  # fmt: skip
    items, _ = read(mmie_folder(tmp_path, records))
    answers = [[Document((Text("said"), drawn(), drawn(), drawn(), Text("unseen"), drawn()))]] * 7
    seen = "said\nImage-0: <image>\nImage-1: <image>\nImage-2: <image>\n"
    lines = [  # in another order than asked, the dropped one not in it
        {"id": "SA-4", "answer": seen, "gpt_feedback": "### Score 9"},
        {"id": "SA-1", "answer": seen, "gpt_feedback": "### Score 5"},
        {"id": "MSR-3", "answer": seen, "gpt_feedback": "no idea"},
        {"id": "SA-5", "answer": "said\n", "gpt_feedback": "### Score 5"},  # its pictures were not found there
    ]
    scores = MMIE().score(items, answers, judged(tmp_path / "result.json", lines))
    assert scores is not None
    assert [(s.id, s.values["score"], s.cause) for s in scores] == [
        ("SA-1", 5.0, ""),
        ("PBL-2", None, DROPPED),
        ("MSR-3", None, "no score in the reply"),
        ("SA-4", None, "score out of range"),
        ("SA-5", None, "another answer was judged"),
        ("SA-6", None, "not in the official file"),
        ("other-7", None, "unknown category: not submitted"),
    ]
    assert scores[0].facts == {"texts": 2, "pictures": 4, "texts_seen": 1, "pictures_seen": 3}
    assert MMIE().score(items, answers, Scoring(tmp_path)) is None


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"id": "SA-9", "gpt_feedback": "### Score 5"}], "entry 1: entry of something that was not asked, 'SA-9'"),
        ([{"id": "SA-1"}], "holds no gpt_feedback"),
        ([{"gpt_feedback": ""}], "entry 1: unusable entry, KeyError: 'id'"),
        ({"id": "SA-1"}, "no list of records with an id"),
        ([{"id": "SA-1", "answer": "of another run", "gpt_feedback": "### Score 5"}], "judges other answers"),
    ],
)
def test_the_result_of_something_else_is_refused(tmp_path, lines, message):
    items, _ = read(mmie_folder(tmp_path, [record("SA-1", ("q", None))]))
    with pytest.raises(ValueError, match=message):
        MMIE().score(items, [[Document((Text("said"),))]], judged(tmp_path / "r.json", lines))


def test_broken_entries_of_the_official_file_are_named_and_cost_no_other(tmp_path):
    items, _ = read(mmie_folder(tmp_path, [record("SA-1", ("q", None)), record("SA-2", ("q", None))]))
    good = {"id": "SA-1", "gpt_feedback": "### Score 5"}
    lines = ["no record", good, {"gpt_feedback": "### Score 1"}, {"id": 7}, {**good, "gpt_feedback": "### Score 2"}, {**good, "id": "SA-9"}]
    scoring = judged(tmp_path / "r.json", lines)
    scores = MMIE().score(items, [[Document((Text("said"),))]] * 2, scoring)
    assert scores is not None
    assert [(s.values["score"], s.cause) for s in scores] == [(5.0, ""), (None, "not in the official file")]
    found = [(p.where.removeprefix(f"{tmp_path / 'r.json'}:entry "), p.cause) for p in scoring.problems.found]
    assert found == [
        ("1", "unusable entry"), ("3", "unusable entry"), ("4", "unusable entry"), ("5", "repeated entry"),
        ("6", "entry of something that was not asked"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"r\.json:entry 1: unusable entry"):
        MMIE().score(items, [[Document((Text("said"),))]] * 2, Scoring(tmp_path, official=scoring.official, problems=Problems(strict=True)))


# --- the table -----------------------------------------------------------------------------------------------------------

COUNTS = {"SA": 5005, "PBL": 11482, "MSR": 3616}  # 20,103 in all
PUBLISHED = [  # SA, PBL, MSR, AVG
    (47.63, 55.12, 42.17, 50.92), (39.65, 46.12, 50.75, 45.33), (46.72, 57.57, 39.33, 51.58), (48.95, 59.05, 51.72, 55.22),
    (53.12, 60.34, 53.28, 57.27), (56.87, 62.28, 54.31, 59.50),
    *zip((53.05, 53.00, 56.12, 54.97), (71.40, 71.20, 73.25, 68.80), [53.67] * 4, (63.65, 63.52, 65.47, 62.63), strict=True),
    *zip((48.08, 47.48, 49.43, 47.07), (67.93, 68.70, 71.85, 68.33), [60.05] * 4, (61.57, 61.87, 64.15, 61.55), strict=True),
    *zip((54.12, 54.72, 55.97, 54.23), (73.47, 72.55, 74.60, 71.32), [47.28] * 4, (63.93, 63.57, 65.05, 62.73), strict=True),
    *zip((52.73, 54.98, 52.58, 54.23), (71.63, 71.87, 73.57, 69.47), [55.63] * 4, (64.05, 64.75, 65.12, 63.18), strict=True),
]  # fmt: skip


def test_the_published_averages_are_reproduced():
    """To 0.01: means are published to 0.001 of 6, which is 0.008 % either way."""
    assert len(PUBLISHED) == 22
    for *means, average in PUBLISHED:
        ours = micro_average(dict(zip(COUNTS, means, strict=True)), COUNTS)
        assert abs(round(ours, 2) - average) < 0.0101, (means, ours)


def scored(id: str, value: float | None, cause: str = "", **facts: float) -> Score:
    return Score(id, category_of(id), {"score": value}, cause=cause, facts=facts)


def test_the_table_by_hand():
    scores = [
        scored("SA-1", 6.0, texts=3, texts_seen=3, pictures=3, pictures_seen=3),
        scored("SA-2", 3.0, texts=1, texts_seen=1, pictures=4, pictures_seen=3),
        scored("PBL-1", 4.0, texts=5, texts_seen=3, pictures=4, pictures_seen=3), scored("PBL-2", None, "no score in the reply"),
        scored("PBL-3", None, DROPPED), scored("MSR-1", None, "score out of range"), scored("x", 6.0),
    ]  # fmt: skip
    table = MMIE().table(scores)
    # SA: (6 + 3) / 2 / 6 = 75 %. PBL: 4 / 6 = 66.67 % scored, 4 / 18 = 22.22 % with 0 for two missing.
    assert {k: table["SA"][k] for k in ("value", "scored", "missing", "missing_as_lowest")} == {
        "value": 75.0, "scored": 2, "missing": 0, "missing_as_lowest": 75.0,
    }  # fmt: skip
    assert {k: table["PBL"][k] for k in ("value", "scored", "missing", "missing_as_lowest")} == {
        "value": 66.67, "scored": 1, "missing": 2, "missing_as_lowest": 22.22,
    }  # fmt: skip
    assert table["MSR"] == {"value": None, "ci": None, "scored": 0, "missing": 1, "missing_as_lowest": 0.0}
    # AVG is over answers, not categories: (6 + 3 + 4) / 3 / 6 = 72.22 %; over all six: 13 / 36 = 36.11 %. "x" is in neither.
    assert (table["AVG"]["value"], table["AVG"]["missing_as_lowest"]) == (72.22, 36.11)
    assert (table["AVG"]["scored"], table["AVG"]["missing"]) == (3, 3)
    assert table["parse_rate"] == 0.6  # 3 of the 5 replies; the dropped one got none
    assert table["dropped"] == 1
    assert table["other_categories"] == 1
    assert table["judge_sees"] == {
        "answers": 3, "answers_cut": 2, "texts_per_answer": 3.0, "texts_seen_per_answer": 2.333, "pictures_per_answer": 3.667,
        "pictures_seen_per_answer": 3.0,
    }  # fmt: skip


def test_the_registry_knows_it():
    assert BENCHMARKS["mmie"] is MMIE
    assert list(BENCHMARKS) == ["mmie", "interleavedbench", "opening", "ueval", "geneval", "mme"]
