"""What the benchmarks that are scored by a judge share: reading their records and asking the judge, resumably.

A judge is shown the request and the answer between marks that neither can contain, then the task; its reply must hold one JSON verdict
that carries the same mark (`rewards.judges`). The wording is ours, not that of the official scripts: `PROMPTS` names it, and every table
says so.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import PIL.Image

from diptych.config import build
from diptych.data.convert.pictures import MissingPicture
from diptych.data.problems import NONSENSE, Problems
from diptych.data.readers import Row
from diptych.document import Document, Image, Text
from diptych.evaluation.benchmark import Benchmark, Item, Score, Scoring
from diptych.pictures import image_data_address
from diptych.rewards.judges.cache import ReplyCache
from diptych.rewards.judges.client import Answer, JudgeClient, Question
from diptych.rewards.judges.options import JudgeOptions
from diptych.rewards.judges.prompts import NOTE, Message, tag_of
from diptych.rewards.judges.replies import UnusableReplyError, numbered_scores
from diptych.runs import atomic_text, read_jsonl
from diptych.runtime import run_async

logger = logging.getLogger(__name__)
PROMPTS = "diptych-1"
KEPT = "judged.jsonl"
CHUNK = 8  # times `concurrency` questions are built and held at a time: they carry pictures
NO_ANSWER = "no answer"


# --- questions -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Material:
    """A request and an answer as parts of a message, encoded once for all questions about them."""

    tag: str
    parts: tuple[Message, ...]

    @classmethod
    def of(cls, request: Document, answer: Document, address: Callable[[PIL.Image.Image], str] = image_data_address) -> Material:
        """`address` makes a data address of a picture. Raises ValueError for an image that has codes but no pixels."""
        tag = tag_of(request, answer)
        marks = f"<request {tag}> and </request {tag}>, and between <answer {tag}> and </answer {tag}>,"
        intro = f"You judge what a model answered to a request. {NOTE.format(marks=marks)}\n<request {tag}>"
        between = _text(f"</request {tag}>\n<answer {tag}>")
        parts = [_text(intro), *_parts(request, address), between, *_parts(answer, address), _text(f"</answer {tag}>")]
        return cls(tag, tuple(parts))


def ask(material: Material, task: str, count: int, lowest: int, highest: int) -> Question:
    """One question about the material; its reply holds `count` whole numbers from `lowest` to `highest`."""
    scores = ", ".join(f'"{number}": <score>' for number in range(1, count + 1))
    form = (
        "First say in a sentence or two what decided, then end with this one JSON object, each <score> replaced by a whole number from "
        f'{lowest} to {highest}:\n{{"verdict": "{material.tag}", "scores": {{{scores}}}}}'
    )
    content = [*material.parts, _text(f"End of the material.\n{task}\n{form}")]
    read = functools.partial(_whole_numbers, tag=material.tag, count=count, lowest=lowest, highest=highest)
    return Question([{"role": "user", "content": content}], read)


def _whole_numbers(reply: str, tag: str, count: int, lowest: int, highest: int) -> list[float | None]:
    values = numbered_scores(reply, tag, count, lowest, highest)
    return [value if value is not None and value.is_integer() else None for value in values]


def _parts(document: Document, address: Callable[[PIL.Image.Image], str]) -> list[Message]:
    parts = [
        {"type": "image_url", "image_url": {"url": address(block["image"])}} if block["type"] == "image" else _text(block["text"])
        for block in document.to_blocks()
        if block["type"] == "image" or block["text"].strip()
    ]
    return parts or [_text("(empty)")]


def _text(text: str) -> Message:
    return {"type": "text", "text": text}


# --- asking ----------------------------------------------------------------------------------------------------------------


class _Kept:
    """Usable replies by a hash of model, settings and messages, appended to a file the moment they arrive."""

    def __init__(self, settings: JudgeOptions, replies: dict[str, str], stream: TextIO) -> None:
        self.settings, self.replies, self.stream = settings, replies, stream

    def key(self, question: Question) -> str:
        settings = {"model": self.settings.model, "max_tokens": self.settings.max_tokens, "extra_body": self.settings.extra_body}
        settings |= {"revision": self.settings.revision} if self.settings.revision else {}
        return ReplyCache.key({**settings, "messages": question.messages})

    def find(self, key: str, question: Question) -> Answer | None:
        reply = self.replies.get(key)
        try:
            return None if reply is None else Answer(question.read(reply), reply)
        except UnusableReplyError:  # kept by a version that read more
            return None

    def recording(self, key: str, question: Question) -> Question:
        def read(reply: str) -> list[float | None]:
            values = question.read(reply)
            if None not in values and self.replies.get(key) != reply:
                self.replies[key] = reply
                self.stream.write(json.dumps({"key": key, "reply": reply}) + "\n")
                self.stream.flush()
            return values

        return Question(question.messages, read)


def judge_all(questions: Iterable[Question], options: dict[str, Any], file: Path) -> list[Answer]:
    """One answer for each question, in order. `options`: those of `JudgeOptions`.

    `file` (JSON lines) keeps every usable reply, so that nothing in it is asked again, whenever the scoring was stopped. Failures are not
    kept: the same call asks them again. While the server is gone the rest waits for it, `wait_seconds` at most; what is left then has the
    cause `breaker`. A value that is out of range, or not whole, makes the cause `out_of_range`.

    Raises ValueError for wrong options, and for a file of another kind.
    """
    if "api_key" in options:
        raise ValueError("--judge api_key: a key is read from the environment only; name its variable with api_key_env")
    settings = build(JudgeOptions, options)
    client = JudgeClient(settings)
    replies = _read_kept(file)
    rest, answers = iter(questions), list[Answer]()
    with file.open("a") as stream:
        kept = _Kept(settings, replies, stream)
        while chunk := list(islice(rest, CHUNK * settings.concurrency)):
            keys = [kept.key(question) for question in chunk]
            found = [kept.find(key, question) for key, question in zip(keys, chunk, strict=True)]
            open_ones = [place for place, answer in enumerate(found) if answer is None]
            asked = run_async(client.ask([kept.recording(keys[place], chunk[place]) for place in open_ones]))
            for place, answer in zip(open_ones, asked, strict=True):
                found[place] = _checked(answer)
            answers += [answer for answer in found if answer is not None]
    lost = [answer for answer in answers if answer.cause]
    if lost:
        causes = ", ".join(f"{cause} {count}" for cause, count in Counter(answer.cause for answer in lost).most_common())
        logger.warning(
            "judge %s: %d of %d questions failed (%s); last: %s", settings.model, len(lost), len(answers), causes, lost[-1].detail
        )
    return answers


def _read_kept(file: Path) -> dict[str, str]:
    lines = read_jsonl(file)
    if not all(isinstance(line, dict) and isinstance(line.get("key"), str) and isinstance(line.get("reply"), str) for line in lines):
        raise ValueError(f"{file} holds no replies of a judge; move it away, or score in another folder")
    atomic_text(file, "".join(json.dumps(line) + "\n" for line in lines))  # without a line that was left unfinished
    return {line["key"]: line["reply"] for line in lines}


def _checked(answer: Answer) -> Answer:
    if answer.values is None or None not in answer.values:
        return answer
    return Answer(None, answer.reply, "out_of_range", f"a score that is out of range or not whole: {answer.reply!r:.160}")


# --- benchmarks ------------------------------------------------------------------------------------------------------------


class UnusableRecord(ValueError):
    """`cause`: a few fixed words."""

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(detail)
        self.cause = cause


class JudgedBenchmark(Benchmark):
    """A benchmark whose answers are scored by a judge. `table` names the judge where the same object has scored."""

    def __init__(self) -> None:
        self._source: dict[str, Any] = {"judge": "not recorded", "prompts": "not recorded"}

    @abstractmethod
    def questions(self, item: Item, answer: Document) -> Iterator[Question]:
        """What is asked about one answer."""

    @abstractmethod
    def values(self, item: Item, answer: Document, found: Sequence[Answer]) -> dict[str, float | None]:
        """The owed values out of the answers to `questions`, in order."""

    def read_official(self, items: Sequence[Item], file: Path) -> list[Score]:
        raise ValueError(f"--official: no result file of {self.name}'s own script can be read back; score with --judge")

    def score(self, items: Sequence[Item], answers: Sequence[Sequence[Document]], scoring: Scoring) -> list[Score] | None:
        """Where an item has no answer at all, one score says so."""
        if scoring.official is not None and scoring.judge is not None:
            raise ValueError("both an official score file and a judge are given; give one of them")
        if scoring.official is not None:
            scores = self.read_official(items, scoring.official)
            self._source = {"judge": f"as in {scoring.official.name}", "prompts": "official"}
            return scores
        if scoring.judge is None:
            return None
        rows = [pair for item, given in zip(items, answers, strict=True) for pair in _pairs(item, given)]
        counts: list[int] = []

        def questions() -> Iterator[Question]:
            for item, _, answer in rows:
                asked = [] if answer is None else list(self.questions(item, answer))
                counts.append(len(asked))
                yield from asked

        found = iter(judge_all(questions(), scoring.judge, scoring.folder / KEPT))
        revision = f" at revision {scoring.judge['revision']}" if scoring.judge.get("revision") else ""
        self._source = {"judge": f"{scoring.judge['model']}{revision}", "prompts": PROMPTS}
        scores = []
        for (item, place, answer), asked in zip(rows, counts, strict=True):
            received = list(islice(found, asked))
            values = dict.fromkeys(self.owed(item)) if answer is None else self.values(item, answer, received)
            causes = [NO_ANSWER] if answer is None else [one.cause for one in received if one.cause]
            scores.append(Score(item.id, item.category, values, place, causes[0] if causes else ""))
        return scores


def _pairs(item: Item, given: Sequence[Document]) -> list[tuple[Item, int, Document | None]]:
    return [(item, place, answer) for place, answer in enumerate(given)] or [(item, 0, None)]


def read_items(rows: Iterable[Row], make: Callable[[Row], Item], problems: Problems) -> list[Item]:
    """The items of rows, without broken ones and second ones of an id, which are reported. Raises ValueError where none is left."""
    items: dict[str, Item] = {}
    for row in rows:
        try:
            item = make(row)
        except UnusableRecord as error:
            problems.report(row.where, error.cause, error)
        except MissingPicture as error:
            problems.report(row.where, "missing picture", error)
        except NONSENSE as error:
            problems.report(row.where, "broken record", f"{type(error).__name__}: {error}")
        else:
            if item.id in items:
                problems.report(row.where, "duplicate id", "the first one stays", item.id)
            items.setdefault(item.id, item)
    if not items:
        found = ", ".join(f"{cause} {count}" for cause, count in problems.by_cause().items())
        raise ValueError(
            f"no usable record was found ({found or 'the file is empty'}); give the folder as it was published, pictures unpacked"
        )
    return list(items.values())


def has_text(answer: Document) -> bool:
    return any(isinstance(segment, Text) and segment.text.strip() for segment in answer)


def has_picture(answer: Document) -> bool:
    return any(isinstance(segment, Image) for segment in answer)
