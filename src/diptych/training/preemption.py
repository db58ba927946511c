"""A scheduler that wants the machine back: the step is finished and saved, and the program ends with a code of its own."""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from diptych.runtime import gather

EXIT_CODE = 75  # sysexits.h's EX_TEMPFAIL: the same command resumes
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(RuntimeError):
    """The run was asked to stop, and is saved."""


class Requests:
    """Whether the process was asked to stop since it began to listen. Only the first signal is heard; a second one ends it as ever.

    Ctrl-C (SIGINT) is only noted beside what it does: where the KeyboardInterrupt comes up in a destructor, Python drops it.
    """

    def __init__(self) -> None:
        self.heard: int | None = None
        self.interrupted = False
        self._before: dict[int, Any] = {}

    def begin(self) -> None:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python hears no signals
            self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}
            if callable(interrupt := signal.getsignal(signal.SIGINT)):  # not where it is ignored
                self._before[signal.SIGINT] = signal.signal(signal.SIGINT, functools.partial(self._note, interrupt))

    def end(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _note(self, interrupt: Callable[[int, Any], Any], number: int, frame: Any) -> None:
        self.interrupted = True
        interrupt(number, frame)

    def _hear(self, number: int, _: Any) -> None:
        self.heard = number
        self.end()


@contextlib.contextmanager
def preemptible() -> Iterator[Requests]:
    """Listens to SIGTERM and SIGUSR1 while inside."""
    requests = Requests()
    requests.begin()
    try:
        yield requests
    finally:
        requests.end()


def asked_to_stop(requests: Requests) -> str:
    """The name of the signal that any process has heard; empty where none has. Every process must ask, at the same step.

    Raises KeyboardInterrupt where Ctrl-C was pressed and came to nothing.
    """
    if requests.interrupted:
        raise KeyboardInterrupt
    heard = next((number for number in gather(requests.heard) if number is not None), None)
    return "" if heard is None else signal.Signals(heard).name
