"""Records in JSONL, JSON, parquet and WebDataset tar files and folders of these, read where they stand: opening them notes where each
record is, and its pictures are opened when it is used. What a row may look like is what `diptych data convert messages` reads.
"""

from __future__ import annotations

import array
import collections
import hashlib
import itertools
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diptych.data.conversation import NotARecord, Record, answer_places, check_known_columns, given_messages
from diptych.data.convert.draft import Block, Message
from diptych.data.convert.messages import columns_of, id_of, messages_of
from diptych.data.convert.pictures import MissingPicture, load
from diptych.data.problems import Problems
from diptych.data.readers import Row
from diptych.data.shards import Place, Shard, open_shard
from diptych.document import STAND_IN, Document, Image, Text, join

# Columns that say what answers there are, and those that `format` reads
CONVERSATION = ("messages", "prompt", "completion", "conversations", "num_images", "ends_with_text", "answer_form")
PICTURES_CHECKED = 1000  # records whose pictures are opened at once; `diptych data inspect` opens all


class RowFile:
    """Random access to the records of files.

    lines: (N,) the row of each record, counted from 0 over all files. columns: what any of them gives to a reward. num_rows: all, also
    those that are no records. pictures: a hash of the pictures that the rows name: their names and sizes, and of the first
    PICTURES_CHECKED records their bytes.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        source: str,
        num_records: int | None = None,
        problems: Problems | None = None,
        *,
        as_lines: bool = False,
    ) -> None:
        """`source`: of rows that name none. `as_lines`: the files hold JSON lines, whatever their names.

        Of the first PICTURES_CHECKED records the pictures are opened; of the rest the conversation is read, and files of pictures are
        looked for. Raises ValueError where there is no row and, without `problems` to report it to, for a row that is no record; each
        with its place.
        """
        self.source, self.num_rows = source, 0
        self.shards = [open_shard(path, as_lines=as_lines) for path in paths]
        self.columns = {"source", "id", "license", "num_images"}
        # of each record: its shard, the three parts of its place there, which message is its answer, and its row
        self._index = index = [array.array("q") for _ in range(6)]
        self._pictures = hashlib.blake2b(digest_size=16)
        for number, shard in enumerate(self.shards):
            for place, row in shard.rows(CONVERSATION):
                if num_records is not None and len(index[0]) >= num_records:
                    break
                try:
                    answers = self._check(shard, place, row, whole=len(index[0]) < PICTURES_CHECKED)
                except ValueError as error:
                    if problems is None:
                        raise ValueError(f"{row.where}: not a record: {error}") from error
                    problems.report(row.where, getattr(error, "cause", "not a record"), error, id_of(row))
                    answers = []
                for answer in answers:
                    for column, value in zip(index, (number, place.at, place.extent, place.number, answer, self.num_rows), strict=True):
                        column.append(value)
                self.num_rows += 1
            self.columns |= columns_of(Row(dict.fromkeys(shard.columns), "", Path())).keys()
        if not self.num_rows:
            raise ValueError(f"data set {source} is empty; at least one record is needed")
        if not len(index[0]):
            raise ValueError(f"none of the {self.num_rows} rows of data set {source} is a record; `diptych data inspect` says why")
        self.lines = np.array(index[5])[:num_records]

    def _check(self, shard: Shard, place: Place, row: Row, *, whole: bool) -> list[int]:
        if row.fault is not None:
            raise row.fault
        check_known_columns(row.value)
        given = given_messages(row.value)
        answers = answer_places(given)
        if whole:
            row = shard.read(place)
            if row.fault is not None:
                raise row.fault
            make_row_record(row, answers[-1], self.source)  # the last one's prompt holds all that came before
        if (whole or shard.reads_all) and any(isinstance(message["content"], list) for message in given):
            for picture in (block[0] for message in messages_of(row) for block in message.blocks if isinstance(block, tuple)):
                if isinstance(picture, Path):
                    self._note(picture, row.root, whole)
        return answers

    def _note(self, path: Path, root: Path, whole: bool) -> None:
        try:
            size = path.stat().st_size
        except OSError:
            raise MissingPicture(f"{path} does not exist") from None
        name = path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
        self._pictures.update(f"{name}\n{size}\n".encode(errors="surrogateescape"))
        if whole:
            self._pictures.update(path.read_bytes())

    @property
    def pictures(self) -> str:
        return self._pictures.hexdigest()

    def __len__(self) -> int:
        return len(self.lines)

    def place(self, at: int) -> tuple[str, str]:
        """File and line, entry, sample or row of a record, and its id where its row can be read."""
        shard, *place, _, _ = (column[at] for column in self._index)
        try:
            row = self.shards[shard].read(Place(*place))
        except ValueError:
            return self.shards[shard].where(Place(*place)), ""
        return row.where, id_of(row)

    def conversations(self, wanted: Container[int]) -> Iterator[tuple[int, Record]]:
        """The records that are wanted, in order, with a stand-in for each picture: of the files only what is said is read."""
        places = (at for at in range(len(self)) if at in wanted)
        for number, mine in itertools.groupby(places, key=self._index[0].__getitem__):
            shard, records = self.shards[number], list(mine)
            few = shard.reads_all and 2 * len(records) < len(self)
            yield from self._read_one_by_one(shard, records) if few else self._gone_through(shard, records)

    def _read_one_by_one(self, shard: Shard, mine: Iterable[int]) -> Iterator[tuple[int, Record]]:
        for at in mine:
            row = shard.read(Place(*(column[at] for column in self._index[1:4])))
            yield at, self._words(row, given_messages(row.value), self._index[4][at])

    def _gone_through(self, shard: Shard, mine: Iterable[int]) -> Iterator[tuple[int, Record]]:
        waiting = collections.deque(mine)
        for place, row in shard.rows(CONVERSATION):
            messages: list[dict[str, Any]] = []
            while waiting and self._index[3][waiting[0]] == place.number:
                messages = messages or given_messages(row.value)
                at = waiting.popleft()
                yield at, self._words(row, messages, self._index[4][at])
            if not waiting:
                break

    def _words(self, row: Row, messages: list[dict[str, Any]], answer: int) -> Record:
        begin = prompt_end(messages, answer)
        prompt, given = join(map(_words, messages[:begin])), join(map(_words, messages[begin:answer]))
        told = _words(messages[answer]) if answer < len(messages) else None
        form = check_known_columns(row.value).get("answer_form")
        return Record(prompt, told, self.source, {}, id_of(row), where=row.where, form=form, given=given)

    def __getitem__(self, at: int) -> Record:
        shard, *place, answer, _ = (column[at] for column in self._index)
        row = self.shards[shard].read(Place(*place))
        try:
            if row.fault is not None:
                raise row.fault
            return make_row_record(row, answer, self.source)
        except ValueError as error:
            raise ValueError(f"{row.where}: not a record: {error}") from error


def prompt_end(messages: Sequence[dict[str, Any]], answer: int) -> int:
    """Where the prompt of the answer at a place ends: before the beginning of the answer, where one is given."""
    return answer - bool(answer and messages[answer - 1].get("prefix"))


def row_answers(row: Row) -> list[int]:
    """Where the answers stand that are trained (`answer_places`). Raises NotARecord for what is no record."""
    check_known_columns(row.value)
    return answer_places(given_messages(row.value))


def make_row_record(row: Row, place: int, source: str) -> Record:
    """The record whose answer is message `place`. Raises ValueError for what is no block, and pictures that do not open."""
    messages = messages_of(row)
    if place > len(messages):
        raise NotARecord("the file was changed since it was opened")
    begin = prompt_end(given_messages(row.value), place)
    prompt, given = join(map(_document, messages[:begin])), join(map(_document, messages[begin:place]))
    answer = _document(messages[place]) if place < len(messages) else None
    license = str(row.value.get("license") or "")
    columns = {**columns_of(row), **check_known_columns(row.value), "id": id_of(row), "license": license}
    columns["source"] = columns.get("source") or source
    if answer is not None and columns.get("num_images") is None:
        columns["num_images"] = len(given.images) + len(answer.images)
    form = columns.pop("answer_form", None)
    return Record(prompt, answer, str(columns["source"]), columns, columns["id"], license, row.where, form, given)


def _words(message: dict[str, Any]) -> Document:
    content = message["content"]
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return Document(tuple(Text(block["text"]) if block["type"] == "text" else STAND_IN for block in blocks))


def _document(message: Message) -> Document:
    return Document(tuple(_segment(block) for block in message.blocks))


def _segment(block: Block) -> Text | Image:
    return Text(block) if isinstance(block, str) else Image(load(block[0])[0])
