"""Before the first step: which records of a data set a model cannot take, as far as their texts tell.

Every record is gone through, without opening a picture: its text must be one that the model has tokens for, and it must fit the context
with an answer behind it. What was found is remembered in the run's folder, for the same data, model and lengths.
"""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from diptych.data import Mixture
from diptych.data.conversation import Record
from diptych.data.records import Source
from diptych.runs import RunFolder, atomic_text
from diptych.runtime import on_first

logger = logging.getLogger(__name__)
WAITING = 256  # records that are read before the first of them is measured


def admit(mixture: Mixture, measure: Callable[[Record], object], run: RunFolder, purpose: str, known: Any) -> None:
    """Leaves out of the mixture what `measure` raises ValueError for.

    `purpose`: names what is remembered; `known`: JSON, all that the outcome depends on. Raises ValueError, in every process, where more
    would be left out than is allowed.
    """
    found = on_first(lambda: _remembered(mixture, measure, run, purpose, known))
    for number, refused in enumerate(found):
        for at, said in refused:
            mixture.skip(number, at, ValueError(said), count=False)
        mixture.check_share(number)


def _remembered(mixture: Mixture, measure: Callable[[Record], object], run: RunFolder, purpose: str, known: Any) -> list[Any]:
    path = run.path / f"admitted_{purpose}.json"
    try:
        stored = json.loads(path.read_bytes())
        if stored["known"] == known:
            return stored["refused"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    refused = [list(_refused(source, measure)) if source.file is not None else [] for source in mixture.sources]
    atomic_text(path, json.dumps({"known": known, "refused": refused}) + "\n")
    return refused


def _refused(source: Source, measure: Callable[[Record], object]) -> Iterator[tuple[int, str]]:
    """Index, and why, of each record that cannot be taken. Tokenizers let other threads run."""
    waiting: deque[tuple[int, Future[object]]] = deque()
    with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1)), "admission") as pool:
        for index, record in source.conversations():
            waiting.append((index, pool.submit(measure, record)))
            if len(waiting) >= WAITING:
                yield from _said(*waiting.popleft())
        while waiting:
            yield from _said(*waiting.popleft())


def _said(index: int, asked: Future[object]) -> Iterator[tuple[int, str]]:
    try:
        asked.result()
    except ValueError as error:
        yield index, str(error)
