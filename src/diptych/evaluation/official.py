"""Files that official scorers wrote: what is broken in one is reported with its place and left out; fatal only where nothing is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diptych.data.problems import NONSENSE, Problems

UNUSABLE, REPEATED, STRANGER = "unusable entry", "repeated entry", "entry of something that was not asked"
Entries = dict[str, tuple[str, Any]]  # by id: place in the file, entry


def entries_of(found: Sequence[Any], path: Path, problems: Problems, key: Callable[[Any], str]) -> Entries:
    """Entries of an official file's list by id, each with its place. Those that are no objects, without an id, or second ones of an id
    are reported and left out."""
    entries: Entries = {}
    for number, entry in enumerate(found, start=1):
        where = f"{path}:entry {number}"
        try:
            id = key(entry)
        except NONSENSE as error:
            problems.report(where, UNUSABLE, f"{type(error).__name__}: {error}")
            continue
        if id in entries:
            problems.report(where, REPEATED, "the first one stays", id)
        else:
            entries[id] = where, entry
    return entries


def refuse_strangers(path: Path, entries: Entries, known: set[str], problems: Problems) -> Entries:
    """Entries of requests that were asked; others are reported. Raises ValueError where none is left: the file is of something else."""
    for id, (where, _) in entries.items():
        if id not in known:
            problems.report(where, STRANGER, "", id)
    kept = {id: entry for id, entry in entries.items() if id in known}
    if not kept:
        raise nothing_usable(path, problems)
    return kept


def nothing_usable(path: Path, problems: Problems) -> ValueError:
    first = problems.found[0] if problems.found else None
    problem = "" if first is None else f"; {first.where}: {first.cause}, {first.detail or repr(first.id)}"
    return ValueError(
        f"{path} holds nothing that the official scorer wrote for this submission{problem}. Give its result of this submission"
    )
