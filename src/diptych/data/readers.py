"""Rows of JSONL and JSON files, parquet files and WebDataset tar shards, one at a time, each with its place.

What is broken is reported (`Problems`) and passed over. JSONL, parquet and tar are streamed; a JSON file is read whole.
"""

from __future__ import annotations

import bz2
import contextlib
import dataclasses
import gzip
import json
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from diptych import userfiles
from diptych.data.conversation import NotARecord, kind_of, refuse_surrogates
from diptych.data.problems import Problems

FORMATS = (".jsonl", ".json", ".parquet", ".tar", ".tar.gz", ".tgz")
BATCH_ROWS = 64  # of a parquet file at a time: rows may hold pictures


@dataclasses.dataclass(frozen=True)
class Row:
    """`value`: columns. `where`: file and line. `root`: what picture paths are relative to. `files`: the other members of a sample.
    `fault`: why it cannot be a record, where that shows before its columns are looked at."""

    value: dict[str, Any]
    where: str
    root: Path
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    fault: NotARecord | None = None


def suffix_of(path: Path) -> str:
    """The format's ending, `.tar.gz` included; empty where it is none of ours."""
    return next((s for s in sorted(FORMATS, key=len, reverse=True) if path.name.lower().endswith(s)), "")


def shards(path: Path, formats: Sequence[str] = FORMATS) -> list[Path]:
    """The files of a data set: the file itself, or those of a folder (not below it), by name.

    Raises ValueError where there are none.
    """
    found = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else []
    found = [p for p in found if suffix_of(p) in formats and not p.name.startswith(".")]
    if not found:
        raise ValueError(f"{path} is no data set that can be read; give a file, or a folder of files, ending in {', '.join(formats)}")
    return found


def read_rows(path: Path, problems: Problems, *, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """All rows of a file or folder, in order. `columns` limits what is read of a parquet file."""
    for shard in shards(path):
        suffix = suffix_of(shard)
        if suffix == ".jsonl":
            with shard.open("rb") as stream:
                yield from json_lines(stream, str(shard), shard.parent, problems)
        elif suffix == ".json":
            yield from _json(shard, problems)
        elif suffix == ".parquet":
            yield from _parquet(shard, problems, columns)
        else:
            yield from _samples(shard, problems)


def json_lines(stream: BinaryIO, name: str, root: Path, problems: Problems) -> Iterator[Row]:
    """Rows of a stream of JSON lines; blank ones are passed over."""
    for number, (_, raw) in enumerate(userfiles.lines_of(stream), start=1):
        if raw.strip():
            yield from reported(json_row(raw, f"{name}:{number}", root), problems)


def json_row(raw: bytes, where: str, root: Path, **more: Any) -> Row:
    """A row of JSON; with a `fault` where it is none, no object, or holds a text that is no valid Unicode."""
    try:
        value = parse(raw)
        if not isinstance(value, dict):
            raise NotARecord(f"a JSON object is needed, this is {kind_of(value)}", "broken line")
        if b"\\ud" in raw or b"\\uD" in raw:  # nothing else can write a surrogate in UTF-8
            refuse_surrogates(value)
    except NotARecord as error:
        return Row({}, where, root, fault=error, **more)
    return Row(value, where, root, **more)


def parse(raw: bytes) -> Any:
    """Raises NotARecord for what is no JSON in UTF-8."""
    try:
        return json.loads(userfiles.decode(raw, "the line"))
    except RecursionError:
        raise NotARecord("it is nested too deeply", "broken line") from None
    except ValueError as error:
        raise NotARecord(str(error), "broken line") from None


def reported(row: Row, problems: Problems) -> Iterator[Row]:
    """The row, if it is one; otherwise its fault is reported."""
    if row.fault is None:
        yield row
    else:
        problems.report(row.where, row.fault.cause, row.fault)


def read_json(path: Path) -> Any:
    """A whole JSON file. Raises ValueError naming it where it cannot be read."""
    try:
        return userfiles.read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}. Give the JSON file as it was published, unpacked.") from error


def _json(path: Path, problems: Problems) -> Iterator[Row]:
    try:
        rows = read_json(path)
    except ValueError as error:
        return problems.report(str(path), "unreadable file", error)
    if not isinstance(rows, list):
        return problems.report(str(path), "unreadable file", f"a list of records is needed, this is {kind_of(rows)}")
    for number, value in enumerate(rows, start=1):
        yield from reported(value_row(value, f"{path}:entry {number}", path.parent), problems)


def check_pyarrow(path: Path) -> None:
    """Raises ValueError where the extra is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ValueError(f"reading {path} needs the extra: pip install 'diptych[data]'") from error


def footer(path: Path) -> Any:
    """What says where everything in a parquet file stands; it may be large, so who reads group by group keeps it."""
    with parquet(path) as file:
        return file.metadata


@contextlib.contextmanager
def parquet(path: Path, metadata: Any = None) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile`; `metadata`: its footer, where that was read before.

    Raises ValueError, from the opening to the end of the reading, for a file that is broken.
    """
    check_pyarrow(path)
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, metadata=metadata) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def values_of(table: Any) -> Iterator[dict[str, Any] | NotARecord]:
    """The rows of a pyarrow batch or table, what is JSON in them read; each by itself where one of them is broken."""
    readers = {field.name: read for field in table.schema if (read := _json_reader(field.type)) is not None}
    table = _without_nanoseconds(table)

    def values(part: Any) -> list[dict[str, Any]]:
        rows = part.to_pylist()
        for row in rows if readers else ():
            row |= {name: read(row[name]) for name, read in readers.items() if row[name] is not None}
        return rows

    try:
        yield from values(table)
    except (ValueError, ArithmeticError):  # UnicodeDecodeError is a ValueError
        for at in range(table.num_rows):
            try:
                yield values(table.slice(at, 1))[0]
            except UnicodeDecodeError as error:
                yield NotARecord(f"a text is not UTF-8 (byte {error.start + 1} of it is 0x{error.object[error.start]:02x})", "broken text")
            except (ValueError, ArithmeticError) as error:
                yield NotARecord(f"a value cannot be read: {error}", "broken value")


def _without_nanoseconds(table: Any) -> Any:
    """Python's times end at microseconds."""
    import pyarrow

    for at, field in enumerate(table.schema):
        kind = field.type
        if getattr(kind, "unit", "") == "ns":
            coarse = pyarrow.timestamp("us", kind.tz) if pyarrow.types.is_timestamp(kind) else pyarrow.duration("us")
            coarse = pyarrow.time64("us") if pyarrow.types.is_time(kind) else coarse
            table = table.set_column(at, field.name, table.column(at).cast(coarse, safe=False))
    return table


def _json_reader(kind: Any) -> Callable[[Any], Any] | None:
    """What makes values of a pyarrow type of what it gives, where that has JSON in it (`Json()` of Hugging Face datasets); else None."""
    from pyarrow import types

    if getattr(kind, "extension_name", "") == "arrow.json":
        return json.loads
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        item = _json_reader(kind.value_type)
        return item and (lambda values: [None if value is None else item(value) for value in values])
    if types.is_struct(kind):
        fields = {field.name: read for field in kind if (read := _json_reader(field.type)) is not None}
        return (lambda value: value | {k: read(value[k]) for k, read in fields.items() if value[k] is not None}) if fields else None
    return None


def replaced(value: dict[str, Any] | NotARecord, where: str, root: Path) -> Row:
    return Row({}, where, root, fault=value) if isinstance(value, NotARecord) else Row(value, where, root)


def _parquet(path: Path, problems: Problems, columns: Sequence[str] | None) -> Iterator[Row]:
    check_pyarrow(path)
    number = 0
    try:
        with parquet(path) as file:
            known = None if columns is None else [c for c in columns if c in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=known):
                for value in values_of(batch):
                    number += 1
                    yield from reported(replaced(value, f"{path}:row {number}", path.parent), problems)
    except ValueError as error:
        problems.report(f"{path}:row {number + 1}", "unreadable file", f"{error}; the rest of the file was not read")


def _samples(path: Path, problems: Problems) -> Iterator[Row]:
    """WebDataset: members that share a name up to the first dot are one sample; its `.json` is the row."""
    for key, files in _grouped(path, problems):
        where = f"{path}:{key}"
        if "json" not in files:
            problems.report(where, "broken line", f"the sample has no .json member, only {', '.join(sorted(files))}")
            continue
        others = {name: content for name, content in files.items() if name != "json"}
        for row in reported(json_row(files["json"], where, path.parent, files=others), problems):
            yield dataclasses.replace(row, value={"__key__": key, **row.value})


def _grouped(path: Path, problems: Problems) -> Iterator[tuple[str, dict[str, bytes]]]:
    key, files = "", dict[str, bytes]()
    for name, content in tar_members(path, problems):
        found, ending = sample_name(name)
        if found != key and files:
            yield key, files
            files = {}
        key = found
        if ending in files:
            problems.report(f"{path}:{key}", "broken line", f"the sample has two members .{ending}; the first counts")
        files.setdefault(ending, content)
    if files:
        yield key, files


def sample_name(name: str) -> tuple[str, str]:
    """Key and ending of a member: `a/b.seg.PNG` is ("a/b", "seg.png")."""
    place = PurePosixPath(name)
    stem, _, ending = place.name.partition(".")
    return str(place.with_name(stem)) if stem else name, ending.lower()


class Member(tarfile.TarInfo):
    """Notes how an archive ended: tarfile takes a broken header behind the first member, and the end of the file, for its end mark."""

    @classmethod
    def fromtarfile(cls, archive: Any) -> Any:
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            archive.ended_by = error
            raise


def is_plain_file(member: tarfile.TarInfo) -> bool:
    """False for a folder. Raises ReadError for a link and the like: what it stands for would be missing."""
    if not member.isfile() and not member.isdir():
        raise tarfile.ReadError(f"{member.name} is a link, or no file: pack what it stands for (tar --dereference --hard-dereference)")
    return member.isfile()


PACKED: dict[bytes, Callable[..., Any]] = {  # how a file begins, and what opens it and checks its sum
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
}


def packed_by(path: Path) -> Callable[..., Any] | None:
    with path.open("rb") as stream:
        begins = stream.read(6)
    return next((opener for mark, opener in PACKED.items() if begins.startswith(mark)), None)


def _unpacked(path: Path) -> BinaryIO:
    """The bytes of an archive. tarfile's own streams do not look at the checksum of what is compressed."""
    return (packed_by(path) or open)(path, "rb")


def check_ended(archive: Any) -> None:
    """Raises ReadError where what looked like an archive's end is none, or more stands behind it."""
    if type(getattr(archive, "ended_by", None)).__name__ != "EOFHeaderError":
        raise tarfile.ReadError("the archive has no end mark there: it is cut off or broken")
    while content := archive.fileobj.read(2**20):
        if content.strip(b"\0"):
            raise tarfile.ReadError("more stands behind the archive's end mark: are these several archives in one file?")


def tar_members(path: Path, problems: Problems) -> Iterator[tuple[str, bytes]]:
    """Name and content of the plain files of a tar archive, compressed or not, in order. Nothing is unpacked to disk."""
    last = "the start"
    try:
        with _unpacked(path) as raw, tarfile.open(fileobj=raw, mode="r|", tarinfo=Member) as archive:
            for member in archive:
                if not is_plain_file(member):
                    continue
                stream = archive.extractfile(member)
                assert stream is not None
                content = stream.read()
                last = member.name
                yield member.name, content
            check_ended(archive)
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        problems.report(str(path), "unreadable file", f"{error}; what stands behind {last} was not read")


def value_row(value: Any, where: str, root: Path) -> Row:
    """A row of a value that was read already; with a `fault` where it is no object, or holds a text that is no valid Unicode."""
    try:
        if not isinstance(value, dict):
            raise NotARecord(f"a JSON object is needed, this is {kind_of(value)}", "broken line")
        refuse_surrogates(value)
    except NotARecord as error:
        return Row({}, where, root, fault=error)
    return Row(value, where, root)
