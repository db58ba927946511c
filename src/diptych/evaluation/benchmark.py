"""What a benchmark is: items that a model answers, what is submitted, and a score sheet.

Three steps, each in files of its own, so that a job which is killed resumes where it stopped:

1. `Benchmark.read` makes items of the published layout; `answers.generate` has a model answer them.
2. `Benchmark.submit` writes what the official scorer reads.
3. `Benchmark.score` makes a sheet: from the answers alone, from an official scorer's file, or from a judge.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import PIL.Image

from diptych.data.convert.pictures import load
from diptych.data.problems import Problems
from diptych.document import Document, Image
from diptych.forms import AnswerForm


def as_file_name(name: str) -> str:
    """A name out of published data that will be one of a file. Raises ValueError for one that leads elsewhere, or is none."""
    if not name or len(name.encode(errors="backslashreplace")) > 200 or name in (".", "..") or set(name) & set("/\\\0"):
        raise ValueError(f"{name[:60]!r} cannot be the name of a file")
    return name


class StoredImage(Image):
    """A picture that is opened whenever its pixels are asked for: a benchmark holds more pictures than memory does.

    `source`: a file, or the bytes of one. `pixels` raises ValueError where it does not open.
    """

    source: Path | bytes

    def __init__(self, source: Path | bytes) -> None:
        object.__setattr__(self, "source", source)
        object.__setattr__(self, "codes", None)

    @property
    def pixels(self) -> PIL.Image.Image:
        return load(self.source)[0]


@dataclasses.dataclass(frozen=True)
class Item:
    """One question. `prompt` is all that a model sees of it; references stay in `record`.

    `record`: as published. `max_images`: the most pictures of a free answer; None: as the job says. `num_answers`: how many are asked for.
    """

    id: str
    prompt: Document
    category: str
    record: dict[str, Any]
    max_images: int | None = None
    num_answers: int = 1


@dataclasses.dataclass(frozen=True)
class Score:
    """One line of a score sheet: what one answer got in every aspect that applies to it.

    `values`: aspect -> raw score, None where it is owed and missing; aspects that do not apply are left out.
    `cause`: a few fixed words why values are missing, that can be counted.
    `facts`: what else was counted of the answer, such as how many of its pictures the judge sees; in no mean of an aspect.
    """

    id: str
    category: str
    values: dict[str, float | None]
    answer: int = 0
    cause: str = ""
    facts: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How a job is scored. Each is None where it was not asked for.

    `official`: the file that the official scorer wrote. `judge`: options of a server (`rewards.judges.JudgeOptions`).
    `folder`: where unfinished judging may keep what it has. `problems`: where unusable entries of the official file are reported.
    """

    folder: Path
    official: Path | None = None
    judge: dict[str, Any] | None = None
    problems: Problems = dataclasses.field(default_factory=Problems)


Cells = Mapping[str, Sequence[float | None]]


@dataclasses.dataclass(frozen=True)
class Headline:
    """A figure that sums a benchmark up, and what it is made of, so that it can be drawn anew from other items.

    It is the mean (or, with `total`, the sum) of the means of *cells*, times `factor`. `cells`: the values, None where missing, that
    the scores of one unit add to each cell. `unit`: what is drawn, such as an item. `stratum`: within what, such as its category.
    `path`: where the same figure stands in `Benchmark.table`.
    """

    name: str
    path: tuple[str, ...]
    cells: Callable[[Sequence[Score]], Cells]
    unit: Callable[[Score], str] = lambda score: score.id
    stratum: Callable[[Score], str] = lambda score: ""
    total: bool = False
    factor: float = 1.0
    decimals: int = 2


def by_aspect(scores: Sequence[Score], aspects: Sequence[str] | None = None) -> Cells:
    """The values of each aspect, or of some, in a cell of its own."""
    found: dict[str, list[float | None]] = {}
    for score in scores:
        for aspect, value in score.values.items():
            if aspects is None or aspect in aspects:
                found.setdefault(aspect, []).append(value)
    return found


class Benchmark(ABC):
    """`aspects`: the columns of the score sheet. `scale`: (lowest, highest) raw value, for reports.

    `defaults`: settings of a job that are part of the benchmark's protocol, where the user says nothing.
    `form`: of its answers, where the user says nothing; a model that was never trained to write documents draws where it must only.
    `scored_by`: what a score sheet can be made from beside the answers themselves, of "official" and "judge".
    `max_side`: the largest side of a saved picture, in pixels; None: any.
    `headlines`: the figures of its table by which models are compared first.
    `notes`: causes that `read` reports of items that stay.
    """

    name: ClassVar[str]
    aspects: ClassVar[tuple[str, ...]]
    scale: ClassVar[tuple[float, float]]
    defaults: ClassVar[dict[str, Any]] = {}
    form: ClassVar[AnswerForm] = AnswerForm.FREE
    scored_by: ClassVar[tuple[str, ...]] = ("official", "judge")
    max_side: ClassVar[int | None] = None
    headlines: ClassVar[tuple[Headline, ...]] = ()
    notes: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def read(self, folder: Path, problems: Problems) -> list[Item]:
        """The items of a local folder in the published layout, in its order; what is broken is reported and left out.

        Raises ValueError where the layout is another.
        """

    def owed(self, item: Item) -> tuple[str, ...]:
        """The aspects that apply to an item: what is missing where the model could not answer it."""
        return self.aspects

    @abstractmethod
    def submit(self, items: Sequence[Item], answers: Sequence[Sequence[Document]], folder: Path, model: str) -> None:
        """Writes the official submission layout into a new folder: for each item its `num_answers` answers."""

    @abstractmethod
    def how_to_score(self, data: Path, submission: Path) -> str:
        """What to run in which environment to have it scored, and how its result is read back; shown where nothing can be scored yet."""

    @abstractmethod
    def score(self, items: Sequence[Item], answers: Sequence[Sequence[Document]], scoring: Scoring) -> list[Score] | None:
        """One score for each answer, in order; None where there is nothing to score with. Raises ValueError for unusable files."""

    @abstractmethod
    def table(self, scores: Sequence[Score]) -> dict[str, Any]:
        """The figures of the benchmark's own tables, with what is missing beside them."""
