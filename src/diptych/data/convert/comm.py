"""`comm`: CoMM. A title, then its steps with their pictures.

Layout as published: a torch-saved list of `{"data_id", "dataset_type", "title", "summary_info", "step_info"}`; `step_info` is a list
of steps, each a list of `{"type": "text", "content"}` and `{"type": "image", "image_path", "url"}`. --media: the folder into which the
authors' script downloaded the pictures. The file is read without running code from it (`weights_only`).

Part of CoMM is WikiHow, from which MMIE and InterleavedBench are made: --exclude both.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

from diptych.data.convert.pictures import Picture
from diptych.data.convert.raw_record import Block, Options, RawRecord, document
from diptych.data.problems import NONSENSE, Problems
from diptych.data.source_ids import names_of

PROMPT = "Explain step by step, with pictures: {title}"


def read(options: Options, problems: Problems) -> Iterator[RawRecord]:
    import torch

    pictures = options.media_folder("the downloaded pictures")
    try:
        items = torch.load(options.input, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"cannot read {options.input}: {str(error)[:200]}. Give CoMM's train_data.pth as it was published.") from error
    if not isinstance(items, list):
        raise ValueError(f"{options.input} holds a {type(items).__name__}; CoMM's file is a list")
    for number, item in enumerate(items, start=1):
        where = f"{options.input}:item {number}"
        id = str(item.get("data_id", "")) if isinstance(item, dict) else ""
        try:
            title, answer, names = _steps(item, pictures, options.cut_at)
        except NONSENSE as error:
            problems.report(where, "not a record", f"{type(error).__name__}: {error}", id)
            continue
        if len(names) < (options.min_images or 1):
            problems.report(where, "too few pictures", f"{len(names)}", id)
            continue
        asked = options.instruction(PROMPT, title=title)
        columns = {"dataset_type": str(item.get("dataset_type", ""))}
        yield RawRecord(
            id or f"item-{number}",
            where,
            document((asked,), tuple(answer)),
            (id, *(name for path in names for name in names_of(path))),
            columns=columns,
        )


def _steps(item: dict[str, Any], pictures: Any, most: int) -> tuple[str, list[Block], list[str]]:
    """Title, blocks and picture names; whole steps, as long as at most `most` pictures are shown."""
    title = " ".join(str(item["title"] or "").split())
    if not title:
        raise ValueError("the title is empty")
    answer: list[Block] = []
    names: list[str] = []
    for step in item["step_info"]:
        text = " ".join(" ".join(str(part["content"]).split()) for part in step if part["type"] == "text").strip()
        shown = [str(part["image_path"]) for part in step if part["type"] == "image"]
        if len(names) + len(shown) > most:
            break
        found: list[Picture] = [pictures / name for name in shown]
        answer += [*([text] if text else []), *((picture,) for picture in found)]
        names += shown
    return title, answer, names
