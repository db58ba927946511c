"""GenEval and MME: whether drawing and understanding have stayed. Published layouts in, tables out, each figure by hand."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from typer.testing import CliRunner

from diptych.cli import app
from diptych.config import ImageSampling, SamplingParams, TextSampling
from diptych.data.problems import Problems
from diptych.document import Document, Image, Text
from diptych.evaluation import answers as answers_module
from diptych.evaluation.answers import Template, answer, plan
from diptych.evaluation.benchmark import Score, Scoring
from diptych.evaluation.geneval import NO_PICTURE, TAGS, GenEval
from diptych.evaluation.jobs import Job, Settings
from diptych.evaluation.mme import COGNITION, MME, PERCEPTION, SUFFIX, parse, spoken
from diptych.models import load_model

SAMPLED = SamplingParams(
    text=TextSampling(temperature=0.8), image=ImageSampling(temperature=0.7, guidance_scale=1.0), max_images=3, max_text_tokens=6
)


def said(*parts: str | None) -> Document:
    """Texts, and None for a picture."""
    return Document(tuple(Image(PIL.Image.new("RGB", (8, 8), "red")) if part is None else Text(part) for part in parts))


# --- GenEval -------------------------------------------------------------------------------------------------------------


def geneval_folder(folder: Path, tags=("counting", "colors", "counting")) -> Path:
    (folder / "prompts").mkdir(parents=True)
    lines = [
        {"tag": tag, "include": [{"class": "boat", "count": 3}], "exclude": [], "prompt": f"a red ball {n}"} for n, tag in enumerate(tags)
    ]
    (folder / "prompts" / "evaluation_metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_geneval_reads_captions_of_a_copy_or_of_its_folder(tmp_path):
    folder = geneval_folder(tmp_path)
    for place in (folder, folder / "prompts"):
        items = GenEval().read(place, Problems())
        assert [item.id for item in items] == ["00000", "00001", "00002"]
        assert [item.category for item in items] == ["counting", "colors", "counting"]
        assert all(item.max_images == 1 and item.num_answers == 4 for item in items)
        assert tuple(items[1].prompt) == (Text("a red ball 1"),)
    with pytest.raises(ValueError, match=r"has no evaluation_metadata\.jsonl"):
        GenEval().read(tmp_path / "none", Problems())


def test_geneval_numbers_lines_also_behind_broken_ones(tmp_path):
    file = geneval_folder(tmp_path) / "prompts" / "evaluation_metadata.jsonl"
    first, second, third = file.read_text().splitlines()
    file.write_text("\n".join([first, "{", second.replace("colors", "sounds"), third]))
    problems = Problems()
    assert [item.id for item in GenEval().read(tmp_path, problems)] == ["00000", "00003"]
    assert [(p.where, p.cause) for p in problems.found] == [
        ("evaluation_metadata.jsonl:2", "broken line"), ("evaluation_metadata.jsonl:3", "broken record"),
    ]  # fmt: skip


def results(path: Path, *lines: tuple[str, int, bool], prompt: str | None = None) -> Scoring:
    found = [
        {"filename": f"/there/{id}/samples/{n:04d}.png", "tag": "x", "prompt": prompt or f"a red ball {int(id)}", "correct": right,
         "reason": "", "metadata": "{}", "details": "{}"}
        for id, n, right in lines
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in found))
    return Scoring(path.parent, official=path)


def test_geneval_from_submission_to_scores(tmp_path):
    items = GenEval().read(geneval_folder(tmp_path / "in"), Problems())[:2]
    answers = [[said(None), said("no"), said("yes", None, None), said("")], [said(None)] * 4]
    out = tmp_path / "out"
    out.mkdir()
    GenEval().submit(items, answers, out, "m")
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == [
        "00000/metadata.jsonl", "00000/samples/0000.png", "00000/samples/0002.png",
        "00001/metadata.jsonl", *(f"00001/samples/{n:04d}.png" for n in range(4)),
    ]  # fmt: skip
    assert json.loads((out / "00001" / "metadata.jsonl").read_text()) == items[1].record
    assert GenEval().score(items, answers, Scoring(tmp_path)) is None
    scoring = results(tmp_path / "r.jsonl", ("00001", 0, True), ("00000", 2, True), ("00000", 0, False), ("00001", 3, False))
    scores = GenEval().score(items, answers, scoring)
    assert scores is not None
    assert [(s.id, s.answer, s.values["correct"], s.cause) for s in scores] == [
        ("00000", 0, 0.0, ""), ("00000", 1, None, NO_PICTURE), ("00000", 2, 1.0, ""), ("00000", 3, None, NO_PICTURE),
        ("00001", 0, 1.0, ""), ("00001", 1, None, "not in the official file"), ("00001", 2, None, "not in the official file"),
        ("00001", 3, 0.0, ""),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "prompt", "message"),
    [
        ([("00007", 0, True)], None, "was not asked"),
        ([("00000", 4, True)], None, "was not asked"),
        ([("00000", 0, True)], "another caption", "was not asked"),
        ([("00000", 1, True)], None, "judges picture 1 of 00000, which was not drawn"),
        ([("00000", 0, 1)], None, "correct is 1"),
        ([("x", 0, True)], "p", "filename is 'x.png'"),
    ],
)
def test_geneval_refuses_the_result_of_something_else(tmp_path, lines, prompt, message):
    items = GenEval().read(geneval_folder(tmp_path / "in"), Problems())[:1]
    if lines[0][0] == "x":
        (tmp_path / "r.jsonl").write_text('{"filename": "x.png", "correct": true}\n')
        scoring = Scoring(tmp_path, official=tmp_path / "r.jsonl")
    else:
        scoring = results(tmp_path / "r.jsonl", *lines, prompt=prompt)
    with pytest.raises(ValueError, match=message):
        GenEval().score(items, [[said(None), said("no"), said(None), said(None)]], scoring)


def test_geneval_broken_lines_of_the_official_file_cost_no_other(tmp_path, tiny_model):
    """Through the whole job: each is named with file and line, counted, told and kept; under --strict the first one stops."""
    data, settings, said_ = geneval_folder(tmp_path / "in", ("counting",)), Settings(benchmark="geneval", model="tiny"), []

    def run(strict: bool = False):
        file = tmp_path / "r.jsonl"
        job = Job(GenEval(), data, tmp_path / "out", settings, official=file, say=said_.append, strict=strict)
        return job.run(lambda: (tiny_model, SAMPLED))

    Job(GenEval(), data, tmp_path / "out", settings, say=said_.append).run(lambda: (tiny_model, SAMPLED))
    drawn = sorted(int(path.stem) for path in (tmp_path / "out" / "submission" / "00000" / "samples").glob("*.png"))
    lines = results(tmp_path / "r.jsonl", *(("00000", n, True) for n in drawn), ("00000", drawn[0], False), ("00007", 0, True))
    (tmp_path / "r.jsonl").write_text('{"broken\n[]\n' + lines.official.read_text() + '{"filename": 3, "correct": true}\n')
    with pytest.raises(ValueError, match=r"r\.jsonl:1: broken line"):
        run(strict=True)
    result = run()
    assert result is not None
    causes = {"broken line": 2, "entry of something that was not asked": 1, "repeated entry": 1, "unusable entry": 1}
    assert result["counts"]["official_file"] == causes
    assert result["counts"]["scored"] == len(drawn)
    assert result["table"]["counting"]["value"] == 1.0  # the first of two counts
    assert f"the first is {tmp_path / 'r.jsonl'}:1, all are in {tmp_path / 'out' / 'problems.json'}" in said_[-1]
    assert run() == result  # and again, when nothing is left to do
    found = json.loads((tmp_path / "out" / "problems.json").read_text())
    assert found["causes"] == causes
    place = len(drawn) + 3
    assert [p["where"].rsplit(":", 1)[1] for p in found["problems"]] == ["1", "2", str(place), str(place + 1), str(place + 2)]


def test_geneval_overall_is_the_mean_of_the_tags_not_of_the_pictures():
    """By hand, and against the rows of its README: single and two objects, counting, colours, position, colour attribution, overall."""

    def sheet(rates: dict[str, list[float | None]]) -> list[Score]:
        return [
            Score(f"{tag}{n // 4}", tag, {"correct": value}, n % 4, "" if value is not None else NO_PICTURE)
            for tag, values in rates.items()
            for n, value in enumerate(values)
        ]

    published = [(89, 22, 37, 62, 3, 0, 35), (73, 11, 12, 37, 2, 1, 23), (97, 38, 35, 76, 4, 6, 43), (98, 51, 44, 85, 7, 17, 50)]
    for *rights, overall in [*published, (98, 74, 39, 85, 15, 23, 55), (97, 74, 66, 81, 13, 35, 61)]:
        rates = {tag: [1.0] * right + [0.0] * (100 - right) for tag, right in zip(TAGS, rights, strict=True)}
        assert abs(GenEval().table(sheet(rates))["overall"]["value"] - overall / 100) < 0.01  # each column is rounded to 0.01
    few = sheet({**{tag: [0.0] * 4 for tag in TAGS[1:]}, "single_object": [1.0, 1.0, None, 0.0, None, None, None, None]})
    table = GenEval().table(few)
    # single_object: 2 of 3 pictures; 2 of 8 with 0 for those that were not drawn. Overall: a sixth of it, since the others are 0.
    assert (table["single_object"]["value"], table["single_object"]["missing_as_lowest"]) == (0.6667, 0.25)
    assert (table["overall"]["value"], table["overall"]["missing_as_lowest"]) == (0.1111, 0.0417)
    assert table["no_picture"] == 5
    # prompts with a right picture: one of the six that have any; of all seven with 0 for the one without
    assert (table["prompts_any"]["value"], table["prompts_any"]["missing_as_lowest"]) == (0.1667, 0.1429)
    assert GenEval().table(few[:4])["overall"]["value"] is None  # five tags are not six


def test_geneval_asks_four_times_for_one_picture(tmp_path, tiny_model):
    items = GenEval().read(geneval_folder(tmp_path), Problems())
    (batch,) = plan(list(enumerate(items)), 16)
    found = [one.document for one in answer(tiny_model, batch, SAMPLED, 0, Template()) if one.document]
    assert len(found) == 12
    assert {len(document.images) for document in found} <= {0, 1}
    assert any(document.images for document in found)


def test_geneval_of_a_base_that_never_draws_has_four_pictures_for_every_caption(tmp_path, folders):
    """By the command: such a model answers in words when it may choose, and with `--form free` it does."""
    for name in ("janus", "emu3", "vila_u", "chameleon"):
        model = shutil.copytree(folders[name], tmp_path / "models" / name)
        if name == "emu3":
            (model / "diptych.json").write_text('{"image_size": 32}')
        command = ["evaluate", "geneval", str(geneval_folder(tmp_path / name)), "--model", str(model), "--temperature", "1"]
        for form, wanted in (([], [1] * 12), (["--form", "text"], [0] * 12)):
            out = tmp_path / f"{name}{len(form)}"
            result = CliRunner().invoke(app, [*command, "--out", str(out), "--max-text-tokens", "4", *form])
            assert result.exception is None, result.exception
            lines = [json.loads(line) for line in (out / "answers" / "batch_000000.jsonl").read_text().splitlines()]
            assert [sum(block["type"] == "image" for block in line["blocks"]) for line in lines] == wanted
            assert len(list((out / "submission").glob("*/samples/*.png"))) == sum(wanted)
        stored = yaml.safe_load((tmp_path / f"{name}0" / "config.yaml").read_text())
        assert stored["form"] == stored["sampling"]["form"] == "image"
        assert stored["sampling"]["image"]["guidance_scale"] == load_model(model).default_sampling.image.guidance_scale
        again = CliRunner().invoke(app, [*command, "--out", str(tmp_path / f"{name}0"), "--form", "free"])
        assert "different: form" in str(again.exception)
        if name == "janus":  # a folder from before there were forms goes on as it began
            before = {key: value for key, value in stored.items() if key not in ("form", "image_decoder")}
            before["sampling"].pop("form")
            (tmp_path / "janus0" / "config.yaml").write_text(yaml.safe_dump(before))
            (tmp_path / "janus0" / "answers" / "batch_000000.jsonl").unlink()
            result = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "janus0"), "--max-text-tokens", "4"])
            assert result.exception is None, result.exception
            assert yaml.safe_load((tmp_path / "janus0" / "config.yaml").read_text()) == before


def test_geneval_refuses_to_draw_one_picture_four_times(tmp_path, tiny_model):
    """Sampling greedily all four answers are the same, so the figures would say nothing of sampling; MME asks once and may."""
    data, settings = geneval_folder(tmp_path / "in"), Settings(benchmark="geneval", model="tiny")
    job = Job(GenEval(), data, tmp_path / "out", settings, say=lambda line: None)
    top = SAMPLED.model_copy(update={part: getattr(SAMPLED, part).model_copy(update={"top_k": 1}) for part in ("text", "image")})
    for params in (SAMPLED.greedy(), top):
        with pytest.raises(ValueError, match=r"4 answers are asked for each item, but sampling is greedy.*for instance --temperature 1"):
            job.run(lambda params=params: (tiny_model, params))
    assert not (tmp_path / "out" / "answers").exists()
    words = SAMPLED.model_copy(update={"image": SAMPLED.greedy().image})  # nothing but codes is chosen
    with pytest.raises(ValueError, match="4 answers are asked for each item"):
        job.run(lambda: (tiny_model, words))
    partly = SAMPLED.model_copy(update={"text": SAMPLED.greedy().text})
    assert job.run(lambda: (tiny_model, partly)) is None  # pictures are sampled
    tiny_model.save_pretrained(tmp_path / "model")
    command = ["evaluate", "geneval", str(data), "--model", str(tmp_path / "model"), "--out", str(tmp_path / "default")]
    assert "--temperature 1" in str(CliRunner().invoke(app, command).exception)


# --- MME -----------------------------------------------------------------------------------------------------------------


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (20, 14), colour).save(buffer, format="PNG")
    return buffer.getvalue()


def mme_rows(category: str, name: str, colour: str = "red") -> list[dict]:
    image, end = {"bytes": png(colour), "path": None}, "Please answer yes or no."
    shared = {"question_id": f"{category}/{name}", "image": image, "category": category}
    return [{**shared, "question": f" Is it a {thing}? {end}", "answer": right} for thing, right in (("ball", "Yes"), ("boat", "No"))]


def mme_folder(folder: Path, rows: list[dict], shards: int = 2) -> Path:
    """data/test-*.parquet, as lmms-lab/MME publishes them; the two questions of a picture may stand in two files."""
    (folder / "data").mkdir(parents=True)
    for shard in range(shards):
        part = rows[shard * len(rows) // shards : (shard + 1) * len(rows) // shards]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), folder / "data" / f"test-{shard:05d}-of-{shards:05d}.parquet")
    return folder


def test_mme_reads_pairs_and_asks_as_lmms_eval_does(tmp_path):
    rows = mme_rows("color", "1.jpg") + mme_rows("OCR", "1.jpg", "blue")
    first, second, third, fourth = MME().read(mme_folder(tmp_path, [rows[0], *rows[2:], rows[1]]), Problems())
    assert [item.id for item in (first, second, third, fourth)] == ["color/1.jpg#0", "OCR/1.jpg#0", "OCR/1.jpg#1", "color/1.jpg#1"]
    picture, question = first.prompt
    assert picture.pixels.getpixel((0, 0)) == (255, 0, 0)
    assert question == Text("Is it a ball?\nAnswer the question using a single word or phrase.")
    assert question.text.endswith(SUFFIX)
    assert fourth.prompt.images[0] is picture  # kept once
    assert all(item.max_images == 0 for item in (first, second, third, fourth))
    assert (fourth.record["answer"], fourth.category) == ("no", "color")
    assert "image" not in fourth.record


def test_mme_reports_what_is_broken_and_leaves_out_half_pairs(tmp_path):
    rows = mme_rows("color", "1.jpg") + mme_rows("color", "2.jpg")[:1] + mme_rows("count", "3.jpg") * 2 + mme_rows("taste", "4.jpg")
    rows.append({**mme_rows("OCR", "5.jpg")[0], "answer": "maybe"})
    rows.append({**mme_rows("OCR", "6.jpg")[0], "image": {"bytes": None, "path": "x.png"}})
    problems = Problems()
    assert [item.id for item in MME().read(mme_folder(tmp_path, rows, 1), problems)] == ["color/1.jpg#0", "color/1.jpg#1"]
    assert problems.by_cause() == {"broken record": 2, "no pair": 2, "unknown category": 2}
    assert {p.id for p in problems.found if p.cause == "no pair"} == {"color/2.jpg", "count/3.jpg"}
    with pytest.raises(ValueError, match="unknown category: taste"):
        MME().read(tmp_path, Problems(strict=True))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Yes", "yes"), ("no.", "no"), (" Yes, it is", "yes"), ("y", "yes"), ("N", "no"), ("No, there is a yes", "no"), ("a yes", ""),
        ("", ""), ("x", ""), ("it is not", ""), ("not", "no"), ("maybe", ""), ("N.o", "no"), ("yesno", "yes"),
    ],
)  # fmt: skip
def test_mme_parses_as_lmms_eval_does(text, value):
    assert parse(text) == value


@pytest.mark.parametrize(
    ("answer_", "words"),
    [
        (said("Yes"), "Yes"),
        (said("<think>is it? no</think> Yes"), "Yes"),
        (said("<think>Yes</think>"), "Yes"),  # all that was said is between the marks
        (said("<think> no end, but No"), "no end, but No"),
        (said("<vis>", "No"), "No"),
        (said(None, "Yes", None), "Yes"),
        (said("a < b"), "a < b"),
    ],
)
def test_mme_reads_what_was_said_without_format_tokens(answer_, words):
    assert spoken(answer_) == words


def test_mme_scores_and_writes_the_evaluation_tools_layout(tmp_path):
    items = MME().read(mme_folder(tmp_path, mme_rows("color", "1.jpg") + mme_rows("OCR", "2.jpg")), Problems())
    order = [items[i] for i in (0, 2, 1, 3)]
    answers = [[said("Yes")], [said("maybe\tso")], [said("yes")], [said("No.")]]
    scores = MME().score(order, answers, Scoring(tmp_path))
    assert [(s.id, s.values["correct"], s.facts) for s in scores] == [
        ("color/1.jpg#0", 1.0, {}), ("OCR/2.jpg#0", 0.0, {"unparsed": 1.0}), ("color/1.jpg#1", 0.0, {}), ("OCR/2.jpg#1", 1.0, {}),
    ]  # fmt: skip
    out = tmp_path / "out"
    out.mkdir()
    MME().submit(order, answers, out, "m")
    assert (out / "color.txt").read_text() == (
        "color/1.jpg\tIs it a ball? Please answer yes or no.\tYes\tYes\ncolor/1.jpg\tIs it a boat? Please answer yes or no.\tNo\tyes\n"
    )
    assert (out / "OCR.txt").read_text().splitlines()[0].split("\t")[3] == "maybe so"


def test_mme_submits_the_two_questions_of_a_picture_together(tmp_path):
    rows = mme_rows("color", "1.jpg") + mme_rows("color", "2.jpg")
    items = MME().read(mme_folder(tmp_path / "in", [rows[i] for i in (0, 2, 1, 3)]), Problems())
    MME().submit(items, [[said("Yes")]] * 4, tmp_path, "m")
    names = [line.split("\t")[0] for line in (tmp_path / "color.txt").read_text().splitlines()]
    assert names == ["color/1.jpg", "color/1.jpg", "color/2.jpg", "color/2.jpg"]


def test_mme_is_greedy_and_short_unless_the_user_says_otherwise(tmp_path, tiny_model):
    tiny_model.save_pretrained(tmp_path / "model")
    data = mme_folder(tmp_path / "in", mme_rows("color", "1.jpg"))
    for more, settings in (([], (0.0, 16)), (["--temperature", "0.5", "--max-text-tokens", "3"], (0.5, 3))):
        out = tmp_path / f"out{len(more)}"
        done = CliRunner().invoke(app, ["evaluate", "mme", str(data), "--model", str(tmp_path / "model"), "--out", str(out), *more])
        assert done.exit_code == 0, done.output
        sampling = yaml.safe_load((out / "config.yaml").read_text())["sampling"]
        assert (sampling["text"]["temperature"], sampling["max_text_tokens"]) == settings


def mme_sheet(category: str, *pairs: tuple[float | None, float | None], unparsed: int = 0) -> list[Score]:
    scores = [Score(f"{category}/{n}#{k}", category, {"correct": v}) for n, pair in enumerate(pairs) for k, v in enumerate(pair)]
    return [Score(s.id, s.category, s.values, facts={"unparsed": 1.0} if i < unparsed else {}) for i, s in enumerate(scores)]


def test_mme_by_hand():
    color = mme_sheet("color", (1.0, 1.0), (1.0, 0.0), (0.0, 0.0), (1.0, 1.0), unparsed=2)
    table = MME().table(color)
    # accuracy 5 / 8 = 62.5 %, both right for 2 of 4 pictures = 50 %
    assert table["color"]["value"] == 112.5
    assert table["color"]["accuracy"] == 62.5
    assert table["color"]["unparsed"] == table["unparsed"] == 2
    assert table["MME-P"]["value"] is None  # of one subtask there is no sum
    full = [score for category in PERCEPTION + COGNITION for score in mme_sheet(category, (1.0, 1.0), (1.0, 0.0))]
    table = MME().table(full)
    # each subtask: 75 + 50 = 125
    assert (table["MME-P"]["value"], table["MME-C"]["value"]) == (1250.0, 500.0)
    low, high = table["MME-C"]["ci"]
    assert 200 <= low < 500 < high <= 800
    perfect = MME().table([score for category in PERCEPTION + COGNITION for score in mme_sheet(category, (1.0, 1.0))])
    assert (perfect["MME-P"]["value"], perfect["MME-C"]["value"]) == (2000.0, 800.0)


def test_mme_a_missing_answer_takes_its_pair_out_and_counts_as_nothing_beside():
    table = MME().table([*mme_sheet("color", (1.0, 1.0), (1.0, None)), Score("color/9#0", "color", {"correct": 1.0})])
    assert (table["color"]["value"], table["color"]["missing_as_lowest"], table["color"]["missing"]) == (200.0, 100.0, 1)
    assert table["half_pairs"] == 1
    assert MME().table(mme_sheet("color", (None, None)))["color"]["accuracy"] is None


# --- what reaches the model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["geneval", "mme"])
def test_the_whole_job_and_what_the_model_sees(name, tiny_model, tmp_path, monkeypatch):
    """GenEval's metadata name a boat three times, which the captions do not; MME's model must see its picture, and not draw."""
    data = geneval_folder(tmp_path / "in") if name == "geneval" else mme_folder(tmp_path / "in", mme_rows("color", "1.jpg"))
    benchmark = GenEval() if name == "geneval" else MME()
    seen, original = [], answers_module.sample
    monkeypatch.setattr(answers_module, "sample", lambda model, rows, *a, **k: seen.extend(rows) or original(model, rows, *a, **k))
    settings = Settings(benchmark=name, model="tiny")
    job = Job(benchmark, data, tmp_path / "out", settings, say=lambda line: None)
    result = job.run(lambda: (tiny_model, SAMPLED))
    words = [tiny_model.decode_text(row.text_ids.tolist()) for row in seen]
    pictures = [int((row.text_ids == tiny_model.image_spec.begin_id).sum()) for row in seen]
    lines = [json.loads(line) for line in (tmp_path / "out" / "answers" / "batch_000000.jsonl").read_text().splitlines()]
    drawn = [sum(block["type"] == "image" for block in line["blocks"]) for line in lines]
    if name == "geneval":
        assert result is None
        assert len(seen) == 12
        assert set(pictures) == {1}  # begun in the prompt
        assert not any("boat" in text or "three" in text for text in words)
        assert drawn == [1] * 12
    else:
        assert result is not None  # scored from the answers alone
        assert pictures == [1, 1]
        assert all("yes" not in text for text in words)
        assert drawn == [0, 0]
        assert result["counts"]["scored"] == 2
        with pytest.raises(ValueError, match="--official has no effect: mme is scored by the answers alone"):
            Job(benchmark, data, tmp_path / "out", settings, official=tmp_path / "x").run(lambda: pytest.fail("refused before"))
