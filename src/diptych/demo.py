"""The whole method on the packaged model: warm-up, unified GRPO, evaluation against a hidden truth, a report.

Every stage is resumable: the same command continues where a killed one stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from diptych.config import DemoConfig, GRPOConfig, WarmupConfig
from diptych.document import to_json_blocks
from diptych.evaluation.storyboard import (
    SHOWN_RATES,
    Judged,
    evaluate_documents,
    evaluate_retention,
    held_out_tasks,
    rate_cells,
    rates,
    rates_by_kind,
    reward_columns,
)
from diptych.models import load_model
from diptych.report import demo_page
from diptych.rewards import call_rewards, load_reward
from diptych.runs import atomic_text, read_jsonl
from diptych.runtime import set_threads, versions
from diptych.training import grpo as grpo_stage
from diptych.training import warmup as warmup_stage

CHECKPOINTS = ("base", "warmup", "grpo")
NUM_EXAMPLES = 60
"""Prompts whose answers are kept for the page, which shows the first ones and those whose verdict GRPO changed."""
_LOSSES = {"loss/text": "text loss", "loss/image": "image loss"}


def run_demo(config: DemoConfig, console: Console | None = None) -> dict[str, Any]:
    """Runs what is not done yet and returns the results, which are also in `results.json` and `report.html`."""
    console = console or Console(markup=False, emoji=False, highlight=False)
    folder = Path(config.output_dir)
    warmup_config, grpo_config = stage_configs(config)
    set_threads(config.warmup.num_threads)
    clock = _Clock(folder / "seconds.json")
    with _bars(console) as bars:
        with clock.of("warmup"):
            warmup_stage.warmup(warmup_config, _stage(bars, "1/3 Warm-up", warmup_config.max_steps, _LOSSES))
            _complete(bars)
        with clock.of("grpo"):
            rewards = {f"rewards/{reward.key}/mean": reward.key for reward in grpo_config.rewards}
            grpo_stage.grpo(grpo_config, _stage(bars, "2/3 GRPO", grpo_config.max_steps, rewards))
            _complete(bars)
        with clock.of("evaluation"):
            sources = {
                "base": warmup_config.model,
                "warmup": warmup_stage.checkpoint_of(warmup_config),
                "grpo": grpo_stage.checkpoint_of(grpo_config),
            }
            evaluated = _evaluate_all(config, sources, folder / "evaluation", bars)
    results = {
        "checkpoints": {name: e["rates"] for name, e in evaluated.items()},
        "retention": {
            skill: {name: e["retention"][skill] for name, e in evaluated.items()} for skill in ("text_to_image", "understanding")
        },
        "greedy_by_kind": {name: e["greedy_by_kind"] for name, e in evaluated.items()},
        "num_prompts": config.evaluate.num_prompts,
        "parity": _parity(folder / "grpo"),
        "seconds": clock.seconds(),
        "versions": versions(),
    }
    atomic_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
    examples = [
        {**answered[0], "answers": {name: example["answer"] for name, example in zip(CHECKPOINTS, answered, strict=True)}}
        for answered in zip(*(evaluated[name]["examples"] for name in CHECKPOINTS), strict=False)  # an older demo kept fewer
    ]
    atomic_text(folder / "report.html", demo_page(results, examples, folder))
    print_results(results, folder, console)
    return results


def stage_configs(config: DemoConfig) -> tuple[WarmupConfig, GRPOConfig]:
    """The stages' settings with the demo's folder and seed; GRPO starts from the warm-up's last checkpoint."""
    warmup_config = config.warmup.model_copy(update={"output_dir": f"{config.output_dir}/warmup", "seed": config.seed})
    grpo_config = config.grpo.model_copy(
        update={"output_dir": f"{config.output_dir}/grpo", "seed": config.seed, "model": warmup_stage.checkpoint_of(warmup_config)}
    )
    return warmup_config, grpo_config


class _Clock:
    """Seconds of each stage, added up over resumed runs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spent: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.spent[stage] = self.spent.get(stage, 0.0) + time.perf_counter() - began
            atomic_text(self.path, json.dumps(self.spent))

    def seconds(self) -> dict[str, float]:
        parts = {stage: round(self.spent[stage], 1) for stage in ("warmup", "grpo", "evaluation")}
        return {**parts, "total": round(sum(parts.values()), 1)}


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<22}", markup=False), BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[shown]}", markup=False), console=console,
    )  # fmt: skip


def _stage(bars: Progress, title: str, total: int, shown_metrics: dict[str, str]) -> Any:
    """What a training reports its steps to. `shown_metrics`: metric -> the word for it beside the bar."""
    task = bars.add_task(title, total=total, shown="")

    def update(step: int, total: int, metrics: dict[str, float]) -> None:
        shown = "  ".join(f"{label} {metrics[name]:.2f}" for name, label in shown_metrics.items() if name in metrics)
        bars.update(task, completed=step, shown=shown)
        if not bars.console.is_terminal and (step % 10 == 0 or step == total):
            bars.console.print(f"{title} {step}/{total}  {shown}")

    return update


def _complete(bars: Progress) -> None:
    """The newest bar to its end: a stage that an earlier run finished reports no step."""
    task = bars.tasks[-1]
    bars.update(task.id, completed=task.total)


def _evaluate_all(config: DemoConfig, sources: dict[str, str], folder: Path, bars: Progress) -> dict[str, Any]:
    """Evaluates each checkpoint once; a finished one is read back."""
    total = len(CHECKPOINTS) * 2 * (config.evaluate.num_prompts + config.evaluate.num_retention)
    task = bars.add_task("3/3 Evaluation", total=total, shown="")
    found = {}
    for name in CHECKPOINTS:
        path = folder / f"{name}.json"
        settings = {"evaluate": config.evaluate.model_dump(), "sampling": config.grpo.sampling.model_dump(), "model": sources[name]}
        stored = json.loads(path.read_text()) if path.is_file() else {}
        bars.update(task, shown=name)
        if stored.get("settings") == settings and "greedy_by_kind" in stored:  # demos before it had been counted lack it
            bars.advance(task, total // len(CHECKPOINTS))
        else:
            result = _evaluate_one(config, sources[name], lambda n: bars.advance(task, n))
            atomic_text(path, json.dumps({**result, "settings": settings}))
        found[name] = json.loads(path.read_text())
    return found


def _evaluate_one(config: DemoConfig, source: str, progress: Any) -> dict[str, Any]:
    model, tasks, sampling = load_model(source).eval(), held_out_tasks(config.evaluate), config.grpo.sampling
    greedy = evaluate_documents(model, tasks, sampling.greedy(), config.evaluate, progress)
    sampled = evaluate_documents(model, tasks, sampling, config.evaluate, progress)
    return {
        "rates": {"greedy": rates(greedy), "sampled": rates(sampled)},
        "greedy_by_kind": rates_by_kind(greedy),
        "retention": evaluate_retention(model, sampling, config.evaluate, progress),
        "examples": _examples(greedy[:NUM_EXAMPLES], config.grpo),
    }


@torch.no_grad()
def _examples(judged: list[Judged], config: GRPOConfig) -> list[dict[str, Any]]:
    """Answers as JSON, with what the learned rewards and the oracle say of each step."""
    functions = [(reward, load_reward(reward.name)) for reward in config.rewards]
    rewards = call_rewards(functions, [j.task.prompt for j in judged], [j.answer for j in judged], reward_columns(judged))
    shown = []
    for b, item in enumerate(judged):
        steps: list[dict[str, Any]] = []
        drawn = 0
        for j, block in enumerate(to_json_blocks(item.answer)):
            values: dict[str, Any] = {
                reward.key: float(rewards.steps[r, b, j]) for r, reward in enumerate(config.rewards) if rewards.applies[r, b, j]
            }
            if drawn < len(item.verdict.steps) and item.answer.images:
                kind = 0 if block["type"] == "text" else 1
                values[("oracle/text", "oracle/picture")[kind]] = item.verdict.steps[drawn][kind]
            drawn += block["type"] == "image"
            steps.append(values)
        whole = {"oracle/whole document": item.verdict.document == 1}
        answer = {"answer": to_json_blocks(item.answer), "steps": steps, "document": whole}
        shown.append({"family": item.task.family, "prompt": to_json_blocks(item.task.prompt), "answer": answer})
    return shown


def _parity(run: Path) -> dict[str, float]:
    lines = read_jsonl(run / "metrics.jsonl")
    return {
        "text_max": max(line["parity/text_max"] for line in lines),
        "image_max": max(line["parity/image_max"] for line in lines),
        "first_ratio_gap": max(max(line["ratio/first_gap/text"], line["ratio/first_gap/image"]) for line in lines),
    }


def print_results(results: dict[str, Any], folder: Path, console: Console) -> None:
    for mode in ("greedy", "sampled"):
        table = Table(title=f"{results['num_prompts']} held-out prompts, {mode} (per cent, 95 % interval)")
        table.add_column("")
        for rate in SHOWN_RATES["full"]:
            table.add_column(rate, justify="right")
        for name in CHECKPOINTS:
            table.add_row(name, *rate_cells(results["checkpoints"][name][mode], SHOWN_RATES["full"]))
        console.print(table)
    kinds = Table(title="whole documents right by kind, greedy (per cent)")
    for head in ("", "prompts", *CHECKPOINTS):
        kinds.add_column(head, justify="right" if head else "left")
    counted = results["greedy_by_kind"]
    for kind, row in counted["base"].items():
        kinds.add_row(kind, str(row["prompts"]), *(f"{100 * counted[name][kind]['document']:.1f}" for name in CHECKPOINTS))
    console.print(kinds)
    for skill, values in results["retention"].items():
        numbers = ", ".join(f"{name} {100 * v['accuracy']:.1f}" for name, v in values.items())
        console.print(f"retention of {skill.replace('_', ' ')} (per cent): {numbers}")
    parity = results["parity"]
    console.print(
        f"largest |replayed - sampled| log-probability: text {parity['text_max']:.1e}, image {parity['image_max']:.1e}; "
        f"first ratio within {parity['first_ratio_gap']:.1e} of 1"
    )
    console.print(f"time: {results['seconds']}\nopen {folder / 'report.html'}")
