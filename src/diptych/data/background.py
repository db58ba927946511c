"""Reading ahead: the next batches of a mixture are read and prepared in threads while the caller computes.

A batch is the same as without, bit by bit: only what needs no memory of earlier batches is done ahead (reading a record and preparing it),
for the records that will be asked for if nothing else is left out until then. What was left out, the device, and everything that fails
are the caller's: an error is raised at the step at which it would have come up. No random stream is drawn from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from diptych.config import RunConfig
from diptych.data.conversation import Record
from diptych.data.mixture import Mixture

Prepare = Callable[[int, Record], Callable[[], Any]]
"""What is made of a record, given its place in the batch, in two parts: the call itself may be in any thread, and what it gives back is
called in the caller's. A ValueError of either is about the record."""
GPU_WORKERS = 4


class Reader:
    """Makes batches of mixtures. `with Reader(...) as reader`: its threads end with it, as soon as the records that they read are done."""

    def __init__(self, workers: int = 0, batches: int = 0) -> None:
        """`workers`: threads; 0: everything is done when it is asked for. `batches`: so many are made ahead."""
        self.workers, self.batches = workers, batches
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: dict[tuple[int, int], dict[tuple[int, int, int], Future[Callable[[], Any]]]] = {}

    @classmethod
    def of(cls, config: RunConfig) -> Reader:
        """As a training's settings say. Without them: threads where a GPU computes; on a CPU they would take its cores away."""
        if config.data_workers is not None:
            return cls(config.data_workers, config.prefetch)
        import torch

        on_gpu = torch.cuda.is_available() if config.device == "auto" else config.device.startswith("cuda")
        return cls(GPU_WORKERS if on_gpu else 0, config.prefetch)

    def __enter__(self) -> Reader:
        if self.workers:
            self._pool = ThreadPoolExecutor(self.workers, "reader")
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        self._ahead.clear()

    @property
    def is_ahead(self) -> bool:
        """Whether records are prepared in other threads than the caller's."""
        return self._pool is not None

    def made(
        self,
        mixture: Mixture,
        step: int,
        size: int,
        prepare: Callable[[int], Prepare],
        *,
        last: int = 0,
        places: Sequence[int] | None = None,
    ) -> list[Any]:
        """What `prepare(step)` makes of the records of a batch, as `Mixture.made`.

        `prepare`: for each step. `last`: the step before which reading ahead ends; 0: nothing is read ahead.
        """
        for later in range(step, min(step + self.batches + 1, last)):
            self._begin(mixture, later, size, prepare, places)
        ahead = self._ahead.pop((id(mixture), step), {})
        make = prepare(step)

        def attempt(place: int, number: int, at: int) -> Any:
            future = ahead.get((place, number, at))
            return (make(place, mixture.sources[number][at]) if future is None else future.result())()

        return [mixture.taken(*drawn, attempt) for drawn in mixture.drawn(step, size, places)]

    def _begin(self, mixture: Mixture, step: int, size: int, prepare: Callable[[int], Prepare], places: Sequence[int] | None) -> None:
        if self._pool is None or (id(mixture), step) in self._ahead:
            return
        make, begun = prepare(step), self._ahead.setdefault((id(mixture), step), {})

        def work(place: int, number: int, at: int) -> Callable[[], Any]:
            return make(place, mixture.sources[number][at])

        for place, number, index in mixture.drawn(step, size, places):
            key = (place, number, mixture.likely(number, index))
            begun[key] = self._pool.submit(work, *key)


IN_TURN = Reader()
