"""`journeydb`: JourneyDB, text to image. A caption, then its picture.

Layout as published: a folder (`data/train`) with `train_anno_realease_repath.jsonl.tgz` (or `train_anno.jsonl.tgz`, or either one
unpacked to `.jsonl`) and `imgs/000.tgz ... 199.tgz` (each may be unpacked to a folder). A line has `img_path` ("./012/ab.jpg"), `prompt`,
and `Task2` with `Caption`, which may be absent: then the prompt is taken, as far as its first flag of Midjourney's (`--ar`, `--no`, ...),
without web addresses and weights (`fox::2`); what has a negative weight is not in the picture, and left out.

Archives are streamed one after the other; captions of the pictures that --share keeps stay in memory.
Its terms: non-commercial research, no redistribution.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from diptych.data.convert.pictures import Picture
from diptych.data.convert.raw_record import Options, RawRecord, document
from diptych.data.problems import NONSENSE, Problems
from diptych.data.readers import Row, json_lines, tar_members
from diptych.data.sampling import is_sampled

ANNOTATIONS = ("*_anno_realease_repath.jsonl*", "*_anno_repath.jsonl*", "*_anno.jsonl*")
PROMPT = "{caption}"
FLAGS = (
    "ar|aspect|beta|c|chaos|creative|cref|cw|draft|exp|fast|h|hd|height|ihd|iw|mp|niji|no|p|personalize|profile|public|q|quality|r|raw|relax|"
    "repeat|s|sameseed|seed|sref|stealth|stop|style|stylize|sv|sw|test|testp|tile|turbo|upanime|upbeta|uplight|v|version|vibe|video|w|weird|width"
)  # of Midjourney
_FLAG = re.compile(rf"(?<!-)(?:--|(?<!\S)[—–])(?:{FLAGS})(?=[\s\d.]|$)", re.IGNORECASE)  # word processors make one dash of two
_ADDRESS = re.compile(r"<https?://[^>]*>|https?://\S+", re.IGNORECASE)
_WEIGHT = re.compile(r"::(-?\d*\.?\d+)?")


def read(options: Options, problems: Problems) -> Iterator[RawRecord]:
    folder = options.input
    images = options.media or folder / "imgs"
    annotations = next((p for pattern in ANNOTATIONS for p in sorted(folder.glob(pattern))), None)
    if annotations is None or not images.is_dir():
        raise ValueError(f"{folder} is no JourneyDB split; it needs an annotation file ({', '.join(ANNOTATIONS)}) and imgs/")
    shards: dict[str, dict[str, tuple[str, str]]] = {}
    for row in _rows(annotations, problems):
        try:
            name = str(PurePosixPath(row.value["img_path"]))  # "./012/ab.jpg" -> "012/ab.jpg"
            text = caption(row.value)
        except NONSENSE as error:
            problems.report(row.where, "not a record", f"{type(error).__name__}: {error}", str(row.value.get("img_path", "")))
            continue
        if not is_sampled(name, options.share, options.seed):
            continue
        shard = shards.setdefault(name.split("/", 1)[0], {})
        if name in shard:
            problems.report(row.where, "duplicate id", f"{name} stood in {shard[name][1]}", name)
        else:
            shard[name] = (text, row.where)
    for number in sorted(shards):
        waiting = shards.pop(number)
        for name, picture in _pictures(images, number, list(waiting), problems):
            if name in waiting:
                text, where = waiting.pop(name)
                yield RawRecord(name, where, document((options.instruction(PROMPT, caption=text),), ((picture,),)), (name, Path(name).stem))
        for name, (_, where) in waiting.items():
            problems.report(where, "missing picture", f"{name} is not in {images}", name)


def caption(line: dict[str, Any]) -> str:
    """Raises ValueError where nothing is left."""
    text = (line.get("Task2") or {}).get("Caption") or words_of(line["prompt"])
    text = " ".join(str(text).split())
    if not text:
        raise ValueError("neither a caption nor a prompt")
    return text


def words_of(prompt: str) -> str:
    """A prompt for Midjourney without what is not its text."""
    text = _FLAG.split(_ADDRESS.sub(" ", prompt), maxsplit=1)[0]
    *pairs, last = _WEIGHT.split(text)  # text, weight, text, weight, ..., text
    parts = [part for part, weight in zip(pairs[::2], pairs[1::2], strict=True) if float(weight or 1) > 0]
    return " ".join(part.strip() for part in (*parts, last)).replace(" ,", ",")


def _rows(path: Path, problems: Problems) -> Iterator[Row]:
    if path.suffix == ".jsonl":
        with path.open("rb") as stream:
            yield from json_lines(stream, str(path), path.parent, problems)
        return
    for name, content in tar_members(path, problems):
        if name.endswith(".jsonl"):
            yield from json_lines(io.BytesIO(content), f"{path}:{name}", path.parent, problems)


def _pictures(images: Path, number: str, names: list[str], problems: Problems) -> Iterator[tuple[str, Picture]]:
    if (images / number).is_dir():
        yield from ((name, images / name) for name in names)
    elif (images / f"{number}.tgz").is_file():
        for name, content in tar_members(images / f"{number}.tgz", problems):
            yield f"{number}/{PurePosixPath(name).name}", content
