"""How often the rewards of texts prefer the right text of a step to one with a mistake, by what happens and by the mistake.

    python benchmarks/text_rewards.py [--quick] [--split train]

Mistakes: `one fact`, anything in the picture is told wrong; `nothing happened`, the event is told and the scene is the one before it;
`all of them`, what happens to one thing happens to all (paint, grow and shrink). The rest of the document is right. A policy that is
trained on a reward learns every mistake that it prefers. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator

import numpy as np

from diptych.document import Document, Text, to_message
from diptych.pretrain.reward_models import spoil
from diptych.rewards.text_critic import text_critic
from diptych.rewards.text_likelihood import TextLikelihood
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


def pairs(rng: np.random.Generator, split: str, count: int) -> list[tuple[str, Document, list[str], int, str]]:
    """(event and mistake, prompt, right texts, the step, its wrong text) of `count` tasks with events."""
    found = []
    tasks = (task for task in task_stream(7, split) if task.family != "how_to")  # type: ignore[arg-type]
    for _ in range(count):
        task = next(tasks)
        scenes = [task.start, *task.truth.scenes]
        right = [segment.text for segment in task.truth.document() if isinstance(segment, Text)]
        for i, event in enumerate(task.truth.events):
            for name, scene in mistakes(rng, event, scenes[i], scenes[i + 1]):
                if scene != scenes[i + 1]:
                    found.append((f"{event.verb}, {name}", task.prompt, right, i, language.step_text(event, scene)))
    return found


def values(reward: Callable[..., list[list[float | None]]], asked: list[tuple[Document, list[str], int]]) -> np.ndarray:
    """What a reward says of one text of each answer."""
    found: list[float | None] = []
    for begin in range(0, len(asked), 64):
        some = asked[begin : begin + 64]
        prompts = [[to_message("user", prompt)] for prompt, _, _ in some]
        answers = [[to_message("assistant", Document(tuple(map(Text, texts))))] for _, texts, _ in some]
        found += [steps[i] for steps, (_, _, i) in zip(reward(prompts=prompts, completions=answers), some, strict=True)]
    return np.array(found, dtype=float)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="60 tasks instead of 600")
    parser.add_argument("--split", choices=("train", "validation", "test"), default="test")
    arguments = parser.parse_args()
    count = 60 if arguments.quick else 600
    rows = pairs(np.random.default_rng(0), arguments.split, count)
    kinds = np.array([kind for kind, *_ in rows])
    report: dict[str, dict] = {}
    for name, reward in {"text_critic": text_critic, "text_likelihood": TextLikelihood()}.items():
        right = values(reward, [(prompt, texts, i) for _, prompt, texts, i, _ in rows])
        wrong = values(reward, [(prompt, [*texts[:i], told, *texts[i + 1 :]], i) for _, prompt, texts, i, told in rows])
        print(f"\n{name:<32}{'pairs':>6}{'right preferred':>17}{'value, right':>14}{'value, wrong':>14}")
        report[name] = {"right_preferred": float(np.mean(right > wrong)), "kinds": {}}
        for kind in sorted(set(kinds)):
            of = kinds == kind
            rate, mean, of_wrong = (float(v[of].mean()) for v in (right > wrong, right, wrong))
            report[name]["kinds"][kind] = {"pairs": int(of.sum()), "right_preferred": rate, "right": mean, "wrong": of_wrong}
            print(f"{kind:<32}{of.sum():>6}{100 * rate:>15.1f} %{mean:>14.3f}{of_wrong:>14.3f}")
        print(f"{'all':<32}{len(rows):>6}{100 * report[name]['right_preferred']:>15.1f} %{right.mean():>14.3f}{wrong.mean():>14.3f}")
    print(json.dumps({"name": "text_rewards", "tasks": count, "split": arguments.split, "rewards": report, "versions": versions()}))


if __name__ == "__main__":
    main()
