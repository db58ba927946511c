"""What a server is started with."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from diptych.userfiles import read_entries

KEYS_VARIABLE = "DIPTYCH_API_KEYS"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Limits of a server.

    max_batch: documents that are written at the same time. max_waiting: documents that wait for their turn; more are refused (429).
    max_choices: `n` of one request. timeout_seconds: from a request's arrival to its last byte. body_seconds: to send its body in.
    max_body: bytes. max_pictures, max_pixels: of all pictures of a request. fetch_pictures: outside addresses are read.
    join: documents join those that are being written at the next phase; False: they wait until all of these are finished.
    keys: what a request may authorize itself with; none: everybody may. hosts: `Host` headers that are answered; None: all.
    origins: web pages that may call (CORS).
    """

    max_batch: int = 32
    max_waiting: int = 64
    max_choices: int = 8
    timeout_seconds: float = 600.0
    body_seconds: float = 30.0
    max_body: int = 32 * 2**20
    max_pictures: int = 16
    max_pixels: int = 32_000_000
    fetch_pictures: bool = False
    join: bool = True
    keys: tuple[str, ...] = ()
    hosts: frozenset[str] | None = None
    origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_choices", "timeout_seconds", "body_seconds", "max_body", "max_pixels"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be more than 0")
        for name in ("max_waiting", "max_pictures"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if self.max_choices > self.max_batch:
            raise ValueError(
                f"max_choices is {self.max_choices} and max_batch {self.max_batch}: such a request could never be answered; lower "
                "max_choices or raise max_batch"
            )


def read_keys(file: Path | None) -> tuple[str, ...]:
    """API keys: the lines of a file, and what the environment lists in DIPTYCH_API_KEYS, with commas between.

    Raises ValueError for a file that holds none, and for keys that an HTTP header cannot carry.
    """
    keys = read_entries(file) if file is not None else []
    if file is not None and not keys:
        raise ValueError(f"--api-keys {str(file)!r} holds no key; write one a line, or leave the option out to let everybody in")
    keys += [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",") if key.strip()]
    for number, key in enumerate(keys, start=1):
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError(f"API key {number} has characters other than printable ASCII without spaces, which no header can carry")
    return tuple(keys)


def own_hosts(host: str, names: Sequence[str] = ("localhost", "127.0.0.1", "[::1]")) -> frozenset[str] | None:
    """The `Host` headers of a server that only its own machine reaches, so that no web page reaches it under a name of its own (DNS
    rebinding); None where it listens for others."""
    return frozenset(names) if host in {name.strip("[]") for name in names} else None
