"""Records in JSONL, JSON, parquet and WebDataset tar files and folders of these, read where they stand: opening them notes where each
record is (`index.py`), and its pictures are opened when it is used. What a row may look like is what `diptych data convert messages` reads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diptych.data.conversation import NotARecord, Record, answer_places, check_known_columns, given_messages
from diptych.data.convert.messages import columns_of, id_of, messages_of
from diptych.data.convert.pictures import MissingPicture, load
from diptych.data.convert.raw_record import Block, Message
from diptych.data.index import Writer, open_index
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
    PICTURES_CHECKED records their bytes. train, held_out: which records are for training, and which (every 20th row's) are not.
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
        looked for. All of that is done once and remembered (`index.py`) for as long as files and pictures are the same. Raises ValueError
        where there is no row and, without `problems` to report it to, for a row that is no record; each with its place.
        """
        self.source, self._num_records, self._stops = source, num_records, problems is None
        self.shards = [open_shard(path, as_lines=as_lines) for path in paths]
        index = open_index(list(paths), [num_records, as_lines, PICTURES_CHECKED], self._scan)
        header = index.header
        for where, cause, detail, id in header.problems:
            if problems is None:
                raise ValueError(f"{where}: not a record: {detail}")
            problems.report(where, cause, detail, id)
        if not header.num_rows:
            raise ValueError(f"data set {source} is empty; at least one record is needed")
        if not len(index.rows):
            raise ValueError(f"none of the {header.num_rows} rows of data set {source} is a record; `diptych data inspect` says why")
        self._rows, self.lines, self.train, self.held_out = index.rows, index.rows[:, 5], index.train, index.held_out
        self.num_rows, self.columns, self.pictures = header.num_rows, set(header.columns), header.pictures

    def _scan(self, writer: Writer) -> None:
        header, most = writer.header, self._num_records
        pictures = hashlib.blake2b(digest_size=16)
        columns = {"source", "id", "license", "num_images"}
        for number, shard in enumerate(self.shards):
            for place, row in shard.rows(CONVERSATION):
                if most is not None and len(writer) >= most:
                    break
                try:
                    answers = self._check(shard, place, row, writer, pictures, whole=len(writer) < PICTURES_CHECKED)
                except ValueError as error:
                    if self._stops:
                        raise ValueError(f"{row.where}: not a record: {error}") from error
                    header.problems.append((row.where, getattr(error, "cause", "not a record"), str(error), id_of(row)))
                    answers = []
                for answer in answers if most is None else answers[: most - len(writer)]:
                    writer.add(number, place.at, place.extent, place.number, answer)
                header.num_rows += 1
            columns |= columns_of(Row(dict.fromkeys(shard.columns), "", Path())).keys()
        header.columns, header.pictures = sorted(columns), pictures.hexdigest()

    def _check(self, shard: Shard, place: Place, row: Row, writer: Writer, pictures: Any, *, whole: bool) -> list[int]:
        if row.fault is not None:
            raise row.fault
        check_known_columns(row.value)
        given = given_messages(row.value)
        answers = answer_places(given)
        if whole:
            row = shard.read(place)
            if row.fault is not None:
                raise row.fault
        found: list[tuple[Path, str, int]] = []
        if (whole or shard.reads_all) and any(isinstance(message["content"], list) for message in given):
            root = str(row.root)
            for block in (block for message in messages_of(row) for block in message.blocks):
                if isinstance(block, tuple) and isinstance(path := block[0], Path):
                    name = _name_below(root, str(path))
                    found.append((path, name, writer.picture(root, name, opened=whole)))
        if whole:
            make_row_record(row, answers[-1], self.source)  # the last one's prompt holds all that came before
        for path, name, size in found:
            if size < 0:
                raise MissingPicture(f"{path} does not exist")
            pictures.update(f"{name}\n{size}\n".encode(errors="surrogateescape"))
            if whole:
                pictures.update(path.read_bytes())
        return answers

    def __len__(self) -> int:
        return len(self.lines)

    def place(self, at: int) -> tuple[str, str]:
        """File and line, entry, sample or row of a record, and its id where its row can be read."""
        shard, *place, _, _ = self._rows[at].tolist()
        try:
            row = self.shards[shard].read(Place(*place))
        except ValueError:
            return self.shards[shard].where(Place(*place)), ""
        return row.where, id_of(row)

    def conversations(self, wanted: np.ndarray) -> Iterator[tuple[int, Record]]:
        """The records that are wanted (their numbers, ascending), in order, with a stand-in for each picture: of the files only what is
        said is read."""
        begins = np.searchsorted(self._rows[:, 0], np.arange(len(self.shards) + 1))
        for shard, begin, end in zip(self.shards, begins[:-1], begins[1:], strict=True):
            mine = wanted[slice(*np.searchsorted(wanted, [begin, end]))]
            few = shard.reads_all and 2 * len(mine) < len(self)
            if len(mine):
                yield from self._read_one_by_one(shard, mine) if few else self._gone_through(shard, mine)

    def _read_one_by_one(self, shard: Shard, mine: np.ndarray) -> Iterator[tuple[int, Record]]:
        for at in map(int, mine):
            _, *place, answer, _ = self._rows[at].tolist()
            row = shard.read(Place(*place))
            yield at, self._words(row, given_messages(row.value), answer)

    def _gone_through(self, shard: Shard, mine: np.ndarray) -> Iterator[tuple[int, Record]]:
        waiting = ((int(at), *self._rows[at, 3:5].tolist()) for at in mine)  # number, its place's number, answer
        next_one = next(waiting, None)
        for place, row in shard.rows(CONVERSATION):
            messages: list[dict[str, Any]] = []
            while next_one is not None and next_one[1] == place.number:
                messages = messages or given_messages(row.value)
                yield next_one[0], self._words(row, messages, next_one[2])
                next_one = next(waiting, None)
            if next_one is None:
                break

    def _words(self, row: Row, messages: list[dict[str, Any]], answer: int) -> Record:
        begin = prompt_end(messages, answer)
        prompt, given = join(map(_words, messages[:begin])), join(map(_words, messages[begin:answer]))
        answered = _words(messages[answer]) if answer < len(messages) else None
        form = check_known_columns(row.value).get("answer_form")
        return Record(prompt, answered, self.source, {}, id_of(row), where=row.where, form=form, given=given)

    def __getitem__(self, at: int) -> Record:
        shard, *place, answer, _ = self._rows[at].tolist()
        row = self.shards[shard].read(Place(*place))
        try:
            if row.fault is not None:
                raise row.fault
            return make_row_record(row, answer, self.source)
        except ValueError as error:
            raise ValueError(f"{row.where}: not a record: {error}") from error


def _name_below(root: str, path: str) -> str:
    """A path as pathlib's `relative_to` gives it, where it is below the root; else itself."""
    if root == "." and not path.startswith("/"):
        return path
    above = root if root.endswith("/") else f"{root}/"
    return path[len(above) :] if path.startswith(above) else path


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
