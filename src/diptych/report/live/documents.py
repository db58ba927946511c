"""Saved documents of a run: which there are, those of one step group by group, and those in which something is found."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PICTURE = re.compile(r"data:image/(png|jpeg|webp|gif);base64,[A-Za-z0-9+/=]+")
MOST_GROUPS = 12  # in one answer


@dataclasses.dataclass(frozen=True)
class Search:
    """`text` in prompt or answer, whatever its case; `low` <= `reward` <= `high`, of a document's value or the mean of its steps."""

    text: str = ""
    reward: str = ""
    low: float | None = None
    high: float | None = None

    def finds(self, entry: Entry) -> bool:
        if self.text.casefold() not in entry.text:
            return False
        if not self.reward or (self.low is None and self.high is None):
            return True
        value = entry.rewards.get(self.reward)
        return value is not None and (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a search looks at of one document."""

    group: int
    text: str
    rewards: dict[str, float]


class Documents:
    """The folder `samples`, read when something is asked; what a search looks at is kept, pictures are not."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._lock = folder, threading.Lock()
        self._entries: dict[int, tuple[int, list[Entry]]] = {}

    def saved(self) -> list[int]:
        """Steps with saved documents, ascending."""
        if self.folder.is_symlink():
            return []
        found = (re.fullmatch(r"step_(\d+)\.jsonl", path.name) for path in self.folder.glob("step_*.jsonl") if not path.is_symlink())
        return sorted(int(match[1]) for match in found if match)

    def find(self, search: Search, step: int | None = None, before: int | None = None) -> dict[str, Any]:
        """Groups in which a document is found, newest step first: of one step, or of all before `before`, MOST_GROUPS at a time.

        `more`: the step to go on before, where there may be others.
        """
        steps = [one for one in reversed(self.saved()) if (step is None or one == step) and (before is None or one < before)]
        groups: list[dict[str, Any]] = []
        for one in steps:
            if len(groups) >= MOST_GROUPS:
                return {"groups": groups, "more": groups[-1]["step"]}
            groups += self._groups(one, search)
        return {"groups": groups, "more": None}

    def _groups(self, step: int, search: Search) -> Iterator[dict[str, Any]]:
        entries = self._of(step)
        hits = [search.finds(entry) for entry in entries]
        if not any(hits):
            return
        records = _read(self.folder / f"step_{step}.jsonl")
        for group in dict.fromkeys(entry.group for entry in entries):
            members = [n for n, entry in enumerate(entries) if entry.group == group and n < len(records)]
            if any(hits[n] for n in members):
                yield {
                    "step": step, "group": group, "prompt": _blocks(records[members[0]].get("prompt")),
                    "members": [{**_member(records[n], entries[n]), "number": place, "found": hits[n]} for place, n in enumerate(members)],
                }  # fmt: skip

    def _of(self, step: int) -> list[Entry]:
        path = self.folder / f"step_{step}.jsonl"
        try:
            written = path.stat().st_mtime_ns
        except OSError:
            return []
        with self._lock:
            known = self._entries.get(step)
            if known is None or known[0] != written:
                known = self._entries[step] = (written, _entries(_read(path)))
            return known[1]


def _read(path: Path) -> list[dict[str, Any]]:
    """Whole lines that are records."""
    found = []
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def _entries(records: list[dict[str, Any]]) -> list[Entry]:
    """Records of before groups were noted: neighbours with one prompt are a group."""
    found: list[Entry] = []
    group, prompt = -1, None
    for record in records:
        if record.get("prompt") != prompt or prompt is None:
            group, prompt = group + 1, record.get("prompt")
        noted = record.get("group", group)
        blocks = [*_blocks(record.get("prompt")), *_blocks(record.get("answer"))]
        text = " ".join(block["text"] for block in blocks if block["type"] == "text").casefold()
        found.append(Entry(noted if isinstance(noted, int) else group, text, _means(record)))
    return found


def _means(record: dict[str, Any]) -> dict[str, float]:
    """What each reward says of a document: its document value, or the mean over its steps; without what is missing."""
    whole = {name: value for name, value in _numbers(record.get("document")).items() if value is not None}
    steps: dict[str, list[float]] = {}
    for values in _steps(record):
        for name, value in values.items():
            if value is not None:
                steps.setdefault(name, []).append(value)
    found = {name: sum(values) / len(values) for name, values in steps.items()} | whole
    return found | {name: value for name, value in _numbers({"reward": record.get("reward")}).items() if value is not None}


def _member(record: dict[str, Any], entry: Entry) -> dict[str, Any]:
    answer = _blocks(record.get("answer"))
    advantages = record.get("advantages")
    extra = record.get("extra")
    return {
        "answer": answer, "steps": _steps(record), "document": _numbers(record.get("document")), "means": entry.rewards,
        "reward": record["reward"] if _is_number(record.get("reward")) else None,
        "advantages": [value if _is_number(value) else None for value in advantages] if isinstance(advantages, list) else [],
        "extra": {str(name): str(value)[:300] for name, value in extra.items()} if isinstance(extra, dict) else {},
    }  # fmt: skip


def _steps(record: dict[str, Any]) -> list[dict[str, float | None]]:
    steps = record.get("steps")
    return [_numbers(values) for values in steps] if isinstance(steps, list) else []


def _numbers(values: Any) -> dict[str, float | None]:
    """None where a value is missing (NaN)."""
    return {str(name): value if _is_number(value) else None for name, value in values.items()} if isinstance(values, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _blocks(blocks: Any) -> list[dict[str, str]]:
    """Texts, and pictures that are in the record itself: no other address is ever given to a browser."""
    found = []
    for block in blocks if isinstance(blocks, list) else ():
        if isinstance(block, dict) and block.get("type") == "image" and PICTURE.fullmatch(str(block.get("image"))):
            found.append({"type": "image", "image": block["image"]})
        elif isinstance(block, dict) and block.get("type") == "text":
            found.append({"type": "text", "text": str(block.get("text", ""))})
        else:
            found.append({"type": "text", "text": "(a picture that cannot be shown)"})
    return found
