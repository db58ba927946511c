"""`genhowto`: GenHowTo's public triplets. The initial state and a goal, then the action and the final state with their pictures.

Layout as published in `evaluation/data`: `actions.SPLIT.txt` and `states.SPLIT.txt`, CSV with the columns VID_ID, DS_CAT, DS_CAT_NAME,
FRAME_S1, FRAME_S2, FRAME_AC, SCORE, FRAME_AC_PROMPT (in `states`: FRAME_S2_PROMPT), FILENAME; frames are seconds in the YouTube video.
The input is the actions file; the states file is looked for beside it. --media: the videos, `VID_ID.mp4` (or mkv, webm, ...). GenHowTo's
own training pictures are not public (on request from its authors), and their layout is not known; what is public has five categories.

Rows are joined on video and frames; of each video the triplet with the best SCORE is kept, because the others nearly repeat it.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from pathlib import Path

from diptych.data.convert.pictures import VIDEOS, Frame, find_file
from diptych.data.convert.raw_record import Options, RawRecord, document
from diptych.data.problems import NONSENSE, Problems
from diptych.userfiles import read_text

PROMPT = "This is the start. Show how to go on with the {category}: first the action, then the result, each with a picture."
KEY = ("VID_ID", "FRAME_S1", "FRAME_AC", "FRAME_S2")


def read(options: Options, problems: Problems) -> Iterator[RawRecord]:
    videos = options.media_folder("the videos, named by their YouTube id")
    actions = options.input
    states = actions.with_name(actions.name.replace("actions", "states", 1))
    if "actions" not in actions.name or not states.is_file():
        raise ValueError(f"the input is {actions}; give actions.SPLIT.txt, with states.SPLIT.txt beside it")
    finals = {tuple(row[k] for k in KEY): row for _, row in _rows(states, "FRAME_S2_PROMPT", problems)}
    best: dict[str, tuple[float, str, dict[str, str], dict[str, str]]] = {}
    for where, row in _rows(actions, "FRAME_AC_PROMPT", problems):
        final = finals.get(tuple(row[k] for k in KEY))
        if final is None:
            problems.report(where, "no final state", f"{states.name} has no row for it", row["VID_ID"])
        elif row["VID_ID"] in best and best[row["VID_ID"]][0] >= float(row["SCORE"]):
            problems.report(where, "another triplet of the video is better", "", row["VID_ID"])
        else:
            if row["VID_ID"] in best:
                problems.report(best[row["VID_ID"]][1], "another triplet of the video is better", "", row["VID_ID"])
            best[row["VID_ID"]] = (float(row["SCORE"]), where, row, final)
    for id, (_, where, row, final) in best.items():
        video = find_file(videos, id, VIDEOS)
        if video is None:
            problems.report(where, "missing video", f"{id} is not in {videos}", id)
            continue
        start, action, end = (Frame(video, float(row[k])) for k in ("FRAME_S1", "FRAME_AC", "FRAME_S2"))
        asked = options.instruction(PROMPT, category=row["DS_CAT_NAME"])
        messages = document(((start,), asked), (row["FRAME_AC_PROMPT"].strip(), (action,), final["FRAME_S2_PROMPT"].strip(), (end,)))
        yield RawRecord(id, where, messages, (id,), columns={"video_id": id, "category": row["DS_CAT_NAME"]})


def _rows(path: Path, prompt: str, problems: Problems) -> Iterator[tuple[str, dict[str, str]]]:
    needed = (*KEY, "DS_CAT_NAME", "SCORE", prompt)
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    missing = [name for name in needed if name not in (reader.fieldnames or ())]
    if missing:
        raise ValueError(f"{path} lacks the columns {', '.join(missing)}; give GenHowTo's file as it was published")
    for row in _read(reader, path, problems):
        where = f"{path}:{reader.line_num}"
        try:
            if not all(math.isfinite(float(row[name])) for name in ("FRAME_S1", "FRAME_AC", "FRAME_S2", "SCORE")):
                raise ValueError("a time or the score is no number")
            if not row[prompt].strip():
                raise ValueError(f"{prompt} is empty")
        except NONSENSE as error:
            problems.report(where, "broken line", error)
            continue
        yield where, row


def _read(reader: csv.DictReader[str], path: Path, problems: Problems) -> Iterator[dict[str, str]]:
    try:
        yield from reader
    except csv.Error as error:  # a quote that never closes would take in the rows behind it
        problems.report(f"{path}:{reader.line_num}", "broken line", f"{error}; what stands behind was not read")
