"""Keeping benchmarks out of training data: by source id, and by a perceptual hash of pictures.

The hash (dHash, 64 bits): the picture in grey at 9 x 8 pixels; a bit says whether a pixel is brighter than its right neighbour. It
survives scaling, JPEG and changes of brightness. Whole pictures and their central squares are both compared, because converters crop.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from diptych.data.problems import Problems
from diptych.data.readers import read_rows
from diptych.document import open_image

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
LISTS = (".json", ".jsonl", ".parquet")
ID_KEYS = ("id", "data_id", "video_id", "story_id", "photo_flickr_id", "orig_id", "source_id", "image_id")
MAX_DISTANCE = 4  # of 64 bits; unrelated pictures differ by about 32, with a standard deviation of about 4 to 8
FLAT = 6  # grey levels: pictures with less contrast than this have no pattern to compare


def dhash(picture: PIL.Image.Image) -> int | None:
    """64 bits, row by row, the first pixel highest; None for a picture without contrast, whose bits would say nothing."""
    small = picture.convert("L").resize((9, 8), PIL.Image.Resampling.BOX)
    pixels = np.asarray(small, dtype=np.int16)  # (8, 9)
    if int(pixels.max()) - int(pixels.min()) < FLAT:
        return None
    bits = (pixels[:, :-1] > pixels[:, 1:]).flatten()  # (64,)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def central_square(picture: PIL.Image.Image) -> PIL.Image.Image:
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))


def hashes(picture: PIL.Image.Image) -> set[int]:
    """Of the whole picture and of its central square."""
    return {found for found in (dhash(picture), dhash(central_square(picture))) if found is not None}


class Exclusion:
    """Ids and pictures that training data may not contain."""

    def __init__(self, ids: Iterable[str] = (), pictures: Iterable[int] = (), max_distance: int = MAX_DISTANCE) -> None:
        self.ids = frozenset(ids)
        self.pictures = np.array(sorted(set(pictures)), dtype=np.uint64)  # (N,)
        self.max_distance = max_distance

    def reason(self, ids: Iterable[str], pictures: Iterable[PIL.Image.Image]) -> str | None:
        """Why a record with these ids and pictures is left out; None where it may stay."""
        for id in ids:
            if id in self.ids:
                return f"id {id} is in the exclusion list"
        if len(self.pictures) == 0:
            return None
        for number, picture in enumerate(pictures, start=1):
            for value in hashes(picture):
                distance = int(np.bitwise_count(self.pictures ^ np.uint64(value)).min())
                if distance <= self.max_distance:
                    return f"picture {number} is that of a benchmark ({distance} of 64 bits differ)"
        return None

    @classmethod
    def load(cls, paths: Iterable[Path], problems: Problems, max_distance: int = MAX_DISTANCE) -> Exclusion:
        """From files and folders (searched below): pictures, `.txt` with an id a line, and JSON, JSONL or parquet files with ids.

        In those an id is the value of `id`, `data_id`, `video_id`, `story_id`, ... at any depth, and, of a JSON object that is
        keyed by video, its keys. Paths of pictures in them are not followed: give the pictures' folder.

        Raises ValueError where a path does not exist or holds nothing of the kind.
        """
        ids: set[str] = set()
        pictures: set[int] = set()
        for path in paths:
            if not path.exists():
                raise ValueError(f"--exclude {str(path)!r} does not exist; give a file or a folder of pictures and lists of ids")
            files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
            before = len(ids) + len(pictures)
            for file in files:
                suffix = file.suffix.lower()
                if suffix in PICTURES:
                    try:
                        pictures |= hashes(open_image(file))
                    except ValueError as error:
                        problems.report(str(file), "exclusion not read", error)
                elif suffix == ".txt":
                    ids |= {line.strip() for line in file.read_text(errors="replace").splitlines() if line.strip()}
                elif suffix in LISTS:
                    ids |= set(_ids_of(file, problems))
            if len(ids) + len(pictures) == before:
                raise ValueError(
                    f"--exclude {str(path)!r} holds no ids and no pictures; allowed are {', '.join((*PICTURES, '.txt', *LISTS))} files"
                )
        return cls(ids, pictures, max_distance)


def _ids_of(file: Path, problems: Problems) -> Iterator[str]:
    if file.suffix.lower() == ".json":
        try:
            value = json.loads(file.read_bytes())
        except ValueError as error:
            return problems.report(str(file), "exclusion not read", error)
        if isinstance(value, dict) and value and all(isinstance(v, dict) for v in value.values()):
            yield from value  # ActivityNet: keyed by video
        yield from _walk(value)
        return
    for row in read_rows(file, problems):
        yield from _walk(row.value)


def _walk(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ID_KEYS and isinstance(inner, str | int) and not isinstance(inner, bool):
                yield str(inner)
            else:
                yield from _walk(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _walk(inner)
