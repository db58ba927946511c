"""MMIE: 20,103 questions with pictures in three categories, answered with text and pictures, scored 0 to 6 by a model of its own.

Source: arXiv:2410.10139; the scorer is github.com/Lillianwei-h/MMIE at commit eb0fd6e. What it does and what follows for us:

- A category is found by a substring of the id, `SA`, `PBL`, `MSR` in this order. An id with none of them makes it stop, so such records are
  answered but not submitted.
- It shows its judge pictures until question and answer have three, and nothing behind: `judge_view`. Records whose question has more than
  four are dropped without a word.
- Replies without a score from 0 to 6 behind `### Score` are left out of the means without a word. Here they are counted, and each mean
  has a second one beside it with 0 in their place.
- Its judge reads 4,096 tokens, of which a square picture of up to 512 pixels a side takes 256 and a larger one up to 3,328.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from diptych.data.problems import NONSENSE, Problems
from diptych.data.readers import read_json
from diptych.document import Document, Image, Segment, Text
from diptych.evaluation.benchmark import Benchmark, Cells, Headline, Item, Score, Scoring, StoredImage
from diptych.evaluation.official import entries_of, refuse_strangers
from diptych.evaluation.sheets import figure, micro_average, units

CATEGORIES = ("SA", "PBL", "MSR")
OTHER = "other"
FILES = ("data.json", "overview.json")
COMMIT = "eb0fd6ecf14576760b5c3deb95c47579cf0cc36e"
SEEN_PICTURES, MOST_PICTURES = 3, 4
UNKNOWN = "unknown category"
DROPPED = "dropped by the scorer: more than 4 pictures"
Part = dict[str, str | None]  # {"text": ..., "image": path}: a text, then a picture


class View(NamedTuple):
    """What of an answer reaches the judge: the text as the scorer writes it, and how many texts and pictures that is."""

    text: str
    texts: int
    pictures: int


def _scores_of_all(scores: Sequence[Score]) -> Cells:
    return {"all": [score.values["score"] for score in scores if score.category != OTHER]}


class MMIE(Benchmark):
    name = "mmie"
    aspects = ("score",)
    scale = (0.0, 6.0)
    scored_by = ("official",)
    max_side = 512
    notes = (UNKNOWN,)
    headlines = (Headline("AVG", ("AVG",), _scores_of_all, stratum=lambda score: score.category, factor=100 / 6),)

    def read(self, folder: Path, problems: Problems) -> list[Item]:
        file = next((folder / name for name in FILES if (folder / name).is_file()), None)
        if file is None:
            raise ValueError(f"{folder} has no data.json; give the folder of MMIE/MMIE's files with images.tar.gz unpacked in it")
        records = read_json(file)
        if not isinstance(records, list):
            raise ValueError(f"{file} is no list of records but a {type(records).__name__}; give MMIE's file as it was published")
        items: dict[str, Item] = {}
        for index, record in enumerate(records):
            where, id = f"{file.name}[{index}]", record.get("id") if isinstance(record, dict) else None
            try:
                if not isinstance(id, str) or not id:
                    raise ValueError(f"id is {id!r}; a string is needed")
                question, reference = _parts_of(record)
            except NONSENSE as error:
                problems.report(where, "broken record", f"{type(error).__name__}: {error}", str(id or ""))
                continue
            missing = [part["image"] for part in question if part["image"] and not _inside(folder, part["image"])]
            if id in items:
                problems.report(where, "duplicate id", "the first record of this id is kept", id)
            elif missing:
                problems.report(where, "missing picture", f"{missing[0]} is no file in the folder", id)
            else:
                if category_of(id) == OTHER:
                    problems.report(where, UNKNOWN, "the id holds none of SA, PBL, MSR: answered, but not submitted", id)
                kept = {"question": question, "gt_answer": reference}
                items[id] = Item(id, _prompt(question, folder), category_of(id), kept)
        return list(items.values())

    def submit(self, items: Sequence[Item], answers: Sequence[Sequence[Document]], folder: Path, model: str) -> None:
        prefix = _free_prefix(items)
        lines = []
        for number, (item, (answer,)) in enumerate(zip(items, answers, strict=True)):
            if item.category == OTHER:
                continue
            parts, pictures = parts_of_answer(answer, f"images/{prefix}{number:06d}")
            paths = [part["image"] for part in item.record["question"] if part["image"]]
            for name, picture in [*zip(paths, item.prompt.images, strict=True), *pictures.items()]:
                if not (folder / name).exists():
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    _save(picture, folder / name, link=name in pictures)
            lines.append(
                {
                    "id": item.id, "question": item.record["question"], "answer": parts, "model": model,
                    "gt_answer": item.record["gt_answer"],
                }
            )  # fmt: skip
        (folder / "data.json").write_text(json.dumps(lines, indent=1) + "\n")

    def how_to_score(self, data: Path, submission: Path) -> str:
        where = shlex.quote(str(submission.resolve()))
        return (
            "MMIE is scored by its own model (MMIE/MMIE-Score on the hub, gated, approved at once), with older versions than a trainer's, "
            "so in an environment of its own and on a GPU:\n"
            f"  git clone https://github.com/Lillianwei-h/MMIE && cd MMIE && git checkout {COMMIT[:7]}\n"
            "  conda create -n MMIE python=3.11 && conda activate MMIE && pip install -r requirements.txt && pip install flash_attn\n"
            f"  python main.py --input_dir {where} --input_name data.json --output_dir eval_outputs --output_name eval_result.json\n"
            "(its README calls the two names --input_file and --output_file: those do not exist). Note which revision of the weights you "
            "took. Then run the same `diptych evaluate mmie` command with --official eval_outputs/eval_result.json."
        )

    def score(self, items: Sequence[Item], answers: Sequence[Sequence[Document]], scoring: Scoring) -> list[Score] | None:
        if scoring.official is None:
            return None
        official = _read_official(scoring.official, {item.id for item in items}, scoring.problems)
        scores = []
        for item, (answer,) in zip(items, answers, strict=True):
            parts, pictures = parts_of_answer(answer, "")
            shown = sum(part["image"] is not None for part in item.record["question"])
            view = judge_view(shown, parts)
            facts: dict[str, float] = {"texts": sum(part["text"] is not None for part in parts), "pictures": len(pictures)}
            facts |= {"texts_seen": view.texts, "pictures_seen": view.pictures}
            value, cause = _verdict(item, shown, view, official.get(item.id))
            scores.append(Score(item.id, item.category, {"score": value}, cause=cause, facts=facts))
        if official and all(score.cause == "another answer was judged" for score in scores if score.id in official):
            raise ValueError(f"{scoring.official} judges other answers than those in this folder; give the result of this submission")
        return scores

    def table(self, scores: Sequence[Score]) -> dict[str, Any]:
        """Means in per cent of 6. `AVG` is over all answers of the three categories, as the scorer prints it."""
        ours = [score for score in scores if score.category != OTHER]
        groups = {c: units(ours, "score", c) for c in CATEGORIES if any(score.category == c for score in ours)}
        columns = {**{name: {name: group} for name, group in groups.items()}, "AVG": groups}
        found: dict[str, Any] = {
            name: figure(column, 0.0, micro_average, needs_all=False, factor=100 / self.scale[1], digits=2)
            for name, column in columns.items()
        }
        causes = Counter(score.cause for score in ours if score.values["score"] is None)
        judged = sum(found[name]["scored"] for name in groups)
        unparsed = causes["no score in the reply"] + causes["score out of range"]
        found["parse_rate"] = round(judged / (judged + unparsed), 4) if judged + unparsed else None
        found["dropped"] = causes[DROPPED]
        found["other_categories"] = len(scores) - len(ours)
        seen = [score.facts for score in ours if score.facts]
        found["judge_sees"] = {
            "answers": len(seen),
            "answers_cut": sum(f["texts_seen"] < f["texts"] or f["pictures_seen"] < f["pictures"] for f in seen),
            **{f"{name}_per_answer": _mean([f[name] for f in seen]) for name in ("texts", "texts_seen", "pictures", "pictures_seen")},
        }
        return found


# --- reading -------------------------------------------------------------------------------------------------------------


def category_of(id: str) -> str:
    return next((category for category in CATEGORIES if category in id), OTHER)


def _parts_of(record: dict[str, Any]) -> tuple[list[Part], list[Part]]:
    """Question and reference, from the scorer's layout or from the hub's, whose turns are `from: human` and `from: gpt`."""
    if "conversations" in record and "question" not in record:
        turns = record["conversations"]
        if [turn["from"] for turn in turns] != ["human", "gpt"]:
            raise ValueError(f"turns are from {[turn['from'] for turn in turns]}; ['human', 'gpt'] is needed")
        question, reference = (_parts(turn["content"]) for turn in turns)
    else:
        question, reference = _parts(record["question"]), _parts(record.get("gt_answer") or [])
    if not any(part["text"] or part["image"] for part in question):
        raise ValueError("the question is empty")
    if category_of(record["id"]) == "MSR" and not any(part["text"] for part in reference[:1]):
        raise ValueError("gt_answer[0].text is missing, which the scorer needs for MSR")
    return question, reference or [{"text": None, "image": None}]


def _parts(value: Any) -> list[Part]:
    if isinstance(value, str):
        value = [{"text": value}]
    parts: list[Part] = []
    for part in value:
        text, image = part.get("text"), part.get("image")
        for name, given in (("text", text), ("image", image)):
            if given is not None and not isinstance(given, str):
                raise ValueError(f"{name} is a {type(given).__name__}; a string or null is needed")
        parts.append({"text": text or None, "image": str(PurePosixPath(image)) if image else None})
    return parts


def _inside(folder: Path, path: str) -> bool:
    """Whether it is a file below the folder, so that the same path resolves in a submission."""
    place = PurePosixPath(path)
    return not place.is_absolute() and ".." not in place.parts and (folder / path).is_file()


def _prompt(question: Sequence[Part], folder: Path) -> Document:
    """Each text, then its picture; texts that follow one another are lines of one."""
    segments: list[Segment] = []
    for part in question:
        if part["text"]:
            before = segments.pop() if segments and isinstance(segments[-1], Text) else None
            segments.append(Text(f"{before.text}\n{part['text']}" if isinstance(before, Text) else part["text"]))
        if part["image"]:
            segments.append(StoredImage(folder / part["image"]))
    return Document(tuple(segments))


# --- submitting ----------------------------------------------------------------------------------------------------------


def parts_of_answer(answer: Document, stem: str) -> tuple[list[Part], dict[str, Image]]:
    """The answer in the scorer's layout, each text with the picture behind it; and its pictures by the path they are named by."""
    parts: list[Part] = []
    pictures: dict[str, Image] = {}
    for segment in answer:
        if isinstance(segment, Text):
            parts.append({"text": segment.text, "image": None})
            continue
        path = f"{stem}_{len(pictures)}.png"
        pictures[path] = segment
        if parts and parts[-1]["image"] is None:
            parts[-1]["image"] = path
        else:
            parts.append({"text": None, "image": path})
    return parts, pictures


def _free_prefix(items: Sequence[Item]) -> str:
    """Of the names of answers' pictures, so that none is a question's."""
    taken = {Path(part["image"]).name for item in items for part in item.record["question"] if part["image"]}
    prefix = "answer_"
    while any(name.startswith(prefix) for name in taken):
        prefix += "_"
    return prefix


def _save(picture: Image, path: Path, link: bool) -> None:
    """`link`: it is a file of ours already, so it need not stand on the disk twice."""
    if isinstance(picture, StoredImage) and isinstance(picture.source, Path):
        if link:
            with contextlib.suppress(OSError):
                return os.link(picture.source, path)
        shutil.copyfile(picture.source, path)
    else:
        assert picture.pixels is not None
        picture.pixels.save(path)


# --- scoring -------------------------------------------------------------------------------------------------------------


def judge_view(question_pictures: int, parts: Sequence[Part]) -> View:
    """What the scorer shows its judge of an answer, pictures counted on from the question's."""
    lines: list[str] = []
    texts, shown = 0, question_pictures
    for part in parts:
        if part["text"] is not None:
            lines.append(part["text"])
            texts += 1
        if part["image"] is not None and shown < SEEN_PICTURES:
            lines.append(f"Image-{shown}: <image>")
            shown += 1
        if shown >= SEEN_PICTURES:
            break
    return View("".join(line + "\n" for line in lines), texts, shown - question_pictures)


def find_score(feedback: Any) -> tuple[float | None, str]:
    """The score of a judge's reply and why there is none: the first number behind `### Score`, rounded with ties to even."""
    match = re.search(r"### Score.*?(-?\d+(?:\.\d+)?)", feedback, re.DOTALL) if isinstance(feedback, str) else None
    if match is None:
        return None, "no score in the reply"
    value = round(float(match[1]))
    return (float(value), "") if 0 <= value <= 6 else (None, "score out of range")


def _verdict(item: Item, shown: int, view: View, line: dict[str, Any] | None) -> tuple[float | None, str]:
    if item.category == OTHER:
        return None, "unknown category: not submitted"
    if line is None:
        return None, DROPPED if shown > MOST_PICTURES else "not in the official file"
    if isinstance(line.get("answer"), str) and line["answer"] != view.text:
        return None, "another answer was judged"
    return find_score(line.get("gpt_feedback"))


def _read_official(path: Path, known: set[str], problems: Problems) -> dict[str, dict[str, Any]]:
    """Lines by id. Raises ValueError for a file of another kind, and where no line is of this submission."""
    lines = read_json(path)
    if not isinstance(lines, list):
        raise ValueError(f"{path} is no list of records with an id; give the scorer's eval_result.json")
    found = {id: line for id, (_, line) in refuse_strangers(path, entries_of(lines, path, problems, _id), known, problems).items()}
    if not any("gpt_feedback" in line for line in found.values()):
        raise ValueError(f"{path} holds no gpt_feedback; give the scorer's result, not its input")
    return found


def _id(line: dict[str, Any]) -> str:
    if not isinstance(line["id"], str):
        raise ValueError(f"id is {line['id']!r}; a string is needed")
    return line["id"]


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 3) if values else None
