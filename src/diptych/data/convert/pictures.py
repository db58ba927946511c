"""Pictures on their way into a converted data set: where they come from, and the bytes that are written."""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import PIL.Image

from diptych.data.exclude import central_square
from diptych.pictures import decode, to_rgb

VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov")
KEPT = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}
QUALITY = 95
MAX_SECONDS = 1e6  # of a video, more than eleven days


class MissingPicture(ValueError):
    """There is no such file."""


@dataclasses.dataclass(frozen=True)
class Frame:
    """The frame of a video that is shown at `seconds`."""

    video: Path
    seconds: float


Picture = bytes | Path | Frame | str  # a string is a data address


def resolve(value: Any, root: Path, files: Mapping[str, bytes] | None = None) -> Picture:
    """A picture as data sets give it: a path, a data address, bytes, a hub-style {"bytes", "path"}, or a member of the sample.

    Raises ValueError for anything else, web addresses included.
    """
    if isinstance(value, dict) and "bytes" in value and value["bytes"] is not None:
        value = value["bytes"]
    elif isinstance(value, dict) and isinstance(value.get("path"), str):
        value = value["path"]
    if isinstance(value, bytes | Path | Frame):
        return value
    if isinstance(value, str):
        if value.startswith("data:image/"):
            return value
        if value.startswith(("http://", "https://")):
            raise ValueError(f"{value[:120]} is a web address; download the picture and give its path")
        if files and value.lower() in files:
            return files[value.lower()]
        return root / value
    raise ValueError(f"a picture is {value!r:.120}; allowed are a path, a data address, bytes, and {{'bytes': ..., 'path': ...}}")


def load(picture: Picture) -> tuple[PIL.Image.Image, bytes | None, str | None]:
    """Pixels (RGB), and the bytes and format as they came where they can be kept.

    Raises MissingPicture where there is no such file, ValueError where it does not open, and nothing else.
    """
    if isinstance(picture, Frame):
        return frame_at(picture.video, picture.seconds), None, None
    if isinstance(picture, str):
        return decode(picture).pixels, None, None
    if isinstance(picture, Path) and not os.path.isfile(picture):  # unlike Path.is_file, also where the name is too long
        raise MissingPicture(f"{str(picture)[:300]} does not exist")
    found = decode(picture)
    return found.pixels, found.raw if found.as_stored else None, found.format


def encode(pixels: PIL.Image.Image, raw: bytes | None, kind: str | None, size: int | None) -> tuple[bytes, str]:
    """What is written, and its ending: the bytes as they came, or a JPEG of the central square at `size` pixels a side."""
    if size is None and raw is not None and kind in KEPT:
        return raw, KEPT[kind]
    if size is not None:
        pixels = central_square(pixels).resize((size, size), PIL.Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    pixels.save(buffer, format="JPEG", quality=QUALITY, subsampling=0)
    return buffer.getvalue(), ".jpg"


def find_file(folder: Path, name: str, endings: tuple[str, ...]) -> Path | None:
    """`folder/name` with one of the endings."""
    paths = (folder / f"{name}{ending}" for ending in endings)
    return next((path for path in paths if os.path.isfile(path)), None)  # unlike Path.is_file, also where the name is too long


def frame_at(video: Path, seconds: float) -> PIL.Image.Image:
    """The first frame that is shown at `seconds` or later.

    Raises MissingPicture where there is no video, ValueError where it is broken or ends before.
    """
    try:
        import av
    except ImportError as error:
        raise ValueError(f"reading frames of {video} needs the extra: pip install 'diptych[data]'") from error
    if not os.path.isfile(video):
        raise MissingPicture(f"{video} does not exist")
    if not seconds < MAX_SECONDS:  # also where it is no number
        raise ValueError(f"{video} has no second {seconds:g}")
    try:
        with av.open(str(video)) as container:
            if not container.streams.video:
                raise ValueError(f"{video} has no pictures")
            stream = container.streams.video[0]
            start = float((stream.start_time or 0) * (stream.time_base or 0))
            container.seek(int(max(0.0, seconds) * av.time_base), backward=True)
            for frame in container.decode(stream):
                length = 1 / float(stream.average_rate or 25)
                if frame.time is not None and frame.time - start + length > seconds:
                    return to_rgb(frame.to_image())
    except (av.FFmpegError, OSError) as error:
        raise ValueError(f"{video} cannot be read: {error}") from error
    raise ValueError(f"{video} ends before second {seconds:g}")
