"""Storyboard's benchmark: held-out prompts, the oracle's verdicts, intervals; and retention of the skills it had before."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from diptych.config import EvaluateConfig, SamplingParams
from diptych.document import Document, Text
from diptych.evaluation.benchmark import Score
from diptych.forms import AnswerForm
from diptych.models import UnifiedModel
from diptych.runtime import generator
from diptych.runtime import rng as make_rng
from diptych.sampling.engine import sample
from diptych.worlds.storyboard.conversations import Turn, make_turn
from diptych.worlds.storyboard.language import normalise
from diptych.worlds.storyboard.oracle import Verdict, judge, read_pictures
from diptych.worlds.storyboard.tasks import Task, task_stream
from diptych.worlds.storyboard.world import ALL_FAMILIES, FULL, World, world_named

RATES = ("format", "text", "image", "given", "kept", "order", "document", "score")
SHOWN_RATES = {  # by telling: as many as a line of 120 has room for
    "full": ("format", "text", "image", "order", "score", "document"),
    "terse": ("format", "text", "image", "given", "score", "document"),
}
Progress = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Judged:
    """One answer with its task and verdict."""

    task: Task
    answer: Document
    verdict: Verdict


def reward_columns(judged: Sequence[Judged]) -> dict[str, list[Any]]:
    """The columns of these tasks' records, for rewards. At least one task."""
    rows = [item.task.columns for item in judged]
    return {name: [row[name] for row in rows] for name in rows[0]}


def held_out_tasks(config: EvaluateConfig) -> list[Task]:
    """The same prompts for every checkpoint; families in turn."""
    return list(itertools.islice(task_stream(config.seed, config.split, world_named(config.world, config.telling)), config.num_prompts))


def evaluate_documents(
    model: UnifiedModel, tasks: Sequence[Task], params: SamplingParams, config: EvaluateConfig, progress: Progress | None = None
) -> list[Judged]:
    """Answers and verdicts, one answer for each prompt. Raises ValueError where the model knows another world."""
    model.check_world(config.world)
    answers = answer(model, [task.prompt for task in tasks], params, config, progress)
    verdicts = judge(answers, [task.truth for task in tasks])
    return [Judged(*parts) for parts in zip(tasks, answers, verdicts, strict=True)]


def answer(
    model: UnifiedModel, prompts: Sequence[Document], params: SamplingParams, config: EvaluateConfig, progress: Progress | None = None
) -> list[Document]:
    answers: list[Document] = []
    for begin in range(0, len(prompts), config.batch_size):
        rows = [model.encode_prompt(prompt, params.form) for prompt in prompts[begin : begin + config.batch_size]]
        rollouts = sample(model, rows, params, generator=generator(config.seed, 30, begin))
        answers += [rollout.document for rollout in rollouts]
        if progress:
            progress(len(rows))
    return answers


def rates(judged: Sequence[Judged], seed: int = 0) -> dict[str, Any]:
    """Mean of each rate and its 95 % interval `<name>_ci` (bootstrap over prompts, 2000 resamples)."""
    table = {name: np.array([float(getattr(j.verdict, name)) for j in judged]) for name in RATES}
    result: dict[str, Any] = {}
    for name, values in table.items():
        result[name] = round(float(values.mean()), 4)
        result[f"{name}_ci"] = interval(values, seed)
    return result


def rates_by_kind(judged: Sequence[Judged]) -> dict[str, dict[str, float]]:
    """For each family and number of pictures asked for (`story, 3 pictures`), in order: `prompts`, how many, and the mean of each rate."""
    groups: dict[str, list[Judged]] = {}
    for item in sorted(judged, key=lambda j: (ALL_FAMILIES.index(j.task.family), j.task.truth.num_steps)):
        count = item.task.truth.num_steps
        groups.setdefault(f"{item.task.family}, {count} picture{'s' * (count > 1)}", []).append(item)
    return {
        kind: {"prompts": len(found), **{r: round(float(np.mean([float(getattr(j.verdict, r)) for j in found])), 4) for r in RATES}}
        for kind, found in groups.items()
    }


def rate_cells(found: Mapping[str, Any], rates: Sequence[str]) -> list[str]:
    """`80.0 [78, 82]`, in per cent, for each rate."""
    return [f"{100 * found[r]:.1f} [{100 * found[r + '_ci'][0]:.0f}, {100 * found[r + '_ci'][1]:.0f}]" for r in rates]


def interval(values: np.ndarray, seed: int = 0) -> list[float]:
    """95 % percentile bootstrap interval of the mean."""
    picks = make_rng(seed, 31).integers(len(values), size=(2000, len(values)))
    low, high = np.percentile(values[picks].mean(1), (2.5, 97.5))
    return [round(float(low), 4), round(float(high), 4)]


def evaluate_retention(
    model: UnifiedModel, params: SamplingParams, config: EvaluateConfig, progress: Progress | None = None
) -> dict[str, dict[str, Any]]:
    """Retained skills, greedily: the share of captions drawn exactly, and of descriptions and answers that are exactly right."""
    return retention_rates(retained_skills(model, params, config, progress))


def retained_skills(
    model: UnifiedModel, params: SamplingParams, config: EvaluateConfig, progress: Progress | None = None, *, forms: bool = False
) -> dict[str, list[tuple[str, bool]]]:
    """For each skill the kind of every turn and whether the answer is exactly right; editing (a picture and an event to the next picture)
    belongs to the terse telling, looking up earlier pictures to worlds whose tasks need it. `forms`: asked for a picture and for words;
    otherwise the model chooses what to answer with."""
    rng, world = make_rng(config.seed, 32), world_named(config.world, config.telling)
    drawing = [make_turn(rng, "draw", config.split, world=world) for _ in range(config.num_retention)]
    kinds = [("describe", "question")[i % 2] for i in range(config.num_retention)]
    asking = [make_turn(rng, kind, config.split, world=world) for kind in kinds]
    forced = (AnswerForm.IMAGE, AnswerForm.TEXT) if forms else (AnswerForm.FREE, AnswerForm.FREE)
    image, text = (params.greedy().model_copy(update={"form": form}) for form in forced)
    drawn = answer(model, [prompt for prompt, _ in drawing], image, config, progress)
    said = answer(model, [prompt for prompt, _ in asking], text, config, progress)
    found = {
        "text_to_image": [("draw", same_picture(a, turn, world)) for a, turn in zip(drawn, drawing, strict=True)],
        "understanding": [(kind, same_words(a, turn)) for kind, a, turn in zip(kinds, said, asking, strict=True)],
    }
    if config.telling == "terse":
        editing = [make_turn(rng, "edit", config.split, world=world) for _ in range(config.num_retention)]
        edited = answer(model, [prompt for prompt, _ in editing], image, config, progress)
        found["editing"] = [("edit", same_picture(a, turn, world)) for a, turn in zip(edited, editing, strict=True)]
    if "recall" in world.families:
        found["look_up"] = []
        for kind, params_of_kind, right in (("look_up", text, same_words), ("again", image, same_picture)):
            looking = [make_turn(rng, kind, config.split, world=world) for _ in range(max(1, config.num_retention // 2))]
            answers = answer(model, [prompt for prompt, _ in looking], params_of_kind, config, progress)
            found["look_up"] += [(kind, right(a, turn, world)) for a, turn in zip(answers, looking, strict=True)]
    return found


def retention_rates(skills: Mapping[str, Sequence[tuple[str, bool]]]) -> dict[str, dict[str, Any]]:
    rights = {skill: np.array([right for _, right in turns], dtype=float) for skill, turns in skills.items()}
    return {skill: {"accuracy": round(float(right.mean()), 4), "accuracy_ci": interval(right)} for skill, right in rights.items()}


def sheet(
    greedy: Sequence[Judged], sampled: Sequence[Judged], skills: Mapping[str, Sequence[tuple[str, bool]]], config: EvaluateConfig
) -> list[Score]:
    """One score for each prompt, with its rates greedily and sampled, and one for each turn of a retained skill. Ids name the prompt: two
    evaluations have the same one where they asked the same."""
    asked = f"{config.split}/{config.seed}"
    scores = []
    for number, (one, other) in enumerate(zip(greedy, sampled, strict=True)):
        values = {f"{mode} {r}": float(getattr(j.verdict, r)) for mode, j in (("greedy", one), ("sampled", other)) for r in RATES}
        scores.append(Score(f"{asked}/{number}", one.task.family, dict(values)))
    for skill, turns in skills.items():  # which turns are made depends on how many
        place = f"{asked}/{skill}/of {config.num_retention}"
        scores += [Score(f"{place}/{number}", kind, {skill: float(right)}) for number, (kind, right) in enumerate(turns)]
    return scores


def same_picture(given: Document, turn: Turn, world: World = FULL) -> bool:
    """The answer is one picture, of the same scene as that of the turn."""
    wanted = turn[1].images[0].pixels
    pictures = [image.pixels for image in given.images]
    if len(given) != 1 or len(pictures) != 1 or pictures[0] is None or wanted is None:
        return False
    seen, truth = read_pictures([pictures[0], wanted], world)
    return seen == truth


def same_words(given: Document, turn: Turn, world: World = FULL) -> bool:
    """The answer is one text, word for word that of the turn; the same in every world."""
    segments = given.segments
    return len(segments) == 1 and isinstance(segments[0], Text) and normalise(segments[0].text) == normalise(turn[1].text)
