"""`vist`: VIST, story in sequence (SIS). Five photographs and the sentence to each.

Layout as published: `{"images": [...], "annotations": [[{"story_id", "photo_flickr_id", "text", "original_text",
"worker_arranged_photo_order"}], ...]}`, each annotation in a list of one. --media: the pictures, `PHOTO_FLICKR_ID.jpg` (or png, gif).
`original_text` is used: `text` has names and places replaced. Part of MMIE comes from VIST: convert the train file only, and
--exclude MMIE.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diptych.data.convert.pictures import find_file
from diptych.data.convert.raw_record import Block, Options, RawRecord, document
from diptych.data.problems import NONSENSE, Problems
from diptych.data.readers import read_json

PROMPT = "Tell a story in {n} parts, each with a picture. It begins like this: {first}"
ENDINGS = (".jpg", ".jpeg", ".png", ".gif")


def read(options: Options, problems: Problems) -> Iterator[RawRecord]:
    pictures = options.media_folder("the photographs, named by their Flickr id")
    value = read_json(options.input)
    if not isinstance(value, dict) or not isinstance(value.get("annotations"), list):
        raise ValueError(f"{options.input} has no `annotations`; give VIST's story-in-sequence file, e.g. train.story-in-sequence.json")
    stories: dict[str, list[tuple[int, str, str]]] = {}
    broken: set[str] = set()
    for number, entry in enumerate(value["annotations"], start=1):
        annotation: Any = entry[0] if isinstance(entry, list) and entry else entry
        story = str(annotation.get("story_id", "")) if isinstance(annotation, dict) else ""
        try:
            order, photo = int(annotation["worker_arranged_photo_order"]), str(annotation["photo_flickr_id"])
            part = (order, photo, str(annotation["original_text"]).strip())
            stories.setdefault(str(annotation["story_id"]), []).append(part)
        except NONSENSE as error:
            problems.report(f"{options.input}:annotation {number}", "not a record", f"{type(error).__name__}: {error}", story)
            broken.add(story)
    for id, parts in stories.items():
        where = f"{options.input}:story {id}"
        if id in broken:
            problems.report(where, "story with broken parts", "", id)
            continue
        answer: list[Block] = []
        missing = None
        for _, photo, sentence in sorted(parts):
            path = find_file(pictures, photo, ENDINGS)
            missing = missing or (photo if path is None else None)
            if path is not None:
                answer += [sentence, (path,)]
        if missing:
            problems.report(where, "missing picture", f"{missing} is not in {pictures}", id)
            continue
        asked = options.instruction(PROMPT, n=len(parts), first=sorted(parts)[0][2])
        yield RawRecord(id, where, document((asked,), tuple(answer)), (id, *(photo for _, photo, _ in parts)))
