"""Unified models: the adapter contract and its families."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

from diptych.models.base import ImageSpec, UnifiedModel
from diptych.models.storyboard import StoryboardModel

FAMILIES: dict[str, type[UnifiedModel]] = {"diptych_storyboard": StoryboardModel}
PACKAGED = ("storyboard",)

__all__ = ["FAMILIES", "PACKAGED", "ImageSpec", "UnifiedModel", "load_model", "packaged_folder"]


def packaged_folder(name: str) -> Path:
    """The folder of something that ships inside the package, e.g. "storyboard" or "image_text"."""
    return Path(str(resources.files("diptych") / "assets" / name))


def load_model(source: str | Path) -> UnifiedModel:
    """The adapter for a packaged model's name or a checkpoint folder, chosen by `model_type` in its config.json.

    Raises ValueError for a missing folder, an unknown family, or a damaged checkpoint.
    """
    folder = packaged_folder(str(source)) if str(source) in PACKAGED else Path(source)
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(f"no model at {str(source)!r}: {config} does not exist. Give a checkpoint folder or one of: {', '.join(PACKAGED)}")
    try:
        kind = json.loads(config.read_text()).get("model_type")
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{config} is not valid JSON: {error}") from error
    if kind not in FAMILIES:
        raise ValueError(f"{config} has model_type {kind!r}; known families are {', '.join(FAMILIES)}")
    return FAMILIES[kind].load(folder)
