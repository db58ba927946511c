"""A model answers the items of a benchmark, batch by batch; a batch is on disk whole or not at all.

answers/batch_000012.jsonl     one line an answer; pictures are paths relative to the file
answers/images/000012/3_0.png  the first picture of the batch's fourth answer
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image

from diptych.config import SamplingParams
from diptych.data.problems import Problems
from diptych.document import Document, Segment, Text
from diptych.evaluation.benchmark import Item, StoredImage
from diptych.models import UnifiedModel
from diptych.models.base import TooLong
from diptych.runs import atomic_folder, atomic_text
from diptych.runtime import generator
from diptych.sampling.engine import context_needed, fit_to_context, sample
from diptych.tokens import TokenRow

STREAM = 33  # of the random numbers of an answer: generator(seed, STREAM, item, number of the answer)


@dataclasses.dataclass(frozen=True)
class Task:
    """One answer that is owed: to item `index` of the benchmark (as read, whatever is selected of it), the `number`-th."""

    index: int
    number: int
    item: Item


@dataclasses.dataclass(frozen=True)
class Answer:
    """`document` is None where the item could not be asked: `cause` and `detail` say why.

    `truncated`: a text reached `max_text_tokens`. `max_images`: how many pictures were allowed; `lowered`: fewer than asked for,
    because more do not fit the context.
    """

    task: Task
    document: Document | None
    truncated: bool = False
    max_images: int = 0
    lowered: bool = False
    cause: str = ""
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Template:
    """Text directly before and behind each prompt."""

    prefix: str = ""
    suffix: str = ""

    def around(self, prompt: Document) -> Document:
        segments: list[Segment] = list(prompt)
        for place, text in ((0, self.prefix), (-1, self.suffix)):
            if not text:
                continue
            edge = segments[place] if segments else None
            if isinstance(edge, Text):
                segments[place] = Text(text + edge.text if place == 0 else edge.text + text)
            else:
                segments.insert(0 if place == 0 else len(segments), Text(text))
        return Document(tuple(segments))


def plan(items: Sequence[tuple[int, Item]], batch_size: int) -> list[list[Task]]:
    """Batches of tasks, fixed by the order of the items and by `batch_size`; all items of one have the same `max_images`."""
    kinds: dict[int | None, list[Task]] = defaultdict(list)
    for index, item in items:
        kinds[item.max_images] += [Task(index, number, item) for number in range(item.num_answers)]
    return [tasks[begin : begin + batch_size] for tasks in kinds.values() for begin in range(0, len(tasks), batch_size)]


def answer(model: UnifiedModel, batch: Sequence[Task], params: SamplingParams, seed: int, template: Template) -> list[Answer]:
    """One answer for each task, in order. An item that cannot be asked is said to be so and stops nobody."""
    asked = batch[0].item.max_images
    params = params if asked is None else params.model_copy(update={"max_images": asked})
    rows: dict[int, TokenRow] = {}  # by item: several answers to one share their prompt
    refused: dict[int, tuple[str, str]] = {}
    groups: dict[int, list[int]] = defaultdict(list)  # max_images that fits -> places in the batch
    for place, task in enumerate(batch):
        if task.index not in rows and task.index not in refused:
            try:
                rows[task.index] = _encode(model, task.item.prompt, params, template)
            except _Refused as error:
                refused[task.index] = error.args
        if task.index in rows:
            groups[fit_to_context(model, rows[task.index], params).max_images].append(place)
    answers = {
        place: Answer(task, None, cause=refused[task.index][0], detail=refused[task.index][1])
        for place, task in enumerate(batch)
        if task.index in refused
    }
    for max_images, places in groups.items():
        tasks = [batch[place] for place in places]
        rollouts = sample(
            model, [rows[task.index] for task in tasks], params.model_copy(update={"max_images": max_images}),
            generator=[generator(seed, STREAM, task.index, task.number) for task in tasks],
        )  # fmt: skip
        for place, task, rollout in zip(places, tasks, rollouts, strict=True):
            answers[place] = Answer(task, rollout.document, rollout.truncated, max_images, max_images < params.max_images)
    return [answers[place] for place in range(len(batch))]


class _Refused(Exception):
    """Why a prompt cannot be asked: cause, detail."""


def _encode(model: UnifiedModel, prompt: Document, params: SamplingParams, template: Template) -> TokenRow:
    try:
        for image in prompt.images:
            _ = image.pixels
    except ValueError as error:
        raise _Refused("unreadable picture", str(error)) from error
    try:
        row = model.encode_prompt(template.around(prompt), params.form)
    except TooLong as error:
        raise _Refused("prompt too long", str(error)) from error
    except ValueError as error:
        raise _Refused("prompt not encodable", str(error)) from error
    needed = context_needed(model, params.model_copy(update={"max_images": 0}), row)
    if len(row) + needed > model.max_positions:
        sizes = f"a prompt of {len(row)} positions and an answer of {needed}"
        raise _Refused("prompt too long", f"{sizes} exceed the model's context of {model.max_positions}")
    return row


# --- files ---------------------------------------------------------------------------------------------------------------


def write_batch(
    folder: Path, number: int, answers: Sequence[Answer], template: Template, side: int | None, largest: int | None = None
) -> None:
    """Pictures first, then the lines that name them; pictures are saved `side` pixels a side, or as they are with sides of at most
    `largest`."""
    name = f"{number:06d}"
    for leftover in (*folder.glob(f".tmp-*batch_{name}*"), *folder.glob(f"images/.tmp-*{name}-*")):  # of a killed process
        discard(leftover)
    pictures: dict[str, PIL.Image.Image] = {}
    lines = [_line(found, f"{name}/{place}", template, pictures) for place, found in enumerate(answers)]
    if pictures:
        with atomic_folder(folder / "images" / name) as target:
            for path, pixels in pictures.items():
                size = (side, side) if side is not None else _within(pixels.size, largest)
                drawn = pixels if pixels.size == size else pixels.resize(size, PIL.Image.Resampling.LANCZOS)
                drawn.save(target / Path(path).name)
    atomic_text(folder / f"batch_{name}.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _within(size: tuple[int, int], largest: int | None) -> tuple[int, int]:
    """A picture's size with both sides at most `largest`, in its proportions."""
    scale = 1.0 if largest is None else min(1.0, largest / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def discard(path: Path) -> None:
    """Removes a file or a folder."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _line(found: Answer, stem: str, template: Template, pictures: dict[str, PIL.Image.Image]) -> dict[str, Any]:
    task = found.task
    prompt = [s.text if isinstance(s, Text) else "(picture)" for s in template.around(task.item.prompt)]
    line: dict[str, Any] = {
        "id": task.item.id, "answer": task.number, "prompt": [{"type": "text", "text": text} for text in prompt], "blocks": [],
    }  # fmt: skip
    if found.document is None:
        return {**line, "unanswered": found.cause, "detail": found.detail}
    for block in found.document.to_blocks():
        if block["type"] == "image":
            path = f"images/{stem}_{sum(b['type'] == 'image' for b in line['blocks'])}.png"
            pictures[path] = block["image"]
            block = {"type": "image", "image": path}
        line["blocks"].append(block)
    return {**line, "truncated": found.truncated, "max_images": found.max_images, "lowered": found.lowered}


def read_batch(folder: Path, number: int, batch: Sequence[Task]) -> list[Answer] | None:
    """The answers of a batch; None where it is not there. Pictures are opened when they are used.

    Raises ValueError for a file that does not hold this batch.
    """
    path = folder / f"batch_{number:06d}.jsonl"
    if not path.is_file():
        return None
    try:
        lines = [json.loads(line) for line in path.read_bytes().splitlines()]
        found = [(line["id"], line["answer"]) for line in lines]
        if found != [(task.item.id, task.number) for task in batch]:
            raise ValueError("it holds other answers")
        return [_answer(folder, task, line) for task, line in zip(batch, lines, strict=True)]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, and the same command makes it again") from error


def _answer(folder: Path, task: Task, line: dict[str, Any]) -> Answer:
    if "unanswered" in line:
        return Answer(task, None, cause=line["unanswered"], detail=line["detail"])
    segments = [Text(b["text"]) if b["type"] == "text" else StoredImage(folder / b["image"]) for b in line["blocks"]]
    return Answer(task, Document(tuple(segments)), line["truncated"], line["max_images"], line["lowered"])


def report_unanswered(answers: Sequence[Answer], problems: Problems) -> None:
    """One problem for each item that could not be asked."""
    for found in answers:
        if found.document is None and found.task.number == 0:
            problems.report(f"item {found.task.index}", found.cause, found.detail, found.task.item.id)
