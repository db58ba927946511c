"""Files of rows with random access: each is scanned once, which gives the place of every row, and is then read at places.

| file | `at`, `extent` of a place | what reading a row costs |
|---|---|---|
| JSONL | byte, bytes | a line |
| JSON (a list) | byte, bytes | an entry; the file is in memory while it is scanned |
| tar | byte of the sample's first header, - | the sample's members |
| parquet | row within its group, group | the row group; the last two are kept |

What is broken raises ValueError with its place: a training passes over nothing.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
import json
import re
import tarfile
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from diptych import userfiles
from diptych.data.readers import (
    Member,
    Row,
    check_ended,
    footer,
    is_plain_file,
    json_row,
    packed_by,
    parquet,
    replaced,
    sample_name,
    suffix_of,
    values_of,
)

MAX_GROUP_BYTES = 2**29
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclasses.dataclass(frozen=True)
class Place:
    """Of a row in its file; `number` counts from 1: the line, entry, sample or row."""

    at: int
    extent: int
    number: int


class Shard(abc.ABC):
    """`columns`: names that any row has, known when all were scanned. `reads_all`: scanning them reads whole rows."""

    reads_all = True
    unit = ""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns: set[str] = set()

    @abc.abstractmethod
    def rows(self, columns: Sequence[str]) -> Iterator[tuple[Place, Row]]:
        """All rows in order, with `columns` at least; without pictures where they can be passed over. What is broken in one row is its
        `fault`."""

    @abc.abstractmethod
    def read(self, place: Place) -> Row: ...

    def where(self, place: Place) -> str:
        return f"{self.path}:{self.unit}{place.number}"

    def _row(self, raw: bytes, where: str, **more: Any) -> Row:
        row = json_row(raw, where, self.path.parent, **more)
        self.columns |= row.value.keys()
        return row

    def _bytes(self, place: Place) -> bytes:
        with self.path.open("rb") as stream:
            stream.seek(place.at)
            return stream.read(place.extent)


class Lines(Shard):
    def rows(self, columns: Sequence[str]) -> Iterator[tuple[Place, Row]]:
        with self.path.open("rb") as stream:
            for number, (offset, raw) in enumerate(userfiles.lines_of(stream), start=1):
                if raw.strip():
                    place = Place(offset, len(raw), number)
                    yield place, self._row(raw, self.where(place))

    def read(self, place: Place) -> Row:
        return self._row(self._bytes(place), self.where(place))


class Entries(Shard):
    unit = "entry "

    def rows(self, columns: Sequence[str]) -> Iterator[tuple[Place, Row]]:
        decoder = json.JSONDecoder()
        number = offset = seen = 0  # `seen` counts characters, `offset` their bytes
        try:
            raw = self.path.read_bytes()
            text = userfiles.decode(raw, str(self.path))
            offset = len(raw) - len(text.encode())  # a mark at the beginning
            at = _skip(text, _skip(text, 0, "[") + 1)
            while text[at] != "]":
                end = decoder.raw_decode(text, at)[1]
                raw, number = text[at:end].encode(), number + 1
                offset += len(text[seen:at].encode())
                place = Place(offset, len(raw), number)
                yield place, self._row(raw, self.where(place))
                offset, seen = offset + len(raw), end
                at = _skip(text, end, ",]")
                if text[at] == ",":
                    at = _skip(text, at + 1)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"cannot read {self.path} behind entry {number}: {error}. A JSON list of records is needed.") from error

    def read(self, place: Place) -> Row:
        return self._row(self._bytes(place), self.where(place))


def _skip(text: str, at: int, wanted: str = "") -> int:
    """Where the next character that is no space stands."""
    match = _SPACE.match(text, at)
    assert match is not None
    at = match.end()
    if at >= len(text) or (wanted and text[at] not in wanted):
        found = repr(text[at]) if at < len(text) else "the end"
        raise ValueError(f"{' or '.join(wanted) or 'an entry'} is needed, found {found}")
    return at


class Samples(Shard):
    """WebDataset: members that share a name up to the first dot."""

    reads_all = False
    unit = "sample "

    def rows(self, columns: Sequence[str]) -> Iterator[tuple[Place, Row]]:
        with self.path.open("rb") as stream:
            for number, (at, row) in enumerate(self._samples(stream, "json"), start=1):
                yield Place(at, 0, number), row

    def read(self, place: Place) -> Row:
        with self.path.open("rb") as stream, contextlib.closing(self._samples(stream)) as samples:
            stream.seek(place.at)
            return next(samples)[1]

    def _samples(self, stream: BinaryIO, only: str | None = None) -> Generator[tuple[int, Row]]:
        """From where the stream stands. `only`: of each sample's members those with this ending are read."""
        start, key, members = 0, "", dict[str, tarfile.TarInfo]()
        try:
            with tarfile.open(fileobj=stream, mode="r:", tarinfo=Member) as archive:
                while (member := archive.next()) is not None:
                    archive.members = []  # type: ignore[attr-defined]  # or it would keep all of them
                    if not is_plain_file(member):
                        continue
                    found, ending = sample_name(member.name)
                    if found != key and members:
                        yield start, self._sample(archive, key, members, only)
                        members = {}
                    start, key = start if members else member.offset, found
                    if ending in members:
                        raise tarfile.ReadError(f"the sample {key} has two members .{ending}")
                    members[ending] = member
                if members:
                    yield start, self._sample(archive, key, members, only)
                stream.seek(archive.offset)
                check_ended(archive)
        except (tarfile.TarError, OSError, EOFError) as error:
            raise ValueError(f"cannot read {self.path} behind {key or 'the start'}: {error}") from error

    def _sample(self, archive: tarfile.TarFile, key: str, members: dict[str, tarfile.TarInfo], only: str | None) -> Row:
        where = f"{self.path}:{key}"
        contents: dict[str, bytes] = {}
        for ending, member in members.items():
            if only in (None, ending):
                content = archive.extractfile(member)
                assert content is not None
                contents[ending] = content.read()
        if "json" not in contents:
            raise ValueError(f"{where}: the sample has no .json member, only {', '.join(sorted(members))}")
        row = self._row(contents.pop("json"), where, files=contents)
        self.columns.add("__key__")
        return dataclasses.replace(row, value={"__key__": key, **row.value})


class Groups(Shard):
    """Parquet."""

    reads_all = False
    unit = "row "

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._group = functools.lru_cache(maxsize=2)(self._read_group)
        self._footer = functools.cache(functools.partial(footer, path))

    def rows(self, columns: Sequence[str]) -> Iterator[tuple[Place, Row]]:
        number = 0
        with parquet(self.path) as file:
            self.columns |= {field.name for field in file.schema_arrow if _has_words(field.type)}
            known = [c for c in columns if c in file.schema_arrow.names]
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).total_byte_size
                if size > MAX_GROUP_BYTES:
                    raise ValueError(
                        f"{self.path}: row group {group + 1} has {size} bytes and is read whole for each row; at most "
                        f"{MAX_GROUP_BYTES} are allowed. Make records of it first: diptych data convert messages {self.path} --out FOLDER"
                    )
                at = 0
                for batch in file.iter_batches(batch_size=64, row_groups=[group], columns=known or None):
                    for value in values_of(batch):
                        number += 1
                        place = Place(at, group, number)
                        yield place, replaced(value, self.where(place), self.path.parent)
                        at += 1

    def read(self, place: Place) -> Row:
        (value,) = values_of(self._group(place.extent).slice(place.at, 1))
        return replaced(value, self.where(place), self.path.parent)

    def _read_group(self, group: int) -> Any:
        with parquet(self.path, self._footer()) as file:
            return file.read_row_group(group)


def _has_words(kind: Any) -> bool:
    """Whether JSON has words for values of a pyarrow type, so that they can reach rewards."""
    from pyarrow import types

    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return False
    return all(_has_words(kind.field(number).type) for number in range(kind.num_fields))


SHARDS: dict[str, type[Shard]] = {".jsonl": Lines, ".json": Entries, ".tar": Samples, ".parquet": Groups}


def open_shard(path: Path, *, as_lines: bool = False) -> Shard:
    """`as_lines`: JSON lines, whatever its name. Raises ValueError for a file without random access."""
    suffix = ".jsonl" if as_lines else suffix_of(path)
    if suffix not in SHARDS or (suffix == ".tar" and packed_by(path)):
        raise ValueError(
            f"{path} has no random access, which training needs; allowed are {', '.join(SHARDS)}. Unpack it (gunzip), or make records of "
            f"it first: diptych data convert messages {path} --out FOLDER"
        )
    return SHARDS[suffix](path)
