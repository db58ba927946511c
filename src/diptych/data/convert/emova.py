"""`emova`: the image-text part of EMOVA's data (understanding). Any LLaVA-style JSON of pictures and conversations reads the same way.

Layouts as published: the hub's parquet (`image` as bytes, `conversations`), and what the authors' script makes of it,
`annotations/SUBSET.json` with `{"id", "image": "SUBSET/0.png", "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, ...]}` and
picture paths relative to --media (left out: the folder above `annotations`).

Of a folder's files each counts its ids anew, so `id` is then `SUBSET/ID`, SUBSET being the file's name.

Rows with speech units or of the speech dialogues, and rows without a picture, are left out and counted. A conversation of several
turns stays one record; each of its answers is trained. Which subsets the paper used is not published: choose files and --share.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diptych.data.convert.pictures import Picture, resolve
from diptych.data.convert.raw_record import Block, Message, Options, RawRecord
from diptych.data.problems import NONSENSE, Problems
from diptych.data.readers import Row, read_rows

MARK = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
SPEECH = ("<|speech_", "user question text", "assistant response speech", "<audio>")


def read(options: Options, problems: Problems) -> Iterator[RawRecord]:
    for number, row in enumerate(read_rows(options.input, problems)):
        value = row.value
        given = str(value.get("id") or f"{options.input.stem}-{number}")
        id = f"{subset_of(row)}/{given}" if options.input.is_dir() and value.get("id") else given
        try:
            turns = [(ROLES[turn["from"]], str(turn["value"])) for turn in value["conversations"]]
            if any(mark in text for _, text in turns for mark in SPEECH):
                problems.report(row.where, "speech", "", id)
                continue
            pictures = _pictures(value.get("image"), options.media or _root(row.root))
            if not pictures:
                problems.report(row.where, "no picture", "", id)
                continue
            messages = _messages(turns, pictures)
        except NONSENSE as error:
            problems.report(row.where, "not a record", f"{type(error).__name__}: {error}", id)
            continue
        names = [image for image in (value.get("image"),) if isinstance(image, str)]
        yield RawRecord(id, row.where, messages, (given, *names))


def subset_of(row: Row) -> str:
    return Path(row.where.rpartition(":")[0]).stem


def _root(folder: Path) -> Path:
    return folder.parent if folder.name == "annotations" else folder


def _pictures(value: Any, root: Path) -> list[Picture]:
    given = value if isinstance(value, list) else [] if value is None or value == "" else [value]
    return [resolve(picture, root) for picture in given]


def _messages(turns: list[tuple[str, str]], pictures: list[Picture]) -> tuple[Message, ...]:
    """Pictures take the places of the marks, in order; without any mark they stand before the first question."""
    marks = sum(text.count(MARK) for _, text in turns)
    if marks not in (0, len(pictures)):
        raise ValueError(f"{len(pictures)} pictures are given and {marks} places for them")
    waiting, messages = list(pictures), []
    for role, text in turns:
        blocks: list[Block] = []
        if marks == 0 and waiting and role == "user":
            blocks += [(waiting.pop(0),) for _ in pictures]
        for index, part in enumerate(text.split(MARK)):
            if index:
                blocks.append((waiting.pop(0),))
            if part.strip():
                blocks.append(part.strip())
        messages.append(Message(role, tuple(blocks)))
    return tuple(messages)
