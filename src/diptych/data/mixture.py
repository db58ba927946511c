"""Mixing sources by weight. Which record stands at which place is a pure function of (seed, place), so a run that is
resumed at a step reads exactly what it would have read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diptych.config import MixtureSource
from diptych.data.jsonl import Record
from diptych.data.records import Source, open_source
from diptych.runtime import rng as make_rng
from diptych.worlds.storyboard.scene import Split


class Mixture:
    """`batch(step, size)` draws each record's source by weight, then the record uniformly from that source."""

    def __init__(self, sources: Sequence[MixtureSource], seed: int, split: Split = "train") -> None:
        self.seed = seed
        self.sources: list[Source] = [open_source(s.name, s.num_records, seed=seed, split=split) for s in sources]
        weights = np.array([s.weight for s in sources])
        self.weights = weights / weights.sum()

    def batch(self, step: int, size: int) -> list[Record]:
        rng = make_rng(self.seed, 3, step)
        picks = rng.choice(len(self.sources), size=size, p=self.weights)
        return [self.sources[int(p)][int(rng.integers(2**31))] for p in picks]
