"""Keeping benchmarks out of training data: by source id (`source_ids`), and by a perceptual hash of pictures.

The hash (dHash, 64 bits): the picture in grey at 9 x 8 pixels; a bit says whether a pixel is brighter than its right neighbour. It
survives scaling, JPEG and changes of brightness. Whole pictures and their central squares are both compared, because converters crop.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import PIL.Image

from diptych.data.problems import Problems
from diptych.data.readers import read_rows
from diptych.data.source_ids import ENDINGS as PICTURES
from diptych.data.source_ids import Id, ids_in, ids_of_picture, is_small
from diptych.pictures import open_image
from diptych.userfiles import read_entries, read_json

LISTS = (".json", ".jsonl", ".parquet")
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
    """Ids and pictures that training data may not contain. `ids`: (source, id); the source is empty where it may be any."""

    def __init__(self, ids: Iterable[Id] = (), pictures: Iterable[int] = (), max_distance: int = MAX_DISTANCE) -> None:
        self.ids = frozenset(ids)
        self.pictures = np.array(sorted(set(pictures)), dtype=np.uint64)  # (N,)
        self.max_distance = max_distance

    def reason(self, source: str, ids: Iterable[str], pictures: Iterable[PIL.Image.Image]) -> str | None:
        """Why a record of `source` with these ids and pictures is left out; None where it may stay."""
        for id in ids:
            if ("", id) in self.ids or (source, id) in self.ids:
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
        """From files and folders (searched below): pictures, `.txt` with an id a line, and JSON, JSONL or parquet files.

        What an entry of those says of its source is in `source_ids.ids_in`; of a JSON object that is keyed by video, its keys are
        ids too. Names of pictures are read as well; paths of pictures in lists are not followed: give the pictures' folder. A line of
        a `.txt` is taken as it stands, for every source.

        Raises ValueError where a path does not exist or holds nothing of the kind, and for a list that cannot be read whole, because less
        would be excluded than it says.
        """
        ids: set[Id] = set()
        pictures: set[int] = set()
        for path in paths:
            if not path.exists():
                raise ValueError(f"--exclude {str(path)!r} does not exist; give a file or a folder of pictures and lists of ids")
            files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
            before = len(ids) + len(pictures)
            for file in files:
                suffix = file.suffix.lower()
                if suffix in PICTURES:
                    ids |= set(ids_of_picture(file.relative_to(path.parent).as_posix()))
                    try:
                        pictures |= hashes(open_image(file))
                    except ValueError as error:
                        problems.report(str(file), "exclusion not read", error)
                elif suffix == ".txt":
                    ids |= {("", entry) for entry in read_entries(file)}
                elif suffix in LISTS:
                    try:
                        ids |= set(_ids_of(file))
                    except ValueError as error:
                        raise ValueError(f"--exclude: {error}. What stands there would not be excluded: mend or remove it") from error
            if len(ids) + len(pictures) == before:
                raise ValueError(
                    f"--exclude {str(path)!r} holds no ids and no pictures; allowed are {', '.join((*PICTURES, '.txt', *LISTS))} files"
                )
        return cls(ids, pictures, max_distance)


def _ids_of(file: Path) -> Iterator[Id]:
    if file.suffix.lower() == ".json":
        value = read_json(file)
        if isinstance(value, dict) and value and all(isinstance(v, dict) for v in value.values()):
            yield from (("", key) for key in value if not is_small(key))  # ActivityNet: keyed by video
        yield from ids_in(value)
        return
    problems = Problems()
    for row in read_rows(file, problems):
        yield from ids_in(row.value)
    for problem in problems.found:
        raise ValueError(f"{problem.where}: {problem.cause}: {problem.detail}")
