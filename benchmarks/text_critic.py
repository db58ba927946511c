"""How often the text critic prefers the right text of a step to one with a mistake, by what happens and by the mistake.

    python benchmarks/text_critic.py [--quick] [--split train]

Mistakes: `one fact`, anything in the picture is told wrong; `nothing happened`, the event is told and the scene is the one before it;
`all of them`, what happens to one thing happens to all (paint, grow and shrink). A policy that is trained on this reward learns every
mistake that it prefers. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator

import numpy as np

from diptych.document import Document, Text
from diptych.pretrain.reward_models import spoil
from diptych.rewards.text_critic import text_critic
from diptych.runtime import versions
from diptych.worlds.storyboard import language
from diptych.worlds.storyboard.scene import Event, Scene
from diptych.worlds.storyboard.tasks import task_stream

ALL_OF_THEM = {"paint": "colour", "grow": "size", "shrink": "size"}


def mistakes(rng: np.random.Generator, event: Event, before: Scene, after: Scene) -> Iterator[tuple[str, Scene]]:
    """What a wrong text of the step could say is there afterwards."""
    yield "one fact", spoil(rng, after)
    yield "nothing happened", before
    if event.verb in ALL_OF_THEM:
        field, where = ALL_OF_THEM[event.verb], after.find(event.kind)
        assert where is not None
        same = {field: getattr(after.places[where], field)}
        told = [None if thing is None else dataclasses.replace(thing, **same) for thing in after.places]
        yield "all of them", Scene(after.background, (told[0], told[1], told[2]))


def pairs(rng: np.random.Generator, split: str, count: int) -> list[tuple[str, str, Document, list[str], str]]:
    """(verb, mistake, prompt, right texts up to the step, the wrong text in place of the last), of `count` tasks with events."""
    found = []
    tasks = (task for task in task_stream(7, split) if task.family != "how_to")  # type: ignore[arg-type]
    for _ in range(count):
        task = next(tasks)
        scenes = [task.start, *task.truth.scenes]
        right = [language.step_text(e, s) for e, s in zip(task.truth.events, task.truth.scenes, strict=True)]
        for i, event in enumerate(task.truth.events):
            for name, scene in mistakes(rng, event, scenes[i], scenes[i + 1]):
                if scene != scenes[i + 1]:
                    found.append((event.verb, name, task.prompt, right[: i + 1], language.step_text(event, scene)))
    return found


def values(asked: list[tuple[Document, list[str]]]) -> np.ndarray:
    """The critic's value of the last text of each answer."""
    found: list[float | None] = []
    for begin in range(0, len(asked), 64):
        some = asked[begin : begin + 64]
        prompts = [[{"role": "user", "content": prompt.to_blocks()}] for prompt, _ in some]
        answers = [[{"role": "assistant", "content": Document(tuple(map(Text, texts))).to_blocks()}] for _, texts in some]
        found += [steps[-1] for steps in text_critic(prompts=prompts, completions=answers)]
    return np.array(found, dtype=float)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="60 tasks instead of 600")
    parser.add_argument("--split", choices=("train", "validation", "test"), default="test")
    arguments = parser.parse_args()
    count = 60 if arguments.quick else 600
    rows = pairs(np.random.default_rng(0), arguments.split, count)
    right = values([(prompt, texts) for _, _, prompt, texts, _ in rows])
    wrong = values([(prompt, [*texts[:-1], told]) for _, _, prompt, texts, told in rows])
    kinds = np.array([f"{verb}, {name}" for verb, name, *_ in rows])
    print(f"{'event, mistake':<30}{'pairs':>6}{'right preferred':>17}{'value, right':>14}{'value, wrong':>14}")
    table = {}
    for kind in sorted(set(kinds)):
        of = kinds == kind
        rate = float(np.mean(right[of] > wrong[of]))
        table[kind] = {"pairs": int(of.sum()), "right_preferred": rate, "right": float(right[of].mean()), "wrong": float(wrong[of].mean())}
        print(f"{kind:<30}{of.sum():>6}{100 * rate:>15.1f} %{right[of].mean():>14.3f}{wrong[of].mean():>14.3f}")
    whole = {"tasks": count, "split": arguments.split, "right_preferred": float(np.mean(right > wrong))}
    print(f"all: the right text is preferred in {100 * whole['right_preferred']:.1f} % of {len(rows)} pairs")
    print(json.dumps({"name": "text_critic", **whole, "kinds": table, "versions": versions()}))


if __name__ == "__main__":
    main()
