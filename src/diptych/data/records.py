"""One record for all data sets: a prompt, an answer, and columns for rewards; from JSONL files or the Storyboard world.

A JSONL line:

    {"messages": [{"role": "user", "content": [{"type": "text", "text": "tell the story ."}, ...]},
                  {"role": "assistant", "content": [{"type": "text", ...}, {"type": "image", "image": "a.png"}]}],
     "id": "a-1", "source": "activitynet", "license": "other", "num_images": 2, "ends_with_text": false}

Only `messages` is needed; other keys are columns for rewards. Image paths are relative to the file. Prompt sets for GRPO leave out the
last assistant's message. A conversation of several turns is one record for each answer that is trained; what came before it is its
prompt. An answer that is not to be trained says `"loss": false` beside its role. How such files are made is in docs/data.md.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from diptych.data.jsonl import JsonlFile, Record
from diptych.runtime import rng as make_rng
from diptych.worlds.storyboard import conversations
from diptych.worlds.storyboard.scene import Split
from diptych.worlds.storyboard.tasks import FAMILIES, make_task


class Source:
    """A data set with random access; `size` is None where records are made endlessly."""

    def __init__(self, name: str, size: int | None, get: Callable[[int], Record]) -> None:
        self.name, self.size, self._get = name, size, get

    def __getitem__(self, index: int) -> Record:
        return self._get(index if self.size is None else index % self.size)


def open_source(name: str, num_records: int | None = None, *, seed: int = 0, split: Split = "train") -> Source:
    """A JSONL file, or `storyboard:interleaved|text_to_image|understanding|text|prompts`.

    Of a file, every 20th line is for validation. Raises ValueError for an unknown name, a missing or empty file, or a broken line
    (with file and line number).
    """
    if name.startswith("storyboard:"):
        return _storyboard(name, name.split(":", 1)[1], num_records, seed, split)
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"data set {name!r} does not exist; give a .jsonl file or one of: {', '.join(_storyboard_names())}")
    if path.suffix.lower() in (".parquet", ".tar", ".tgz", ".gz"):
        raise ValueError(f"{path} has no random access; make records of it first: diptych data convert messages {path} --out FOLDER")
    file = JsonlFile(path, num_records)
    held_out = file.lines % 20 == 19
    if not held_out.any():
        held_out = file.lines == file.lines[-1]
    places = np.flatnonzero(held_out if split != "train" or held_out.all() else ~held_out)
    return Source(name, len(places), lambda index: file[int(places[index])])


_KINDS = {"text_to_image": ("draw",), "understanding": ("describe", "question"), "text": ("event", "tell")}


def _storyboard_names() -> list[str]:
    return [f"storyboard:{kind}" for kind in ("interleaved", "prompts", *_KINDS)]


def _storyboard(name: str, kind: str, num_records: int | None, seed: int, split: Split) -> Source:
    stream = ("train", "validation", "test").index(split)
    if kind in ("interleaved", "prompts"):

        def interleaved(index: int) -> Record:
            task = make_task(make_rng(seed, 7, stream, index), split, FAMILIES[index % len(FAMILIES)])
            answer = task.truth.document() if kind == "interleaved" else None
            return Record(task.prompt, answer, name, task.columns)

        return Source(name, num_records, interleaved)
    if kind in _KINDS:

        def single(index: int) -> Record:
            rng = make_rng(seed, 8, stream, index)
            turn = _KINDS[kind][int(rng.integers(len(_KINDS[kind])))]
            prompt, answer = conversations.make_turn(rng, turn, split)
            return Record(prompt, answer, name, {"num_images": len(answer.images)})

        return Source(name, num_records, single)
    raise ValueError(f"unknown data set {name!r}; known are {', '.join(_storyboard_names())}")
