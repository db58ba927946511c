"""How well the rewards of pictures tell right pictures from wrong ones, where pictures must remember.

    python benchmarks/picture_rewards.py [--seed 0] [--count 480] [--threads 1] [--docs docs/results]
    python benchmarks/picture_rewards.py --quick

A warm-up of the demo writes documents, sampled, for held-out prompts. The oracle says which of their pictures are right given their own
text and the picture before; each reward is asked about the same pictures. AUC: the chance that a right picture gets more than a wrong
one. A policy that is trained on a reward learns every mistake that it prefers. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from diptych.config import DemoConfig, EvaluateConfig, load_config
from diptych.document import Document, Image, to_message
from diptych.evaluation.storyboard import Judged, evaluate_documents, held_out_tasks
from diptych.models import load_model
from diptych.rewards.image_likelihood import ImageLikelihood
from diptych.rewards.image_text import image_text
from diptych.rewards.next_picture import next_picture
from diptych.runtime import set_threads, versions
from diptych.training import warmup

COLUMNS = ("pictures", "AUC", "mean of right ones", "mean of wrong ones", "wrong ones above 0.5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a warm-up of 20 steps, 24 prompts, and nothing is kept: that it runs")
    parser.add_argument("--seed", type=int, default=0, help="of the warm-up")
    parser.add_argument("--count", type=int, default=480, help="held-out prompts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/picture_rewards"))
    parser.add_argument("--docs", type=Path, help="write picture_rewards.md there")
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    with contextlib.ExitStack() as stack:
        if arguments.quick:
            arguments.count, arguments.out = 24, Path(stack.enter_context(tempfile.TemporaryDirectory()))
        judged = sampled_documents(arguments)
    found = {name: measured(reward, judged, codes=name != "image_likelihood, from pixels") for name, reward in rewards().items()}
    print("".join(f"{line}\n" for line in table(found)), end="")
    report = {"name": "picture_rewards", "prompts": len(judged), "seed": arguments.seed, "rewards": found, "versions": versions()}
    print(json.dumps(report))
    if arguments.docs is not None:
        (arguments.docs / "picture_rewards.md").write_text(document(report))


def rewards() -> dict[str, Callable[..., Any]]:
    likelihood = ImageLikelihood
    return {
        "image_likelihood": likelihood(), "image_likelihood, per code": likelihood(per_code=True),
        "image_likelihood, guidance 1.5": likelihood(guidance_scale=1.5), "image_likelihood, from pixels": likelihood(from_pixels=True),
        "image_likelihood, no memory": likelihood(memory=0), "next_picture": next_picture,
        "next_picture, no memory": partial(next_picture, memory=0), "image_text": image_text,
    }  # fmt: skip


def sampled_documents(arguments: argparse.Namespace) -> list[Judged]:
    """Answers of the demo's warm-up, trained here unless an earlier call did."""
    demo = load_config(DemoConfig, "demo")
    changes = {"output_dir": str(arguments.out / f"warmup_{arguments.seed}"), "seed": arguments.seed, "num_threads": arguments.threads}
    if arguments.quick:
        changes["max_steps"] = 20
    config = demo.warmup.model_copy(update=changes)
    warmup.warmup(config)
    evaluate = EvaluateConfig(num_prompts=arguments.count, num_retention=1, telling="terse")
    return evaluate_documents(load_model(warmup.checkpoint_of(config)), held_out_tasks(evaluate), demo.grpo.sampling, evaluate)


def measured(reward: Callable[..., Any], judged: list[Judged], *, codes: bool) -> dict[str, float]:
    answers = [j.answer if codes else without_codes(j.answer) for j in judged]
    values = reward(
        prompts=[[to_message("user", j.task.prompt)] for j in judged],
        completions=[[to_message("assistant", answer)] for answer in answers],
        completion_documents=answers,
    )
    pairs = []
    for line, item in zip(values, judged, strict=True):
        drawn = [value for value, segment in zip(line, item.answer, strict=True) if isinstance(segment, Image)]
        known = zip(drawn, item.verdict.steps_given, strict=False)  # one may have more pictures than were asked for, the other fewer
        pairs += [(value, right) for value, right in known if value is not None and right is not None]
    good, bad = (np.array([value for value, right in pairs if right is wanted]) for wanted in (True, False))
    if not len(good) or not len(bad):
        raise SystemExit(f"{len(good)} right and {len(bad)} wrong pictures: there is nothing to compare; ask more prompts (--count)")
    auc = np.mean((good[:, None] > bad).astype(float) + 0.5 * (good[:, None] == bad))
    figures = dict(zip(COLUMNS[1:], (auc, good.mean(), bad.mean(), np.mean(bad > 0.5)), strict=True))
    return {"pictures": len(pairs), **{name: round(float(value), 4) for name, value in figures.items()}}


def without_codes(document: Document) -> Document:
    return Document(tuple(Image(s.pixels) if isinstance(s, Image) else s for s in document))


def table(found: dict[str, dict[str, float]]) -> list[str]:
    lines = [f"| reward | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, row in found.items():
        lines.append(f"| {name} | {row['pictures']} | {' | '.join(f'{row[column]:.3f}' for column in COLUMNS[1:])} |")
    return lines


def document(report: dict[str, Any]) -> str:
    made, rows = report["versions"], "\n".join(table(report["rewards"]))
    return f"""## Rewards of pictures: right against wrong

Pictures sampled by the demo's warm-up for {report["prompts"]} held-out prompts, right or wrong given their own text and the picture
before, by the oracle. AUC: the chance that a right picture gets more than a wrong one.

{rows}

`python benchmarks/picture_rewards.py --seed {report["seed"]} --count {report["prompts"]}`. Made with {made["cpu"]},
torch {made["torch"]}, Diptych {made["diptych"]} at {made["commit"]}.
"""


if __name__ == "__main__":
    main()
