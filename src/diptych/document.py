"""Illustrated documents: what a unified model reads and writes, and the message form that the ecosystem speaks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image

from diptych.pictures import image_data_address, open_image

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class Text:
    text: str


@dataclasses.dataclass(frozen=True, eq=False)
class Image:
    """A picture as pixels, as codes, or both.

    `pixels`: PIL image, RGB; None until a sampled image is decoded.
    `codes`: (num_positions, depth) int64; None for a picture that came from outside.
    """

    pixels: PIL.Image.Image | None = None
    codes: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.pixels is None and self.codes is None:
            raise ValueError("an Image needs pixels or codes; neither was given")


STAND_IN = Image(PIL.Image.new("RGB", (1, 1)))  # for a picture that nobody opened, where lengths alone are asked for
Segment = Text | Image


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """An ordered list of segments, e.g. text, picture, text, picture."""

    segments: tuple[Segment, ...]

    def __iter__(self):
        return iter(self.segments)

    def __len__(self) -> int:
        return len(self.segments)

    @property
    def images(self) -> list[Image]:
        return [segment for segment in self.segments if isinstance(segment, Image)]

    @property
    def text(self) -> str:
        """All text segments, joined by a space."""
        return " ".join(segment.text for segment in self.segments if isinstance(segment, Text))

    def captions(self) -> list[tuple[int, str, Image]]:
        """(place, caption, picture) of each picture with a caption: the text before it, with nothing but pictures between.

        A picture that has no text there, or an empty one, is left out.
        """
        found: list[tuple[int, str, Image]] = []
        caption = ""
        for place, segment in enumerate(self.segments):
            if isinstance(segment, Text):
                caption = segment.text
            elif caption.strip():
                found.append((place, caption, segment))
        return found

    def to_blocks(self) -> list[dict[str, Any]]:
        """`[{"type": "text", "text": ...}, {"type": "image", "image": PIL image}, ...]`

        Raises ValueError for an image that has codes but no pixels yet.
        """
        blocks: list[dict[str, Any]] = []
        for segment in self.segments:
            if isinstance(segment, Text):
                blocks.append({"type": "text", "text": segment.text})
            elif segment.pixels is None:
                raise ValueError("an image of this document has codes but no pixels; decode it first")
            else:
                blocks.append({"type": "image", "image": segment.pixels})
        return blocks

    @classmethod
    def from_blocks(cls, blocks: str | Sequence[dict[str, Any]], folder: Path | None = None) -> Document:
        """The inverse of `to_blocks`; a plain string is one text segment.

        An image may be a PIL image, a file path, the bytes of a file, or a `data:image/...;base64,` address. `folder`: what paths are
        relative to; by default the working directory.
        """
        if isinstance(blocks, str):
            return cls((Text(blocks),))
        segments: list[Segment] = []
        for index, block in enumerate(blocks):
            kind = block.get("type") if isinstance(block, dict) else None
            if kind == "text" and isinstance(block.get("text"), str):
                segments.append(Text(block["text"]))
            elif kind == "image" and block.get("image") is not None:
                segments.append(Image(open_image(block["image"], folder)))
            else:
                raise ValueError(
                    f"block {index} is {block!r:.120}; allowed are {{'type': 'text', 'text': str}} and "
                    "{'type': 'image', 'image': PIL image, path or data address}"
                )
        return cls(tuple(segments))


NOTHING = Document(())


# --- message form ---
def to_message(role: str, document: Document) -> dict[str, Any]:
    return {"role": role, "content": document.to_blocks()}


def to_json_blocks(document: Document) -> list[dict[str, Any]]:
    """`to_blocks` with images as data addresses: ready for JSON, read back by `Document.from_blocks`."""
    return [
        {"type": "image", "image": image_data_address(block["image"])} if block["type"] == "image" else block
        for block in document.to_blocks()
    ]


def join(documents: Iterable[Document]) -> Document:
    return Document(tuple(segment for document in documents for segment in document))


def valid_text(text: str) -> str:
    """The text itself. Raises ValueError for a lone surrogate: Python keeps one in a string, but no tokenizer or file can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text holds a lone surrogate ({text[error.start]!r}) at character {error.start} of {len(text)}: half of a character "
            "(of an emoji, say), as a string that was cut leaves it; mend the text"
        ) from None
    return text
