"""The whole method on the packaged model: warm-up, unified GRPO, evaluation against a hidden truth, a report.

Where the settings have a `control`, GRPO is run a second time from the same warm-up, with what the control changes.

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
from diptych.document import Document, Image, to_json_blocks
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
from diptych.rewards import RewardBatch, call_rewards, load_reward
from diptych.runs import atomic_text, read_jsonl
from diptych.runtime import set_threads, versions
from diptych.training import grpo as grpo_stage
from diptych.training import warmup as warmup_stage

NUM_EXAMPLES = 60
"""Prompts whose answers are kept for the page, which shows the first ones and those whose verdict GRPO changed."""
_LOSSES = {"loss/text": "text loss", "loss/image": "image loss"}


def run_demo(config: DemoConfig, console: Console | None = None) -> dict[str, Any]:
    """Runs what is not done yet and returns the results, which are also in `results.json` and `report.html`."""
    console = console or Console(markup=False, emoji=False, highlight=False)
    folder = Path(config.output_dir)
    warmup_config, *trainings = stage_configs(config)
    set_threads(config.warmup.num_threads)
    clock = _Clock(folder / "seconds.json")
    labels = {"base": "base", "warmup": "warm-up", "control": f"GRPO {config.control.label}" if config.control else "", "grpo": "GRPO"}
    sources = {"base": warmup_config.model, "warmup": warmup_stage.checkpoint_of(warmup_config)}
    stages = 2 + len(trainings)
    with _bars(console) as bars:
        with clock.of("warmup"):
            warmup_stage.warmup(warmup_config, _stage(bars, f"1/{stages} Warm-up", warmup_config.max_steps, _LOSSES))
            _complete(bars)
        for number, grpo_config in enumerate(trainings):
            name = Path(grpo_config.output_dir).name
            with clock.of(name):
                rewards = {f"rewards/{reward.key}/mean": reward.key for reward in grpo_config.rewards}
                grpo_stage.grpo(grpo_config, _stage(bars, f"{2 + number}/{stages} {labels[name]}", grpo_config.max_steps, rewards))
                _complete(bars)
            sources[name] = grpo_stage.checkpoint_of(grpo_config)
        with clock.of("evaluation"):
            evaluated = _evaluate_all(config, sources, folder / "evaluation", bars, f"{stages}/{stages} Evaluation")
    results = {
        "telling": config.evaluate.telling,
        "rates": SHOWN_RATES[config.evaluate.telling],
        "labels": {name: labels[name] for name in evaluated},
        "checkpoints": {name: e["rates"] for name, e in evaluated.items()},
        "retention": {skill: {name: e["retention"][skill] for name, e in evaluated.items()} for skill in evaluated["base"]["retention"]},
        "greedy_by_kind": {name: e["greedy_by_kind"] for name, e in evaluated.items()},
        "greedy_by_picture": {name: e["greedy_by_picture"] for name, e in evaluated.items()},
        "num_prompts": config.evaluate.num_prompts,
        "parity": _parity([Path(training.output_dir) for training in trainings]),
        "seconds": clock.seconds(),
        "versions": versions(),
    }
    atomic_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
    examples = [
        {**answered[0], "answers": {name: example["answer"] for name, example in zip(evaluated, answered, strict=True)}}
        for answered in zip(*(e["examples"] for e in evaluated.values()), strict=True)
    ]
    atomic_text(folder / "report.html", demo_page(results, examples, folder))
    print_results(results, folder, console)
    return results


def stage_configs(config: DemoConfig) -> tuple[WarmupConfig, *tuple[GRPOConfig, ...]]:
    """The stages' settings with the demo's folder and seed: warm-up, GRPO, and the control where there is one. Both trainings of GRPO start
    from the warm-up's last checkpoint.

    Raises ValueError where the control changes what is no setting of GRPO.
    """
    warmup_config = config.warmup.model_copy(update={"output_dir": f"{config.output_dir}/warmup", "seed": config.seed})
    start = {"seed": config.seed, "model": warmup_stage.checkpoint_of(warmup_config)}
    trainings = {"grpo": config.grpo}
    if config.control is not None:
        trainings["control"] = config.controlled()
    return warmup_config, *(
        training.model_copy(update={**start, "output_dir": f"{config.output_dir}/{name}"}) for name, training in trainings.items()
    )


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
        parts = {stage: round(seconds, 1) for stage, seconds in self.spent.items()}
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


def _evaluate_all(config: DemoConfig, sources: dict[str, str], folder: Path, bars: Progress, title: str) -> dict[str, Any]:
    """Evaluates each checkpoint once; a finished one is read back. In the order in which they are shown: the control before GRPO."""
    skills = 3 if config.evaluate.telling == "terse" else 2
    each = 2 * config.evaluate.num_prompts + skills * config.evaluate.num_retention
    task = bars.add_task(title, total=len(sources) * each, shown="")
    found = {}
    for name in sorted(sources, key=("base", "warmup", "control", "grpo").index):
        path = folder / f"{name}.json"
        settings = {"evaluate": config.evaluate.model_dump(), "sampling": config.grpo.sampling.model_dump(), "model": sources[name]}
        stored = json.loads(path.read_text()) if path.is_file() else {}
        bars.update(task, shown=name)
        if stored.get("settings") == settings and "greedy_by_picture" in stored:  # demos before it had been counted lack it
            bars.advance(task, each)
        else:
            result = _evaluate_one(config, sources[name], lambda n: bars.advance(task, n))
            atomic_text(path, json.dumps({**result, "settings": settings}))
        found[name] = json.loads(path.read_text())
    return found


def _evaluate_one(config: DemoConfig, source: str, progress: Any) -> dict[str, Any]:
    model, tasks, sampling = load_model(source).eval(), held_out_tasks(config.evaluate), config.grpo.sampling
    greedy = evaluate_documents(model, tasks, sampling.greedy(), config.evaluate, progress)
    sampled = evaluate_documents(model, tasks, sampling, config.evaluate, progress)
    rewards = _rewards(greedy, config.grpo)
    return {
        "rates": {"greedy": rates(greedy), "sampled": rates(sampled)},
        "greedy_by_kind": rates_by_kind(greedy),
        "greedy_by_picture": _by_picture(greedy, rewards, config),
        "retention": evaluate_retention(model, sampling, config.evaluate, progress),
        "examples": _examples(greedy[:NUM_EXAMPLES], rewards, config),
    }


@torch.no_grad()
def _rewards(judged: list[Judged], config: GRPOConfig) -> RewardBatch:
    """What the rewards of the training say of answers, those of weight 0 too."""
    functions = [(reward, load_reward(reward.name)) for reward in config.rewards]
    documents = [j.answer for j in judged]
    return call_rewards(functions, [j.task.prompt for j in judged], documents, reward_columns(judged))


def _by_picture(judged: list[Judged], rewards: RewardBatch, config: DemoConfig) -> list[dict[str, Any]]:
    """Of the first, second, ... picture that was asked for: how many, the shares that are right and right given what stands before, and the
    mean of each reward that judges pictures."""
    found = []
    for number in range(max(j.task.truth.num_steps for j in judged)):
        asked = [(b, j) for b, j in enumerate(judged) if number < j.task.truth.num_steps]
        given = [right for _, j in asked if (right := j.verdict.steps_given[number]) is not None]
        places = [(b, places[number]) for b, j in asked if number < len(places := _pictures(j.answer))]
        means = {}
        for r, reward in enumerate(config.grpo.rewards):
            said = torch.tensor([float(rewards.steps[r, b, place]) for b, place in places if rewards.applies[r, b, place]])
            values = said[~said.isnan()]
            if reward.modality == "image" and len(values):
                means[reward.key] = round(float(values.mean()), 4)
        shares = [_share([j.verdict.steps[number][1] for _, j in asked]), _share(given)]
        found.append({"pictures": len(asked), "right": shares[0], "given": shares[1], "rewards": means})
    return found


def _share(rights: list[bool]) -> float | None:
    return round(sum(rights) / len(rights), 4) if rights else None


def _pictures(answer: Document) -> list[int]:
    """The places of an answer's pictures."""
    return [place for place, segment in enumerate(answer) if isinstance(segment, Image)]


def _examples(judged: list[Judged], rewards: RewardBatch, config: DemoConfig) -> list[dict[str, Any]]:
    """Answers as JSON, with what the rewards and the oracle say of each step."""
    shown = []
    for b, item in enumerate(judged):
        steps: list[dict[str, Any]] = []
        drawn = 0
        for j, block in enumerate(to_json_blocks(item.answer)):
            values: dict[str, Any] = {
                reward.key: float(rewards.steps[r, b, j]) for r, reward in enumerate(config.grpo.rewards) if rewards.applies[r, b, j]
            }
            if drawn < len(item.verdict.steps) and item.answer.images:
                text, picture = item.verdict.steps[drawn]
                if block["type"] == "text":
                    values["oracle/text"] = text
                elif config.evaluate.telling == "full":
                    values["oracle/picture"] = picture
                elif (given := item.verdict.steps_given[drawn]) is not None:
                    values["oracle/picture"] = given
            drawn += block["type"] == "image"
            steps.append(values)
        whole = {"oracle/whole document": item.verdict.document == 1}
        answer = {"answer": to_json_blocks(item.answer), "steps": steps, "document": whole}
        shown.append({"family": item.task.family, "prompt": to_json_blocks(item.task.prompt), "answer": answer})
    return shown


def _parity(runs: list[Path]) -> dict[str, float]:
    lines = [line for run in runs for line in read_jsonl(run / "metrics.jsonl")]
    return {
        "text_max": max(line["parity/text_max"] for line in lines),
        "image_max": max(line["parity/image_max"] for line in lines),
        "first_ratio_gap": max(max(line["ratio/first_gap/text"], line["ratio/first_gap/image"]) for line in lines),
    }


def print_results(results: dict[str, Any], folder: Path, console: Console) -> None:
    labels = results["labels"]
    for mode in ("greedy", "sampled"):
        table = Table(title=f"{results['num_prompts']} held-out prompts, {mode} (per cent, 95 % interval)")
        table.add_column("")
        for rate in results["rates"]:
            table.add_column(rate, justify="right")
        for name, found in results["checkpoints"].items():
            table.add_row(labels[name], *rate_cells(found[mode], results["rates"]))
        console.print(table)
    kinds = Table(title="whole documents right by kind, greedy (per cent)")
    for head in ("", "prompts", *labels.values()):
        kinds.add_column(head, justify="right" if head else "left")
    counted = results["greedy_by_kind"]
    for kind, row in counted["base"].items():
        kinds.add_row(kind, str(row["prompts"]), *(f"{100 * counted[name][kind]['document']:.1f}" for name in labels))
    console.print(kinds)
    for skill, values in results["retention"].items():
        numbers = ", ".join(f"{labels[name]} {100 * v['accuracy']:.1f}" for name, v in values.items())
        console.print(f"retention of {skill.replace('_', ' ')} (per cent): {numbers}")
    parity = results["parity"]
    console.print(
        f"largest |replayed - sampled| log-probability: text {parity['text_max']:.1e}, image {parity['image_max']:.1e}; "
        f"first ratio within {parity['first_ratio_gap']:.1e} of 1"
    )
    console.print(f"time: {results['seconds']}\nopen {folder / 'report.html'}")
