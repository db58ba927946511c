"""UEval (arXiv:2601.22155): 1,000 requests in eight tasks, answers judged by yes/no criteria of their own, one call each.

Checked in the repository zlab-princeton/UEval (`ueval_eval.py`, commit 3a5b5ea, and README): fields; submission; result file; that a
criterion counts only if it is fully met ("not sure" does not); what the judge sees (criteria on text: request and text; on pictures of the
open tasks: request, text and pictures; of the closed tasks: request and pictures).

The script prints a mean text rate and a mean image rate, but no number like the leaderboard's, so how that puts the two together is not
known. Two readings are given: `overall`, met criteria of all criteria of a request; `text_and_image`, the plain mean of the two mean rates,
which fits the README's example. The leaderboard's Avg is the plain mean of its eight columns (all ten rows, to 0.1): so is `avg`.

The wording of the questions is ours, and so is that criteria on a modality which the answer lacks count as not met without being asked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from diptych.data.problems import NONSENSE, Problems
from diptych.data.readers import Row, read_json, read_rows, shards
from diptych.document import Document, Text
from diptych.evaluation.benchmark import Cells, Headline, Item, Score, Scoring, by_aspect
from diptych.evaluation.judging import JudgedBenchmark, Material, UnusableRecord, ask, has_picture, has_text, read_items
from diptych.evaluation.official import UNUSABLE, entries_of, nothing_usable
from diptych.evaluation.sheets import UNROUNDED, average, figure, figures, grouped, macro_average, units
from diptych.rewards.judges.client import Answer, Question

COLUMNS = ("id", "task", "task_type", "prompt", "text_rubrics", "image_rubrics", "text_ref")  # not the reference pictures
FORMATS = (".parquet", ".json", ".jsonl")
CLOSED = ("space", "textbook", "diagram", "paper")
MET = 2.0
ABOUT_TEXT = "Does the text of the answer meet this criterion?"
ABOUT_PICTURES = (
    "Do the pictures meet this criterion? What it asks to be shown must be drawn: words written in a picture are no substitute. Where it "
    "compares pictures with steps of the text, it is enough that each shows the main action of its step."
)
ABOUT_PICTURES_ALONE = (
    "Do the pictures meet this criterion? What it asks to be shown must be drawn: words written in a picture are no substitute, and a "
    "picture of nothing but text does not meet it."
)
CODES = "Score 2 if it is fully met, 0 if any part of it is not, 1 if there is not enough to be sure."


def _by_task(scores: Sequence[Score]) -> Cells:
    return {scores[0].category: [score.values["overall_rate"] for score in scores if "overall_rate" in score.values]}


def _of_text_and_image(scores: Sequence[Score]) -> Cells:
    return by_aspect(scores, ("text_rate", "image_rate"))


class UEval(JudgedBenchmark):
    """A folder of parquet, JSON or JSONL files (or one with them in `data/`), or one such file. Categories are the tasks.

    `values`: shares 0..1 of met criteria; a share with one criterion that could not be judged is missing as a whole.
    """

    name: ClassVar[str] = "ueval"
    aspects: ClassVar[tuple[str, ...]] = ("text_rate", "image_rate", "overall_rate")
    scale: ClassVar[tuple[float, float]] = (0.0, 1.0)
    headlines: ClassVar[tuple[Headline, ...]] = (
        Headline("Avg", ("avg",), _by_task, stratum=lambda score: score.category, factor=100),
        Headline("text and image", ("text_and_image",), _of_text_and_image, factor=100),
    )

    def read(self, folder: Path, problems: Problems) -> list[Item]:
        """`record` is as published, without the reference pictures."""
        place = folder / "data" if (folder / "data").is_dir() else folder
        rows = (row for shard in shards(place, FORMATS) for row in read_rows(shard, problems, columns=COLUMNS))
        return read_items(rows, _item, problems)

    def submit(self, items: Sequence[Item], answers: Sequence[Sequence[Document]], folder: Path, model: str) -> None:
        """`outputs.json` with `id`, `text_answer` and `image_answer`: paths of PNG files, relative to the folder."""
        (folder / "images").mkdir(parents=True)
        entries = []
        for number, (item, given) in enumerate(zip(items, answers, strict=True)):
            for answer in given[:1]:
                files = [f"images/{number:04d}_{k}.png" for k in range(len(answer.images))]
                pictures = [block["image"] for block in answer.to_blocks() if block["type"] == "image"]
                for file, picture in zip(files, pictures, strict=True):
                    picture.save(folder / file)
                entries.append({"id": item.id, "text_answer": _text(answer), "image_answer": files})
        (folder / "outputs.json").write_text(json.dumps(entries, indent=1))

    def how_to_score(self, data: Path, submission: Path) -> str:
        return (
            "Score it here with --judge base_url=http://HOST:PORT/v1 --judge model=NAME (the official judge is Gemini-2.5-Pro; the wording "
            "of the questions is ours).\n"
            "Officially: a checkout of github.com/zlab-princeton/UEval in an environment with its requirements.txt and GEMINI_API_KEY. "
            f"Picture paths are read from the working directory, so\n  cd {submission} && python UEVAL/ueval_eval.py "
            "--model_output_path outputs.json --output_path results.json\nand give results.json as the official file. The script "
            "fetches the data itself, and asks about requests that were not answered, too, as if the answer were empty."
        )

    def owed(self, item: Item) -> tuple[str, ...]:
        text, image = bool(_rubrics(item.record, "text")), bool(_rubrics(item.record, "image"))
        return tuple(aspect for aspect, applies in zip(self.aspects, (text, image, True), strict=True) if applies)

    def questions(self, item: Item, answer: Document) -> Iterator[Question]:
        text = Document((Text(_text(answer)),))
        for kind, rubrics in _asked(item, answer):
            if kind == "text":
                material, about = Material.of(item.prompt, text), ABOUT_TEXT
            elif item.category.strip().lower() in CLOSED:
                material, about = Material.of(item.prompt, Document(tuple(answer.images))), ABOUT_PICTURES_ALONE
            else:
                material, about = Material.of(item.prompt, Document((*text, *answer.images))), ABOUT_PICTURES
            yield from (ask(material, f"{about} {CODES}\nThe criterion: {rubric}", 1, 0, int(MET)) for rubric in rubrics)

    def values(self, item: Item, answer: Document, found: Sequence[Answer]) -> dict[str, float | None]:
        rest = iter(found)
        met: dict[str, list[float | None]] = {kind: [0.0] * len(_rubrics(item.record, kind)) for kind in ("text", "image")}
        for kind, rubrics in _asked(item, answer):
            met[kind] = [None if (values := next(rest).values) is None else float(values[0] == MET) for _ in rubrics]
        shares = (_share(met["text"]), _share(met["image"]), _share(met["text"] + met["image"]))
        return {aspect: share for aspect, share in zip(self.aspects, shares, strict=True) if aspect in self.owed(item)}

    def score(self, items: Sequence[Item], answers: Sequence[Sequence[Document]], scoring: Scoring) -> list[Score] | None:
        self._problems = scoring.problems
        return super().score(items, answers, scoring)

    def read_official(self, items: Sequence[Item], file: Path) -> list[Score]:
        """Scores of `ueval_eval.py`'s file, which also has requests that were not submitted: they are passed over.

        Raises ValueError for a file of another kind, and where no entry is of these requests and their criteria.
        """
        content = read_json(file)
        found = content.get("items") if isinstance(content, dict) else None
        if not isinstance(found, list):
            raise ValueError(f"{file} is no result file of ueval_eval.py: an object with `items` is needed")
        entries = entries_of(found, file, self._problems, lambda entry: str(entry["id"]))
        scores, usable = [], 0
        for item in items:
            values, cause = dict[str, float | None](dict.fromkeys(self.owed(item))), "not in the file"
            if item.id in entries:
                where, entry = entries[item.id]
                try:
                    values, cause, usable = _official_shares(item, entry), "", usable + 1
                except NONSENSE as error:
                    detail = str(error) if isinstance(error, ValueError) else f"{type(error).__name__} {error}"
                    self._problems.report(where, UNUSABLE, detail, item.id)
                    cause = "unusable entry in the file"
            scores.append(Score(item.id, item.category, values, cause=cause))
        if not usable:
            raise nothing_usable(file, self._problems)
        return scores

    def table(self, scores: Sequence[Score]) -> dict[str, Any]:
        """In per cent, of all and of each task; `avg` is the mean of the tasks' `overall`, `avg_text_and_image` of the other reading."""
        tasks = grouped(scores, lambda score: score.category)
        columns = {name: _figures(group) for name, group in tasks.items()}
        both = average({name: _text_and_image(group) for name, group in tasks.items()})
        overall = {name: units(group, "overall_rate") for name, group in tasks.items()}
        return {
            **self._source,
            "unit": "per cent",
            **_figures(scores),
            "avg": figure(overall, 0.0, macro_average, factor=100, digits=2),
            "avg_text_and_image": None if both is None else round(both, 2),
            "tasks": columns,
        }


def _text_and_image(scores: Sequence[Score]) -> float | None:
    return figures(scores, UEval.aspects[:2], average, 0.0, factor=100, digits=UNROUNDED)["average"]["value"]


def _figures(scores: Sequence[Score]) -> dict[str, Any]:
    found = figures(scores, UEval.aspects[:2], average, 0.0, factor=100, digits=2)
    overall = figure({"all": units(scores, "overall_rate")}, 0.0, factor=100, digits=2)
    shown = {"text_rate": "text", "image_rate": "image"}
    return {
        **{shown[aspect]: value for aspect, value in found["aspects"].items()},
        "overall": overall,
        "text_and_image": found["average"],
        "missing": found["missing"],
    }


def _item(row: Row) -> Item:
    record = {key: value for key, value in row.value.items() if key != "image_ref"}
    if not isinstance(record["prompt"], str) or not record["prompt"].strip():
        raise UnusableRecord("broken record", f"the prompt is {record['prompt']!r:.80}")
    if not _rubrics(record, "text") and not _rubrics(record, "image"):
        raise UnusableRecord("no criteria", "neither text_rubrics nor image_rubrics")
    task = record.get("task") or record["task_type"]
    return Item(str(record["id"]), Document((Text(record["prompt"]),)), str(task), record)


def _official_shares(item: Item, entry: dict[str, Any]) -> dict[str, float | None]:
    """Shares of met criteria. Raises ValueError, KeyError or TypeError for an entry that is not of this item's criteria."""
    (text, of_text), (image, of_image) = ((entry[f"{kind}_score"]["met"], entry[f"{kind}_score"]["total"]) for kind in ("text", "image"))
    expected = tuple(len(_rubrics(item.record, kind)) for kind in ("text", "image"))
    if (of_text, of_image) != expected:
        raise ValueError(
            f"{of_text} and {of_image} criteria were judged, the data has {expected[0]} and {expected[1]}; score the same data"
        )
    if not (0 <= text <= of_text and 0 <= image <= of_image):
        raise ValueError(f"{text} of {of_text} and {image} of {of_image} criteria are met")
    shares = zip(UEval.aspects, ((text, of_text), (image, of_image), (text + image, of_text + of_image)), strict=True)
    return {aspect: met / total for aspect, (met, total) in shares if total}


def _rubrics(record: dict[str, Any], kind: str) -> list[str]:
    """Texts, or objects with a `criterion` as in the first release."""
    return [rubric if isinstance(rubric, str) else rubric["criterion"] for rubric in record.get(f"{kind}_rubrics") or []]


def _asked(item: Item, answer: Document) -> list[tuple[str, list[str]]]:
    there = {"text": has_text(answer), "image": has_picture(answer)}
    return [(kind, rubrics) for kind in there if there[kind] and (rubrics := _rubrics(item.record, kind))]


def _share(met: Sequence[float | None]) -> float | None:
    known = [value for value in met if value is not None]
    return sum(known) / len(known) if known and len(known) == len(met) else None


def _text(answer: Document) -> str:
    return "\n\n".join(segment.text.strip() for segment in answer if isinstance(segment, Text) and segment.text.strip())
