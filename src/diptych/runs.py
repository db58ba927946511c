"""Run folders: configuration, metrics, samples and checkpoints that are never half-written.

config.yaml   rewards.json   metrics.jsonl   samples/step_N.jsonl   checkpoints/step_N/   report.html
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from diptych.config import Config
from diptych.runtime import barrier, rank, versions


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A folder written under a temporary name and renamed when complete. On any error nothing is left behind.

    Raises ValueError with the free space where the disk is full.
    """
    temporary = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    old = target.with_name(f".tmp-old-{target.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                path.chmod(0o666 & ~_umask())  # safetensors writes files that only their owner can read
                with path.open("rb") as stream:
                    os.fsync(stream.fileno())
        if target.exists():
            target.rename(old)
        temporary.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)
        if is_disk_full(error):
            existing = next(p for p in (target, *target.parents) if p.exists())
            free = shutil.disk_usage(existing).free // 2**20
            raise ValueError(
                f"no space left while writing {target} ({free} MiB free). Nothing was half-written and earlier "
                "checkpoints are intact: free some space and run the same command again."
            ) from error
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def is_disk_full(error: BaseException | None) -> bool:
    """Also true for the errors that torch and safetensors raise around a full disk."""
    while error is not None:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return True
        if "No space left" in str(error) or "StorageFull" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def atomic_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if is_disk_full(error):
            raise ValueError(f"no space left while writing {path}; the old file, if any, is intact") from error
        raise


class RunFolder:
    """One training run. Only the first process writes."""

    def __init__(self, path: str | Path, config: Config) -> None:
        """Opens or makes the folder. Raises ValueError where it holds a run with other settings."""
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self._writer: Any = None
        settings = config.model_dump(mode="json")
        file = self.path / "config.yaml"
        if file.is_file():
            old = (yaml.safe_load(file.read_text()) or {}).get("config")
            changed = sorted(key for key in settings if old is None or old.get(key) != settings[key])
            if changed:
                raise ValueError(
                    f"{self.path} holds a run with other settings (different: {', '.join(changed)}). "
                    "Choose another output_dir, or delete the folder to start over."
                )
        elif rank() == 0:
            self.path.mkdir(parents=True, exist_ok=True)
            text = yaml.safe_dump({"config": settings, "versions": versions()}, sort_keys=False)
            atomic_text(file, text)
        if rank() == 0:
            for leftover in self.checkpoints.glob(".tmp-*"):  # of a killed process
                shutil.rmtree(leftover, ignore_errors=True)
        barrier()
        if settings.get("report_to") == "tensorboard" and rank() == 0:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ValueError("report_to=tensorboard needs the extra: pip install 'diptych[track]'") from error
            self._writer = SummaryWriter(self.path / "tensorboard")

    # --- checkpoints ---
    def steps(self) -> list[int]:
        """Steps that have a complete checkpoint, ascending."""
        if not self.checkpoints.is_dir():
            return []
        found = [re.fullmatch(r"step_(\d+)", p.name) for p in self.checkpoints.iterdir() if p.is_dir()]
        return sorted(int(match[1]) for match in found if match)

    def save(self, step: int, model: Any, state: dict[str, Any], *, keep: int = 2) -> None:
        """Writes model and trainer state for `step`, then drops all but the newest `keep` checkpoints."""
        if rank() == 0:
            with atomic_folder(self.checkpoints / f"step_{step}") as folder:
                model.save(folder / "model")
                torch.save(state, folder / "trainer.pt")
            for old in self.steps()[:-keep]:
                shutil.rmtree(self.checkpoints / f"step_{old}", ignore_errors=True)
        barrier()

    def load(self, step: int) -> tuple[Path, dict[str, Any]]:
        """The model folder and the trainer state of a checkpoint. Raises ValueError where it is damaged."""
        folder = self.checkpoints / f"step_{step}"
        try:
            state = torch.load(folder / "trainer.pt", weights_only=True, map_location="cpu")
        except Exception as error:
            raise ValueError(f"checkpoint {folder} is damaged ({str(error)[:200]}). Delete it to resume from the one before.") from error
        return folder / "model", state

    # --- logs ---
    def describe(self, name: str, content: Any) -> None:
        """A JSON file that says what the run is made of, written by its first start."""
        if rank() == 0 and not (self.path / name).is_file():
            atomic_text(self.path / name, json.dumps(content, indent=1) + "\n")

    def truncate_logs(self, step: int) -> None:
        """Forgets metrics and samples after `step`: they will be written again by the resumed run."""
        if rank() != 0:
            return
        kept = [line for line in self.metrics() if line["step"] <= step]
        atomic_text(self.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))
        for path in (self.path / "samples").glob("step_*.jsonl"):
            if int(path.stem.split("_")[1]) > step:
                path.unlink()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if rank() != 0:
            return
        line = {"step": step, **metrics}
        with (self.path / "metrics.jsonl").open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        if self._writer is not None:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)

    def metrics(self) -> list[dict[str, Any]]:
        """All logged lines. A last line that a killed process left unfinished is ignored."""
        return read_jsonl(self.path / "metrics.jsonl")

    def save_samples(self, step: int, records: list[dict[str, Any]]) -> None:
        """Documents in message form with their rewards, one JSON record per line."""
        if rank() == 0:
            text = "".join(json.dumps(record) + "\n" for record in records)
            atomic_text(self.path / "samples" / f"step_{step}.jsonl", text)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
