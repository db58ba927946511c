"""Pictures that must remember: Storyboard with the terse telling, after warm-up and after GRPO with and without a visual reward.

    python benchmarks/terse.py [--seed 0] [--arms base warmup without likelihood] [--threads 1] [--docs docs/results]
    python benchmarks/terse.py --rewards [--seed 0]      how well visual rewards tell right pictures from wrong ones
    python benchmarks/terse.py --quick

Stages are the packaged recipes `terse_warmup` and `terse_grpo`; `--set` changes settings of GRPO, `--warmup_set` those of warm-up. A run
that was killed goes on, and stages that are there are not run again. Every arm is asked 480 held-out prompts, greedily and sampled, and
judged by the oracle: whether texts are right, pictures true to the task, and pictures right *given* their own text and the picture before;
and single turns of the old skills. Each arm prints one JSON line; with `--docs` lines are added to DOCS/terse.jsonl, and DOCS/terse.md, a
section of docs/results.md, is written from all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from diptych.config import EvaluateConfig, GRPOConfig, WarmupConfig, load_config
from diptych.document import Document, Image, to_message
from diptych.evaluation.storyboard import Judged, evaluate_documents, held_out_tasks, interval, rates, retained_skills, retention_rates
from diptych.models import load_model
from diptych.rewards.image_likelihood import ImageLikelihood
from diptych.rewards.image_text import image_text
from diptych.runtime import set_threads, versions
from diptych.training import grpo, warmup

VISUAL = "--rewards.2"  # the place of the visual reward in the recipe
ARMS: dict[str, list[str]] = {
    "base": [],
    "warmup": [],
    "without": [f"{VISUAL}.weight=0"],  # it watches
    "without, format on texts": [f"{VISUAL}.weight=0", "--rewards.0.modality=text"],  # nothing speaks of codes but KL and ptx
    "likelihood": [],
    "likelihood, no memory": [f"{VISUAL}.options.memory=0"],
    "image_text": [f"{VISUAL}.name=image_text", f"{VISUAL}.options={{}}"],
    "outcome": ["--advantages.credit=outcome"],
}
SHOWN = ("text", "image", "given", "kept", "document")
SKILLS = ("text_to_image", "understanding", "editing")
SECTION = """## Pictures that must remember

Storyboard with the terse telling: a text tells what happens ("the ball grows ."), and its picture must keep everything else. In per cent,
greedy / sampled: texts right, pictures true to the task, pictures right *given* their own text and the picture before (an error is charged
once), things kept that the told event leaves alone, whole documents right; then single turns of the old skills, greedily.

| arm | seed | steps | texts | pictures true | given | kept | documents | drawing | understanding | editing | seconds |
|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=["base", "warmup", "without", "likelihood"], choices=list(ARMS))
    parser.add_argument("--rewards", action="store_true")
    parser.add_argument("--quick", action="store_true", help="two steps, 12 prompts, and nothing is kept: that it runs")
    parser.add_argument("--base", default="storyboard_terse", help="the model that is warmed up, and whose likelihood is the reward")
    parser.add_argument("--seed", type=int, default=0, help="of warm-up and GRPO; prompts are the same for all")
    parser.add_argument("--count", type=int, default=480, help="held-out prompts, and half as many turns of each old skill")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/terse"))
    parser.add_argument("--docs", type=Path)
    parser.add_argument("--set", nargs="*", default=[], help="more settings of GRPO: --set optim.lr=1e-4")
    parser.add_argument("--warmup_set", nargs="*", default=[], help="more settings of warm-up")
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    with contextlib.ExitStack() as stack:
        if arguments.quick:
            arguments.count, arguments.out = 12, Path(stack.enter_context(tempfile.TemporaryDirectory()))
            arguments.set, arguments.warmup_set = ["max_steps=2", *arguments.set], ["max_steps=2", *arguments.warmup_set]
        if arguments.rewards:
            print(json.dumps({"name": "terse rewards", **reward_accuracy(arguments), "versions": versions()}))
            return
        for arm in arguments.arms:
            line = json.dumps(measure(arm, arguments))
            print(line, flush=True)
            if arguments.docs is not None:
                publish(line, arguments.docs)


def measure(arm: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains what the arm needs, and asks it."""
    stages = (
        [] if arm == "base" else [warmup_config(arguments)] if arm == "warmup" else [warmup_config(arguments), grpo_config(arm, arguments)]
    )
    model, seconds, steps, curve = arguments.base, 0.0, 0, {}
    for config in stages:
        model, seconds, curve = trained(config)
        steps = config.max_steps
    found = asked(model, arguments)
    settings = {"set": arguments.set if arm not in ("base", "warmup") else [], "warmup_set": arguments.warmup_set if arm != "base" else []}
    told = {"name": "terse", "arm": arm, "seed": arguments.seed if arm != "base" else 0, "steps": steps, "threads": arguments.threads}
    return {**told, **settings, "count": arguments.count, "seconds": round(seconds, 1), **found, "training": curve, "versions": versions()}


def warmup_config(arguments: argparse.Namespace) -> WarmupConfig:
    folder = arguments.out / f"warmup_{arguments.seed}"
    changes = [f"--model={arguments.base}", f"--output_dir={folder}", f"--seed={arguments.seed}", f"--num_threads={arguments.threads}"]
    return load_config(WarmupConfig, "terse_warmup", [*changes, *(f"--{one}" for one in arguments.warmup_set)])


def grpo_config(arm: str, arguments: argparse.Namespace) -> GRPOConfig:
    folder = arguments.out / f"{arm.replace(', ', '_').replace(' ', '_')}_{arguments.seed}"
    start = warmup.checkpoint_of(warmup_config(arguments))
    changes = [f"--model={start}", f"--output_dir={folder}", f"--seed={arguments.seed}", f"--num_threads={arguments.threads}"]
    changes += [f"--rewards.{place}.options.model={arguments.base}" for place in (1, 2)]
    return load_config(GRPOConfig, "terse_grpo", [*changes, *ARMS[arm], *(f"--{one}" for one in arguments.set)])


def trained(config: WarmupConfig | GRPOConfig) -> tuple[str, float, dict[str, list[float]]]:
    """The checkpoint, the seconds that its run took (its last start, where it was killed), and the mean of each reward in tenths of it."""
    stage: Any = warmup if isinstance(config, WarmupConfig) else grpo
    done = Path(config.output_dir) / "seconds.json"
    if not done.is_file():
        began = time.perf_counter()
        train = stage.warmup if isinstance(config, WarmupConfig) else stage.grpo
        train(config, lambda step, total, metrics: print(f"{step}/{total} {metrics.get('reward', metrics.get('loss'))}", flush=True))
        done.write_text(json.dumps(time.perf_counter() - began))
    lines = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]
    names = sorted({name for line in lines for name in line if name.startswith("rewards/") and name.endswith("/mean")})
    names += ["frac_reward_zero_std"] if isinstance(config, GRPOConfig) else []
    tenth = max(1, config.max_steps // 10)
    curve = {
        name: [
            round(float(np.mean(values)), 4)
            for begin in range(0, config.max_steps, tenth)
            if (values := [line[name] for line in lines if begin < line["step"] <= begin + tenth and name in line])
        ]
        for name in names
    }
    return stage.checkpoint_of(config), json.loads(done.read_text()), curve


def asked(source: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Rates of held-out prompts and old skills; for each prompt what paired comparisons need; and pictures right given by event."""
    config = EvaluateConfig(num_prompts=arguments.count, num_retention=arguments.count // 2, telling="terse")
    params = load_config(GRPOConfig, "terse_grpo").sampling
    model, tasks = load_model(source), held_out_tasks(config)
    judged = {name: evaluate_documents(model, tasks, p, config) for name, p in (("greedy", params.greedy()), ("sampled", params))}
    prompts = {name: {rate: [round(getattr(j.verdict, rate), 3) for j in found] for rate in SHOWN} for name, found in judged.items()}
    skills = retention_rates(retained_skills(model, params.model_copy(update={"max_text_tokens": 64}), config))
    valid = float(np.mean([j.verdict.format for j in judged["greedy"]]))
    return {
        **{name: rates(found) for name, found in judged.items()}, "skills": skills, "valid": valid,
        "given_by_event": by_event(judged["greedy"]), "prompts": prompts,
    }  # fmt: skip


def by_event(judged: list[Judged]) -> dict[str, dict[str, float]]:
    """For each event: how many pictures the oracle could judge given what stands before them, and the share that is right."""
    found: dict[str, list[bool]] = {}
    for item in judged:
        for event, right in zip(item.task.truth.events, item.verdict.steps_given, strict=True):
            if right is not None:
                found.setdefault(event.verb, []).append(right)
    return {verb: {"pictures": len(rights), "given": round(float(np.mean(rights)), 4)} for verb, rights in sorted(found.items())}


# --- how good the rewards are ---------------------------------------------------------------------------------------------


def reward_accuracy(arguments: argparse.Namespace) -> dict[str, Any]:
    """For each visual reward the chance that it prefers a right picture to a wrong one (AUC), on pictures sampled after warm-up."""
    model, _, _ = trained(warmup_config(arguments))
    config = EvaluateConfig(num_prompts=max(12, arguments.count // 4), num_retention=1, telling="terse")
    judged = evaluate_documents(load_model(model), held_out_tasks(config), load_config(GRPOConfig, "terse_grpo").sampling, config)
    base = {"model": arguments.base}
    rewards = {
        "likelihood": ImageLikelihood(**base), "likelihood, per code": ImageLikelihood(**base, per_code=True),
        "likelihood, guidance 1.5": ImageLikelihood(**base, guidance_scale=1.5), "likelihood, no memory": ImageLikelihood(**base, memory=0),
        "likelihood, from pixels": ImageLikelihood(**base, from_pixels=True), "image_text": image_text,
    }  # fmt: skip
    found = {}
    print(f"{'reward':<28}{'pictures':>9}{'AUC':>8}{'right':>9}{'wrong':>9}{'wrong > 0.5':>13}")
    for name, reward in rewards.items():
        answers = [j.answer if name != "likelihood, from pixels" else without_codes(j.answer) for j in judged]
        told: Any = {
            "prompts": [[to_message("user", j.task.prompt)] for j in judged],
            "completions": [[to_message("assistant", answer)] for answer in answers],
        }
        values = reward(**told) if reward is image_text else reward(**told, completion_documents=answers)
        pairs = []
        for line, item in zip(values, judged, strict=True):
            drawn = [value for value, segment in zip(line, item.answer, strict=True) if isinstance(segment, Image)]
            known = zip(drawn, item.verdict.steps_given, strict=False)  # one may have more pictures than were asked for, the other fewer
            pairs += [(value, right) for value, right in known if value is not None and right is not None]
        good, bad = (np.array([value for value, right in pairs if right is wanted]) for wanted in (True, False))
        auc = float(np.mean((good[:, None] > bad).astype(float) + 0.5 * (good[:, None] == bad))) if len(good) and len(bad) else float("nan")
        found[name] = {
            "right": len(good), "wrong": len(bad), "auc": round(auc, 4), "mean_right": round(float(good.mean()), 4) if len(good) else None,
            "mean_wrong": round(float(bad.mean()), 4) if len(bad) else None, "wrong_above_half": round(float(np.mean(bad > 0.5)), 4),
        }  # fmt: skip
        print(f"{name:<28}{len(pairs):>9}{auc:>8.3f}{good.mean():>9.3f}{bad.mean():>9.3f}{100 * np.mean(bad > 0.5):>11.1f} %")
    return {"prompts": len(judged), "seed": arguments.seed, "rewards": found}


def without_codes(document: Document) -> Document:
    return Document(tuple(Image(s.pixels) if isinstance(s, Image) else s for s in document))


# --- records ----------------------------------------------------------------------------------------------------------------


def publish(line: str, folder: Path) -> None:
    """Adds a line to the records, in the place of one with the same settings, and writes the section from all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    path, keys = folder / "terse.jsonl", ("arm", "seed", "steps", "set", "warmup_set", "count")
    lines = [*(path.read_text().splitlines() if path.is_file() else ()), line]
    records = {json.dumps([record[key] for key in keys]): record for record in map(json.loads, lines)}
    ordered = sorted(
        records.values(), key=lambda r: (list(ARMS).index(r["arm"]), r["steps"], str(r["set"]), str(r["warmup_set"]), r["seed"])
    )
    path.write_text("".join(json.dumps(record) + "\n" for record in ordered))
    rows, made = [], set()
    for record in ordered:
        changed = f" ({', '.join([*record['set'], *record['warmup_set']])})" if record["set"] or record["warmup_set"] else ""
        cells = [f"{100 * record['greedy'][rate]:.1f} / {100 * record['sampled'][rate]:.1f}" for rate in SHOWN]
        kept = [f"{100 * record['skills'][skill]['accuracy']:.1f}" for skill in SKILLS]
        parts = [f"{record['arm']}{changed}", record["seed"], record["steps"], *cells, *kept, f"{record['seconds']:.0f}"]
        rows.append(f"| {' | '.join(map(str, parts))} |\n")
        told = record["versions"]
        made.add(f"{told['cpu']}, {record['threads']} thread(s), torch {told['torch']}, Diptych {told['diptych']} at {told['commit']}")
    against = "".join(f"{text}\n" for text in differences(ordered))
    command = "`python benchmarks/terse.py --seed SEED --threads 1 --docs docs/results`"
    (folder / "terse.md").write_text(
        f"{SECTION}{''.join(rows)}\n{against}\n{command}. Made with {'; '.join(sorted(made))}, beside other work.\n"
    )


def differences(records: list[dict[str, Any]]) -> list[str]:
    """Each arm of GRPO against `without` from the same warm-up: the difference in `given`, and its interval over prompts."""
    same = ("seed", "steps", "set", "warmup_set", "count")
    controls = {json.dumps([r[key] for key in same]): r for r in records if r["arm"] == "without"}
    found = []
    for arm in ARMS:
        for mode in ("greedy", "sampled"):
            gains = []
            for record in (r for r in records if r["arm"] == arm and arm != "without"):
                control = controls.get(json.dumps([record[key] for key in same]))
                if control is not None:
                    gains.append(np.array(record["prompts"][mode]["given"]) - np.array(control["prompts"][mode]["given"]))
            if gains:
                every = np.mean(gains, axis=0) if len({len(g) for g in gains}) == 1 else np.concatenate(gains)
                low, high = interval(every)
                seeds = " ".join(f"{100 * gain.mean():+.1f}" for gain in gains)
                told = f"{100 * every.mean():+.1f} points ({100 * low:+.1f} to {100 * high:+.1f} over prompts; by seed {seeds})"
                found.append(f"- {arm} against without, given, {mode}: {told}")
    return found


if __name__ == "__main__":
    main()
