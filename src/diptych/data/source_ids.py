"""What an entry of a benchmark says about where it comes from: ids, and names of pictures that hold an article or a video.

    {"id": "wikihow_next_step_0_000123", "image": ["wiki_images_test/000123_0_0.png"]}   -> wikiHow's article 000123, and the picture
    {"image": ["activity/v_abc_1.png"]}                                                 -> ActivityNet's video v_abc
    {"data_id": "7"}                                                                    -> nothing: 7 of what?

A small number is an id within one data set only: it is kept with the source that its key or its picture names, or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
SMALL = 10_000_000  # numbers below it count something in many data sets
# keys whose value is an id, and the source that the key names
KEYS = {
    "id": "", "data_id": "", "video_id": "", "orig_id": "", "source_id": "", "image_id": "", "story_id": "vist", "photo_flickr_id": "vist",
    "article_id": "wikihow", "file_id": "wikihow",
}  # fmt: skip
_COMMON = re.compile(r"[a-z]*[ _-]?\d*", re.IGNORECASE)  # "7", "image", "q1", "frame_0012": names that any data set may use
_STEP = re.compile(r"(\d+)(_\d+){2,}")  # wikiHow's pictures: article, method, step
_PHOTO = re.compile(r"\d{6,}")  # Flickr's ids; VIST's stories have smaller ones
_LAST_NUMBER = re.compile(r"[_-]\d+$")

Id = tuple[str, str]  # source and id; the source is empty where the id holds for every source


def is_small(id: str) -> bool:
    return id.isdecimal() and int(id) < SMALL


def ids_in(value: Any) -> Iterator[Id]:
    """Of an entry, at any depth: values of `KEYS`, and what its pictures' names say. `source` in an entry names the source of its ids."""
    if isinstance(value, dict):
        task, source = str(value.get("task_name") or ""), value.get("source")
        for key, inner in value.items():
            if key in KEYS and isinstance(inner, str | int) and not isinstance(inner, bool):
                yield from _id(str(inner), KEYS[key] or (source if isinstance(source, str) else ""))
                last = _LAST_NUMBER.search(str(inner))
                if key == "id" and last and task.startswith("wikihow"):
                    yield from _id(last[0][1:], "wikihow")
            else:
                yield from ids_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from ids_in(inner)
    elif isinstance(value, str) and value.lower().endswith(ENDINGS) and "\n" not in value:
        yield from ids_of_picture(value)


def ids_of_picture(path: str) -> Iterator[Id]:
    """File name and stem, where they are not names that any data set may use; the article, the video, the photograph."""
    place = PurePosixPath(path)
    if step := _STEP.fullmatch(place.stem):
        yield from (("wikihow", place.name), ("wikihow", place.stem))
        yield from _id(step[1], "wikihow")
    elif names := names_of(path)[1:]:
        yield from (("", name) for name in names)
    elif _PHOTO.fullmatch(place.stem):
        yield from _id(place.stem, "vist")
    for part in (*place.parent.parts, place.stem):
        yield from (("", name) for name in _videos(part))


def names_of(path: str) -> list[str]:
    """The path, its file name and stem; of common names ("7.png", "image_3.jpg") the path alone."""
    place = PurePosixPath(path)
    return [path] if _COMMON.fullmatch(place.stem) else [path, place.name, place.stem]


def _id(id: str, source: str) -> Iterator[Id]:
    if not is_small(id):
        yield "", id
    elif source:
        yield from ((source, id), (source, str(int(id))))


def _videos(part: str) -> Iterator[str]:
    """`v_abc_1_2` may be the video's id, or that with numbers of an event and a frame; YouTube's own have 11 characters."""
    if not part.startswith("v_") or part == "v_":
        return
    found = {part, part[:13]}
    while (last := _LAST_NUMBER.search(part)) and last.start() > 1:
        part = part[: last.start()]
        found.add(part)
    for video in sorted(found):
        yield from (video, *([] if is_small(video[2:]) else [video[2:]]))
