"""One record for all data sets: a prompt, an answer, and columns for rewards; from JSONL files or the Storyboard world.

A JSONL line:

    {"messages": [{"role": "user", "content": [{"type": "text", "text": "tell the story ."}, ...]},
                  {"role": "assistant", "content": [{"type": "text", ...}, {"type": "image", "image": "a.png"}]}],
     "num_images": 2}

Image paths are relative to the file. Prompt sets for GRPO leave out the assistant's message.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diptych.document import Document
from diptych.runtime import rng as make_rng
from diptych.worlds.storyboard import conversations
from diptych.worlds.storyboard.scene import Split
from diptych.worlds.storyboard.tasks import FAMILIES, make_task


@dataclasses.dataclass(frozen=True)
class Record:
    """`columns` reach the rewards; `source` says which data set the record came from."""

    prompt: Document
    answer: Document | None
    source: str
    columns: dict[str, Any]

    @property
    def is_drawing(self) -> bool:
        """Whether the answer is one bare picture, so that caption dropout makes sense."""
        return self.answer is not None and len(self.answer) == len(self.answer.images) == 1


class Source:
    """A data set with random access; `size` is None where records are made endlessly."""

    def __init__(self, name: str, size: int | None, get: Callable[[int], Record]) -> None:
        self.name, self.size, self._get = name, size, get

    def __getitem__(self, index: int) -> Record:
        return self._get(index if self.size is None else index % self.size)


def open_source(name: str, num_records: int | None = None, *, seed: int = 0, split: Split = "train") -> Source:
    """A JSONL file, or `storyboard:interleaved|text_to_image|understanding|text|prompts`.

    Raises ValueError for an unknown name, a missing or empty file, or a broken line (with file and line number).
    """
    if name.startswith("storyboard:"):
        return _storyboard(name, name.split(":", 1)[1], num_records, seed, split)
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"data set {name!r} does not exist; give a .jsonl file or one of: {', '.join(_storyboard_names())}")
    records = _read_jsonl(path, num_records)
    held_out = records[19::20] or records[-1:]  # of a file, every 20th record is for validation
    if split == "train":
        records = [r for i, r in enumerate(records) if i % 20 != 19] if len(records) >= 20 else records[: max(1, len(records) - 1)]
    else:
        records = held_out
    return Source(name, len(records), records.__getitem__)


_KINDS = {"text_to_image": ("draw",), "understanding": ("describe", "question"), "text": ("event", "tell")}


def _storyboard_names() -> list[str]:
    return [f"storyboard:{kind}" for kind in ("interleaved", "prompts", *_KINDS)]


def _storyboard(name: str, kind: str, num_records: int | None, seed: int, split: Split) -> Source:
    stream = ("train", "validation", "test").index(split)
    if kind in ("interleaved", "prompts"):

        def interleaved(index: int) -> Record:
            task = make_task(make_rng(seed, 7, stream, index), split, FAMILIES[index % len(FAMILIES)])
            answer = task.truth.document() if kind == "interleaved" else None
            return Record(task.prompt, answer, name, {"num_images": task.truth.num_steps})

        return Source(name, num_records, interleaved)
    if kind in _KINDS:

        def single(index: int) -> Record:
            rng = make_rng(seed, 8, stream, index)
            turn = _KINDS[kind][int(rng.integers(len(_KINDS[kind])))]
            prompt, answer = conversations.make_turn(rng, turn, split)
            return Record(prompt, answer, name, {"num_images": len(answer.images)})

        return Source(name, num_records, single)
    raise ValueError(f"unknown data set {name!r}; known are {', '.join(_storyboard_names())}")


def _read_jsonl(path: Path, num_records: int | None) -> list[Record]:
    records = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            records.append(_parse(json.loads(line), path))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}:{number}: not a record: {error}") from error
        if num_records is not None and len(records) == num_records:
            break
    if not records:
        raise ValueError(f"data set {path} is empty; at least one record is needed")
    return records


def _parse(line: dict[str, Any], path: Path) -> Record:
    messages = line["messages"]
    roles = [message["role"] for message in messages]
    if roles not in (["user"], ["user", "assistant"]):
        raise ValueError(f"roles are {roles}; allowed are ['user'] and ['user', 'assistant']")
    documents = [_document(message["content"], path.parent) for message in messages]
    answer = documents[1] if len(documents) == 2 else None
    columns = {key: value for key, value in line.items() if key != "messages"}
    if answer is not None:
        columns.setdefault("num_images", len(answer.images))
    return Record(documents[0], answer, str(path), columns)


def _document(content: Any, folder: Path) -> Document:
    if isinstance(content, list):
        content = [
            {**block, "image": str(folder / block["image"])}
            if isinstance(block.get("image"), str) and not block["image"].startswith("data:")
            else block
            for block in content
        ]
    return Document.from_blocks(content)
