"""Text-to-image and understanding GRPO on Storyboard: each from a base that was made worse at just that, and what it does to the other.

    python benchmarks/tasks.py text_to_image [--seed 0] [--threads 1] [--docs docs/results]
    python benchmarks/tasks.py plan_and_draw | understanding | --quick

The base is the packaged model with Gaussian noise on the weights of one head, as large as `--noise` times their standard deviation:
`depth_heads`, the vectors that the codes of pictures are distinguished by, or `lm_head`, which chooses words. So the other skill is exactly
what it was. Then the packaged recipe of that name trains it with its rewards, which never see the oracle. Held-out captions (drawn at
once, form `image`) and questions (answered in words, form `text`) are judged by the oracle, greedily. Prints a table and one JSON line.
A run that was killed goes on. Random numbers come from the seeds, so figures repeat on one machine with one number of threads.
With `--docs` the line is added to DOCS/tasks.jsonl, and DOCS/tasks.md, a section of docs/results.md, is written from all its lines.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from diptych.config import EvaluateConfig, GRPOConfig, SamplingParams, load_config
from diptych.evaluation.storyboard import retained_skills, retention_rates
from diptych.models import load_model
from diptych.runs import atomic_folder
from diptych.runtime import generator, set_threads, versions
from diptych.training.grpo import checkpoint_of, grpo

DAMAGED = {"text_to_image": "depth_heads", "plan_and_draw": "depth_heads", "understanding": "lm_head.weight"}
SKILLS = ("text_to_image", "understanding")
NOISE = 1.4  # at 0.8 both skills stay at 100 %, at 2.5 nothing is left
SECTION = """## Tasks beside documents

Text-to-image, plan-and-draw and understanding GRPO ([tasks.md](tasks.md)) from the packaged model with Gaussian noise on one head, as large
as so many times the standard deviation of its weights: `depth_heads`, by which codes are distinguished, or `lm_head`. So the other skill is
exactly what it was. Held-out captions drawn (form `image`) and questions answered (form `text`) exactly right, greedily, in per cent with
95 % bootstrap intervals over turns.

| recipe | seed | noise | steps | drawing: made worse | after GRPO | understanding: made worse | after GRPO | seconds of GRPO |
|---|---|---|---|---|---|---|---|---|
"""


def damaged(folder: Path, parameter: str, noise: float, seed: int) -> Path:
    """The packaged model with noise on one parameter."""
    if not folder.is_dir():
        model = load_model("storyboard")
        weights = dict(model.named_parameters())[parameter]
        with torch.no_grad():
            weights += noise * weights.std() * torch.randn(weights.shape, generator=generator(seed, 77))
        with atomic_folder(folder) as target:
            model.save_pretrained(target)
    return folder


def measured(source: str, count: int) -> dict[str, dict[str, Any]]:
    """Both skills on held-out turns, greedily."""
    config = EvaluateConfig(num_retention=count)
    params = SamplingParams(max_text_tokens=64)
    return retention_rates(retained_skills(load_model(source), params, config, forms=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", default="text_to_image", choices=sorted(DAMAGED))
    parser.add_argument("--quick", action="store_true", help="two steps, 24 turns, and nothing is kept: that it runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--noise", type=float)
    parser.add_argument("--steps", type=int, help="of GRPO; left out: the recipe's")
    parser.add_argument("--count", type=int, default=480, help="held-out turns of each skill")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/tasks"))
    parser.add_argument("--docs", type=Path)
    parser.add_argument("--set", nargs="*", default=[], help="more of the recipe's settings: --set optim.lr=1e-4")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        if arguments.quick:
            arguments.steps, arguments.count = 2, 24
            arguments.out = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    noise = NOISE if arguments.noise is None else arguments.noise
    set_threads(arguments.threads)
    folder = arguments.out / f"{arguments.task}_{noise:g}_{arguments.seed}"
    base = damaged(folder / "base", DAMAGED[arguments.task], noise, arguments.seed)
    changes = [f"--model={base}", f"--output_dir={folder / 'grpo'}", f"--seed={arguments.seed}", f"--num_threads={arguments.threads}"]
    changes += [f"--max_steps={arguments.steps}"] if arguments.steps else []
    config = load_config(GRPOConfig, arguments.task, [*changes, *(f"--{one}" for one in arguments.set)])
    began = time.perf_counter()
    grpo(config, lambda step, total, metrics: print(f"{step}/{total} reward {metrics.get('reward', float('nan')):.3f}", flush=True))
    seconds = time.perf_counter() - began
    found = {
        "packaged": measured("storyboard", arguments.count),
        "made worse": measured(str(base), arguments.count),
        "after GRPO": measured(checkpoint_of(config), arguments.count),
    }
    print(f"{'per cent right':14}" + "".join(f"{skill:>24}" for skill in SKILLS))
    for name, rates in found.items():
        cells = [shown(rates[skill]) for skill in SKILLS]
        print(f"{name:14}" + "".join(f"{cell:>24}" for cell in cells))
    settings = {"task": arguments.task, "seed": arguments.seed, "noise": noise, "steps": config.max_steps, "threads": arguments.threads}
    line = json.dumps({**settings, "seconds_grpo": round(seconds, 1), "found": found, "versions": versions()})
    print(line)
    if arguments.docs is not None:
        publish(line, arguments.docs)


def publish(line: str, folder: Path) -> None:
    """Adds a line to the records, in the place of one with the same settings, and writes the section from all of them."""
    path, keys = folder / "tasks.jsonl", ("task", "seed", "noise", "steps", "threads")
    lines = [*(path.read_text().splitlines() if path.is_file() else ()), line]
    records = {tuple(record[key] for key in keys): record for record in map(json.loads, lines)}
    ordered = [records[key] for key in sorted(records)]
    path.write_text("".join(json.dumps(record) + "\n" for record in ordered))
    rows, made = [], set()
    for record in ordered:
        found = [shown(record["found"][stage][skill]) for skill in SKILLS for stage in ("made worse", "after GRPO")]
        parts = [f"`{record['task']}`", record["seed"], record["noise"], record["steps"], *found, record["seconds_grpo"]]
        rows.append(f"| {' | '.join(map(str, parts))} |\n")
        used = record["versions"]
        made.add(f"{used['cpu']}, {record['threads']} thread(s), torch {used['torch']}, Diptych {used['diptych']} at {used['commit']}")
    command = "`python benchmarks/tasks.py RECIPE --seed SEED --threads 1 --docs docs/results`"
    (folder / "tasks.md").write_text(f"{SECTION}{''.join(rows)}\n{command}. Made with {'; '.join(sorted(made))}, beside other work.\n")


def shown(rate: dict[str, Any]) -> str:
    low, high = rate["accuracy_ci"]
    return f"{100 * rate['accuracy']:.1f} [{100 * low:.0f}, {100 * high:.0f}]"


if __name__ == "__main__":
    main()
