"""What a converter hands over for each record, and the options that it receives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from diptych.data.convert.pictures import Picture
from diptych.data.problems import Problems

MAX_IMAGES = 6  # of a document that is cut
Block = str | tuple[Picture]  # a text, or a picture in a tuple of one


@dataclasses.dataclass(frozen=True)
class Message:
    role: str
    blocks: tuple[Block, ...]
    loss: bool = True
    prefix: bool = False


@dataclasses.dataclass(frozen=True)
class RawRecord:
    """A record before its pictures are opened. `source_ids`: of the video, article or row it was made from, for exclusion."""

    id: str
    where: str
    messages: tuple[Message, ...]
    source_ids: tuple[str, ...] = ()
    license: str | None = None
    columns: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user asked for. `media`: the folder of pictures or videos that annotations point to. `prompt`: None: the kind's own.

    A record with fewer pictures than `min_images`, or more than `max_images`, is left out, of whatever kind. Kinds that make documents
    of whole steps, or windows, end them at `cut_at` pictures.
    """

    input: Path
    media: Path | None = None
    prompt: str | None = None
    min_images: int | None = None
    max_images: int | None = None
    license: str | None = None
    image_size: int | None = None
    share: float = 1.0
    seed: int = 0
    max_records: int | None = None

    @property
    def cut_at(self) -> int:
        return MAX_IMAGES if self.max_images is None else self.max_images

    def media_folder(self, what: str) -> Path:
        """Raises ValueError where none was given, or it is no folder."""
        if self.media is None or not self.media.is_dir():
            given = "nothing" if self.media is None else repr(str(self.media))
            raise ValueError(f"--media is {given}; this kind needs the folder of {what}")
        return self.media

    def instruction(self, own: str, **fields: object) -> str:
        """The prompt's text. Raises ValueError for a template with unknown fields."""
        template = self.prompt or own
        try:
            return template.format(**fields)
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"--prompt {template!r} has the field {error}; allowed are {', '.join(f'{{{f}}}' for f in fields)}") from error


Converter = Callable[[Options, Problems], Iterator[RawRecord]]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A data set that can be converted. `read` names its layout; `license` is that of the annotations, as far as it is known."""

    read: Converter
    license: str
    summary: str


def document(asked: tuple[Block, ...], answer: tuple[Block, ...]) -> tuple[Message, ...]:
    """One question and its answer, which is trained."""
    return (Message("user", asked), Message("assistant", answer))
