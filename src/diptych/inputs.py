"""What a training is made of, by hashes: data, base model, rewards and their code. A run goes on with the same, or says what changed."""

from __future__ import annotations

import ast
import json
import os
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from diptych.config import RewardConfig, RunConfig
from diptych.data import Mixture
from diptych.data.hub import PREFIX
from diptych.data.records import Source, record_files
from diptych.models.fingerprint import digest, of_file, of_model
from diptych.models.loading import packaged_folder
from diptych.rewards.base import BUILT_IN, JUDGES, SCORERS
from diptych.runs import RunFolder, atomic_text
from diptych.runtime import on_first

WHOLE = 2**20  # blocks of a file: all of it, up to some TB
BLOCK = 2**22


def check_inputs(
    run: RunFolder, config: RunConfig, mixtures: Sequence[Mixture], rewards: Sequence[RewardConfig] = (), *, needs_model: bool
) -> dict[str, Any]:
    """Notes in `inputs.json` what the run is made of, and gives it back.

    `needs_model`: the base model is read again also where the run goes on. Raises ValueError, in every process, naming each input that is
    not what it was when the run's checkpoints were made.
    """
    return on_first(lambda: _checked(run, config, mixtures, rewards, needs_model))


def _checked(
    run: RunFolder, config: RunConfig, mixtures: Sequence[Mixture], rewards: Sequence[RewardConfig], needs_model: bool
) -> dict[str, Any]:
    path = run.path / "inputs.json"
    goes_on = bool(run.steps())
    stored = json.loads(path.read_bytes()) if goes_on and path.is_file() else {}
    found: dict[str, Any] = {}
    model = of_model(config.model, fetch=not goes_on or needs_model)
    found[f"model {config.model}"] = model if model is not None else stored.get(f"model {config.model}")
    for source in (source for mixture in mixtures for source in mixture.sources):
        if (key := f"data {source.name}") not in found:
            found[key] = of_source(source)
    for reward in rewards:
        found[f"reward {reward.key}"] = of_reward(reward)
    changed = [f"{key} ({told})" for key, value in found.items() if key in stored and (told := differing(stored[key], value))]
    if changed:
        raise ValueError(
            f"{run.path} was trained on other inputs: {'; '.join(changed)}. Put back what was there, or choose another output_dir. To go "
            f"on all the same, delete {path}"
        )
    text = json.dumps({**stored, **found}, indent=1) + "\n"
    atomic_text(path, text)
    return found


def differing(before: Any, now: Any) -> str:
    """What differs between two inputs, in words; empty where nothing does, or nothing is known of one of them."""
    if before is None or now is None or before == now:
        return ""
    told = [f"{before[name]} {name} then, {now[name]} now" for name in ("rows",) if before.get(name) != now.get(name)]
    old, new = before.get("files") or {}, now.get("files") or {}
    others = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        told.append(f"changed: {', '.join(others[:3])}{more}")
    told += [f"{name} then {before.get(name)}, now {now.get(name)}" for name in ("made_by",) if before.get(name) != now.get(name)]
    return ", ".join(told or ["changed: " + ", ".join(sorted(k for k in {*before, *now} if before.get(k) != now.get(k)))])


# --- data ----------------------------------------------------------------------------------------------------------------


def of_source(source: Source) -> dict[str, Any] | None:
    """Rows, bytes of the files and the pictures that they name; None for what is made, or stands at a commit of the hub."""
    if source.file is None or source.name.startswith(PREFIX):
        return None
    paths = record_files(source.name)
    with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1)), "hash") as pool:  # hashing lets other threads run
        hashes = list(pool.map(lambda path: of_file(path, WHOLE, BLOCK), paths))
    files = {path.name: value for path, value in zip(paths, hashes, strict=True)}
    return {"rows": source.file.num_rows, "files": {**files, "pictures": source.file.pictures}}


# --- rewards -------------------------------------------------------------------------------------------------------------


def of_reward(config: RewardConfig) -> dict[str, Any] | None:
    """The code of a user's own with what it imports of theirs, packaged weights, and the files and models that its options name."""
    files: dict[str, str] = {}
    if config.name not in BUILT_IN | JUDGES | SCORERS:
        files |= {path.name: of_file(path) for path in own_code(config.name.partition(":")[0])}
    elif (packaged := packaged_folder(config.name)).is_dir():
        files |= {path.name: of_file(path) for path in sorted(packaged.iterdir()) if path.is_file()}
    for name, value in config.options.items():
        if name.endswith("_dir") or not isinstance(value, str) or not value:
            continue
        if Path(value).is_file():
            files[f"{name} {value}"] = of_file(Path(value))
        elif Path(value).is_dir() or (name == "model" and config.name == "text_likelihood"):
            model = of_model(value, fetch=True)
            files[f"{name} {value}"] = model["hash"] if model else ""
    if config.name == "text_likelihood" and "model" not in config.options:
        files["model storyboard"] = (of_model("storyboard", fetch=False) or {"hash": ""})["hash"]
    return {"files": files} if files else None


def own_code(module: str) -> list[Path]:
    """The source files of a module and of what it imports, at any place in it, but for installed packages."""
    found: dict[Path, None] = {}
    waiting = list(_files_of(module, Path.cwd()))
    while waiting:
        path = waiting.pop()
        if path in found or _is_installed(path):
            continue
        found[path] = None
        for name in _imported(path):
            waiting += [*_files_of(name, path.parent), *_files_of(name, Path.cwd())]
    return sorted(found)


def _imported(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            yield from (f"{base}.{alias.name}" if base else alias.name for alias in node.names)
            yield base


def _files_of(module: str, folder: Path) -> Iterator[Path]:
    """Of `a.b.c`, seen from a folder: a/b/c.py, and the packages a and a.b on the way."""
    parts = [part for part in module.split(".") if part]
    for depth in range(1, len(parts) + 1):
        place = folder.joinpath(*parts[:depth])
        yield from (path.resolve() for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file())


def _is_installed(path: Path) -> bool:
    installed = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return any(path.is_relative_to(folder) for folder in installed) or path.is_relative_to(Path(__file__).resolve().parent)


def summary(found: Mapping[str, Any]) -> str:
    """One hash of all inputs."""
    return digest(json.dumps(found, sort_keys=True))
