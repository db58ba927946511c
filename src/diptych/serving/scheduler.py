"""One thread writes all documents of all models; requests join and leave between phases.

Documents with the same sampling settings are written together (`sampling.engine.Batch`). At each round the thread drops the documents whose
client left, lets waiting requests in, in the order in which they came, and runs one phase of every batch: texts until half of them have
begun a picture or ended, or the pictures that were begun, while the other texts are written on.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import logging
import math
import threading
import time
from collections.abc import Mapping
from typing import Any

import torch

from diptych.config import SamplingParams
from diptych.models.base import TooLong, UnifiedModel
from diptych.models.steps import prepared
from diptych.runtime import generator
from diptych.sampling.batch import Asked, Batch, Watch
from diptych.sampling.distribution import resolve
from diptych.sampling.engine import NOT_FINITE, check_room, fit_to_context
from diptych.sampling.rollout import PartialRollout, decode_pictures, finish, is_broken
from diptych.serving.errors import APIError, invalid
from diptych.serving.jobs import Accepted, Event, Failed, Finished, Job, Picture, Words
from diptych.serving.metrics import Metrics
from diptych.serving.settings import Settings
from diptych.serving.wording import Wording
from diptych.tokens import Modality

logger = logging.getLogger(__name__)
TELL_EVERY = 0.01  # seconds between two times that loops are woken for words: small models write faster than anybody reads


class Scheduler:
    def __init__(self, models: Mapping[str, UnifiedModel], settings: Settings) -> None:
        """`models`: by the names that requests know them by."""
        self.models, self.settings = dict(models), settings
        self.metrics = Metrics(lambda: self.num_waiting, lambda: self.num_running)
        self.closed = False  # nothing more is let in
        self._waiting: collections.deque[Job] = collections.deque()
        self._lanes: list[_Lane] = []
        self._told: list[tuple[Job, Event]] = []  # events of this moment
        self._told_at = 0.0
        self._changed = threading.Condition()
        self._ending = False
        self._mean_seconds = 1.0  # of a document, lately
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    @property
    def num_waiting(self) -> int:
        return sum(job.count for job in list(self._waiting))

    @property
    def num_running(self) -> int:
        return sum(len(lane.batch.partials) for lane in list(self._lanes))

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    # --- from the loop ---------------------------------------------------------------------------------------------------
    def submit(self, job: Job) -> None:
        """Raises APIError where the line is full (429), or the server is about to stop (503)."""
        with self._changed:
            if self.closed:
                raise APIError(503, "the server is stopping", code="stopping", retry_after=10)
            waiting = self.num_waiting
            if self._full(job):
                seconds = max(1, math.ceil(self._mean_seconds * (waiting + job.count) / self.settings.max_batch))
                raise APIError(
                    429, f"{waiting} documents wait already, of {self.settings.max_waiting} that may; try again in {seconds} s",
                    code="rate_limit_exceeded", retry_after=min(seconds, 600),
                )  # fmt: skip
            self._waiting.append(job)
            self._changed.notify()

    def _full(self, job: Job) -> bool:
        if self.settings.max_waiting:
            return self.num_waiting > 0 and self.num_waiting + job.count > self.settings.max_waiting
        return self.num_waiting + self.num_running + job.count > self.settings.max_batch

    def leave(self, job: Job) -> None:
        """Its client is gone: its documents are dropped at the next phase."""
        with self._changed:
            job.gone = True
            self._changed.notify()

    def close(self) -> None:
        """Lets nothing more in; what waits is refused, what is being written goes on."""
        with self._changed:
            self.closed = True
            self._changed.notify()

    def end(self) -> None:
        """Ends the thread after the phase that it is in."""
        with self._changed:
            self.closed = self._ending = True
            self._changed.notify()
        self._thread.join()

    # --- in the thread ---------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def _run(self) -> None:
        with contextlib.ExitStack() as stack:
            for model in self.models.values():
                model.eval()
                stack.enter_context(model.gathered())
                stack.enter_context(prepared(model))
            while self._wait():
                self._drop()
                self._let_in()
                self._tell()
                for lane in list(self._lanes):
                    self._phase(lane)
                    self._tell()

    def _wait(self) -> bool:
        """Until there is something to do. Returns False at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._lanes or self._ending)
            if self.closed:
                while self._waiting:
                    self._say(self._waiting.popleft(), Failed(APIError(503, "the server is stopping", code="stopping", retry_after=10)))
            return not self._ending

    def _drop(self) -> None:
        with self._changed:
            self._waiting = collections.deque(job for job in self._waiting if not job.gone)
        for lane in list(self._lanes):
            lane.drop_gone()
            self._forget_empty(lane)

    def _let_in(self) -> None:
        """Waiting requests, as many as there is room for."""
        if self._lanes and not self.settings.join:
            return
        room = self.settings.max_batch - self.num_running
        joining: dict[_Lane, list[_Entry]] = {}
        for job in list(self._waiting):
            if job.count > room:
                break
            try:
                entry = _Entry.of(job, self.models[job.model])
            except APIError as error:
                self._remove(job, Failed(error))
                continue
            except Exception:
                logger.exception("a prompt could not be read")
                self._remove(job, Failed(APIError(500, "the prompt could not be read; the server's log says why")))
                continue
            lane = next((one for one in self._lanes if one.key == entry.key), None)
            if lane is None:
                lane = _Lane(entry.key, Batch(self.models[job.model], entry.params, yields=self.settings.join))
                self._lanes.append(lane)
            self._remove(job, Accepted(len(entry.asked.prompt)))
            joining.setdefault(lane, []).append(entry)
            room -= job.count
        for lane, entries in joining.items():
            with self._guarded(lane, [entry.job for entry in entries]):
                lane.join(entries)
        for lane in list(self._lanes):
            self._forget_empty(lane)

    def _remove(self, job: Job, event: Event) -> None:
        with self._changed:
            self._waiting.remove(job)
        self._say(job, event)

    def _phase(self, lane: _Lane) -> None:
        if lane not in self._lanes:
            return
        kind = "picture" if lane.batch.drawing else "text"
        self.metrics.rows.labels(lane.model_name, kind).observe(len(lane.batch.partials))
        with self._guarded(lane):
            finished = lane.batch.advance(self._words_of(lane))
            self._pictures(lane)
            for partial in finished:
                self._finish(lane, partial)
        self._forget_empty(lane)

    def _words_of(self, lane: _Lane) -> Watch | None:
        """What takes the tokens of a text phase as they are chosen; None where nobody wants them."""
        if not any(written.job.streams for written in lane.written.values()):
            return None

        def take(tokens: list[tuple[PartialRollout, list[int]]]) -> None:
            for partial, ids in tokens:
                written = lane.written[partial]
                if written.job.streams and not written.job.gone and (text := written.wording.more(ids)):
                    self._say(written.job, Words(written.choice, text))
            if time.monotonic() - self._told_at >= TELL_EVERY:
                self._tell()

        return take

    def _pictures(self, lane: _Lane) -> None:
        """Says the pictures that were just drawn."""
        before = {partial: len(partial.pictures) for partial in lane.written}
        decode_pictures(lane.batch.model, list(lane.written))
        for partial, written in lane.written.items():
            for pixels in partial.pictures[before[partial] :]:
                self._end_text(written)
                written.wording = Wording(lane.batch.model)
                self._say(written.job, Picture(written.choice, pixels))
                self.metrics.pictures.labels(lane.model_name).inc()

    def _end_text(self, written: _Written) -> None:
        """Says what was held back of a text."""
        if written.job.streams and (text := written.wording.end()):
            self._say(written.job, Words(written.choice, text))

    def _finish(self, lane: _Lane, partial: PartialRollout) -> None:
        written = lane.written.pop(partial)
        if is_broken(partial):
            self.metrics.documents.labels(lane.model_name, "failed").inc()
            self._say(written.job, Failed(APIError(500, NOT_FINITE)))
            written.job.gone = True
            return
        self._end_text(written)
        rollout = finish(lane.batch.model, [partial], lane.batch.params)[0]
        chosen = rollout.row.completion_mask
        texts, images = (int((chosen & (rollout.row.modality == kind)).sum()) for kind in (Modality.TEXT, Modality.IMAGE))
        for kind, count in (("text", texts), ("image", images)):
            self.metrics.tokens.labels(lane.model_name, kind).inc(count)
        self.metrics.documents.labels(lane.model_name, "length" if rollout.truncated else "stop").inc()
        self._mean_seconds += 0.1 * (time.monotonic() - written.began - self._mean_seconds)
        self._say(written.job, Finished(written.choice, rollout.document, rollout.truncated, texts, images))

    @contextlib.contextmanager
    def _guarded(self, lane: _Lane, joining: list[Job] | None = None) -> Any:
        """Where something goes wrong, who is in the batch is told, the batch is given up, and the server goes on."""
        try:
            yield
        except Exception as error:
            logger.exception("a batch of %d documents failed", len(lane.written))
            said = "the machine's memory is used up" if isinstance(error, torch.OutOfMemoryError) else "writing failed"
            for job in dict.fromkeys([*(written.job for written in lane.written.values()), *(joining or [])]):
                self.metrics.documents.labels(lane.model_name, "failed").inc(job.count)
                self._say(job, Failed(APIError(500, f"{said}; the server's log says more")))
            lane.written.clear()
            if lane in self._lanes:
                self._lanes.remove(lane)

    def _forget_empty(self, lane: _Lane) -> None:
        if lane in self._lanes and not lane.batch.partials:
            self._lanes.remove(lane)

    def _say(self, job: Job, event: Event) -> None:
        seconds = time.monotonic() - job.arrived
        if isinstance(event, Words) and job.first_text is None:
            job.first_text = seconds
            self.metrics.first_text.labels(job.model).observe(seconds)
        if isinstance(event, Picture) and job.first_picture is None:
            job.first_picture = seconds
            self.metrics.first_picture.labels(job.model).observe(seconds)
        self._told.append((job, event))

    def _tell(self) -> None:
        """Hands the events of this moment to the loops that wait for them."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Job, Event]]] = {}
        for job, event in self._told:
            by_loop.setdefault(job.loop, []).append((job, event))
        self._told, self._told_at = [], time.monotonic()
        for loop, events in by_loop.items():
            with contextlib.suppress(RuntimeError):  # a loop that ended; nobody waits there any more
                loop.call_soon_threadsafe(_deliver, events)


def _deliver(events: list[tuple[Job, Event]]) -> None:
    for job, event in events:
        job.events.put_nowait(event)


@dataclasses.dataclass
class _Written:
    """A document that is being written. `choice`: which of its request's."""

    job: Job
    choice: int
    wording: Wording
    began: float


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A request that is let in. `key`: documents with the same are written together."""

    job: Job
    asked: Asked
    params: SamplingParams

    @classmethod
    def of(cls, job: Job, model: UnifiedModel) -> _Entry:
        """Raises APIError where the model cannot answer."""
        try:
            prompt = model.encode_prompt(job.prompt, job.form)
            params = resolve(job.params, model)
            if job.max_images is None:
                params = fit_to_context(model, prompt, params)
            else:
                params = params.model_copy(update={"max_images": job.max_images})
            if job.form is not None and job.form.ends_with_image:
                model.check_can_draw()
            check_room(model, prompt, params)
            asked = Asked(prompt, generator(job.seed), job.count, params.max_images, job.max_tokens)
        except TooLong as error:
            raise invalid(str(error), param="messages", code="context_length_exceeded") from error
        except ValueError as error:
            code = "context_length_exceeded" if "context" in str(error) else None
            raise invalid(str(error), param="messages" if code else None, code=code) from error
        return cls(job, asked, params)

    @property
    def key(self) -> tuple[str, SamplingParams]:
        return self.job.model, self.params.model_copy(update={"max_images": 0})


class _Lane:
    """A batch, and whose documents they are."""

    def __init__(self, key: tuple[str, SamplingParams], batch: Batch) -> None:
        self.key, self.batch = key, batch
        self.written: dict[PartialRollout, _Written] = {}

    @property
    def model_name(self) -> str:
        return self.key[0]

    def join(self, entries: list[_Entry]) -> None:
        joined = iter(self.batch.join([entry.asked for entry in entries]))
        now = time.monotonic()
        for entry in entries:
            for choice in range(entry.job.count):
                self.written[next(joined)] = _Written(entry.job, choice, Wording(self.batch.model), now)

    def drop_gone(self) -> None:
        left = [partial for partial, written in self.written.items() if written.job.gone]
        for partial in left:
            del self.written[partial]
        if left:
            self.batch.drop(left)
