"""What is wrong with data: reported with its place, counted by cause, skipped; fatal only where the user asks for it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

# What values raise that are of other types, sizes or depths than a data set's description says
NONSENSE = (ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError, RecursionError)


@dataclasses.dataclass(frozen=True)
class Problem:
    """`where` is file and line, row or member; `cause` a few fixed words that can be counted; `detail` the rest."""

    where: str
    cause: str
    detail: str = ""
    id: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {key: value for key, value in dataclasses.asdict(self).items() if value}


class Problems:
    """All problems of one job. `muted`: a job that is resumed passes what it has already reported."""

    def __init__(self, strict: bool = False) -> None:
        self.strict, self.muted = strict, False
        self.found: list[Problem] = []

    def report(self, where: str, cause: str, detail: object = "", id: str = "") -> None:
        """Raises ValueError under `strict`."""
        if self.muted:
            return
        words = " ".join(str(detail).split())[:300]
        problem = Problem(*(text.encode(errors="backslashreplace").decode() for text in (where, cause, words, id)))
        if self.strict:
            raise ValueError(f"{where}: {cause}{': ' if problem.detail else ''}{problem.detail} (--strict stops at the first problem)")
        self.found.append(problem)

    def by_cause(self) -> dict[str, int]:
        """How many of each cause, the most frequent first."""
        return dict(sorted(Counter(problem.cause for problem in self.found).items(), key=lambda pair: (-pair[1], pair[0])))
