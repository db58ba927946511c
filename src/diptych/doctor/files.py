"""What lies in a checkpoint folder, read from JSON files and safetensors headers. No weight is read, so nothing is said of values."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diptych.models.janus_weights import BIN, SINGLE, bin_tensors

INDEX = f"{SINGLE}.index.json"
TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_LONGEST_HEADER = 100_000_000  # bytes, the format's own limit


@dataclasses.dataclass
class Stored:
    """Tensors of one folder: key -> (safetensors dtype, shape).

    lost: keys that an index names in files that are missing or unreadable; their shapes are unknown.
    complete: False where a file without an index could not be read, so that nobody knows which keys it held.
    """

    tensors: dict[str, tuple[str, tuple[int, ...]]] = dataclasses.field(default_factory=dict)
    lost: set[str] = dataclasses.field(default_factory=set)
    complete: bool = True

    def on_meta(self) -> dict[str, Tensor]:
        """Every tensor without memory; a lost one has shape (0,)."""
        found = {key: torch.empty(shape, dtype=TORCH_DTYPES.get(kind), device="meta") for key, (kind, shape) in self.tensors.items()}
        return {**{key: torch.empty(0, device="meta") for key in self.lost}, **found}

    def numbers_by_dtype(self) -> Counter[str]:
        counts: Counter[str] = Counter()
        for kind, shape in self.tensors.values():
            counts[kind] += prod(shape)
        return counts


def read_json_object(path: Path, problems: list[str], what_to_do: str = "copy it again") -> dict[str, Any] | None:
    """None, and a problem, where the file is missing or holds no JSON object."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        problems.append(f"{path} is missing; copy the whole checkpoint folder")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        problems.append(f"{path} is not valid JSON ({error}); {what_to_do}")
    else:
        if isinstance(content, dict):
            return content
        problems.append(f"{path} holds a {type(content).__name__}, not a JSON object; {what_to_do}")
    return None


def read_header(path: Path, problems: list[str]) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    """Key -> (dtype, shape) of a safetensors file; a problem where its length is not what the header says. None: no header.

    Source: the format's description, https://github.com/huggingface/safetensors: 8 bytes of length, JSON, data.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= min(_LONGEST_HEADER, size - 8):
            problems.append(f"{path} is no safetensors file or was cut off in its header ({size:,} bytes); copy it again")
            return None
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            found = {key: (str(entry["dtype"]), tuple(map(int, entry["shape"]))) for key, entry in header.items()}
            end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            problems.append(f"{path} has a damaged header ({type(error).__name__}: {str(error)[:80]}); copy it again")
            return None
    if size != 8 + length + end:
        state = "truncated" if size < 8 + length + end else "too long"
        problems.append(f"{path} is {state}: it has {size:,} bytes, its header promises {8 + length + end:,}; copy it again")
    return found


def read_weights(folder: Path, problems: list[str], torch_files: bool = False) -> Stored:
    """Headers of `model.safetensors`, or of the shards that its index names, as the loaders choose them.

    `torch_files`: where there are none, those of `pytorch_model.bin` or its shards, for families whose loader reads them.
    """
    single, index_name, pattern = SINGLE, INDEX, "model-*.safetensors"
    if torch_files and not (folder / SINGLE).is_file() and not (folder / INDEX).is_file() and any(folder.glob(f"{BIN[:-4]}*.bin*")):
        single, index_name, pattern = BIN, f"{BIN}.index.json", "pytorch_model-*.bin"
    shards = sorted(path.name for path in folder.glob(pattern))
    index: dict[str, Any] = {}
    if (folder / single).is_file():
        names: Iterable[str] = [single]
        for name in shards:
            problems.append(f"{folder / name} is not read, because {single} lies beside it; delete whichever is not of this checkpoint")
    elif (folder / index_name).is_file():
        index = _weight_map(folder / index_name, problems)
        names = sorted(set(index.values())) or shards
        for name in sorted(set(shards) - set(names)):
            problems.append(
                f"{folder / name} is not named in {index_name}, so it is not read; delete it, or copy the index that belongs to it"
            )
    elif shards:
        names = shards
        problems.append(f"{folder / index_name} is missing, without which the {len(shards)} shards beside it are not read; copy it")
    else:
        names = []
        _say_what_is_there_instead(folder, problems)
    stored = Stored(complete=bool(names))
    for name in names:
        path, keys = folder / name, {key for key, file in index.items() if file == name}
        header = None
        if path.is_file():
            header = _read_bin(path, problems) if path.suffix == ".bin" else read_header(path, problems)
        else:
            problems.append(f"{path}, which {index_name} names for {len(keys)} tensors, is missing; copy it")
        if header is None:
            stored.lost |= keys
            stored.complete = stored.complete and bool(keys)
        else:
            stored.tensors.update(header)
    return stored


def _read_bin(path: Path, problems: list[str]) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    """The same of a file that torch saved: of its archive only the names and shapes are read."""
    try:
        return stored_as(bin_tensors(path, "meta")).tensors
    except ValueError as error:
        problems.append(str(error))
        return None


def stored_as(tensors: Mapping[str, Tensor]) -> Stored:
    """What such tensors are in a file."""
    kinds = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    return Stored({key: (kinds.get(value.dtype, str(value.dtype)), tuple(value.shape)) for key, value in tensors.items()})


def _weight_map(path: Path, problems: list[str]) -> dict[str, str]:
    content = read_json_object(path, problems)
    found = (content or {}).get("weight_map")
    if isinstance(found, dict) and found and all(isinstance(name, str) for name in found.values()):
        return found
    if content is not None:
        problems.append(f"{path} has no weight_map; copy it again")
    return {}


def _say_what_is_there_instead(folder: Path, problems: list[str]) -> None:
    others = sorted(path.name for path in folder.glob("*.bin"))
    if others:
        problems.append(
            f"warning: {folder} has its weights in {others[0]}{' and others' if len(others) > 1 else ''}, whose keys cannot be checked "
            "without loading them; convert them to safetensors"
        )
    else:
        problems.append(f"{folder} has no weights: neither {SINGLE} nor {INDEX}; copy the whole checkpoint folder")


def say_missing(folder: Path, kind: str, missing: Collection[str], unknown: Collection[str], problems: list[str]) -> None:
    if missing:
        have = f"; it holds {_some(unknown)}, which nothing asks for" if unknown else ""
        problems.append(f"{folder} lacks {_some(missing)} of {kind}{have}. Copy every file again, and the configs that belong to them")
    elif unknown:
        problems.append(f"{folder} holds {_some(unknown)}, for which {kind} has no place by its config. Take both from one release")


def say_misshapen(folder: Path, kind: str, shapes: Mapping[str, tuple[Iterable[int], Iterable[int]]], problems: list[str]) -> None:
    """`shapes`: key -> (given, wanted)."""
    if shapes:
        key, (given, wanted) = min(shapes.items())
        problems.append(
            f"{folder} has {len(shapes)} tensor{'s' * (len(shapes) > 1)} of {kind} in another shape: {key} is {list(given)}, but its "
            f"config asks for {list(wanted)}. Take weights and configs from one release"
        )


def _some(keys: Collection[str]) -> str:
    first = sorted(keys)[:3]
    return f"{len(keys)} tensor{'s' * (len(keys) > 1)} ({', '.join(first)}{', ...' * (len(keys) > 3)})"
