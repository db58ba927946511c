"""What a training is made of, by hashes: data, base model, rewards and their code. A run is resumed with the same, or says what changed."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.machinery
import itertools
import json
import os
import re
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from diptych.config import RewardConfig, RunConfig
from diptych.data import Mixture, cache
from diptych.data.hub import PREFIX
from diptych.data.records import Source, record_files
from diptych.models.fingerprint import digest, of_file, of_model
from diptych.models.loading import packaged_folder
from diptych.rewards.base import BUILT_IN, JUDGES, SCORERS, load_reward
from diptych.runs import RunFolder, atomic_text
from diptych.runtime import gather, on_first, rank
from diptych.userfiles import read_json

BLOCK = 2**22  # bytes that are read at once
WORTH = 1.0  # seconds: a hash that takes less is taken again
MOST_FILES = 1000  # of a folder that an option names: one with more is no part of a reward
_WRITTEN = re.compile("log|cache|out|save|dump|tmp", re.IGNORECASE)  # names of options for what a reward writes


def check_inputs(
    run: RunFolder, config: RunConfig, mixtures: Sequence[Mixture], rewards: Sequence[RewardConfig] = (), *, needs_model: bool
) -> dict[str, Any]:
    """Notes in `inputs.json` what the run is made of, and gives it back.

    `needs_model`: the base model is read again where the run is resumed too. Raises ValueError, in every process, naming each input that
    is not what it was when the run's checkpoints were made.
    """
    found = None
    if rank() == 0 or os.environ.get("LOCAL_RANK") == "0":  # of each machine one process
        goes_on = bool(run.steps())
        found = {f"model {config.model}": of_model(config.model, fetch=not goes_on or needs_model)}
        for source in (source for mixture in mixtures for source in mixture.sources):
            if (key := f"data {source.name}") not in found:
                found[key] = of_source(source)
        found |= {f"reward {reward.key}": of_reward(reward) for reward in rewards}
        if config.image_decoder is not None:
            found[f"image_decoder {config.image_decoder}"] = {"files": of_code(config.image_decoder)}
    seen = [one for one in gather(found) if one is not None]
    for number, other in enumerate(seen):
        if others := [f"{key} ({difference})" for key, value in seen[0].items() if (difference := differing(value, other[key]))]:
            raise ValueError(f"machine {number} has other inputs than machine 0: {'; '.join(others)}. Give all of them the same files")
    return on_first(lambda: _checked(run, seen[0]))


def _checked(run: RunFolder[Any], found: dict[str, Any]) -> dict[str, Any]:
    path = run.path / "inputs.json"
    stored = read_json(path) if run.steps() and path.is_file() else {}
    if not isinstance(stored, dict) or not all(isinstance(one, dict | None) for one in stored.values()):
        raise ValueError(f"{path} is damaged; delete it to resume without comparing inputs")
    found = {key: value if value is not None else stored.get(key) for key, value in found.items()}
    changed = [f"{key} ({difference})" for key, value in found.items() if key in stored and (difference := differing(stored[key], value))]
    if changed:
        raise ValueError(
            f"{run.path} was trained on other inputs: {'; '.join(changed)}. Put back what was there, or choose another output_dir. To go "
            f"on all the same, delete {path}"
        )
    atomic_text(path, json.dumps({**stored, **found}, indent=1) + "\n")
    return found


def differing(before: Any, now: Any) -> str:
    """What differs between two inputs, in words; empty where nothing does, or nothing is known of one of them."""
    if before is None or now is None or before == now:
        return ""
    differences = [f"{before[name]} {name} then, {now[name]} now" for name in ("rows",) if before.get(name) != now.get(name)]
    old, new = before.get("files") or {}, now.get("files") or {}
    others = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    others += ["pictures"] if before.get("pictures") != now.get("pictures") else []
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        differences.append(f"changed: {', '.join(others[:3])}{more}")
    return ", ".join(differences or ["changed: " + ", ".join(sorted(k for k in {*before, *now} if before.get(k) != now.get(k)))])


# --- data ----------------------------------------------------------------------------------------------------------------


def of_source(source: Source) -> dict[str, Any] | None:
    """Rows, bytes of the files and the pictures that they name; None for what is made, or stands at a commit of the hub."""
    if source.file is None or source.name.startswith(PREFIX):
        return None
    paths = record_files(source.name)
    above = Path(os.path.commonpath([path.parent for path in paths]))  # what is moved as a whole stays the same
    with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1)), "hash") as pool:  # hashing lets other threads run
        hashes = list(pool.map(_of_all, paths))
    files = {path.relative_to(above).as_posix(): value for path, value in zip(paths, hashes, strict=True)}
    return {"rows": source.file.num_rows, "pictures": source.file.pictures, "files": files}


def _of_all(path: Path) -> str:
    """`of_file` of all bytes, a block at a time; remembered for as long as the file is the same (`data/cache.py`)."""
    before = cache.file_facts(path)

    def find() -> str:
        with path.open("rb") as stream:
            found = hashlib.blake2b(f"{os.fstat(stream.fileno()).st_size} ".encode(), digest_size=16)
            while part := stream.read(BLOCK):
                found.update(part)
        return found.hexdigest()

    return cache.remembered(
        "hashes", before, find, worth=WORTH, good=lambda: before == cache.file_facts(path) and cache.is_settled(before[3])
    )


# --- rewards -------------------------------------------------------------------------------------------------------------


def of_reward(config: RewardConfig) -> dict[str, Any] | None:
    """The code of a user's own with what it imports of theirs, packaged weights, and the files and models that its options name."""
    files: dict[str, str] = {}
    reward = load_reward(config.name)
    if config.name not in BUILT_IN | JUDGES | SCORERS:
        files |= of_code(config.name)
    elif (packaged := packaged_folder(config.name)).is_dir():
        files |= {path.name: of_file(path) for path in sorted(packaged.iterdir()) if path.is_file()}
    free: frozenset[str] = getattr(getattr(reward, "options_class", None), "may_change", frozenset())
    for name, value in _texts({name: value for name, value in config.options.items() if name not in free}):
        if _WRITTEN.search(name):
            continue
        files |= {f"{name} {value}": content for content in _named(value)}
    if config.name in ("text_likelihood", "image_likelihood"):
        default = vars(reward)["options_class"].model_fields["model"].default
        model = of_model(config.options.get("model", default), fetch=True)
        files["model"] = model["hash"] if model else ""
    return {"files": files} if files else None


def of_code(name: str) -> dict[str, str]:
    """The source files of `package.module:name` and of what it imports of the user's own, relative to the folder that holds them."""
    paths = own_code(name.partition(":")[0])
    above = os.path.commonpath([path.parent for path in paths]) if paths else ""
    return {os.path.relpath(path, above): of_file(path) for path in paths}


def _texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every text in options, at any depth, with the name that leads to it."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, Mapping | list | tuple):
        for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _texts(inner, f"{name}.{key}" if name else str(key))


def _named(value: str) -> Iterator[str]:
    """The hash of a file or of what is in a folder, where a text names one."""
    path = Path(value)
    with contextlib.suppress(OSError, ValueError):  # no name that a file could have
        if value and path.is_file():
            yield of_file(path)
        elif value and path.is_dir():
            inside = sorted(itertools.islice((one for one in path.rglob("*") if one.is_file()), MOST_FILES + 1))
            if len(inside) <= MOST_FILES:
                yield digest(*(f"{one.relative_to(path).as_posix()} {of_file(one)}\n" for one in inside))


def own_code(module: str) -> list[Path]:
    """The source files of a module and of what it imports, at any place in it, but for installed packages."""
    found: dict[Path, None] = {}
    waiting = list(_files_of(module, _roots()))
    while waiting:
        path = waiting.pop()
        if path in found or _is_installed(path):
            continue
        found[path] = None
        for level, name in _imported(path):
            above = [path.parents[level - 1]] if 0 < level <= len(path.parents) else _roots()
            waiting += _files_of(name, above)
    return sorted(found)


def _roots() -> list[Path]:
    """Where Python looks for modules that are not installed."""
    return [path for path in dict.fromkeys(Path(entry or ".").resolve() for entry in [".", *sys.path]) if not _is_installed(path)]


def _imported(path: Path) -> Iterator[tuple[int, str]]:
    """How many folders up (0: absolute, 1: beside it), and the name, of every import in a file."""
    try:
        tree = ast.parse(path.read_bytes() if path.suffix == ".py" else b"")
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            yield node.level, base
            yield from ((node.level, f"{base}.{alias.name}".strip(".")) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield 0, node.args[0].value


def _files_of(module: str, folders: Sequence[Path]) -> list[Path]:
    """Of `a.b.c`, in the first of the folders that has any of it: a/b/c.py, and the packages a and a.b on the way."""
    parts = [part for part in module.split(".") if part]
    for folder in folders:
        found: list[Path] = []
        for depth in range(1, len(parts) + 1):
            place = folder.joinpath(*parts[:depth])
            named = [place.with_name(f"{place.name}{suffix}") for suffix in _SUFFIXES]
            found += [path.resolve() for path in (*named, *(place / f"__init__{suffix}" for suffix in _SUFFIXES)) if path.is_file()]
        if found:
            return found
    return []


_SUFFIXES = [".py", *importlib.machinery.EXTENSION_SUFFIXES]


def _is_installed(path: Path) -> bool:
    if {"site-packages", "dist-packages"} & set(path.parts):
        return True
    installed = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return any(path.is_relative_to(folder) for folder in installed) or path.is_relative_to(Path(__file__).resolve().parent)


def summary(found: Mapping[str, Any]) -> str:
    """One hash of all inputs."""
    return digest(json.dumps(found, sort_keys=True))
