"""One record for all data sets: a prompt, an answer, and columns for rewards; from files or the Storyboard world.

A JSONL line:

    {"messages": [{"role": "user", "content": [{"type": "text", "text": "tell the story ."}, ...]},
                  {"role": "assistant", "content": [{"type": "text", ...}, {"type": "image", "image": "a.png"}]}],
     "id": "a-1", "source": "activitynet", "license": "other", "num_images": 2, "ends_with_text": false}

Only `messages` is needed; other keys are columns for rewards. Image paths are relative to the file. Prompt sets for GRPO leave out the
last assistant's message. A conversation of several turns is one record for each answer that is trained; what came before it is its
prompt. An answer that is not to be trained says `"loss": false` beside its role. An assistant message that says `"prefix": true` is the
given beginning of the answer that follows, or is to be sampled. The column `answer_form` says what the answer may hold (`AnswerForm`).
How such files are made is in docs/how-to/data.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import glob
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from diptych.data import hub
from diptych.data.conversation import Record
from diptych.data.problems import Problems
from diptych.data.readers import shards, suffix_of
from diptych.data.rows import RowFile
from diptych.forms import AnswerForm
from diptych.runtime import rng as make_rng
from diptych.userfiles import lines_of
from diptych.worlds.storyboard import conversations
from diptych.worlds.storyboard.scene import Split
from diptych.worlds.storyboard.tasks import make_task
from diptych.worlds.storyboard.world import WORLDS, World


class Source:
    """A data set with random access; `size` is None where records are made endlessly. `file`: None for records that are made."""

    def __init__(
        self, name: str, size: int | None, get: Callable[[int], Record], columns: Iterable[str] = (), file: RowFile | None = None,
        places: np.ndarray | None = None, world: str | None = None,
    ) -> None:  # fmt: skip
        """`places`: (size,) which records of the file these are. `world`: the built-in world whose words and pictures they have."""
        self.name, self.size, self._get, self.columns, self.file = name, size, get, frozenset(columns) - {"answer_form"}, file
        self.places, self.world = places, world
        self.form: AnswerForm | None = None  # of answers whose record names none

    def __getitem__(self, index: int) -> Record:
        return self._formed(self._get(index if self.size is None else index % self.size))

    def _formed(self, record: Record) -> Record:
        return dataclasses.replace(record, form=self.form) if record.form is None and self.form is not None else record

    def place(self, index: int) -> tuple[str, str]:
        """File and line of a record of a file, and its id where its row can be read."""
        assert self.file is not None
        assert self.places is not None
        return self.file.place(int(self.places[index]))

    def row(self, index: int) -> int:
        """Which row of the file a record is of; a row of several answers is several records."""
        assert self.file is not None
        assert self.places is not None
        return int(self.file.lines[self.places[index]])

    def conversations(self) -> Iterator[tuple[int, Record]]:
        """Every record of a file by its index, with a stand-in for each picture: nothing but text is read."""
        assert self.file is not None
        assert self.places is not None
        yield from ((index, self._formed(record)) for index, (_, record) in enumerate(self.file.conversations(self.places)))


def open_source(
    name: str, num_records: int | None = None, *, seed: int = 0, split: Split = "train", problems: Problems | None = None
) -> Source:
    """A file, a folder or a pattern of files, or `storyboard:interleaved|text_to_image|understanding|text|edit|prompts`, of which
    `storyboard:terse/interleaved` and `storyboard:terse/prompts` tell only what happens; or of a larger world, as
    `storyboard:large/interleaved|prompts|text_to_image|understanding|edit|look_up`.

    JSONL, JSON, parquet and tar files, folders of files, and patterns such as `data/train-*.parquet` hold what `diptych data convert
    messages` reads. Every 20th row is for validation. Raises ValueError for an unknown name, a missing or empty file, or (without
    `problems` to report it to) a row that is no record, with file and line number.
    """
    if name.startswith("storyboard:"):
        return _storyboard(name, num_records, seed, split)
    return split_of(name, open_file(name, num_records, problems), split)


def open_file(name: str, num_records: int | None = None, problems: Problems | None = None) -> RowFile:
    """The rows of a data set, whatever split they are of."""
    files = record_files(name)
    as_lines = len(files) == 1 and has_records(files[0])
    return RowFile(files, str(files[0]) if as_lines else name, num_records, problems, as_lines=as_lines)


def split_of(name: str, file: RowFile, split: Split) -> Source:
    """The records of a split: every 20th row is for validation."""
    places = file.train if split == "train" else file.held_out
    return Source(name, len(places), lambda index: file[int(places[index])], file.columns, file, places)


def record_files(name: str) -> list[Path]:
    """The files of a data set: a file, those of a folder (of a conversion's, its records), what a pattern matches, or the hub's, by name.

    Raises ValueError where there are none.
    """
    path = Path(name)
    if (path / "records.jsonl").is_file():
        return [path / "records.jsonl"]
    if path.is_file():
        return [path] if has_records(path) else shards(path)
    if path.is_dir():
        return shards(path)
    if found := hub.fetch(name) if name.startswith(hub.PREFIX) else [Path(match) for match in sorted(glob.glob(name))]:
        return [shard for match in found for shard in shards(match)]
    if _HUB_ID.fullmatch(name):
        raise ValueError(
            f"data set {name!r} does not exist here. If it is one of the hub, say which files of which commit: "
            f"{hub.FORM.replace('ORG/NAME', name)}, such as hf://datasets/{name}@COMMIT/data/train-*.parquet"
        )
    raise ValueError(f"data set {name!r} does not exist; give a file or folder of records, or one of: {', '.join(_storyboard_sources())}")


def has_records(path: Path) -> bool:
    """Whether a file is JSON lines, whatever its name, if not that of another format; .json where its first line is an object."""
    suffix = suffix_of(path)
    if suffix not in ("", ".json", ".jsonl") or path.suffix == ".gz":
        return False
    if suffix == ".jsonl":
        return True
    first = None
    with path.open("rb") as stream, contextlib.suppress(ValueError):
        line = next((line for _, line in lines_of(stream) if line.strip()), b"")
        if not line.lstrip().startswith(b"["):
            first = json.loads(line)
    return isinstance(first, dict) or suffix != ".json"


_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_TURNS = {"text_to_image": ("draw",), "understanding": ("describe", "question"), "text": ("event", "tell"), "edit": ("edit",)}
_RECALL_TURNS = {  # of worlds in which earlier pictures must be looked up
    "text_to_image": ("draw",), "understanding": ("describe", "question"), "edit": ("edit", "continue"), "look_up": ("look_up", "again"),
}  # fmt: skip


@functools.cache
def _storyboard_sources() -> dict[str, tuple[str, str, World, tuple[str, ...]]]:
    """What each built-in source is, by name: its kind, the name of its world, the world, and the turns that it has (none: documents)."""
    found: dict[str, tuple[str, str, World, tuple[str, ...]]] = {}
    for world_name, tellings in WORLDS.items():
        before = "" if world_name == "standard" else f"{world_name}/"
        for telling, world in tellings.items():
            told = f"{telling}/" if world_name == "standard" and telling != "full" else ""
            for kind in ("interleaved", "prompts"):
                found[f"storyboard:{before}{told}{kind}"] = (kind, world_name, world, ())
            if not told:
                for kind, turns in (_RECALL_TURNS if "recall" in world.families else _TURNS).items():
                    found[f"storyboard:{before}{kind}"] = (kind, world_name, world, turns)
    return found


def _storyboard(name: str, num_records: int | None, seed: int, split: Split) -> Source:
    sources = _storyboard_sources()
    if name not in sources:
        raise ValueError(f"unknown data set {name!r}; known are {', '.join(sources)}")
    kind, world_name, world, turns = sources[name]
    stream = ("train", "validation", "test").index(split)

    def document(index: int) -> Record:
        task = make_task(make_rng(seed, 7, stream, index), split, world.families[index % len(world.families)], world)
        return Record(task.prompt, task.truth.document() if kind == "interleaved" else None, name, task.columns)

    def single(index: int) -> Record:
        rng = make_rng(seed, 8, stream, index)
        turn = turns[int(rng.integers(len(turns)))]
        if turn == "draw":
            (prompt, answer), caption = conversations.drawing(rng, split, world)
            return Record(prompt, answer, name, {"num_images": 1, "caption": caption})
        prompt, answer = conversations.make_turn(rng, turn, split, world=world)
        solution = {} if kind == "edit" else {"solution": answer.text}  # empty where a picture is asked for
        return Record(prompt, answer, name, {"num_images": len(answer.images), **solution})

    get = single if turns else document
    return Source(name, num_records, get, get(0).columns, world=world_name)
