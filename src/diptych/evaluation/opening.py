"""OpenING (arXiv:2411.18499): 2,160 test requests, answers judged by seven criteria from 0 to 10 in one call.

Checked in the repository LanceZPF/OpenING (commit 56b663b): of its test file's 2,510 request parts, 1,513 have a picture and one `<image>`
at their very end, 997 have neither, so a picture follows its text; ids are unique; the layout of outputs; the seven criteria, the 512 x 512
pictures as JPEG, the files that `GPT_score_A.py` writes, and what `summarize_GPT_scores.py` makes of them: entries without a score are left
out, each criterion's mean is rounded to two decimals, and Overall is the mean of the rounded means. The repository's own score file, read
back here, gives its own table (SEED-X, Show-o, GPT-4o+DALL-E3).
The questions are in our wording: one JSON verdict in place of a function call, without justifications, and with marks around the material.
"""

from __future__ import annotations

import base64
import copy
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import PIL.Image

from diptych.data.convert.pictures import MissingPicture
from diptych.data.problems import Problems
from diptych.data.readers import Row, read_json, read_rows
from diptych.document import Document, Segment, Text
from diptych.evaluation.benchmark import Headline, Item, Score, Scoring, StoredImage, as_file_name, by_aspect
from diptych.evaluation.judging import JudgedBenchmark, Material, UnusableRecord, ask, read_items
from diptych.evaluation.official import UNUSABLE, entries_of, refuse_strangers
from diptych.evaluation.sheets import average, figures, grouped
from diptych.rewards.judges.client import Answer, Question

FILE = "test_data.jsonl"
FOLDERS = ("", "OpenING-benchmark", "OpenING-Benchmark")
MARK = "<image>"
CRITERIA = {
    "Correctness": "is what it says and shows right, sensible and asked for?",
    "Image-Text Coherency": "do pictures and texts belong together, and does each picture show what its text says?",
    "Multi-step Consistency": "do style, people and things stay the same over the pictures, and do the texts follow from each other?",
    "Content Quality": "are the pictures clear and realistic, and is the language correct?",
    "Human Preference Alignment": "is the text free of undesirable content, and do the pictures please?",
    "Completeness": "are all steps and parts there that the request calls for?",
    "Content Richness": "are the pictures varied, and is the text as detailed as is useful?",
}
TASK = (
    "Judge the answer by seven criteria:\n"
    + "\n".join(f"{number}. {name}: {question}" for number, (name, question) in enumerate(CRITERIA.items(), start=1))
    + "\nGive each a score from 0 to 10: 0-2 serious faults, 3-5 clear weaknesses, 6-8 good, 9-10 exemplary. "
    "Score number N is that of criterion N."
)


class OpenING(JudgedBenchmark):
    """A folder with `test_data.jsonl` and `images/`, or the repository above it. Categories are the names of the meta tasks.

    How many steps the reference has is not given to the model; the harnesses of several published models make use of it.
    """

    name: ClassVar[str] = "opening"
    aspects: ClassVar[tuple[str, ...]] = tuple(CRITERIA)
    scale: ClassVar[tuple[float, float]] = (0.0, 10.0)
    headlines: ClassVar[tuple[Headline, ...]] = (Headline("Overall", ("average",), by_aspect),)

    def read(self, folder: Path, problems: Problems) -> list[Item]:
        for file in (folder / name / FILE for name in FOLDERS):
            if file.is_file():
                return read_items(read_rows(file, problems), _item, problems)
        raise ValueError(f"{folder} holds no {FILE}; give OpenING-benchmark/ of the repository, with the published images/ in it")

    def submit(self, items: Sequence[Item], answers: Sequence[Sequence[Document]], folder: Path, model: str) -> None:
        """`gen_outputs/MODEL_output/UID.json` in the shape of the record, pictures beside it as `UID-o-STEP.jpg`, steps from 0."""
        place = folder / "gen_outputs" / f"{re.sub(r'[^A-Za-z0-9.+-]+', '-', model).strip('-')}_output"
        place.mkdir(parents=True)
        for item, given in zip(items, answers, strict=True):
            for answer in given[:1]:
                record = copy.deepcopy(item.record)
                record["conversations"][1]["output"] = _steps(answer, item.id, place)
                (place / f"{item.id}.json").write_text(json.dumps(record, indent=4))

    def how_to_score(self, data: Path, submission: Path) -> str:
        return (
            "Score it here with --judge base_url=http://HOST:PORT/v1 --judge model=NAME (the official judge is GPT-4o; the wording of the "
            "question is ours).\n"
            "Officially: a checkout of github.com/LanceZPF/OpenING in an environment with its requirements.txt. The script looks for the "
            f"data in ./OpenING-Benchmark (link {data} there) and has its server's address and key in the code: put in your own. Then run\n"
            f"  python GPT_score_A.py --mode output_dir --output_dir {submission / 'gen_outputs'}\n"
            "and give its Interleaved_Arena/gpt-score_results_new.json as the official file. `summarize_GPT_scores.py` reads another file "
            "and puts models without an id together: keep one model to a file."
        )

    def owed(self, item: Item) -> tuple[str, ...]:
        return self.aspects

    def questions(self, item: Item, answer: Document) -> Iterator[Question]:
        yield ask(Material.of(item.prompt, answer, _square), TASK, len(CRITERIA), 0, 10)

    def values(self, item: Item, answer: Document, found: Sequence[Answer]) -> dict[str, float | None]:
        return dict(zip(CRITERIA, found[0].values or [None] * len(CRITERIA), strict=True))

    def score(self, items: Sequence[Item], answers: Sequence[Sequence[Document]], scoring: Scoring) -> list[Score] | None:
        self._problems = scoring.problems
        return super().score(items, answers, scoring)

    def read_official(self, items: Sequence[Item], file: Path) -> list[Score]:
        """Scores of `GPT_score_A.py`'s file. Raises ValueError for one of several models, of other requests, or of another kind."""
        content = read_json(file)
        if not isinstance(content, list) or not any(isinstance(entry, dict) and "score" in entry for entry in content):
            raise ValueError(f"{file} is no score file of GPT_score_A.py: a list of entries with instance_id, model and score is needed")
        entries = entries_of(content, file, self._problems, _uid)
        models = {str((entry.get("model") or {}).get("name")) for _, entry in entries.values()}
        if len(models) > 1:
            raise ValueError(f"{file} holds scores of several models ({', '.join(sorted(models))}); leave those of the submission only")
        kept = refuse_strangers(file, entries, {item.id for item in items}, self._problems)
        scores = []
        for item in items:
            values, cause = dict[str, float | None](dict.fromkeys(CRITERIA)), "not in the file"
            if item.id in kept:
                where, entry = kept[item.id]
                try:
                    values = _official_values(entry["score"])
                    cause = "no score in the file" if None in values.values() else ""
                except ValueError as error:
                    self._problems.report(where, UNUSABLE, error, item.id)
                    cause = "unusable score in the file"
            scores.append(Score(item.id, item.category, values, cause=cause))
        return scores

    def table(self, scores: Sequence[Score]) -> dict[str, Any]:
        """Mean of each criterion over what was scored, as the official summary has it, and `average`, its Overall; of all, of each task."""
        return {
            **self._source,
            **_figures(scores),
            "tasks": {name: _figures(group) for name, group in grouped(scores, lambda score: score.category).items()},
        }


def overall(means: Mapping[str, float | None]) -> float | None:
    """The mean of the means after they were rounded to two decimals, rounded; None where one is missing."""
    found = average({name: None if value is None else round(value, 2) for name, value in means.items()})
    return None if found is None else round(found, 2)


def _figures(scores: Sequence[Score]) -> dict[str, Any]:
    return figures(scores, tuple(CRITERIA), overall, lowest=0.0, digits=2)


def _item(row: Row) -> Item:
    record = row.value
    if "output" not in record["conversations"][1]:
        raise UnusableRecord("broken record", "the second turn has no output")
    segments: list[Segment] = []
    for part in record["conversations"][0]["input"]:
        if part["text"].count(MARK) != (part["image"] is not None):
            raise UnusableRecord("marks and pictures differ", f"{part['text'].count(MARK)} {MARK} with picture {part['image']!r}")
        text = part["text"].replace("<BEGIN>", "").replace(MARK, "").strip()
        segments += [Text(text)] if text else []
        segments += [_picture(row.root, part["image"])] if part["image"] is not None else []
    if not segments:
        raise UnusableRecord("broken record", "the request is empty")
    return Item(as_file_name(str(record["total_uid"])), Document(tuple(segments)), str(record["meta_task_name"]), record)


def _picture(folder: Path, name: str) -> StoredImage:
    path = folder / name
    if not os.path.isfile(path):  # unlike Path.is_file, also where the name is too long
        raise MissingPicture(f"{str(path)[:300]} does not exist; most pictures are not in the repository but in its download")
    return StoredImage(path)


def _square(picture: PIL.Image.Image) -> str:
    buffer = io.BytesIO()
    picture.resize((512, 512)).save(buffer, format="JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _steps(answer: Document, uid: str, folder: Path) -> list[dict[str, Any]]:
    """Each picture with the texts before it is a step; texts behind the last picture are one without."""
    steps, texts = list[dict[str, Any]](), list[str]()
    for block in answer.to_blocks():
        if block["type"] == "text":
            texts.append(block["text"].strip())
        else:
            name = f"{uid}-o-{len(steps)}.jpg"
            block["image"].save(folder / name, quality=95)
            steps.append({"text": "\n".join(texts), "image": name})
            texts = []
    return [*steps, {"text": "\n".join(texts), "image": None}] if texts else steps


def _uid(entry: dict[str, Any]) -> str:
    if "score" not in entry or not isinstance(entry.get("model") or {}, dict):
        raise ValueError("an entry with instance_id, model and score is needed")
    return str(entry["instance_id"] if "instance_id" in entry else entry["data_id"])


def _official_values(score: Any) -> dict[str, float | None]:
    """All seven or none. Raises ValueError for one that is no number from 0 to 10."""
    given = score if isinstance(score, dict) else {}
    found: dict[str, Any] = {name: entry.get("Score") for name, entry in given.items() if name in CRITERIA and isinstance(entry, dict)}
    for name, value in found.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 10):
            raise ValueError(f"{name} is {value!r}; allowed are numbers from 0 to 10")
    if len(found) < len(CRITERIA) or None in found.values():
        return dict.fromkeys(CRITERIA)
    return {name: float(found[name]) for name in CRITERIA}
