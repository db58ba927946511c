"""What was found out about data files and need not be found out again: files in a cache, each named by a hash of all that it depends on.

The folder is `$DIPTYCH_CACHE`, else `$XDG_CACHE_HOME/diptych`, else `~/.cache/diptych`. Files appear by a rename, what is damaged is made
again, and where nothing can be written everything works without. A file is known by its path, size, times and inode, and one that was
changed in the last SETTLED seconds is not remembered at all: clocks of file systems are too coarse to tell two changes from one.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import PIL

logger = logging.getLogger(__name__)
SETTLED = 2.0  # seconds
KEPT_DAYS = 90  # of what nobody uses
_PACKAGE = Path(__file__).parents[1]


class Unwritable(Exception):
    """The cache cannot be written; caused by the OSError."""


def folder(kind: str) -> Path:
    """Where one kind of files is kept; it is made. Raises Unwritable."""
    try:
        own = os.environ.get("DIPTYCH_CACHE")
        root = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diptych"
        (root / kind).mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home
        raise Unwritable from error
    return root / kind


@functools.cache
def say_once(why: str) -> None:
    """That nothing can be kept."""
    logger.warning("the cache cannot be written (%s): data files are scanned at every start. DIPTYCH_CACHE names another folder", why)


def file_facts(path: Path) -> list[Any]:
    """By which a file is known: another content has others."""
    found = path.stat()
    return [str(path), str(path.resolve()), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def is_settled(*times: int) -> bool:
    """Whether nothing was changed just now: then any change to come will show in a file's times (nanoseconds)."""
    return time.time() - max(times, default=0) / 1e9 > SETTLED


def name_of(*known: Any) -> str:
    """A name for what depends on `known` (JSON)."""
    return hashlib.blake2b(json.dumps(known, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


@functools.cache
def rules(*parts: str) -> str:
    """A hash of the code of some parts of the package, by which what was found under other rules is not used."""
    found = hashlib.blake2b(PIL.__version__.encode(), digest_size=16)
    for part in parts:
        place = _PACKAGE / part
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            found.update(path.read_bytes())
    return found.hexdigest()


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Any]:
    """A binary file that is open to be written and read, and takes its name where `rename` is called on it. Raises Unwritable."""
    try:
        stream = path.with_name(f".tmp-{os.getpid()}-{secrets.token_hex(4)}").open("x+b", buffering=2**20)
    except OSError as error:
        raise Unwritable from error
    try:
        yield stream
    finally:
        with contextlib.suppress(OSError):  # a full disk
            stream.close()
        Path(stream.name).unlink(missing_ok=True)  # not there where it was renamed


def prune(place: Path) -> None:
    """Deletes what was not used for long, and what killed processes left."""
    now = time.time()
    for path in place.iterdir():
        with contextlib.suppress(OSError):
            days = (now - path.stat().st_mtime) / 86400
            if days > (1 if path.name.startswith(".tmp-") else KEPT_DAYS):
                path.unlink()


def remembered(kind: str, known: Any, find: Callable[[], Any], *, worth: float, good: Callable[[], bool] = lambda: True) -> Any:
    """JSON that `find` gives; kept where that took `worth` seconds or more, under the name of `known`, if it is `good` then."""
    try:
        path = folder(kind) / f"{name_of(known)}.json"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            stored = json.loads(path.read_bytes())
            if stored["digest"] == name_of(stored["value"]):
                os.utime(path)
                return stored["value"]
    except Unwritable:
        return find()
    began = time.perf_counter()
    value = find()
    if time.perf_counter() - began >= worth and good():
        try:
            with appearing(path) as stream:
                stream.write(json.dumps({"digest": name_of(value), "value": value}).encode())
                stream.flush()
                os.replace(stream.name, path)
            prune(path.parent)
        except (OSError, Unwritable) as error:
            say_once(str(error.__cause__ or error))
    return value


# --- several processes ---------------------------------------------------------------------------------------------------


@functools.cache
def _started(process: int) -> float:
    """When a process started, in seconds of the clock; now, where the system does not say."""
    try:
        ticks = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError, AttributeError):
        return time.time()


class Lock:
    """A file's lock, which the system takes from a process that dies. `waited`: another process had it.

    It also notes who looked last whether what is kept is still right, so that the processes of one training look once for each machine.
    """

    def __init__(self, path: Path) -> None:
        """Raises Unwritable. Where the file system has no locks, nobody waits."""
        self.path, self.waited = path, False
        try:
            self._stream = path.open("a+b")
        except OSError as error:
            raise Unwritable from error
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.waited = True
                logger.info("another process scans the same files; waiting for its index")
                fcntl.flock(self._stream, fcntl.LOCK_EX)

    def note(self, began: float) -> None:
        """That this process looked, beginning at a time of the clock."""
        with contextlib.suppress(OSError):
            self._stream.truncate(0)
            self._stream.write(json.dumps([socket.gethostname(), os.getpid(), began]).encode())
            self._stream.flush()

    def looked_for_us(self) -> bool:
        """Whether another process of this machine has looked since this one started, where both may be of one training."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return False
        try:
            self._stream.seek(0)
            host, process, began = json.loads(self._stream.read())
            return host == socket.gethostname() and process != os.getpid() and began >= _started(os.getpid())
        except (OSError, ValueError, TypeError):
            return False

    def let_others_in(self) -> None:
        with contextlib.suppress(OSError):
            fcntl.flock(self._stream, fcntl.LOCK_UN)

    def release(self, *, useless: bool) -> None:
        """`useless`: nothing is kept, so the file may go."""
        if useless:
            self.path.unlink(missing_ok=True)
        self._stream.close()
