"""Mixing sources by weight. Which record stands at which place is a pure function of (seed, place), so a run that is
resumed at a step reads exactly what it would have read.

A record that cannot be used stops a training, or is left out where the recipe allows it (`max_skipped_records`): the next one of its source
takes its place, and it is counted and reported.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from diptych.config import MixtureSource
from diptych.data.conversation import Record
from diptych.data.problems import Problem, Problems
from diptych.data.records import Source, open_source, split_of
from diptych.runtime import gather, world_size
from diptych.runtime import rng as make_rng
from diptych.worlds.storyboard.scene import Split

if TYPE_CHECKING:
    from diptych.models.base import UnifiedModel  # which takes torch

logger = logging.getLogger(__name__)


class Mixture:
    """`batch(step, size)` draws each record's source by weight, then the record uniformly from that source.

    skipped: for each source what was left out of it: records by their place, rows that are no records by -1, -2, ...
    """

    def __init__(
        self, sources: Sequence[MixtureSource], seed: int, split: Split = "train", max_skipped: float = 0.0, beside: Mixture | None = None
    ) -> None:
        """`max_skipped`: the share of a source's rows that may be left out. `beside`: a mixture of another split of the same sources, whose
        files need not be scanned again. Raises ValueError where more is broken than may be left out."""
        self.seed, self.split, self.max_skipped = seed, split, max_skipped
        self.sources: list[Source] = []
        self.skipped: list[dict[int, Problem]] = []
        for number, source in enumerate(sources):
            file = beside.sources[number].file if beside is not None else None
            problems = Problems() if max_skipped else None
            if beside is not None and file is not None:
                self.sources.append(split_of(source.name, file, split))
                self.skipped.append({at: problem for at, problem in beside.skipped[number].items() if at < 0})
            else:
                self.sources.append(open_source(source.name, source.num_records, seed=seed, split=split, problems=problems))
                self.skipped.append({-1 - at: problem for at, problem in enumerate(problems.found if problems else ())})
            self.sources[-1].form = source.form
            self.check_share(number)
        weights = np.array([s.weight for s in sources])
        self.weights = weights / weights.sum()

    @property
    def columns(self) -> list[str]:
        """What any source gives to rewards."""
        return sorted({column for source in self.sources for column in source.columns})

    def check_model(self, model: UnifiedModel) -> None:
        """Raises ValueError where a source's records are of a built-in world that the model does not know."""
        for source in self.sources:
            if source.world is not None:
                try:
                    model.check_world(source.world)
                except ValueError as error:
                    raise ValueError(f"{source.name}: {error}") from None

    def batch(self, step: int, size: int) -> list[Record]:
        return self.made(step, size, lambda _, record: record)

    def made(self, step: int, size: int, make: Callable[[int, Record], Any], places: Sequence[int] | None = None) -> list[Any]:
        """What `make` makes of each record, given its place in the batch; only of those at `places`, where these are given. A ValueError
        that it raises is about the record."""
        return [
            self.taken(*drawn, lambda place, number, at: make(place, self.sources[number][at])) for drawn in self.drawn(step, size, places)
        ]

    def drawn(self, step: int, size: int, places: Sequence[int] | None = None) -> list[tuple[int, int, int]]:
        """Place in the batch, source, and index in it, of what stands there if nothing is left out."""
        rng = make_rng(self.seed, 3, step)
        picks = rng.choice(len(self.sources), size=size, p=self.weights)
        drawn = [(place, int(p), int(rng.integers(2**31))) for place, p in enumerate(picks)]
        return [drawn[place] for place in (range(size) if places is None else places)]

    def likely(self, number: int, index: int) -> int:
        """The record of a source that `taken` tries first, as far as is known now."""
        size, skipped = self.sources[number].size, self.skipped[number]
        if size is None:
            return index
        return next((at % size for at in range(index, index + size) if at % size not in skipped), index % size)

    def taken(self, place: int, number: int, index: int, attempt: Callable[[int, int, int], Any]) -> Any:
        """What `attempt(place, source, index)` makes of the first record from `index` on that can be used. A ValueError that it raises is
        about the record."""
        source = self.sources[number]
        if source.size is None:
            return attempt(place, number, index)
        for at in range(index, index + source.size):
            at %= source.size
            if at not in self.skipped[number]:
                try:
                    return attempt(place, number, at)
                except ValueError as error:
                    self.skip(number, at, error)
        raise ValueError(f"none of the {source.size} {self.split} records of {source.name} can be used: {self._told(number)}")

    def skip(self, number: int, at: int, error: ValueError, *, count: bool = True) -> None:
        """Leaves a record of a source out. Raises ValueError naming it where that is one too many; without `count` whoever asks
        `check_share` does."""
        source = self.sources[number]
        assert source.file is not None
        where, id = source.place(at)
        self.skipped[number][at] = Problem(where, "not used", str(error).removeprefix(f"{where}: "), id)
        if count:
            self.check_share(number)
            logger.warning("left out: %s: %s", where, error)

    def share_skipped(self) -> None:
        """What any process left out of its share, all leave out. Raises ValueError, in all of them, where it is too much."""
        if world_size() > 1:
            for part in gather(self.skipped):
                for skipped, others in zip(self.skipped, part, strict=True):
                    skipped |= others
            for number in range(len(self.skipped)):
                self.check_share(number)

    def check_share(self, number: int) -> None:
        """Raises ValueError where more rows of a source are left out, with any of their answers, than is allowed."""
        source, skipped = self.sources[number], self.skipped[number]
        if not skipped or source.file is None:
            return
        count, total = len({source.row(at) if at >= 0 else at for at in skipped}), source.file.num_rows
        if count > self.max_skipped * total:
            allowed = f"max_skipped_records: {self.max_skipped:g}" if self.max_skipped else "none may be left out (max_skipped_records: 0)"
            raise ValueError(
                f"{count} of the {total} rows of {source.name} cannot be used, and {allowed}: {self._told(number)}. Mend or remove what is "
                "named, or allow a larger share; `diptych data inspect --model` lists all of them"
            )

    def left_out(self) -> list[dict[str, Any]]:
        """Everything that was left out, for JSON."""
        found = zip(self.sources, self.skipped, strict=True)
        return [{"source": source.name, **problem.as_dict()} for source, skipped in found for problem in skipped.values()]

    def _told(self, number: int) -> str:
        found = list(self.skipped[number].values())
        more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
        ids = [f" (id {p.id})" if p.id and not p.where.endswith(p.id) else "" for p in found]
        return "; ".join(f"{p.where}{id}: {p.detail}" for p, id in zip(found[:5], ids, strict=False)) + more
