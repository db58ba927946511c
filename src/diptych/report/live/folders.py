"""Runs in the folders that were given, found again and again; nothing outside these folders is ever read."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from diptych.report.live.alerts import Alert, alerts
from diptych.report.live.documents import Documents
from diptych.report.live.metrics import Metrics
from diptych.userfiles import read_json

DEPTH = 6  # folders below a given one
LOOK_AGAIN_SECONDS = 2.0
NOT_RUNS = {"checkpoints", "samples", "tensorboard", "wandb", "node_modules"}
QUIET_SECONDS, QUIET_STEPS = 60.0, 5  # without a new line, a run is quiet: so long, or so many of its steps


class Run:
    """One run folder, as it is now."""

    def __init__(self, id: str, folder: Path) -> None:
        self.id, self.folder = id, folder
        self.metrics = Metrics(folder / "metrics.jsonl")
        self.documents = Documents(folder / "samples")
        self._settings: tuple[int, dict[str, Any]] = (0, {})
        self._alerts: tuple[tuple[str, int, int], list[Alert]] = (("", 0, 0), [])

    def settings(self) -> dict[str, Any]:
        """What config.yaml says; nothing where it cannot be read."""
        file = self.folder / "config.yaml"
        try:
            written = file.stat(follow_symlinks=False).st_mtime_ns
            if written != self._settings[0]:
                content = {} if file.is_symlink() else yaml.safe_load(file.read_text())
                self._settings = (written, dict(content["config"]))
        except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError):
            self._settings = (0, {})
        return self._settings[1]

    def alerts(self, settings: Mapping[str, Any]) -> list[Alert]:
        now = (self.metrics.generation, self.metrics.num_lines, self._settings[0])
        if self._alerts[0] != now:
            self._alerts = (now, alerts(self.metrics.curves(), settings))
        return self._alerts[1]

    def summary(self) -> dict[str, Any]:
        """What a list of runs shows of it."""
        self.metrics.refresh()
        settings, step = self.settings(), self.metrics.last_step
        most = settings.get("max_steps")
        try:
            age = max(0.0, time.time() - (self.folder / "metrics.jsonl").stat().st_mtime)
        except OSError:
            age = 0.0
        times = self.metrics.curve("step_time")[1][-20:]
        seconds = float(np.median(times)) if len(times) else None
        logging_steps = settings.get("logging_steps", 1)
        quiet = age > max(QUIET_SECONDS, QUIET_STEPS * (seconds or 0.0) * logging_steps)
        state = "finished" if most is not None and step >= most else "quiet" if quiet else "training"
        return {
            "id": self.id, "kind": "grpo" if "rewards" in settings else "warmup", "state": state, "step": step, "max_steps": most,
            "age_seconds": round(age, 1), "step_seconds": seconds, "generation": self.metrics.generation, "lines": self.metrics.num_lines,
            "reward": self.metrics.last("reward"), "saved": self.documents.saved(),
            "rewards": self._rewards(settings), "alerts": [dataclasses.asdict(alert) for alert in self.alerts(settings)],
        }  # fmt: skip

    def _rewards(self, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Name, weight, modality and description of each."""
        about: dict[str, str] = {}
        file = self.folder / "rewards.json"
        try:
            for entry in [] if file.is_symlink() else read_json(file):
                about[str(entry["name"])] = str(entry["about"])
        except (OSError, ValueError, LookupError, TypeError):
            pass  # an older run, or a warm-up
        found = []
        for reward in settings.get("rewards", ()):
            key = reward.get("label") or reward.get("name")
            modality = reward.get("modality", "both")
            found.append({"key": key, "weight": reward.get("weight"), "modality": modality, "about": about.get(key, "")})
        return found


class Runs:
    """All runs in some folders, by ids that are their paths below these. An id is looked up, and never made into a path."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self.roots = [root.resolve() for root in roots]
        self._lock, self._found, self._looked = threading.Lock(), dict[str, Run](), 0.0

    def all(self) -> dict[str, Run]:
        with self._lock:
            if time.monotonic() - self._looked > LOOK_AGAIN_SECONDS or not self._found:
                self._look()
                self._looked = time.monotonic()
            return dict(self._found)

    def _look(self) -> None:
        found: dict[str, Run] = {}
        for root in self.roots:
            for folder in _run_folders(root):
                below = folder.relative_to(root)
                name = root.name if below == Path() else f"{root.name}/{below.as_posix()}" if len(self.roots) > 1 else below.as_posix()
                number, id = 1, name
                while id in found and found[id].folder != folder:
                    number, id = number + 1, f"{name} ({number + 1})"
                known = self._found.get(id)
                found[id] = known if known is not None and known.folder == folder else Run(id, folder)
        self._found = dict(sorted(found.items()))


def _run_folders(root: Path) -> list[Path]:
    """Folders with metrics.jsonl; links are not followed."""
    found = []
    for path, folders, files in os.walk(root, followlinks=False):
        here = Path(path)
        if "metrics.jsonl" in files and not (here / "metrics.jsonl").is_symlink():
            found.append(here)
        deep = len(here.relative_to(root).parts) >= DEPTH
        folders[:] = [] if deep else sorted(name for name in folders if name not in NOT_RUNS and not name.startswith("."))
    return found
