"""One thread and one bounded queue for each tracker: what it cannot take is dropped, and a warning says so once."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import queue
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diptych.trackers.kinds import Opened, open_tracker, tracker_class

logger = logging.getLogger(__name__)
MAX_WAITING = 1000  # lines of metrics that wait for one tracker
MAX_DOCUMENTS = 4  # steps whose documents wait; they hold pictures
PATIENCE = 20.0  # seconds that the end of a run waits for its trackers
Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class About:
    """What a tracker is told of the run: its folder, the project it belongs to, its settings by dotted keys, an id that is its own."""

    folder: Path
    project: str
    settings: Mapping[str, Any]
    id: str


class Trackers:
    """The trackers of one run, in its first process. `step`: where the run starts or goes on; what a tracker has had is not sent again.

    Everything that a tracker does happens in a thread: one that fails, hangs or is slow costs the
    training nothing but a warning. `trackers.json` in the run's folder notes its id and what each tracker has.
    """

    def __init__(
        self, names: Sequence[str], folder: Path, step: int, *, project: str, options: Mapping[Any, Mapping[str, Any]],
        settings: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self._file, self._lock = folder / "trackers.json", threading.Lock()
        self._state = self._read()
        about = About(folder, project, settings, self._state["run"])
        self._workers = [_Worker(name, about, step, options.get(name, {}), self) for name in names]
        for worker in self._workers:
            tracker_class(worker.tracker)  # imports accelerate here: of two threads that import it, one may meet half of it
            worker.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for worker in self._workers:
            worker.put("metrics", step, metrics)

    def documents(self, step: int, records: Sequence[Record]) -> None:
        for worker in self._workers:
            worker.put("documents", step, records)

    def close(self) -> None:
        """Waits a while for what is still on its way."""
        for worker in self._workers:
            worker.end()
        deadline = time.monotonic() + PATIENCE
        for worker in self._workers:
            worker.join(max(0.0, deadline - time.monotonic()))
            worker.report()

    # --- what each tracker has ---
    def _read(self) -> dict[str, Any]:
        try:
            stored = json.loads(self._file.read_text())
            if isinstance(stored["run"], str) and isinstance(stored["trackers"], dict):
                return dict(stored)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, LookupError, TypeError) as error:
            logger.warning("%s is damaged (%s): the trackers begin a new run", self._file, error)
        return {"run": uuid.uuid4().hex[:12], "trackers": {}}

    def has(self, name: str, kind: str) -> int:
        """The last step of which the tracker has the metrics, or the documents."""
        found = self._state["trackers"].get(name, {}).get(kind, 0)
        return found if isinstance(found, int) else 0

    def own_id(self, name: str) -> str | None:
        """The id that the tracker gave the run when it began."""
        return self._state["trackers"].get(name, {}).get("id")

    def note(self, name: str, **facts: Any) -> None:
        with self._lock:
            self._state["trackers"].setdefault(name, {}).update(facts)
            temporary = self._file.with_name(f".tmp-{self._file.name}-{os.getpid()}")
            temporary.write_text(json.dumps(self._state, indent=1) + "\n")
            temporary.replace(self._file)


class _Worker(threading.Thread):
    def __init__(self, name: str, about: About, step: int, options: Mapping[str, Any], owner: Trackers) -> None:
        super().__init__(name=f"tracker {name}", daemon=True)  # no program waits at its end for a tracker that hangs
        self.tracker, self.about, self.step, self.options, self.owner = name, about, step, options, owner
        self.waiting: queue.Queue[tuple[str, int, Any] | None] = queue.Queue(MAX_WAITING)
        self.room = threading.BoundedSemaphore(MAX_DOCUMENTS)
        self.warned: set[str] = set()
        self.lost = 0

    # --- called by the training: returns at once ---
    def put(self, kind: str, step: int, content: Any) -> None:
        if not self.is_alive():
            return
        if kind == "documents" and not self.room.acquire(blocking=False):
            self._drop()
            return
        try:
            self.waiting.put_nowait((kind, step, content))
        except queue.Full:
            self._drop()
            if kind == "documents":
                self.room.release()

    def end(self) -> None:
        with contextlib.suppress(queue.Full):  # it hangs, and is left behind
            self.waiting.put_nowait(None)

    def report(self) -> None:
        if self.is_alive():
            self._warn("end", f"has not taken everything after {PATIENCE:.0f} s and is left behind")
        elif self.lost:
            logger.warning("tracker %s missed %d logged steps or sets of documents; the run's folder has them all", self.tracker, self.lost)

    def _drop(self) -> None:
        self.lost += 1
        self._warn("slow", "takes too long: what it cannot take is left out (the run's folder has everything)")

    def _warn(self, key: str, text: str) -> None:
        if key not in self.warned:
            self.warned.add(key)
            logger.warning("tracker %s %s", self.tracker, text)

    # --- the thread ---
    def run(self) -> None:
        try:
            opened = open_tracker(self.tracker, self.about, self.step, self.options, self.owner.own_id(self.tracker))
        except BaseException as error:  # also SystemExit, which some of them raise where nobody is logged in
            self._warn("start", f"cannot start ({_told(error)}): nothing is sent to it; the training goes on")
            return
        if opened.id is not None:
            self._try("note", lambda: self.owner.note(self.tracker, id=opened.id))
        while (item := self.waiting.get()) is not None:
            self._send(opened, *item)
        self._try("finish", opened.finish)

    def _send(self, opened: Opened, kind: str, step: int, content: Any) -> None:
        try:
            if opened.forgets or step > self.owner.has(self.tracker, kind):
                send = opened.log if kind == "metrics" else opened.documents
                if not self._try("send", lambda: send(step, content)):
                    self.lost += 1
                elif not opened.forgets:
                    self._try("note", lambda: self.owner.note(self.tracker, **{kind: step}))
        finally:
            if kind == "documents":
                self.room.release()

    def _try(self, key: str, call: Any) -> bool:
        try:
            call()
        except BaseException as error:
            self._warn(key, f"failed ({_told(error)}); the training goes on, and later failures are counted and not told")
            return False
        return True


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"
