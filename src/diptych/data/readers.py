"""Rows of JSONL and JSON files, parquet files and WebDataset tar shards, one at a time, each with its place.

What is broken is reported (`Problems`) and passed over. JSONL, parquet and tar are streamed; a JSON file is read whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from diptych.data.problems import Problems

FORMATS = (".jsonl", ".json", ".parquet", ".tar", ".tar.gz", ".tgz")
BATCH_ROWS = 64  # of a parquet file at a time: rows may hold pictures


@dataclasses.dataclass(frozen=True)
class Row:
    """`value`: columns. `where`: file and line. `root`: what picture paths are relative to. `files`: the other members of a sample."""

    value: dict[str, Any]
    where: str
    root: Path
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)


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
    for number, raw in enumerate(stream, start=1):
        if raw.strip():
            yield from _json_row(raw, f"{name}:{number}", root, problems)


def read_json(path: Path) -> Any:
    """A whole JSON file. Raises ValueError naming it where it cannot be read."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}. Give the JSON file as it was published, unpacked.") from error


def _json(path: Path, problems: Problems) -> Iterator[Row]:
    try:
        rows = read_json(path)
    except ValueError as error:
        return problems.report(str(path), "unreadable file", error)
    if not isinstance(rows, list):
        return problems.report(str(path), "unreadable file", f"a list of records is needed, this is a {type(rows).__name__}")
    for number, value in enumerate(rows, start=1):
        yield from _as_row(value, f"{path}:entry {number}", path.parent, problems)


def check_pyarrow(path: Path) -> None:
    """Raises ValueError where the extra is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ValueError(f"reading {path} needs the extra: pip install 'diptych[data]'") from error


@contextlib.contextmanager
def parquet(path: Path) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile`. Raises ValueError, from the opening to the end of the reading, for a file that is broken."""
    check_pyarrow(path)
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def _parquet(path: Path, problems: Problems, columns: Sequence[str] | None) -> Iterator[Row]:
    check_pyarrow(path)
    number = 0
    try:
        with parquet(path) as file:
            known = None if columns is None else [c for c in columns if c in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=known):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(value, f"{path}:row {number}", path.parent)
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
        for row in _json_row(files["json"], where, path.parent, problems):
            yield Row({"__key__": key, **row.value}, where, path.parent, others)


def _grouped(path: Path, problems: Problems) -> Iterator[tuple[str, dict[str, bytes]]]:
    key, files = "", dict[str, bytes]()
    for name, content in tar_members(path, problems):
        found, ending = sample_name(name)
        if found != key and files:
            yield key, files
            files = {}
        key = found
        files[ending] = content
    if files:
        yield key, files


def sample_name(name: str) -> tuple[str, str]:
    """Key and ending of a member: `a/b.seg.PNG` is ("a/b", "seg.png")."""
    place = PurePosixPath(name)
    stem, _, ending = place.name.partition(".")
    return str(place.with_name(stem)) if stem else name, ending.lower()


def tar_members(path: Path, problems: Problems) -> Iterator[tuple[str, bytes]]:
    """Name and content of the plain files of a tar archive, compressed or not, in order. Nothing is unpacked to disk."""
    last = "the start"
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                stream = archive.extractfile(member) if member.isfile() else None
                if stream is not None:
                    content = stream.read()
                    last = member.name
                    yield member.name, content
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        problems.report(str(path), "unreadable file", f"{error}; what stands behind {last} was not read")


def _json_row(raw: bytes, where: str, root: Path, problems: Problems) -> Iterator[Row]:
    try:
        value = json.loads(raw)
    except ValueError as error:  # UnicodeDecodeError is one
        return problems.report(where, "broken line", error)
    yield from _as_row(value, where, root, problems)


def _as_row(value: Any, where: str, root: Path, problems: Problems) -> Iterator[Row]:
    if isinstance(value, dict):
        yield Row(value, where, root)
    else:
        problems.report(where, "broken line", f"a JSON object is needed, this is a {type(value).__name__}")
