"""Trials: what is trained and evaluated once, however many suites and variants ask for it.

A trial is named by a hash of everything that its numbers depend on, so other settings are another trial and are never mixed
up. Beside the trials stand the warm-ups, each trained once for all trials that start from it:

warmups/HASH/run/                    a warm-up's run folder; of a finished one only the model is kept
cells/STAGE-HASH/settings.json  what the hash is of
                 run/                GRPO's run folder; of a finished one only the last model is kept
                 evaluation/step_N.json   written once
                 summary.json        written last: the trial is finished
                 log.txt             the worker's output
"""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diptych.ablation.measures import MEMORY, RATES, TRAINING
from diptych.config import Config, DemoConfig, EvaluateConfig, GRPOConfig, RewardConfig, SamplingParams, WarmupConfig, build
from diptych.evaluation.storyboard import Judged, evaluate_documents, evaluate_retention, held_out_tasks, rates, reward_columns
from diptych.models import load_model, packaged_folder
from diptych.rewards import call_rewards, load_reward
from diptych.runs import RunFolder, atomic_text, read_jsonl
from diptych.runtime import pick_device, versions
from diptych.training.credit import document_rewards
from diptych.training.grpo import grpo
from diptych.training.warmup import checkpoint_of, warmup

Say = Callable[[int, int, str], None]
"""(steps done, steps in all, a few words)"""
DEFAULTS = 1  # raised whenever the default of a setting changes
ASKED = ("format", "image_text", "text_critic", "text_likelihood", "image_likelihood")  # in every evaluation
WEIGHTS = ("image_text", "storyboard", "storyboard_terse", "text_critic")  # packages that they need
WINDOW = 5  # logged steps before a checkpoint whose mean is its training metrics


@dataclasses.dataclass(frozen=True)
class Trial:
    """`settings` is JSON: the stage and all that its numbers depend on, without folders."""

    settings: dict[str, Any]

    @property
    def stage(self) -> str:
        return self.settings["stage"]

    @property
    def key(self) -> str:
        return f"{self.stage}-{digest(self.settings)}"

    def folder(self, root: Path) -> Path:
        return root / "cells" / self.key

    def summary(self, root: Path) -> dict[str, Any] | None:
        """What a finished trial found; None where it is not finished. Raises ValueError where the folder is of other settings."""
        self.check(root)
        path = self.folder(root) / "summary.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def check(self, root: Path) -> None:
        path = self.folder(root) / "settings.json"
        if path.is_file():
            stored = json.loads(path.read_text())
            if stored != self.settings:
                changed = ", ".join(sorted(differences(stored, self.settings)))
                raise ValueError(
                    f"{path} was changed ({changed}): its trial would be mixed with another. Delete {path.parent} to run it again"
                )
        elif path.parent.is_dir() and (path.parent / "summary.json").is_file():
            raise ValueError(f"{path} is missing, so nothing says what {path.parent} is of. Delete that folder to run it again")

    def prepare(self, root: Path) -> None:
        """Makes the folder with its settings."""
        self.check(root)
        path = self.folder(root) / "settings.json"
        if not path.is_file():
            atomic_text(path, json.dumps(self.settings, indent=1) + "\n")


def trial_of(stage: str, config: DemoConfig, steps: tuple[int, ...]) -> Trial:
    """The trial of a variant's settings at one seed. `steps`: GRPO steps to evaluate, the last included."""
    later = {"world"} if config.evaluate.world == "standard" else None  # a setting that came later makes no other trials
    settings: dict[str, Any] = {
        "stage": stage,
        "evaluate": config.evaluate.model_dump(mode="json", exclude=later),
        "sampling": config.grpo.sampling.model_dump(mode="json"),
        "device": config.grpo.device,
        "weights": packaged_weights(config.model_dump(mode="json", include={"warmup", "grpo"})),
        "defaults": DEFAULTS,
    }
    if stage == "base":
        return Trial({**settings, "model": config.warmup.model})
    settings["warmup"] = _said(config.warmup, {"output_dir"})
    if stage == "warmup":
        return Trial(settings)
    save_steps = math.gcd(config.grpo.save_steps, *steps[:-1])  # the last step is always saved
    settings["grpo"] = _said(config.grpo.model_copy(update={"save_steps": save_steps}), {"output_dir", "model"})
    return Trial({**settings, "steps": list(steps)})


def _said(config: Config, without: set[str]) -> dict[str, Any]:
    """What differs from the defaults, so that a setting that is added later makes no other trials. A default that is changed must not be
    taken for the old one: `tests/data/defaults.json` holds them, and `DEFAULTS` counts their changes."""
    return config.model_dump(mode="json", exclude=without, exclude_defaults=True)


def warmup_trial(trial: Trial) -> Trial:
    """The trial that evaluates the warm-up from which a GRPO trial starts."""
    return Trial({**{k: v for k, v in trial.settings.items() if k not in ("grpo", "steps")}, "stage": "warmup"})


def packaged_weights(settings: Mapping[str, Any]) -> str:
    """A hash of the packaged weights that the settings name and evaluations need: another base model or reward makes other trials."""
    said = json.dumps(settings)
    names = sorted(path.name for path in packaged_folder("").iterdir() if path.name in WEIGHTS or f'"{path.name}"' in said)
    return _hash_of(tuple(names))


@functools.cache
def _hash_of(packages: tuple[str, ...]) -> str:
    files = [file for name in packages for file in sorted(packaged_folder(name).rglob("*.safetensors"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def digest(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def differences(old: Any, new: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted leaf -> (old, new) of what differs between two JSON values."""
    if isinstance(old, dict) and isinstance(new, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in [*old, *(k for k in new if k not in old)]:
            found |= differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        return found
    return {} if old == new else {path: (old, new)}


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits until no other process or thread holds the file. The lock goes with its holder, however that dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


# --- running -------------------------------------------------------------------------------------------------------------


def run_trial(root: Path, trial: Trial, say: Say) -> dict[str, Any]:
    """Runs what is not done yet of a trial and returns its summary.

    Raises whatever the trainings raise; what was done until then is kept.
    """
    with locked(trial.folder(root) / "lock"):
        trial.prepare(root)
        summary = trial.summary(root)
        if summary is None:
            found = {"base": _base, "warmup": _warmup, "grpo": _grpo}[trial.stage](root, trial, say)
            summary = {"cell": trial.key, **found, "versions": versions()}
            atomic_text(trial.folder(root) / "summary.json", json.dumps(summary, indent=1) + "\n")
        if trial.stage == "grpo":
            _keep_last_model(trial.folder(root) / "run" / "checkpoints")
        return summary


def _base(root: Path, trial: Trial, say: Say) -> dict[str, Any]:
    say(0, 1, "evaluation")
    return _summary(trial, root, {0: _evaluated(root, trial, 0, trial.settings["model"])}, {})


def _warmup(root: Path, trial: Trial, say: Say) -> dict[str, Any]:
    model, seconds = trained_warmup(root, trial, say)
    return _summary(trial, root, {0: _evaluated(root, trial, 0, model)}, {"warmup": seconds})


def trained_warmup(root: Path, trial: Trial, say: Say) -> tuple[str, float]:
    """The model folder of the warm-up that a trial needs, and the seconds its training took; trained here if nobody did."""
    settings = trial.settings["warmup"]
    folder = root / "warmups" / digest(settings)
    config = build(WarmupConfig, {**settings, "output_dir": str(folder / "run")})
    clock, model = folder / "seconds.json", checkpoint_of(config)
    with locked(folder / "lock"):
        if not Path(model).is_dir():
            began = time.perf_counter()
            before = json.loads(clock.read_text()) if clock.is_file() else 0.0

            def progress(step: int, total: int, metrics: dict[str, float]) -> None:
                atomic_text(clock, json.dumps(round(before + time.perf_counter() - began, 1)))
                say(step, total, f"warm-up, text loss {metrics['loss/text']:.2f}")

            warmup(config, progress)
        _keep_last_model(folder / "run" / "checkpoints")
    return model, json.loads(clock.read_text())


def _grpo(root: Path, trial: Trial, say: Say) -> dict[str, Any]:
    model, _ = trained_warmup(root, trial, say)
    config = build(GRPOConfig, {**trial.settings["grpo"], "model": model, "output_dir": str(trial.folder(root) / "run")})
    run = RunFolder(config.output_dir, config)

    def evaluate(step: int) -> None:
        if step in trial.settings["steps"]:
            _evaluated(root, trial, step, run.checkpoints / f"step_{step}" / "model")

    def progress(step: int, total: int, metrics: dict[str, float]) -> None:
        say(step, total, f"GRPO, reward {metrics.get('reward', math.nan):.2f}")
        evaluate(step)  # grpo() has just saved this step, and later keeps only the newest two

    for step in run.steps():  # saved by a process that was killed before or while it evaluated
        evaluate(step)
    grpo(config, progress)
    found = {step: _evaluated(root, trial, step, run.checkpoints / f"step_{step}" / "model") for step in trial.settings["steps"]}
    return _summary(trial, root, found, {"grpo": sum(line["step_time"] for line in run.metrics())})


def _keep_last_model(checkpoints: Path) -> None:
    """What a finished training needs no more: all but the newest model, and the optimizer's state."""
    newest = max(checkpoints.glob("step_*"), key=lambda path: int(path.name.removeprefix("step_")))
    for path in checkpoints.iterdir():
        if path != newest:
            shutil.rmtree(path, ignore_errors=True)
    (newest / "trainer.pt").unlink(missing_ok=True)


# --- evaluating ----------------------------------------------------------------------------------------------------------


def _evaluated(root: Path, trial: Trial, step: int, model: str | Path) -> dict[str, Any]:
    """The evaluation of a checkpoint: read back where it was done before."""
    path = trial.folder(root) / "evaluation" / f"step_{step}.json"
    if not path.is_file():
        evaluate = build(EvaluateConfig, trial.settings["evaluate"])
        sampling = build(SamplingParams, trial.settings["sampling"])
        atomic_text(path, json.dumps(evaluate_model(model, evaluate, sampling, trial.settings["device"])) + "\n")
    return json.loads(path.read_text())


def evaluate_model(source: str | Path, config: EvaluateConfig, sampling: SamplingParams, device: str = "cpu") -> dict[str, float]:
    """Measures of a checkpoint on held-out prompts, by name (see `measures`), and the `seconds` they took.

    A reward that says nothing of any answer (a model that draws no picture has no image agreement) has no entry.
    """
    began = time.perf_counter()
    model, tasks = load_model(source).to(pick_device(device)).eval(), held_out_tasks(config)
    found: dict[str, float] = {}
    for mode, params in (("greedy", sampling.greedy()), ("sampled", sampling)):
        judged = evaluate_documents(model, tasks, params, config)
        oracle = rates(judged)
        found |= {f"{mode}/{name}": oracle[name] for name in (*RATES, *(MEMORY if config.telling == "terse" else ()))}
        found |= {f"{mode}_reward/{name}": value for name, value in mean_rewards(judged).items()}
    kept = evaluate_retention(model, sampling, config)
    found |= {f"retention/{name}": value["accuracy"] for name, value in kept.items()}
    return {**found, "seconds": round(time.perf_counter() - began, 1)}


def mean_rewards(judged: list[Judged]) -> dict[str, float]:
    """What each of `ASKED` says of the answers, on average over those that it speaks of. None of them is trained on here:
    beside the oracle's rates this shows a policy that pleases its rewards and nothing else."""
    functions = [(RewardConfig(name=name), load_reward(name)) for name in ASKED]
    batch = call_rewards(functions, [j.task.prompt for j in judged], [j.answer for j in judged], reward_columns(judged))
    values, speaks, missing = document_rewards(batch.steps, batch.applies, batch.documents, batch.documents_apply)  # (R, B)
    used = speaks & ~missing
    return {name: round(float(values[r][used[r]].mean()), 4) for r, name in enumerate(ASKED) if bool(used[r].any())}


def _summary(trial: Trial, root: Path, evaluations: dict[int, dict[str, Any]], seconds: dict[str, float]) -> dict[str, Any]:
    lines = read_jsonl(trial.folder(root) / "run" / "metrics.jsonl")
    points = {}
    for step, evaluation in evaluations.items():
        measured = {name: value for name, value in evaluation.items() if name != "seconds"}
        points[str(step)] = {**measured, **_training(lines, step)}
    seconds = {**seconds, "evaluation": sum(e["seconds"] for e in evaluations.values())}
    return {
        "seed": trial.settings["warmup"].get("seed", 0) if "warmup" in trial.settings else None,
        "points": points,
        "parity": {f"{kind}_max": max(line[f"parity/{kind}_max"] for line in lines) for kind in ("text", "image")} if lines else {},
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }


def _training(lines: list[dict[str, Any]], step: int) -> dict[str, float]:
    """Means of the last steps up to a checkpoint, of the known metrics and of every reward of the recipe."""
    recent = [line for line in lines if line["step"] <= step][-WINDOW:]
    found = {}
    for name in recent[-1] if recent else ():
        if name in TRAINING or (name.startswith("rewards/") and name.endswith("/mean")):
            values = [line[name] for line in recent if name in line]
            found[f"train/{name}"] = float(f"{sum(values) / len(values):.5g}")
    return found
