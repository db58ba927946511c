"""Run folders: configuration, metrics, samples and checkpoints that are never half-written.

config.yaml   rewards.json   metrics.jsonl   samples/step_N.jsonl   checkpoints/step_N/   report.html
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml

from diptych.config import RunConfig
from diptych.resumption import leaves, resumed_settings, set_keys
from diptych.runtime import agree, barrier, on_first, rank, versions
from diptych.trackers import Trackers, check_installed
from diptych.userfiles import dump_yaml

logger = logging.getLogger(__name__)
ConfigT = TypeVar("ConfigT", bound=RunConfig)
SHARED_FOLDER = "output_dir must be a folder that all of them see (a shared file system)"


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
        if any(words in str(error) for words in ("No space left", "StorageFull", "unexpected pos")):  # the last is torch.save's
            return True
        error = error.__cause__ or error.__context__
    return False


def atomic_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # half a character, as a path may hold one, becomes \udce9, which is right in JSON too
        temporary.write_text(text.encode(errors="backslashreplace").decode())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if is_disk_full(error):
            raise ValueError(f"no space left while writing {path}; the old file, if any, is intact") from error
        raise


class RunFolder(Generic[ConfigT]):
    """One training run. Only the first process writes, and only one run at a time: `with RunFolder(...) as run` holds its lock.

    config: the settings that the run is resumed with. Outside of `with` the folder can be looked into.
    """

    def __init__(self, path: str | Path, config: ConfigT, may_change: Collection[str] = ()) -> None:
        """`may_change`: settings beside `config.may_change` with which it may be resumed in another way, by their dotted keys."""
        self.path, self.config = Path(path), config
        self.checkpoints = self.path / "checkpoints"
        self._may_change = {*config.may_change, *may_change}
        self.ending = ExitStack()  # what is done before the lock is given up
        self._trackers: Trackers | None = None
        self._lock: Any = None

    def __enter__(self) -> RunFolder[ConfigT]:
        """Opens or makes the folder. Raises ValueError where another process trains in it, or it holds a run with other settings."""
        try:
            mine = self.config.model_dump(mode="json", exclude={"output_dir"})
            agree(hashlib.blake2b(json.dumps(mine).encode(), digest_size=8).hexdigest(), "settings (by their hash)", "Give all one command")
            settings = on_first(self._open)
            lock = self.path / "lock"
            agree(lock.read_text() if lock.is_file() else "none", "run folder (by what its lock says)", SHARED_FOLDER)
        except BaseException:
            self._release()
            raise
        self.config = type(self.config).model_validate(settings)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.ending.close()
            if self._trackers is not None:
                self._trackers.close()
        finally:
            self._release()

    def _open(self) -> dict[str, Any]:
        for tracker in self.config.report_to:
            check_installed(tracker)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / "lock").open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is training in {self.path}; wait for it, or choose another output_dir") from None
        except OSError as error:
            logger.warning("%s cannot be locked (%s): start no other run in it", self.path, error)
        self._lock.truncate(0)
        print(f"process {os.getpid()} since {time.time_ns()}", file=self._lock, flush=True)
        for leftover in self.checkpoints.glob(".tmp-*"):  # of a killed process; first, where they fill the disk
            shutil.rmtree(leftover, ignore_errors=True)
        return self._settled()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _settled(self) -> dict[str, Any]:
        """The settings to resume with, noted in config.yaml."""
        file, config = self.path / "config.yaml", self.config
        stored = (yaml.safe_load(file.read_text()) or {}) if file.is_file() else None
        made_with: dict[str, Any] = versions()
        history: list[dict[str, Any]] = []
        named = set_keys(config)
        if stored is not None:
            named |= set(stored.get("set", ()))
            step = (self.steps() or [0])[-1]
            config, changed = resumed_settings(config, stored, self._may_change, self.path)
            if config.max_steps < step:
                raise ValueError(f"{self.path} has done {step} steps already, and max_steps is {config.max_steps}; ask for {step} or more")
            others = {name: [stored.get("versions", {}).get(name), one] for name, one in made_with.items()}
            others = {name: pair for name, pair in others.items() if pair[0] != pair[1] and name in ("diptych", "torch", "transformers")}
            history = stored.get("history", [])
            if changed or others:
                entry = {"step": step, "changed": {key: list(pair) for key, pair in changed.items()}, "versions": others}
                history = [*history, {key: value for key, value in entry.items() if value}]
                changes = "; ".join(f"{key} {old!r} -> {new!r}" for key, (old, new) in [*changed.items(), *others.items()])
                logger.warning("%s resumes after step %d with other settings: %s", self.path, step, changes)
        settings = config.model_dump(mode="json")
        content = {"config": settings, "set": sorted(named), "versions": made_with, **({"history": history} if history else {})}
        if stored is None or stored != content:
            atomic_text(file, dump_yaml(content))
        return settings

    # --- checkpoints ---
    def steps(self) -> list[int]:
        """Steps that have a complete checkpoint, ascending."""
        if not self.checkpoints.is_dir():
            return []
        found = [re.fullmatch(r"step_(\d+)", p.name) for p in self.checkpoints.iterdir() if p.is_dir()]
        return sorted(int(match[1]) for match in found if match)

    @contextmanager
    def new_checkpoint(self, step: int, keep: int = 2) -> Iterator[Path]:
        """A folder to write the checkpoint of a step into, which gets its name when all is written; then all but the newest `keep` are
        dropped."""
        with atomic_folder(self.checkpoints / f"step_{step}") as folder:
            yield folder
        for old in self.steps()[:-keep]:
            shutil.rmtree(self.checkpoints / f"step_{old}", ignore_errors=True)

    def save(self, step: int, model: Any, state: dict[str, Any], *, keep: int = 2) -> None:
        """Writes model and trainer state for `step`, in the first process."""
        import torch

        if rank() == 0:
            with self.new_checkpoint(step, keep) as folder:
                model.save(folder / "model")
                torch.save(state, folder / "trainer.pt")
        barrier()

    def load(self, step: int) -> tuple[Path, dict[str, Any]]:
        """The model folder and the trainer state of a checkpoint. Raises ValueError where it is damaged."""
        import torch

        folder = self.checkpoints / f"step_{step}"
        try:
            state = torch.load(folder / "trainer.pt", weights_only=True, map_location="cpu")
        except Exception as error:
            raise ValueError(f"checkpoint {folder} is damaged ({str(error)[:200]}). Delete it to resume from the one before.") from error
        return folder / "model", state

    # --- logs ---
    def describe(self, name: str, content: Any) -> None:
        """A JSON file that says what the run is made of."""
        text = json.dumps(content, indent=1) + "\n"
        if rank() == 0 and not ((self.path / name).is_file() and (self.path / name).read_text() == text):
            atomic_text(self.path / name, text)

    def truncate_logs(self, step: int) -> None:
        """Forgets metrics and samples after `step`, which the resumed run will write again, and starts the trackers."""
        if rank() != 0:
            return
        kept = [line for line in self.metrics() if line["step"] <= step]
        atomic_text(self.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))
        for path in (self.path / "samples").glob("step_*.jsonl"):
            if int(path.stem.split("_")[1]) > step:
                path.unlink()
        if self.config.report_to:
            self._trackers = Trackers(
                self.config.report_to, self.path, step, project=self.config.tracker_project, options=self.config.tracker_options,
                settings={key: json.dumps(one) if isinstance(one, list | dict) else one for key, one in leaves(self.config).items()},
            )  # fmt: skip

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if rank() != 0:
            return
        line = {"step": step, **metrics}
        with (self.path / "metrics.jsonl").open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        if self._trackers is not None:
            self._trackers.log(step, metrics)

    def metrics(self) -> list[dict[str, Any]]:
        """All logged lines. A last line that a killed process left unfinished is ignored."""
        return read_jsonl(self.path / "metrics.jsonl")

    def save_samples(self, step: int, records: list[dict[str, Any]]) -> None:
        """Documents in message form with their rewards, one JSON record per line."""
        if rank() == 0:
            text = "".join(json.dumps(record) + "\n" for record in records)
            atomic_text(self.path / "samples" / f"step_{step}.jsonl", text)
            if self._trackers is not None:
                self._trackers.documents(step, records)


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
