"""Records in a JSONL file, read where they stand: opening one indexes its lines, and a record's pictures are opened when it is used."""

from __future__ import annotations

import array
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from diptych.document import Document, join

PICTURES_CHECKED = 1000  # records whose pictures are opened at once; `diptych data inspect` opens all


@dataclasses.dataclass(frozen=True)
class Record:
    """`columns` reach the rewards; `source` says which data set the record came from, `license` under what terms."""

    prompt: Document
    answer: Document | None
    source: str
    columns: dict[str, Any]
    id: str = ""
    license: str = ""

    @property
    def is_drawing(self) -> bool:
        """Whether the answer is one bare picture, so that caption dropout makes sense."""
        return self.answer is not None and len(self.answer) == len(self.answer.images) == 1


class JsonlFile:
    """Random access to the records of a file; `lines` (N,) is the line of each, counted from 0 over lines that are not blank."""

    def __init__(self, path: Path, num_records: int | None = None) -> None:
        """Raises ValueError for an empty file, a line that is no record and a picture that is missing, with file and line number."""
        self.path = path
        offsets, numbers, places, lines = (array.array("q") for _ in range(4))
        offset = num_lines = 0
        with path.open("rb") as stream:
            for number, raw in enumerate(stream, start=1):
                if raw.strip():
                    answers = self._check(raw, number, pictures=len(offsets) < PICTURES_CHECKED)
                    for place in answers:
                        offsets.append(offset)
                        numbers.append(number)
                        places.append(place)
                        lines.append(num_lines)
                    num_lines += 1
                    if num_records is not None and len(offsets) >= num_records:
                        break
                offset += len(raw)
        if not offsets:
            raise ValueError(f"data set {path} is empty; at least one record is needed")
        self._offsets, self._numbers, self._places = offsets, numbers, places
        self.lines = np.array(lines)[:num_records]

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Record:
        with self.path.open("rb") as stream:
            stream.seek(self._offsets[index])
            raw = stream.readline()
        try:
            return make_record(json.loads(raw), self._places[index], self.path)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.path}:{self._numbers[index]}: not a record: {error}") from error

    def _check(self, raw: bytes, number: int, pictures: bool) -> list[int]:
        try:
            line = json.loads(raw)
            places = answer_places(line)
            if pictures:
                for place in places[-1:]:  # the last one's prompt holds all that came before
                    make_record(line, place, self.path)
            else:
                for missing in missing_pictures(line, self.path.parent):
                    raise ValueError(f"cannot read image {missing!r}: there is no such file")
            return places
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.path}:{number}: not a record: {error}") from error


def answer_places(line: dict[str, Any]) -> list[int]:
    """Where the answers stand that are trained; for a prompt without answer, where one would stand.

    Raises ValueError where the messages are no conversation.
    """
    messages = line["messages"]
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(turns)):
        raise ValueError(
            f"roles are {roles}; allowed are ['user'], ['user', 'assistant'], and more turns of the two, with 'system' before them"
        )
    for message in messages:
        if not isinstance(message.get("loss", True), bool) or ("loss" in message and message["role"] != "assistant"):
            raise ValueError(f"`loss` is {message['loss']!r} at a {message['role']} message; it is true or false, and at answers only")
    if roles[-1] == "user":
        return [len(messages)]
    places = [i for i, message in enumerate(messages) if message["role"] == "assistant" and message.get("loss", True)]
    if not places:
        raise ValueError("no answer is trained: each says `loss`: false; leave out the last answer to make it a prompt")
    return places


def make_record(line: dict[str, Any], place: int, path: Path) -> Record:
    """The record whose answer is message `place`. Raises ValueError for blocks that are none and pictures that do not open."""
    messages = line["messages"]
    prompt = join(Document.from_blocks(message["content"], path.parent) for message in messages[:place])
    answer = Document.from_blocks(messages[place]["content"], path.parent) if place < len(messages) else None
    columns = {key: value for key, value in line.items() if key != "messages"}
    if answer is not None:
        columns.setdefault("num_images", len(answer.images))
    return Record(prompt, answer, str(line.get("source", path)), columns, str(line.get("id", "")), str(line.get("license", "")))


def empty_step(line: dict[str, Any]) -> str:
    """Where an answer with pictures has an empty text, in words; empty where none has."""
    for number, message in enumerate(line["messages"], start=1):
        blocks = message["content"]
        if message["role"] == "assistant" and isinstance(blocks, list) and any(block["type"] == "image" for block in blocks):
            for index, block in enumerate(blocks):
                if block["type"] == "text" and not block["text"].strip():
                    return f"block {index} of message {number} is an empty text beside pictures"
    return ""


def missing_pictures(line: dict[str, Any], folder: Path) -> list[str]:
    """Paths of pictures that do not exist. Raises ValueError for a block that is none."""
    missing = []
    for content in (message["content"] for message in line["messages"]):
        if isinstance(content, str):
            continue
        for index, block in enumerate(content):
            kind = block.get("type") if isinstance(block, dict) else None
            value = block.get(kind) if kind in ("text", "image") else None
            if not isinstance(value, str):
                raise ValueError(f"block {index} is {block!r:.120}; allowed are text and image blocks")
            if kind == "image" and not value.startswith("data:") and not (folder / value).is_file():
                missing.append(value)
    return missing
