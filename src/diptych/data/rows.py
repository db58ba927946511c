"""Records in parquet files, WebDataset tar shards, JSON lists and folders of these, read where they stand, as `JsonlFile` reads its own.

What a row may look like is what `diptych data convert messages` reads.
"""

from __future__ import annotations

import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diptych.data.convert.draft import Block, Message
from diptych.data.convert.messages import columns_of, given_messages, id_of, is_trained, messages_of
from diptych.data.convert.pictures import load
from diptych.data.jsonl import PICTURES_CHECKED, Record, answer_places
from diptych.data.readers import Row
from diptych.data.shards import Place, open_shard
from diptych.document import Document, Image, Text, join

CONVERSATION = ("messages", "prompt", "completion")  # columns that say what answers there are
BROKEN = (ValueError, KeyError, TypeError, AttributeError)


class RowFile:
    """Random access to the records of files; `lines` (N,) is the row of each, counted from 0 over all files."""

    def __init__(self, paths: Sequence[Path], source: str, num_records: int | None = None) -> None:
        """`source`: of rows that name none. Of the first 1,000 records the pictures are opened, of the rest the conversation is read.

        Raises ValueError where there is no row, for a row that is no record, and for what cannot be read, with its place.
        """
        self.source = source
        self.shards = [open_shard(path) for path in paths]
        # of each record: its shard, the three parts of its place there, which message is its answer, and its row
        index, num_rows = [array.array("q") for _ in range(6)], 0
        for number, shard in enumerate(self.shards):
            for place, row in shard.rows(CONVERSATION):
                try:
                    answers = row_answers(row)
                    if len(index[0]) < PICTURES_CHECKED:
                        make_row_record(shard.read(place), answers[-1], source)  # the last one's prompt holds all that came before
                except BROKEN as error:
                    raise ValueError(f"{row.where}: not a record: {_words(error)}") from error
                for answer in answers:
                    for column, value in zip(index, (number, place.at, place.extent, place.number, answer, num_rows), strict=True):
                        column.append(value)
                num_rows += 1
                if num_records is not None and len(index[0]) >= num_records:
                    break
            if num_records is not None and len(index[0]) >= num_records:
                break
        if not num_rows:
            raise ValueError(f"data set {source} is empty; at least one record is needed")
        self._index = index
        self.lines = np.array(index[5])[:num_records]

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, at: int) -> Record:
        shard, *place, answer, _ = (column[at] for column in self._index)
        row = self.shards[shard].read(Place(*place))
        try:
            return make_row_record(row, answer, self.source)
        except BROKEN as error:
            raise ValueError(f"{row.where}: not a record: {_words(error)}") from error


def row_answers(row: Row) -> list[int]:
    """Where the answers stand that are trained (`answer_places`)."""
    turns = [{"role": m["role"], **({} if is_trained(m.get("loss")) else {"loss": False})} for m in given_messages(row.value)]
    return answer_places({"messages": turns})


def make_row_record(row: Row, place: int, source: str) -> Record:
    """The record whose answer is message `place`. Raises ValueError for what is no block, and pictures that do not open."""
    messages = messages_of(row)
    prompt = join(_document(message) for message in messages[:place])
    answer = _document(messages[place]) if place < len(messages) else None
    license = str(row.value.get("license") or "")
    columns = {"source": source, **columns_of(row), "id": id_of(row), "license": license}
    if answer is not None:
        columns.setdefault("num_images", len(answer.images))
    return Record(prompt, answer, str(columns["source"]), columns, columns["id"], license)


def _document(message: Message) -> Document:
    return Document(tuple(_segment(block) for block in message.blocks))


def _segment(block: Block) -> Text | Image:
    return Text(block) if isinstance(block, str) else Image(load(block[0])[0])


def _words(error: Exception) -> str:
    return f"{type(error).__name__} {error}" if isinstance(error, KeyError) else str(error)
