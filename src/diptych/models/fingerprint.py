"""Hashes that tell one model or file from another, cheap enough to take whenever a job starts.

A small file is hashed whole. Of a larger one, its size and `BLOCKS` blocks spread evenly over it, the first and the last included: the
first holds the header of a safetensors file, and the others fall into every matrix of a language model (at 7B they lie 10 MB apart).
Names of folders are in no hash, so what is only moved or renamed stays the same.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diptych.models.loading import PACKAGED, is_adapter, model_folder
from diptych.models.lora import read_description

BLOCKS, BLOCK = 512, 8192  # of a file of weights: 4 MiB
PARTS = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".safetensors", ".bin", ".pt", ".pth", ".ckpt")  # what a model is made of


def digest(*contents: str | bytes) -> str:
    found = hashlib.blake2b(digest_size=16)
    for content in contents:
        found.update(content.encode() if isinstance(content, str) else content)
    return found.hexdigest()


def of_file(path: Path, blocks: int = BLOCKS, block: int = BLOCK) -> str:
    """Of a file's size and bytes: all of them, or so many blocks where it is larger than these."""
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size <= blocks * block:
            return digest(f"{size} ", stream.read())
        contents = []
        for number in range(blocks):
            stream.seek(number * (size - block) // (blocks - 1))
            contents.append(stream.read(block))
        return digest(f"{size} ", *contents)


# --- models --------------------------------------------------------------------------------------------------------------


def of_model(source: str, fetch: bool) -> dict[str, Any] | None:
    """`hash` of a model, of each of its `files` (an adapter's base with it, under `base/`), and the `commit` of a hub repository.

    None where `source` is no folder (any more) and, without `fetch`, for a hub id: then nothing is asked of the hub.
    Raises ValueError as `load_model` does for what is not there.
    """
    if not fetch and source not in PACKAGED and not Path(source).is_dir():
        return None
    folder = model_folder(source)
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix in PARTS and path.is_file()]
    files = {path.relative_to(folder).as_posix(): of_file(path) for path in paths}
    if is_adapter(folder):
        base = of_model(read_description(folder)["base"]["source"], fetch)
        if base is None:
            return None
        files |= {f"base/{name}": value for name, value in base["files"].items()}
    found: dict[str, Any] = {"hash": digest(json.dumps(files, sort_keys=True)), "files": files}
    resolved = folder.resolve()
    return {**found, "commit": resolved.name} if resolved.parent.name == "snapshots" else found


def differing_model(stored: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    """What differs between the models of two settings, in words; empty where nothing does. The names count where a hash is missing."""
    before, now = stored.get("fingerprint"), known.get("fingerprint")
    if not before or not now:
        return "" if stored.get("model") == known["model"] else f"model: {stored.get('model')} there, {known['model']} here"
    if before["hash"] == now["hash"]:
        return ""
    names = before["files"].keys() | now["files"].keys()
    others = sorted(name for name in names if before["files"].get(name) != now["files"].get(name))
    commits = [each.get("commit") for each in (before, now)]
    commits_text = f", commit {commits[0] or 'unknown'} there, {commits[1] or 'unknown'} here" if commits[0] != commits[1] else ""
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    return f"model: its files {', '.join(others[:3])}{more} are not those that answered before{commits_text}"
