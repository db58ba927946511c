"""Documents, pictures and JSONL records for the tests of model families."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image

from diptych.document import Document, Image, Text


def picture(seed: int, width: int = 40, height: int = 52) -> PIL.Image.Image:
    """Smooth colours, so that neighbouring patches differ and resizing is exercised."""
    noise = np.random.default_rng(seed).integers(0, 255, (5, 4, 3), dtype=np.uint8)
    return PIL.Image.fromarray(noise).resize((width, height), PIL.Image.Resampling.BICUBIC)


def prompts() -> list[Document]:
    """Three prompts of different lengths: without, with one, and with two pictures."""
    return [
        Document((Text("tell a story"),)),
        Document((Image(picture(1)), Text("what happens next? tell it in words and pictures"))),
        Document((Text("look at this"), Image(picture(2, 64, 30)), Text("and"), Image(picture(3, 32, 32)))),
    ]


def answer() -> Document:
    return Document((Text("a red cat."), Image(picture(4)), Text("then a bird."), Image(picture(5, 30, 90))))


def write_records(folder: Path) -> Path:
    """Four records: two illustrated answers, one bare picture, one answer in words."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(6):
        picture(seed).save(folder / f"{seed}.png")

    def content(*parts: str) -> list[dict[str, str]]:
        return [{"type": "image", "image": p} if p.endswith(".png") else {"type": "text", "text": p} for p in parts]

    records = [
        (content("tell a story"), content("a red cat.", "0.png", "then a bird.", "1.png")),
        (content("2.png", "and then?"), content("it rains.", "3.png")),
        (content("draw a cat"), content("4.png")),
        (content("5.png", "what is it?"), content("a bird on the mat.")),
    ]
    path = folder / "records.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": told}], "num_images": 2}
        for asked, told in records
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
