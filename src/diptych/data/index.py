"""Where the records of files stand: found once, kept in the cache (`cache.py`) and mapped into memory, so that processes share its pages.

A file of an index, in this order: (N, 6) int64 of the records; (P, 2) int64 of the pictures that were looked for; uint32 places of the
training records, and of those for validation; the pictures' names, each with a 0 byte behind it; `Header` as JSON; its length (8 bytes),
and a hash of everything before it.

An index is used where the files have the size, times and inode that they had, the code that made it is this code, and every picture that
was looked for is there in the size it had (a missing one: still missing); one that was opened, with the time of change that it had too.
"""

from __future__ import annotations

import array
import dataclasses
import hashlib
import io
import json
import logging
import mmap
import os
import struct
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from diptych.data import cache

logger = logging.getLogger(__name__)
WORTH = 1.0  # seconds: what is made in less is made again
VALIDATION = 20  # every 20th row
RULES = ("data", "document.py", "pictures.py", "tokens.py", "userfiles.py")  # code that says what a record is
CHUNK, THREADS = 2**13, 4  # pictures that a thread looks for in turn; on network file systems threads are most of the speed
BUFFER = 2**16  # numbers
GONE = (-1, -1)


@dataclasses.dataclass
class Header:
    """What an index holds beside arrays.

    num_rows: all, also those that are no records. columns: what any row has for a reward. problems: place, cause, detail and id of each row
    that is no record. pictures: a hash (`RowFile`). chunks: of pictures, the folder that their names are relative to, the number of the
    first, and where in the names they begin and end. opened: how many, from the first on, were opened; latest: when one of these was
    changed last, in nanoseconds. counts: N, P, and of the two splits.
    """

    num_rows: int = 0
    columns: list[str] = dataclasses.field(default_factory=list)
    problems: list[tuple[str, str, str, str]] = dataclasses.field(default_factory=list)
    pictures: str = ""
    chunks: list[tuple[str, int, int, int]] = dataclasses.field(default_factory=list)
    opened: int = 0
    latest: int = 0
    counts: tuple[int, int, int, int] = (0, 0, 0, 0)


class Index:
    """rows: (N, 6) int64, of each record its shard, the three parts of its place there (`shards.Place`), which message is its answer, and
    its row, counted from 0 over all files. train, held_out: uint32, which records belong to either split."""

    def __init__(self, buffer: Any) -> None:
        """Raises ValueError and the like for what is no index."""
        length = int.from_bytes(buffer[-24:-16], "little")
        end = len(buffer) - 24 - length
        self.header = Header(**json.loads(bytes(buffer[end:-24])))
        num_records, num_pictures, num_train, num_held_out = self.header.counts
        self.rows = np.frombuffer(buffer, np.int64, 6 * num_records).reshape(-1, 6)
        at = self.rows.nbytes
        self._facts = np.frombuffer(buffer, np.int64, 2 * num_pictures, at).reshape(-1, 2)
        at += self._facts.nbytes
        self.train = np.frombuffer(buffer, np.uint32, num_train, at)
        self.held_out = np.frombuffer(buffer, np.uint32, num_held_out, at + self.train.nbytes)
        self._names = memoryview(buffer)[at + self.train.nbytes + self.held_out.nbytes : end]

    def is_current(self) -> bool:
        """Whether every picture is as it was when the index was made."""
        if not len(self._facts):
            return True
        with ThreadPoolExecutor(THREADS, "pictures") as pool:  # looking for files lets other threads run
            return all(pool.map(self._are_current, range(len(self.header.chunks))))

    def _are_current(self, number: int) -> bool:
        root, first, begin, end = self.header.chunks[number]
        folder = os.fsencode(root)
        for at, name in enumerate(bytes(self._names[begin:end]).split(b"\0")[:-1], start=first):
            size, changed = facts_of(os.path.join(folder, name))
            if size != self._facts[at, 0] or (at < self.header.opened and changed != self._facts[at, 1]):
                return False
        return True


def facts_of(path: str | bytes | Path) -> tuple[int, int]:
    """Size and time of change (nanoseconds) of a file; GONE where there is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # ValueError: a 0 in its name
        return GONE
    return found.st_size, found.st_mtime_ns


class Writer:
    """Writes an index while files are scanned; little of it is in memory."""

    def __init__(self, stream: Any) -> None:
        self.header, self._stream, self._digest = Header(), stream, hashlib.blake2b(digest_size=16)
        self._rows, self._lines = array.array("q"), array.array("I")
        self._facts, self._names = tempfile.SpooledTemporaryFile(2**24), tempfile.SpooledTemporaryFile(2**24)  # noqa: SIM115
        self._num_pictures = 0

    def __len__(self) -> int:
        return len(self._lines)

    def add(self, shard: int, at: int, extent: int, number: int, answer: int) -> None:
        """A record of the row that is scanned."""
        self._rows.extend((shard, at, extent, number, answer, self.header.num_rows))
        self._lines.append(self.header.num_rows)
        if len(self._rows) >= BUFFER:
            self._flush()

    def picture(self, root: str, name: str, *, opened: bool) -> int:
        """Notes a picture that is looked for; its size, or -1."""
        size, changed = facts_of(os.path.join(root, name))
        header, chunks = self.header, self.header.chunks
        raw = os.fsencode(name) + b"\0"
        begin = chunks[-1][3] if chunks else 0
        if not chunks or chunks[-1][0] != root or self._num_pictures - chunks[-1][1] == CHUNK:
            chunks.append((root, self._num_pictures, begin, begin))
        chunks[-1] = (*chunks[-1][:3], begin + len(raw))
        self._names.write(raw)
        self._facts.write(struct.pack("=2q", size, changed))
        self._num_pictures += 1
        if opened:
            header.opened, header.latest = self._num_pictures, max(header.latest, changed)
        return size

    def finish(self) -> None:
        """Writes what is not yet written."""
        self._flush()
        lines = np.array(self._lines)
        held_out = lines % VALIDATION == VALIDATION - 1
        if len(lines) and not held_out.any():
            held_out = lines == lines[-1]
        train, rest = np.flatnonzero(held_out if held_out.all() else ~held_out), np.flatnonzero(held_out)
        self.header.counts = (len(lines), self._num_pictures, len(train), len(rest))
        self._copy(self._facts)
        self._write(train.astype(np.uint32).tobytes())
        self._write(rest.astype(np.uint32).tobytes())
        self._copy(self._names)
        encoded = json.dumps(dataclasses.asdict(self.header)).encode()
        self._write(encoded)
        self._write(len(encoded).to_bytes(8, "little"))
        self._write(self._digest.digest())
        self._stream.flush()

    def _flush(self) -> None:
        self._write(self._rows.tobytes())
        del self._rows[:]

    def _copy(self, spool: Any) -> None:
        spool.seek(0)
        while part := spool.read(2**20):
            self._write(part)
        spool.close()

    def _write(self, content: bytes) -> None:
        self._digest.update(content)
        try:
            self._stream.write(content)
        except OSError as error:
            raise cache.Unwritable from error


Make = Callable[[Writer], None]


def open_index(files: list[Path], known: Any, make: Make) -> Index:
    """The index of files from the cache, or as `make` takes it down. `known`: JSON, all else that it depends on.

    Of several processes that ask at once one makes it; the others wait, and read it. Raises what `make` raises.
    """
    try:
        before = [cache.file_facts(path) for path in files]
        path = cache.folder("indexes") / f"{cache.name_of(before, known, cache.rules(*RULES))}.index"
        lock = cache.Lock(path.with_suffix(".lock"))
    except cache.Unwritable as error:
        return _in_memory(make, error)
    try:
        began = time.time()
        found = _read(path)
        if found is not None and (lock.looked_for_us() or found.is_current()):
            lock.note(began)
            return found
        if lock.waited and found is None:  # the other one found it not worth keeping, or failed: now all make it at once
            lock.let_others_in()
        try:
            return _made(path, files, before, make, lock, began)
        except cache.Unwritable as error:
            return _in_memory(make, error)
    finally:
        lock.release(useless=not path.exists())


def _made(path: Path, files: list[Path], before: list[Any], make: Make, lock: cache.Lock, began: float) -> Index:
    with cache.appearing(path) as stream:
        writer = Writer(stream)
        make(writer)
        writer.finish()
        took, header = time.time() - began, writer.header
        index = Index(_mapped(Path(stream.name)))
        changes = [one[3] for one in before]
        if took >= WORTH and before == [cache.file_facts(one) for one in files] and cache.is_settled(*changes, header.latest):
            os.replace(stream.name, path)
            lock.note(began)
            cache.prune(path.parent)
    return index


def _in_memory(make: Make, error: cache.Unwritable) -> Index:
    cache.say_once(str(error.__cause__))
    writer = Writer(stream := io.BytesIO())
    make(writer)
    writer.finish()
    return Index(stream.getbuffer())


def _read(path: Path) -> Index | None:
    """What is kept; None where nothing is, or it is damaged."""
    try:
        with path.open("rb") as stream:
            size, digest = os.fstat(stream.fileno()).st_size, hashlib.blake2b(digest_size=16)
            for _ in range(0, size - 16, 2**20):  # not by the mapping: its pages would count as this process's
                digest.update(stream.read(min(2**20, size - 16 - stream.tell())))
            if stream.read() != digest.digest():
                raise ValueError("its hash is another")
        os.utime(path)
        return Index(_mapped(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("the index %s is damaged (%s) and is made again", path, error)
        return None


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
