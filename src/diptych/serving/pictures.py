"""Pictures that a request brings: data addresses and, where it was allowed, addresses on the net."""

from __future__ import annotations

import base64
import binascii
import io
import re
import urllib.parse
from collections.abc import Sequence

import PIL.Image

from diptych.document import Document, Image, Text
from diptych.pictures import decode, reading
from diptych.serving.errors import invalid
from diptych.serving.fetching import fetch
from diptych.serving.protocol import Message, PicturePart
from diptych.serving.settings import Settings

_DATA = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII)
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # no format that starts another program, or reads files


def prompt_of(messages: Sequence[Message], settings: Settings) -> Document:
    """All messages, one after the other, as the prompt that a conversation of several turns is in training (docs/data.md).

    Raises APIError where the last message is not the user's, where one holds nothing, and for pictures that are not read.
    """
    if messages[-1].role != "user":
        raise invalid(f"the last message is of the role {messages[-1].role}; it must be the user's, to be answered", param="messages")
    reader = _Reader(settings)
    segments: list[Text | Image] = []
    for number, message in enumerate(messages):
        where = f"messages.{number}.content"
        found: list[Text | Image] = []
        for place, part in enumerate([message.content] if isinstance(message.content, str) else message.content):
            if isinstance(part, PicturePart):
                found.append(Image(reader.read(part.image_url.url, f"{where}.{place}.image_url.url")))
            else:
                text = part if isinstance(part, str) else part.text
                found += [Text(text)] if text.strip() else []
        if not found and message.role in ("user", "assistant"):
            raise invalid(f"the {message.role}'s message is empty; a picture, or a text of more than spaces, is needed", param=where)
        segments += found
    return Document(tuple(segments))


class _Reader:
    """Reads the pictures of one request, which share its limits."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.count, self.pixels, self.bytes = 0, 0, 0

    def read(self, url: str, where: str) -> PIL.Image.Image:
        limits = self.settings
        self.count += 1
        if self.count > limits.max_pictures:
            raise invalid(f"the request brings more than {limits.max_pictures} pictures, the most that are read", param=where)
        raw = self._bytes(url, where)
        self.bytes += len(raw)
        try:
            with reading(f"of {len(raw)} bytes"), PIL.Image.open(io.BytesIO(raw), formats=_FORMATS) as opened:
                width, height = opened.size
        except ValueError as error:
            raise invalid(str(error), param=where, code="invalid_image") from error
        self.pixels += width * height
        if self.pixels > limits.max_pixels:
            raise invalid(
                f"the picture has {width} x {height} pixels, and those of a request may have {limits.max_pixels} together; make it smaller",
                param=where, code="image_too_large",
            )  # fmt: skip
        try:
            return decode(raw).pixels
        except ValueError as error:
            raise invalid(str(error), param=where, code="invalid_image") from error

    def _bytes(self, url: str, where: str) -> bytes:
        begin = _DATA.match(url)
        if begin:
            try:
                return base64.b64decode(url[begin.end() :], validate=True)
            except (binascii.Error, ValueError) as error:
                raise invalid(f"the data address is no valid base64: {error}", param=where, code="invalid_image") from error
        if url[:5].lower() == "data:":
            raise invalid("a data address begins with data:image/...;base64, and holds a picture's file", param=where, code="invalid_image")
        scheme = urllib.parse.urlsplit(url).scheme if len(url) <= 4096 and url.isprintable() else ""
        if scheme not in ("http", "https"):
            raise invalid("a picture's address begins with data:image/...;base64, or https://", param=where, code="invalid_image")
        if not self.settings.fetch_pictures:
            raise invalid(
                "this server reads no outside addresses (--fetch-pictures would allow it); send the picture as data:image/...;base64,",
                param=where, code="invalid_image_url",
            )  # fmt: skip
        try:
            return fetch(url, self.settings.max_body - self.bytes)
        except ValueError as error:
            raise invalid(str(error), param=where, code="invalid_image_url") from error
