"""What a step costs in larger worlds: of pretraining, warm-up and GRPO, for a setting of `diptych pretrain`.

    python benchmarks/worlds.py large [--model runs/pretrain_large/storyboard] [--steps 20] [--threads 1]
    python benchmarks/worlds.py large_100m --steps 2
    python benchmarks/worlds.py standard --quick

Without `--model` the weights are random, which costs the same but for how long documents become. Warm-up and GRPO are the recipes
`large_warmup` and `large_grpo` (for the standard world `terse_warmup` and `terse_grpo`) with the setting's world and model in them. Seconds
are the median over steps, by the clock and of this process's CPU time, which other programs on the machine do not lengthen; hours are what
all steps of the setting and of its recipes take at that CPU time. With fewer `--rows` and `--prompts` a step is measured on a share of its
rows, and hours are for the whole: `base, update` is what the optimizer takes of a step whatever its rows. Of pretraining at most six steps
are measured.

Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diptych.config import GRPOConfig, WarmupConfig, build, load_config
from diptych.models.storyboard import StoryboardModel
from diptych.models.storyboard.codec import PatchCodec
from diptych.pretrain.base_model import PatchCodes, likelihood_loss, make_batch, new_model
from diptych.pretrain.codec import patches_of, train_codec
from diptych.pretrain.muon import AttentionCap, MuonAdamW
from diptych.pretrain.settings import Setting, setting_named
from diptych.runtime import set_threads, versions
from diptych.training import grpo, warmup


def timed(steps: int, step: Callable[[int], Any]) -> dict[str, float]:
    """Median seconds of `step(0)`, `step(1)`, ...; a first one is not counted where there are more."""
    taken = []
    for number in range(steps):
        clock, cpu = time.perf_counter(), time.process_time()
        step(number)
        taken.append((time.perf_counter() - clock, time.process_time() - cpu))
    clock, cpu = np.median(taken[1:] or taken, axis=0)
    return {"seconds": round(float(clock), 3), "cpu_seconds": round(float(cpu), 3), "measured": max(1, steps - 1)}


def between_steps(run: Callable[[Any], Any], steps: int) -> tuple[dict[str, float], dict[str, Any]]:
    """The same of a training that tells of each step; and its last metrics."""
    marks, last = [], {}

    def progress(_: int, __: int, metrics: dict[str, float]) -> None:
        marks.append((time.perf_counter(), time.process_time()))
        last.update(metrics)

    began = (time.perf_counter(), time.process_time())
    run(progress)
    taken = np.diff(np.array([began, *marks]), axis=0)
    clock, cpu = np.median(taken[1:] if len(taken) > 1 else taken, axis=0)
    return {"seconds": round(float(clock), 3), "cpu_seconds": round(float(cpu), 3), "measured": max(1, steps - 1)}, last


def pretraining(setting: Setting, model: StoryboardModel, steps: int, rows: int | None) -> dict[str, dict[str, float]]:
    """A step of the image tokenizer, and of the base model in each of its lessons, with at most so many rows."""
    config, world = model.config, setting.told
    codec = PatchCodec(config.grid, config.patch, config.depth, config.levels, config.codec_width)
    patches = patches_of(world, config.patch, num_scenes=200)
    short, long = (timed(1, lambda _, n=n: train_codec(codec, patches, n, 2e-3, 128, 0, lambda line: None)) for n in (20, 60))
    found = {"codec": {name: round((long[name] - short[name]) / 40, 4) for name in ("seconds", "cpu_seconds")} | {"measured": 40}}
    optimizer, cap, codes = MuonAdamW(model, 3e-3, 1000, 8e-3, decay=0.1), AttentionCap(model.llama), PatchCodes(model)
    model.train()
    for name in ("facts", "words", "alone", "amid"):
        whole = getattr(setting.course, name)
        plan = dataclasses.replace(whole, rows=whole.rows if rows is None else min(rows, whole.rows))

        def step(number: int, plan: Any = plan) -> None:
            loss, _ = likelihood_loss(model, make_batch(model, codes, 0, number, plan, world))
            optimizer.step(loss)
            cap.apply(50)

        found[f"base, {name}"] = timed(steps, step) | {"share": plan.rows / whole.rows}
    found["base, update"] = timed(min(steps, 2), lambda _: [part.step() for part in optimizer.optimizers])
    model.eval()
    return found


def recipe(cls: Any, name: str, changes: dict[str, Any], world: str) -> Any:
    """A recipe with another world in the names of its sources, and other settings."""
    text = load_config(cls, name, changes).model_dump_json(exclude_unset=True)
    return build(cls, json.loads(text.replace("storyboard:large/", f"storyboard:{world}/")))


def hours(found: dict[str, dict[str, float]], setting: Setting, steps: dict[str, int]) -> dict[str, float]:
    share = setting.base_steps
    parts = {"base, facts": share / 4, "base, words": share / 6, "base, alone": share * 7 / 24, "base, amid": share * 7 / 24}
    counts = {"codec": setting.codec_steps, **parts, **steps}
    update = found["base, update"]["cpu_seconds"]
    result = {}
    for name, count in counts.items():
        whole, fixed = found[name]["cpu_seconds"], update if name.startswith("base") else 0.0
        result[name] = count * ((whole - fixed) / found[name].get("share", 1) + fixed) / 3600
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting")
    parser.add_argument("--model", help="a base model of the setting; left out: random weights")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--prompts", type=int, help="prompts of a step of GRPO, and records of a step of warm-up / 4; left out: the recipe's"
    )
    parser.add_argument("--rows", type=int, help="rows of a step of pretraining, at most; left out: the setting's")
    parser.add_argument("--quick", action="store_true", help="two steps, two prompts, four rows")
    arguments = parser.parse_args()
    steps, prompts, rows = (2, 2, 4) if arguments.quick else (arguments.steps, arguments.prompts, arguments.rows)
    set_threads(arguments.threads)
    setting = setting_named(arguments.setting)
    config = setting.config()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        folder = arguments.model
        if folder is None:
            torch.manual_seed(0)
            codec = PatchCodec(config.grid, config.patch, config.depth, config.levels, config.codec_width)
            folder = str(work / "random")
            new_model(codec, 0, setting).save_pretrained(Path(folder))
        model = StoryboardModel.load(folder)
        size = sum(p.numel() for p in model.parameters())
        found = pretraining(setting, model, min(steps, 6), rows)
        del model
        kind = "terse" if setting.world == "standard" else "large"
        common = {"num_threads": arguments.threads, "max_steps": steps, "save_steps": steps, "sample_steps": steps}
        fewer = {} if prompts is None else {"batch_size": 4 * prompts, "num_eval_records": 4 * prompts}
        first = recipe(
            WarmupConfig, f"{kind}_warmup",
            {**common, **fewer, "model": folder, "output_dir": str(work / "warmup"), "eval_steps": steps}, setting.world,
        )  # fmt: skip
        found["warm-up"], warm_metrics = between_steps(lambda progress: warmup.warmup(first, progress), steps)
        fewer = {} if prompts is None else {"prompts_per_step": prompts}
        second = recipe(
            GRPOConfig, f"{kind}_grpo",
            {**common, **fewer, "model": warmup.checkpoint_of(first), "output_dir": str(work / "grpo"),
             "rewards.1.options.model": folder, "rewards.2.options.model": folder}, setting.world,
        )  # fmt: skip
        found["GRPO"], metrics = between_steps(lambda progress: grpo.grpo(second, progress), steps)
    stages = {
        "warm-up": load_config(WarmupConfig, f"{kind}_warmup").max_steps, "GRPO": load_config(GRPOConfig, f"{kind}_grpo").max_steps,
    }  # fmt: skip
    found["warm-up"]["share"] = first.batch_size / load_config(WarmupConfig, f"{kind}_warmup").batch_size
    found["GRPO"]["share"] = second.prompts_per_step / load_config(GRPOConfig, f"{kind}_grpo").prompts_per_step
    all_hours = hours(found, setting, stages)
    print(f"{arguments.setting}: {size / 1e6:.1f} M parameters, {config.grid**2} positions x {config.depth} codes\n")
    print(
        "| step of | share of its rows | seconds | CPU seconds | steps measured | hours of all steps, in full |\n|---|---|---|---|---|---|"
    )
    for name, values in found.items():
        seconds = f"{values['seconds']:.2f} | {values['cpu_seconds']:.2f} | {values['measured']:.0f}"
        hours_of_it = f"{all_hours[name]:.2f}" if name in all_hours else "(in these)"
        print(f"| {name} | {values.get('share', 1):.2g} | {seconds} | {hours_of_it} |")
    print(f"| all | | | | | {sum(all_hours.values()):.2f} |")
    shown = {k: v for k, v in metrics.items() if k.startswith(("rewards/", "parity/", "seconds/")) and not k.endswith("/std")}
    print(json.dumps({
        "name": "worlds", "setting": arguments.setting, "parameters": size, "model": arguments.model or "random weights", "steps": steps,
        "prompts": prompts, "seconds": found, "hours": all_hours, "warmup": warm_metrics, "grpo": shown, "versions": versions(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
