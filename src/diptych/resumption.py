"""With which settings a run is resumed: what may change, and what must be what it was."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from diptych.config import RunConfig, build
from diptych.overrides import set_leaf

ConfigT = TypeVar("ConfigT", bound=RunConfig)


def resumed_settings(
    config: ConfigT, stored: dict[str, Any], may_change: Collection[str], where: Path
) -> tuple[ConfigT, dict[str, tuple[Any, Any]]]:
    """The settings a run is resumed with, and those among them that changed: dotted key -> (before, now).

    What somebody set is compared. A setting that neither start names stays as the run has it, whatever the default is by now; one that
    is younger than the run has today's default. Raises ValueError for other settings than those that may change.
    """
    cls = type(config)
    old = stored.get("config")
    if not isinstance(old, dict):
        raise ValueError(f"{where / 'config.yaml'} is damaged; choose another output_dir, or delete the folder to start over")
    try:
        before = build(cls, old)
    except ValueError as error:
        raise ValueError(f"{where} holds a run that this version cannot resume: {error}. Choose another output_dir") from None
    was, now = leaves(before), leaves(config)
    named = set_keys(config) | set(stored.get("set", ()))
    differing = [key for key in [*was, *(k for k in now if k not in was)] if was.get(key) != now.get(key)]
    kept = [key for key in differing if "set" in stored and key in was and not any(part in named for part in prefixes(key))]
    changed = {key: (was.get(key), now.get(key)) for key in differing if key not in kept}
    refused = [key for key in changed if key not in may_change and key.split(".")[0] not in may_change]
    if refused:
        free = ", ".join(sorted(may_change))
        raise ValueError(
            f"{where} holds a run with other settings (different: {', '.join(refused)}). Choose another output_dir, or delete the folder "
            f"to start over. These may change: {free}."
        )
    if kept:
        data = config.model_dump(mode="json")
        for key in kept:
            set_leaf(data, cls, key, was[key], written=False)
        config = build(cls, data)
    return config, changed


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Dotted key -> value of everything in a configuration, as JSON."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict) and value:
        items = value.items()
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = enumerate(value)
    found: dict[str, Any] = {}
    for key, inner in items:
        found |= leaves(inner, f"{path}.{key}" if path else str(key))
    return found or {path: value}


def prefixes(key: str) -> list[str]:
    """Of `a.b.c`: a, a.b and itself."""
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def set_keys(value: Any, path: str = "") -> set[str]:
    """Dotted keys of what was set in a configuration, not left to its default."""
    if isinstance(value, BaseModel):
        inner = {name: getattr(value, name) for name in value.model_fields_set}
    elif isinstance(value, dict) and value:
        inner = value
    elif isinstance(value, list | tuple) and any(isinstance(item, BaseModel | dict) for item in value):
        inner = {str(index): item for index, item in enumerate(value)}
    else:
        return {path}
    found: set[str] = set()
    for key, one in inner.items():
        found |= set_keys(one, f"{path}.{key}" if path else str(key))
    return found or {path}  # a group of which nothing was set but that it is there
