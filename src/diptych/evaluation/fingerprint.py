"""A hash that tells one benchmark's data from another."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from diptych.document import Image, Text
from diptych.evaluation.benchmark import Item, StoredImage
from diptych.models.fingerprint import digest, of_file

PICTURE_BLOCKS, PICTURE_BLOCK = 4, 16384


def of_items(items: Sequence[Item]) -> dict[str, Any]:
    """The number of items, the hash of all that they say (ids, prompts, categories, records) and that of the prompts' pictures."""
    said = [[i.id, i.category, [s.text if isinstance(s, Text) else None for s in i.prompt], i.record] for i in items]
    texts = digest(json.dumps(said, sort_keys=True, default=lambda value: type(value).__name__))
    known: dict[int, str] = {}  # several items may share a picture
    pictures = [_of_picture(image, known) for item in items for image in item.prompt.images]
    return {"items": len(items), "texts": texts, "pictures": digest(*pictures)}


def _of_picture(image: Image, known: dict[int, str]) -> str:
    if id(image) not in known:
        if not isinstance(image, StoredImage):
            assert image.pixels is not None
            known[id(image)] = digest(f"{image.pixels.size} ", image.pixels.tobytes())
        elif isinstance(image.source, bytes):
            known[id(image)] = digest(image.source)
        else:
            try:
                known[id(image)] = of_file(image.source, PICTURE_BLOCKS, PICTURE_BLOCK)
            except OSError:  # it will be counted as unreadable
                known[id(image)] = "unreadable"
    return known[id(image)]


def differing_data(stored: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    """What differs between two benchmarks' data, in words; empty where nothing does."""
    before, now = stored.get("data") or {}, known["data"]
    words = {"items": "how many items", "texts": "their texts or records", "pictures": "their pictures"}
    others = [word for name, word in words.items() if before.get(name) != now[name]]
    return f"data: {', '.join(others)}" if others else ""
