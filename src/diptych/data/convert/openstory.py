"""`openstory`: OpenStory++, its `story` part. Windows of neighbouring key frames of a video with their captions.

Layout as published: parquet shards with `__key__` ("VIDEOID_keyframe_HH-MM-SS-mmm"), `video_id`, `time_stamp`, `png` and `json` (an object
with `caption`). `png` is a mask of instances and not the picture; the frames are not in the data set. --media: the frames, as the authors'
script cuts them: `VIDEOID/VIDEOID_keyframe_HH-MM-SS-mmm.jpg` (or without the folder). Frames are found by their key, not by position.

A window never spans a key frame that is missing. A key with "_override_" says that the frame took over the annotation of the one before
it, so its caption is not its own: it is left out, and those around it are neighbours.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diptych.data.convert.pictures import find_file
from diptych.data.convert.raw_record import Block, Options, RawRecord, document
from diptych.data.problems import NONSENSE, Problems
from diptych.data.readers import read_rows

PROMPT = "Tell a story in {n} parts, each with a picture. It begins like this: {first}"
MIN_IMAGES = 3
Shown = tuple[str, str, str, str]  # time stamp, key, caption (empty: it has none), where


def read(options: Options, problems: Problems) -> Iterator[RawRecord]:
    frames = options.media_folder("the frames")
    least = options.min_images or MIN_IMAGES
    videos: dict[str, list[Shown]] = {}
    for row in read_rows(options.input, problems, columns=("__key__", "video_id", "time_stamp", "json")):
        try:
            key, video, time = (str(row.value[name]) for name in ("__key__", "video_id", "time_stamp"))
        except KeyError as error:
            problems.report(row.where, "not a record", f"KeyError: {error}", str(row.value.get("__key__", "")))
            continue
        if "_override_" in key:
            problems.report(row.where, "annotation of another frame", key, key)
            continue
        caption = ""
        try:
            caption = _caption(row.value["json"])
        except NONSENSE as error:
            problems.report(row.where, "not a record", f"{type(error).__name__}: {error}", key)
        videos.setdefault(video, []).append((time, key, caption, row.where))
    for video, shown in videos.items():
        runs = _unbroken(frames, video, sorted(shown), problems)
        for window in (window for run in runs for window in _windows(run, least, options.cut_at, problems)):
            answer: list[Block] = []
            for _, key, caption, _ in window:
                path = _frame(frames, video, key)
                assert path is not None
                answer += [caption, (path,)]
            id = window[0][1]
            asked = options.instruction(PROMPT, n=len(window), first=window[0][2])
            yield RawRecord(id, window[0][3], document((asked,), tuple(answer)), (id, video), columns={"video_id": video})


def _caption(annotation: Any) -> str:
    if isinstance(annotation, str | bytes):
        annotation = json.loads(annotation)
    caption = annotation["caption"]
    if not isinstance(caption, str) or not caption.strip():
        raise ValueError("the caption is empty")
    return caption.strip()


def _frame(frames: Path, video: str, key: str) -> Path | None:
    return find_file(frames / video, key, (".jpg", ".png")) or find_file(frames, key, (".jpg", ".png"))


def _has_frame(frames: Path, video: str, shown: Shown, problems: Problems) -> bool:
    found = _frame(frames, video, shown[1]) is not None
    if not found:
        problems.report(shown[3], "missing picture", f"{shown[1]}.jpg is not in {frames}", shown[1])
    return found


def _unbroken(frames: Path, video: str, shown: list[Shown], problems: Problems) -> Iterator[list[Shown]]:
    """Split where a frame or its caption is missing: the captions around it do not go on from each other."""
    run: list[Shown] = []
    for one in shown:
        if one[2] and _has_frame(frames, video, one, problems):
            run.append(one)
        elif run:
            yield run
            run = []
    if run:
        yield run


def _windows(shown: list[Shown], least: int, most: int, problems: Problems) -> Iterator[list[Shown]]:
    """Neighbours in windows of at most `most`; what is left over and shorter than `least` is reported."""
    for start in range(0, len(shown), most):
        window = shown[start : start + most]
        if len(window) >= least:
            yield window
        else:
            for _, key, _, where in window:
                problems.report(where, "too few pictures", f"a window of {len(window)}, at least {least} are needed", key)
