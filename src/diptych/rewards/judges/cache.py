"""Replies by the content of their question: the same question is never paid for twice."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

from diptych.runs import atomic_text


class ReplyCache:
    """The last `size` replies in memory, and all of them in `folder`, if one is given.

    Only the texts of usable replies are kept, never values: they are read anew each time.
    """

    def __init__(self, size: int, folder: str | None = None) -> None:
        self.size, self.folder = size, Path(folder) if folder else None
        self._replies: OrderedDict[str, str] = OrderedDict()

    @staticmethod
    def key(request: dict[str, Any]) -> str:
        """SHA-256 of the whole request: model, its revision if one is named, settings, prompt and pictures. The server's address is no
        part of it."""
        return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()

    def get(self, key: str) -> str | None:
        reply = self._replies.get(key)
        if reply is not None:
            self._replies.move_to_end(key)
        elif self.folder is not None:
            reply = self._read(key)
            if reply is not None:
                self._remember(key, reply)
        return reply

    def put(self, key: str, reply: str) -> None:
        self._remember(key, reply)
        if self.folder is not None:
            atomic_text(self._path(key), json.dumps({"key": key, "reply": reply}) + "\n")

    def _remember(self, key: str, reply: str) -> None:
        self._replies[key] = reply
        while len(self._replies) > self.size:
            self._replies.popitem(last=False)

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / key[:2] / f"{key}.json"

    def _read(self, key: str) -> str | None:
        try:
            stored = json.loads(self._path(key).read_text())
        except (OSError, ValueError):  # not there, or half a file: ask again
            return None
        fits = isinstance(stored, dict) and stored.get("key") == key and isinstance(stored.get("reply"), str)
        return stored["reply"] if fits else None
