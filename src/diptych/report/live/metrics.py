"""A run's metrics as columns, read as the file grows; thinned out for a page, and only what is new."""

from __future__ import annotations

import json
import os
import secrets
import threading
from array import array
from bisect import bisect_right
from pathlib import Path
from typing import Any

import numpy as np

MOST_POINTS = 600  # of one curve that is sent whole
TAIL = 64  # bytes before what is new that must be what they were
Curve = tuple[np.ndarray, np.ndarray]  # steps (N,) int64, values (N,) float64


class Metrics:
    """`metrics.jsonl` while a training writes it. Its last line may be unfinished: it is read when it is whole.

    A run that is resumed replaces the file; all is then read again under another `generation`.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.RLock()  # questions are answered in several threads
        self._forget()

    def _forget(self) -> None:
        self.generation = secrets.token_hex(6)
        self.last_step, self.num_lines = 0, 0
        self._file, self._offset, self._tail = (0, 0), 0, b""
        self._steps: dict[str, array[int]] = {}
        self._values: dict[str, array[float]] = {}

    def refresh(self) -> None:
        """Reads what was added."""
        with self._lock:
            try:
                with self.path.open("rb") as stream:
                    self._read(stream)
            except FileNotFoundError:
                self._forget()

    def _read(self, stream: Any) -> None:
        status = os.fstat(stream.fileno())
        if (status.st_dev, status.st_ino) != self._file or status.st_size < self._offset:
            self._forget()
        stream.seek(self._offset - len(self._tail))
        if stream.read(len(self._tail)) != self._tail:
            self._forget()
            stream.seek(0)
        self._file = (status.st_dev, status.st_ino)
        new = stream.read()
        whole = new[: new.rfind(b"\n") + 1]
        for line in whole.splitlines():
            self._add(line)
        self._offset += len(whole)
        self._tail = (self._tail + whole)[-TAIL:]

    def _add(self, line: bytes) -> None:
        try:
            content = json.loads(line)
            step = int(content.pop("step"))
        except (ValueError, LookupError, TypeError, AttributeError):
            return  # of a killed process, and another line follows
        self.last_step, self.num_lines = step, self.num_lines + 1
        for name, value in content.items():
            if isinstance(value, int | float):
                self._steps.setdefault(name, array("q")).append(step)
                self._values.setdefault(name, array("d")).append(value)

    def curve(self, name: str) -> Curve:
        """All finite values of a metric."""
        with self._lock:
            steps, values = np.array(self._steps.get(name, ()), dtype=np.int64), np.array(self._values.get(name, ()), dtype=np.float64)
        return steps[np.isfinite(values)], values[np.isfinite(values)]

    def last(self, name: str) -> float | None:
        values = self.curve(name)[1]
        return float(values[-1]) if len(values) else None

    def curves(self) -> dict[str, Curve]:
        with self._lock:
            return {name: self.curve(name) for name in self._steps}

    def since(self, generation: str | None, step: int) -> dict[str, Any]:
        """What a page lacks that has everything of `generation` up to `step`; everything, thinned out, where that is another one."""
        with self._lock:
            is_whole = generation != self.generation
            series = {}
            for name, steps in self._steps.items():
                begin = 0 if is_whole else bisect_right(steps, step)
                if begin < len(steps):
                    at, values = np.array(steps[begin:], dtype=np.int64), np.array(self._values[name][begin:], dtype=np.float64)
                    series[name] = _plain(thinned(at, values, MOST_POINTS))
            return {"generation": self.generation, "step": self.last_step, "whole": is_whole, "series": series}


def thinned(steps: np.ndarray, values: np.ndarray, most: int) -> Curve:
    """At most `most` points: of each stretch the lowest and the highest, so that no outlier is lost, and the last point of all."""
    if len(steps) <= most:
        return steps, values
    kept = {len(steps) - 1}
    for part in np.array_split(np.arange(len(steps)), (most - 1) // 2):
        finite = part[np.isfinite(values[part])]
        if len(finite):
            kept |= {int(finite[values[finite].argmin()]), int(finite[values[finite].argmax()])}
    index = np.array(sorted(kept))
    return steps[index], values[index]


def _plain(curve: Curve) -> list[list[Any]]:
    steps, values = curve
    return [steps.tolist(), [float(f"{value:.6g}") if np.isfinite(value) else None for value in values.tolist()]]
