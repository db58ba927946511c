"""The grid: every variant at every seed, in worker processes, from where an earlier command was stopped."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from diptych.ablation.suite import Suite, Variant, evaluated_steps, variant_config
from diptych.ablation.trials import Trial, differences, trial_of, warmup_trial
from diptych.runs import atomic_text

POLL_SECONDS = 0.2
LAST_LINES = 6
WARMUP_STEP = 0.25  # of the work of a GRPO step, about; for the time left only


@dataclasses.dataclass(frozen=True)
class Entry:
    """One place of the grid. Two entries may share a trial: the base model has no seed."""

    variant: Variant
    seed: int
    trial: Trial


@dataclasses.dataclass
class _Worker:
    trial: Trial
    process: subprocess.Popen[bytes]
    log: Path
    bar: TaskID
    began: float


def grid(suite: Suite, seeds: Sequence[int]) -> list[Entry]:
    """All entries, seed by seed, so that a grid that is stopped early is complete for its first seeds.

    Raises ValueError for wrong settings of any variant.
    """
    entries = []
    for seed in seeds:
        for variant in suite.variants:
            config = variant_config(suite, variant, seed)
            entries.append(Entry(variant, seed, trial_of(variant.stage, config, evaluated_steps(suite, config))))
    return entries


def default_jobs() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_grid(name: str, suite: Suite, entries: Sequence[Entry], root: Path, jobs: int, console: Console) -> dict[str, str]:
    """Runs what is not finished and returns what failed: title of a trial -> the last lines that its worker said.

    Raises ValueError where a trial's folder holds other settings than it should, before anything runs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("ablate starts its own processes (--jobs), each for a trial by itself; run it without torchrun")
    trials, titles = _unfinished(entries, root)
    _tell_changes(root / name / "suite.json", entries, console)
    for trial in trials:
        trial.prepare(root)
    pending, workers, failures = list(trials), list[_Worker](), dict[str, str]()
    with _bars(console) as bars:
        whole = bars.add_task(suite.title, total=sum(map(_work, trials)) or 1, shown="")
        try:
            while pending or workers:
                for worker in [w for w in workers if w.process.poll() is not None]:
                    workers.remove(worker)
                    error = _finish(worker, titles[worker.trial.key], root, bars)
                    if error:
                        failures[worker.trial.key] = error
                for trial in _ready(pending, workers, failures):
                    if len(workers) < jobs:
                        pending.remove(trial)
                        workers.append(_start(trial, titles[trial.key], root, bars))
                for trial in [c for c in pending if _needs(c) in failures]:
                    pending.remove(trial)
                    failures[trial.key] = f"not run, because it needs what failed: {titles[_needs(trial) or '']}"
                left = sum(map(_work, pending)) + sum(_show(worker, bars) for worker in workers)
                bars.update(
                    whole, completed=sum(map(_work, trials)) - left, shown=f"{len(pending) + len(workers)} of {len(trials)} trials left"
                )
                if workers:
                    time.sleep(POLL_SECONDS)
            bars.update(whole, completed=sum(map(_work, trials)) or 1)
        finally:
            for worker in workers:  # the command was stopped; everything up to the last checkpoints is saved
                worker.process.terminate()
                worker.process.wait()
    return {titles[key]: lines for key, lines in failures.items()}


def _unfinished(entries: Sequence[Entry], root: Path) -> tuple[list[Trial], dict[str, str]]:
    """The trials to run, each once, warm-ups before what starts from them; and a title for every trial."""
    trials: dict[str, Trial] = {}
    titles: dict[str, str] = {}
    for entry in entries:
        if entry.trial.stage == "grpo":
            needed = warmup_trial(entry.trial)
            trials.setdefault(needed.key, needed)
            titles.setdefault(needed.key, f"warm-up {needed.key[-6:]}, seed {entry.seed}")
        trials.setdefault(entry.trial.key, entry.trial)
        titles.setdefault(entry.trial.key, f"{entry.variant.name}, seed {entry.seed}")
    return [trial for trial in trials.values() if trial.summary(root) is None], titles


def _needs(trial: Trial) -> str | None:
    return warmup_trial(trial).key if trial.stage == "grpo" else None


def _ready(pending: Sequence[Trial], workers: Sequence[_Worker], failures: dict[str, str]) -> list[Trial]:
    """Trials whose warm-up is neither still to be made nor failed."""
    open_keys = {trial.key for trial in pending} | {worker.trial.key for worker in workers} | set(failures)
    return [trial for trial in pending if _needs(trial) not in open_keys]


def _tell_changes(path: Path, entries: Sequence[Entry], console: Console) -> None:
    """Says which variants have other settings than when the suite was last run: their trials are run anew, and the old ones stay."""
    now = {entry.variant.name: entry.trial.settings for entry in reversed(entries)}  # at the first seed
    before = json.loads(path.read_text()) if path.is_file() else {}
    for name, settings in now.items():
        changed = differences(before[name], settings) if name in before else {}
        if changed:
            words = ", ".join(f"{key} {json.dumps(old)} -> {json.dumps(new)}" for key, (old, new) in changed.items())
            line = f"{name}: settings changed since the last run ({words}); its trials are run anew, the old ones are kept"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    atomic_text(path, json.dumps(now) + "\n")


# --- workers -------------------------------------------------------------------------------------------------------------


def _start(trial: Trial, title: str, root: Path, bars: Progress) -> _Worker:
    log = trial.folder(root) / "log.txt"
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "diptych.ablation.worker", str(root), trial.key], stdin=subprocess.PIPE, stdout=stream, stderr=stream,
            env={**os.environ, **threads, "TOKENIZERS_PARALLELISM": "false"}, start_new_session=True,
        )  # fmt: skip
    return _Worker(trial, process, log, bars.add_task(title, total=_steps(trial), shown=""), time.perf_counter())


def _finish(worker: _Worker, title: str, root: Path, bars: Progress) -> str | None:
    """The last lines of a worker that failed; None where it did what it should."""
    assert worker.process.stdin is not None
    worker.process.stdin.close()
    bars.remove_task(worker.bar)
    code = worker.process.returncode
    if code == 0 and worker.trial.summary(root) is not None:
        bars.console.print(f"done: {title} ({time.perf_counter() - worker.began:.0f} s)", highlight=False)
        return None
    bars.console.print(f"failed: {title} (exit code {code}; all it said is in {worker.log})", highlight=False, markup=False, soft_wrap=True)
    lines = [line for line in _tail(worker.log) if not _progress(line)][-LAST_LINES:]
    return "\n".join(lines) or f"exit code {code}, and it said nothing"


def _show(worker: _Worker, bars: Progress) -> float:
    """Moves a worker's bar to what it said last; returns the work that is left to it."""
    lines = _tail(worker.log)
    said = _progress(lines[-1]) if lines else None
    if said is None:
        return _work(worker.trial)
    done, total, words = int(said[1]), int(said[2]), said[3]
    bars.update(worker.bar, completed=done, total=total, shown=words)
    return _work(worker.trial) * (1 - done / total)


def _progress(line: str) -> re.Match[str] | None:
    return re.fullmatch(r"(\d+)/([1-9]\d*) (.+)", line)


def _tail(log: Path) -> list[str]:
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 8000))
        return stream.read().decode(errors="replace").splitlines()


def _steps(trial: Trial) -> int:
    return trial.settings[trial.stage]["max_steps"] if trial.stage != "base" else 1


def _work(trial: Trial) -> float:
    return _steps(trial) * (WARMUP_STEP if trial.stage == "warmup" else 1)


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<30}", markup=False), BarColumn(bar_width=24), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(), TextColumn("{task.fields[shown]}", markup=False), console=console,
    )  # fmt: skip
