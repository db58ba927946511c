"""The benchmarks by name; a module is imported when its benchmark is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diptych.evaluation.benchmark import Benchmark


class _Lazy(Mapping[str, "type[Benchmark]"]):
    def __init__(self, places: dict[str, str]) -> None:
        self._places = places

    def __getitem__(self, name: str) -> type[Benchmark]:
        module, _, cls = self._places[name].partition(":")
        return getattr(importlib.import_module(module), cls)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


BENCHMARKS: Mapping[str, type[Benchmark]] = _Lazy(
    {
        "mmie": "diptych.evaluation.mmie:MMIE",
        "interleavedbench": "diptych.evaluation.interleavedbench:InterleavedBench",
        "opening": "diptych.evaluation.opening:OpenING",
        "ueval": "diptych.evaluation.ueval:UEval",
        "geneval": "diptych.evaluation.geneval:GenEval",
        "mme": "diptych.evaluation.mme:MME",
    }
)
