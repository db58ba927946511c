"""Before the first step: which records of a data set a model cannot take, as far as their texts tell.

Every record is scanned, without opening a picture: its text must be one that the model has tokens for, and it must fit the context
with an answer behind it. Most texts are so short that they fit however they are cut into tokens; the others are encoded, several at a time.
What was found is remembered in the run's folder, for the same data, model and lengths, and in the cache for other runs with these and
equal settings.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from typing import Any

from diptych.data import Mixture, cache
from diptych.data.conversation import Record
from diptych.data.records import Source
from diptych.document import Document, Image, Text
from diptych.runs import RunFolder, atomic_text
from diptych.runtime import on_first

WORTH = 1.0  # seconds: what takes less is found again by another run
_NO_MATTER = {"seed", "optim"}  # settings that decide nothing here; and those that a run may change
WAITING = 256  # records that are read before the first of them is measured
JOINTS = 4  # tokens that a template or a tokenizer may put around a text
Length = Callable[[Record], int]
"""Positions that a record takes, with the room that it needs. Raises ValueError where it cannot be encoded or does not fit."""


def admit(mixture: Mixture, length: Length, limit: int, run: RunFolder[Any], purpose: str, known: Any) -> None:
    """Leaves out of the mixture the records for which `length` raises ValueError; `limit`: positions that there are.

    `purpose`: names what is remembered; `known`: JSON, all that the outcome depends on. Raises ValueError, in every process, where more
    would be left out than is allowed.
    """
    found = on_first(lambda: _remembered(mixture, length, limit, run, purpose, known))
    for number, refused in enumerate(found):
        for at, said in refused:
            mixture.skip(number, at, ValueError(said), count=False)
        mixture.check_share(number)


def note_skipped(run: RunFolder[Any], *mixtures: Mixture) -> None:
    """What was left out so far, in `skipped.json`; no file where nothing was."""
    if skipped := [line for mixture in mixtures for line in mixture.left_out()]:
        run.describe("skipped.json", skipped)


def _remembered(mixture: Mixture, length: Length, limit: int, run: RunFolder[Any], purpose: str, known: Any) -> list[Any]:
    path = run.path / f"admitted_{purpose}.json"
    try:
        stored = json.loads(path.read_bytes())
        if stored["known"] == known:
            return stored["refused"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    settings = run.config.model_dump(mode="json", exclude=_NO_MATTER | run.config.may_change)
    everything = [purpose, known, limit, settings, cache.rules(""), [metadata.version(name) for name in ("transformers", "tokenizers")]]
    refused = cache.remembered("admitted", everything, lambda: _gone_through(mixture, length, limit), worth=WORTH)
    atomic_text(path, json.dumps({"known": known, "refused": refused}) + "\n")
    return refused


def _gone_through(mixture: Mixture, length: Length, limit: int) -> list[Any]:
    return [list(_refused(source, length, limit)) if source.file is not None else [] for source in mixture.sources]


def _refused(source: Source, length: Length, limit: int) -> Iterator[tuple[int, str]]:
    """Index, and why, of each record that cannot be taken. Tokenizers let other threads run."""
    waiting: deque[tuple[int, Future[int]]] = deque()
    bound = Bound(length, limit)
    with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1)), "admission") as pool:
        for index, record in source.conversations():
            if bound.fits(record):
                continue
            waiting.append((index, pool.submit(length, record)))
            if len(waiting) >= WAITING:
                yield from _said(*waiting.popleft())
        while waiting:
            yield from _said(*waiting.popleft())


class Bound:
    """Whether a record fits for sure: no tokenizer makes more tokens of a text than it has bytes."""

    def __init__(self, length: Length, limit: int) -> None:
        self.length, self.limit = length, limit
        self._least: dict[tuple[Any, ...], int | None] = {}  # by the kinds of segments: positions with texts of one letter

    def fits(self, record: Record) -> bool:
        segments = (*record.prompt, *record.given, *(record.answer or ()))
        texts = [segment.text for segment in segments if isinstance(segment, Text)]
        ends = (len(record.prompt), len(record.given), -1 if record.answer is None else 1)
        shape = (record.form, *ends, *(isinstance(segment, Image) for segment in segments))
        if shape not in self._least:
            self._least[shape] = self._shortest(record)
        least = self._least[shape]
        return least is not None and least + sum(len(text.encode()) + JOINTS for text in texts) <= self.limit

    def _shortest(self, record: Record) -> int | None:
        def short(document: Document) -> Document:
            return Document(tuple(Text("a") if isinstance(segment, Text) else segment for segment in document))

        answer = None if record.answer is None else short(record.answer)
        try:
            return self.length(Record(short(record.prompt), answer, record.source, {}, form=record.form, given=short(record.given)))
        except ValueError:
            return None


def _said(index: int, asked: Future[int]) -> Iterator[tuple[int, str]]:
    try:
        asked.result()
    except ValueError as error:
        yield index, str(error)
