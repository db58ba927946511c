"""Adapter folders: PEFT's files and ours, against the base model that they name."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from torch import nn

from diptych.doctor.files import read_header, read_json_object, say_misshapen, say_missing
from diptych.models.base import UnifiedModel
from diptych.models.lora import DESCRIPTION, FULL

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclasses.dataclass(frozen=True)
class Adapter:
    """`parameters`: numbers in the adapter's own file. `load_in_4bit`, `dtype`: how the base is loaded for it."""

    base: str
    rank: int | None
    alpha: int | None
    parameters: int
    load_in_4bit: bool
    dtype: str
    train_in_full: list[str]


def read_adapter(folder: Path, problems: list[str]) -> tuple[Adapter | None, dict[str, tuple[int, ...]], Any]:
    """The adapter, the shapes in its file, and PEFT's `target_modules`. None, and a problem, where its base is not named."""
    description, settings = read_json_object(folder / DESCRIPTION, problems), read_json_object(folder / SETTINGS, problems) or {}
    shapes: dict[str, tuple[int, ...]] = {}
    if (folder / WEIGHTS).is_file():
        shapes = {key: shape for key, (_, shape) in (read_header(folder / WEIGHTS, problems) or {}).items()}
    else:
        problems.append(f"{folder / WEIGHTS} is missing; copy the whole adapter folder")
    base = (description or {}).get("base")
    if description is not None and not (isinstance(base, dict) and isinstance(base.get("source"), str)):
        problems.append(f"{folder / DESCRIPTION} names no base model (base.source); write the checkpoint folder or hub id there")
    if not isinstance(base, dict) or not isinstance(base.get("source"), str):
        return None, shapes, None
    full = list((description or {}).get("train_in_full") or [])
    if full and (folder / FULL).is_file():
        read_header(folder / FULL, problems)
    elif full:
        problems.append(f"{folder / FULL} is missing, though {', '.join(full)} were trained in full; copy the whole adapter folder")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if settings and not isinstance(rank, int):
        problems.append(f"{folder / SETTINGS} has r={rank!r}; it must be a whole number. Copy it again")
    numbers = sum(int(shape[0]) * int(shape[1]) for shape in shapes.values() if len(shape) == 2)
    found = Adapter(
        base=base["source"], rank=rank if isinstance(rank, int) else None, alpha=alpha, parameters=numbers,
        load_in_4bit=bool(base.get("load_in_4bit")), dtype=str(base.get("dtype", "auto")), train_in_full=full,
    )  # fmt: skip
    return found, shapes, settings.get("target_modules")


def check_fit(
    folder: Path, adapter: Adapter, shapes: dict[str, tuple[int, ...]], targets: Any, base: UnifiedModel, problems: list[str]
) -> None:
    """The adapter's keys and shapes against the base's matrices."""
    if not shapes or adapter.rank is None:
        return
    wanted: dict[str, tuple[int, ...]] = {}
    for name, module in base.lora_root.named_modules():
        if isinstance(module, nn.Linear) and _is_target(name, targets):
            prefix = f"base_model.model.{name}"
            wanted[f"{prefix}.lora_A.weight"] = (adapter.rank, module.in_features)
            wanted[f"{prefix}.lora_B.weight"] = (module.out_features, adapter.rank)
    kind = f"an adapter of rank {adapter.rank} on {adapter.base}"
    if wanted:
        say_missing(folder, kind, wanted.keys() - shapes.keys(), shapes.keys() - wanted.keys(), problems)
    if not wanted:
        problems.append(
            f"target_modules in {folder / SETTINGS} match nothing in {adapter.base}; this adapter belongs to another base model"
        )
    both = wanted.keys() & shapes.keys()
    say_misshapen(folder, kind, {k: (shapes[k], wanted[k]) for k in both if shapes[k] != wanted[k]}, problems)


def _is_target(name: str, targets: Any) -> bool:
    """PEFT's rule: a string is a regular expression of the whole name, a list holds endings of names."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets or [])
