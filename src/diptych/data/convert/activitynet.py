"""`activitynet`: ActivityNet Captions. One document per video: its events in order, each with a key frame.

Layout as published: one JSON object keyed by video id, `{"v_abc": {"duration": 82.7, "timestamps": [[0.8, 19.9], ...],
"sentences": ["A man ...", " He ..."]}}` (train.json, val_1.json, val_2.json). --media: the videos, `v_abc.mp4` (or mkv, webm, ...).

Our choices, where the paper is silent: events end where the video does (`duration`), and those that begin later are left out and counted;
events under a second are dropped; of two that overlap by more than 0.7 (IoU) the later is; the key frame is the one in the middle; the
first --max-images events are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from diptych.data.convert.pictures import VIDEOS, Frame, find_file
from diptych.data.convert.raw_record import Block, Options, RawRecord, document
from diptych.data.problems import NONSENSE, Problems
from diptych.data.readers import read_json

PROMPT = "Tell what happens in the video in {n} steps, each with a picture."
MIN_SECONDS, MAX_IOU = 1.0, 0.7


def read(options: Options, problems: Problems) -> Iterator[RawRecord]:
    videos = options.media_folder("the videos, named by their id")
    annotations = read_json(options.input)
    if not isinstance(annotations, dict):
        raise ValueError(f"{options.input} is a {type(annotations).__name__}; ActivityNet Captions is an object keyed by video id")
    for id, entry in annotations.items():
        where = f"{options.input}:{id}"
        try:
            chosen, past = events(entry), past_the_end(entry)
        except NONSENSE as error:
            problems.report(where, "not a record", f"{type(error).__name__}: {error}", id)
            continue
        for number in past:
            problems.report(f"{where}:event {number}", "event past the end", f"the video has {entry['duration']} seconds", id)
        chosen = chosen[: options.cut_at]
        if len(chosen) < (options.min_images or 1):
            problems.report(where, "too few pictures", f"{len(chosen)} events are left", id)
            continue
        video = find_file(videos, id, VIDEOS) or find_file(videos, id.removeprefix("v_"), VIDEOS)
        if video is None:
            problems.report(where, "missing video", f"{id} is not in {videos}", id)
            continue
        answer: list[Block] = []
        for start, end, sentence in chosen:
            answer += [sentence, (Frame(video, (start + end) / 2),)]
        asked = options.instruction(PROMPT, n=len(chosen))
        yield RawRecord(
            id, where, document((asked,), tuple(answer)), (id, id.removeprefix("v_")), columns={"video_id": id.removeprefix("v_")}
        )


def events(entry: dict[str, Any]) -> list[tuple[float, float, str]]:
    """(start, end, sentence) in time order, cut at the video's end, without short and repeated ones."""
    if len(entry["timestamps"]) != len(entry["sentences"]):
        raise ValueError(f"{len(entry['timestamps'])} timestamps and {len(entry['sentences'])} sentences")
    last = _duration(entry)
    found = [
        (float(start), min(float(end), last), str(s).strip())
        for (start, end), s in zip(entry["timestamps"], entry["sentences"], strict=True)
    ]
    if not all(math.isfinite(time) for start, end, _ in found for time in (start, end)):
        raise ValueError("a time is no number")
    kept: list[tuple[float, float, str]] = []
    for start, end, sentence in sorted(found, key=lambda event: event[:2]):
        repeated = any(_iou(start, end, a, b) > MAX_IOU for a, b, _ in kept)
        if sentence and end - start >= MIN_SECONDS and not repeated:
            kept.append((start, end, sentence))
    return kept


def past_the_end(entry: dict[str, Any]) -> list[int]:
    """Which events, counted from 1, begin when the video is over."""
    last = _duration(entry)
    return [number for number, (start, _) in enumerate(entry["timestamps"], start=1) if float(start) >= last]


def _duration(entry: dict[str, Any]) -> float:
    return float(entry.get("duration") or "inf")


def _iou(a: float, b: float, c: float, d: float) -> float:
    shared = max(0.0, min(b, d) - max(a, c))
    return shared / (b - a + d - c - shared) if shared else 0.0
