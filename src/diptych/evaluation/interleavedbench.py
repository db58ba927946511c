"""InterleavedBench (arXiv:2406.14643): 815 requests, answers judged in five aspects from 0 to 5, one call each.

Checked in public sources: the layout and how a prompt is put together (facebookresearch/MMRB2, `sources/interleavedeval.py`); that the text
aspects do not count for image editing and subject-driven generation (card of the hub repository mqliu/InterleavedBench); that the
published AVG is the plain mean of the five means. The official judge script could not be read: wording and scale of the questions, the keys
of the prediction file, the rule for a missing modality, and which task names are meant by those two tasks are ours.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from diptych.data.convert.pictures import MissingPicture
from diptych.data.problems import Problems
from diptych.data.readers import Row, read_rows
from diptych.document import Document, Segment, Text
from diptych.evaluation.benchmark import Headline, Item, Score, StoredImage, by_aspect
from diptych.evaluation.judging import JudgedBenchmark, Material, UnusableRecord, ask, has_picture, has_text, read_items
from diptych.evaluation.sheets import average, figures, grouped
from diptych.rewards.judges.client import Answer, Question

FILE, PICTURES = "interleaved_bench.json", "zipped_images"
MARK = "<image>"
WITHOUT_TEXT_ASPECTS = re.compile(r"edit|subject", re.I)  # task names: image editing, subject-driven generation
UNMARKED, ALL_TEXT = "pictures without a mark", "no task without text aspects"
TEXT_ASPECTS = ("text_quality", "text_image_coherence")
ASPECTS = {
    "text_quality": "the text of the answer: is it clear, fluent, coherent and free of repetitions? Leave the pictures aside.",
    "perceptual_quality": "the pictures of the answer: does each look natural and well made, without artefacts or distortions? "
    "Leave aside what they should show.",
    "image_coherence": "how the pictures of the answer fit each other and those of the request: do style, people and things stay the same "
    "where they should?",
    "text_image_coherence": "how each picture of the answer fits the text around it: does it show what the text says, and does the text "
    "describe what is seen?",
    "helpfulness": "how helpful the answer is as a whole: does it do what the request asks, completely, and is it of use to who asked?",
}
SCALE = "Score from 0 to 5: 0 nothing of it is there, 1 very bad, 2 bad, 3 fair, 4 good, 5 excellent."


class InterleavedBench(JudgedBenchmark):
    """A folder with `interleaved_bench.json` and the unpacked `zipped_images/`. Categories: `context-based/TASK`, `context-free/TASK`.

    A modality that an answer lacks scores 0 in the aspects about it, and an empty answer 0 in all, without being asked.
    """

    name: ClassVar[str] = "interleavedbench"
    aspects: ClassVar[tuple[str, ...]] = tuple(ASPECTS)
    scale: ClassVar[tuple[float, float]] = (0.0, 5.0)
    scored_by: ClassVar[tuple[str, ...]] = ("judge",)
    notes: ClassVar[tuple[str, ...]] = (UNMARKED, ALL_TEXT)
    headlines: ClassVar[tuple[Headline, ...]] = (Headline("AVG", ("average",), by_aspect),)

    def read(self, folder: Path, problems: Problems) -> list[Item]:
        file = folder / FILE
        if not file.is_file():
            raise ValueError(
                f"{folder} holds no {FILE}; give the hub repository mqliu/InterleavedBench as it is, {PICTURES}/*.zip unpacked"
            )
        items = read_items(read_rows(file, problems), lambda row: _item(row, problems), problems)
        tasks = sorted({_task(item.category) for item in items})
        if not any(WITHOUT_TEXT_ASPECTS.search(task) for task in tasks):
            some = ", ".join(tasks[:12]) + (", ..." if len(tasks) > 12 else "")
            detail = f"image editing and subject-driven generation owe two aspects less; no name of {some} holds 'edit' or 'subject'"
            problems.report(str(file), ALL_TEXT, f"{detail}, so all tasks owe all five")
        return items

    def submit(self, items: Sequence[Item], answers: Sequence[Sequence[Document]], folder: Path, model: str) -> None:
        """`predictions.json`: each record with `model` and `output` added (`text` with <image> marks, and `image`, files beside it)."""
        (folder / "images").mkdir(parents=True)
        records = []
        for number, (item, given) in enumerate(zip(items, answers, strict=True)):
            for answer in given[:1]:
                texts, files = [], list[str]()
                for block in answer.to_blocks():
                    if block["type"] == "image":
                        files.append(f"images/{number:04d}_{len(files)}.png")
                        block["image"].save(folder / files[-1])
                    texts.append(MARK if block["type"] == "image" else block["text"].replace(MARK, ""))
                records.append({**item.record, "model": model, "output": {"text": "\n".join(texts), "image": files}})
        (folder / "predictions.json").write_text(json.dumps(records, indent=1))

    def how_to_score(self, data: Path, submission: Path) -> str:
        return (
            "Score it here with --judge base_url=http://HOST:PORT/v1 --judge model=NAME (the official judge is GPT-4o; the wording of the "
            "questions is ours).\n"
            "Officially: `src/interleavedeval_gpt4o.py` of the hub repository mqliu/InterleavedBench, in an environment with `openai` and "
            f"a key, on {submission / 'predictions.json'}. Its input keys could not be checked: `output.text` and `output.image` are ours. "
            "Leave out the zeros that it writes for the text aspects of image editing and subject-driven generation. Its results cannot be "
            "read back."
        )

    def owed(self, item: Item) -> tuple[str, ...]:
        skipped = TEXT_ASPECTS if WITHOUT_TEXT_ASPECTS.search(_task(item.category)) else ()
        return tuple(aspect for aspect in ASPECTS if aspect not in skipped)

    def questions(self, item: Item, answer: Document) -> Iterator[Question]:
        asked = [aspect for aspect in self.owed(item) if not _lacking(aspect, answer)]
        if asked:
            material = Material.of(item.prompt, answer)
            yield from (ask(material, f"Judge one thing only, {ASPECTS[aspect]} {SCALE}", 1, 0, 5) for aspect in asked)

    def values(self, item: Item, answer: Document, found: Sequence[Answer]) -> dict[str, float | None]:
        rest = iter(found)
        return {aspect: 0.0 if _lacking(aspect, answer) else (next(rest).values or [None])[0] for aspect in self.owed(item)}

    def table(self, scores: Sequence[Score]) -> dict[str, Any]:
        """Mean of each aspect over what was scored, and `average`, the published AVG; of all, of each subset and of each task."""
        return {
            **self._source,
            **_figures(scores),
            "subsets": {name: _figures(group) for name, group in grouped(scores, lambda s: s.category.split("/", 1)[0]).items()},
            "tasks": {name: _figures(group) for name, group in grouped(scores, lambda s: _task(s.category)).items()},
        }


def _figures(scores: Sequence[Score]) -> dict[str, Any]:
    return figures(scores, tuple(ASPECTS), average, lowest=0.0)


def _lacking(aspect: str, answer: Document) -> bool:
    text, picture = has_text(answer), has_picture(answer)
    if aspect == "text_quality":
        return not text
    if aspect in ("perceptual_quality", "image_coherence"):
        return not picture
    if aspect == "text_image_coherence":
        return not (text and picture)
    return not (text or picture)


def _task(category: str) -> str:
    return category.split("/", 1)[1]


def _item(row: Row, problems: Problems) -> Item:
    record = row.value
    first = record["conversations"][0]
    if first["from"] != "human":
        raise UnusableRecord("broken record", f"the first turn is from {first['from']!r}, not from 'human'")
    parts = first["value"].replace("<BEGIN>", "").split(MARK)
    pictures, needed = record["image"], len(parts) - 1
    if needed > len(pictures):
        raise UnusableRecord("more marks than pictures", f"{needed} {MARK} in the request, {len(pictures)} pictures")
    segments: list[Segment] = []
    for place, part in enumerate(parts):  # the picture at place k belongs to mark k; those behind the last mark are the reference
        text = part.strip().removeprefix(".").strip()
        segments += [Text(text)] if text else []
        segments += [_picture(row.root, pictures[place])] if place < needed else []
    if not segments:
        raise UnusableRecord("broken record", "the request is empty")
    theirs = sum(str(turn.get("value", "")).count(MARK) for turn in record["conversations"][1:])
    if len(pictures) > needed + theirs:  # never shown: they may be the reference's
        mismatch = f"{len(pictures)} pictures, {needed} {MARK} in the request and {theirs} behind it; only the first {needed} are shown"
        problems.report(row.where, UNMARKED, mismatch, str(record["id"]))
    subset = "context-based" if needed else "context-free"
    return Item(str(record["id"]), Document(tuple(segments)), f"{subset}/{record['task_name']}", record)


def _picture(folder: Path, name: str) -> StoredImage:
    for path in (folder / PICTURES / name, folder / name):
        if os.path.isfile(path):  # unlike Path.is_file, also where the name is too long
            return StoredImage(path)
    raise MissingPicture(f"{name[:300]} is neither in {folder / PICTURES} nor in {folder}; unpack the zip files there")
