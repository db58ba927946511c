"""Train `next_picture`, the learned reward that remembers, on scenes of its own: pictures that show what an event makes, or do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn

from diptych.models.storyboard import build_tokenizer
from diptych.models.storyboard.codec import PatchCodec
from diptych.pretrain.reward_models import Log, Redrawer, differences, spoil, train_critic
from diptych.rewards.next_picture import NextPictureCritic, Step
from diptych.runtime import rng as make_rng
from diptych.worlds.storyboard import language
from diptych.worlds.storyboard.conversations import VERBS, scene_of
from diptych.worlds.storyboard.scene import Event, Scene, Split, in_split
from diptych.worlds.storyboard.tasks import random_event
from diptych.worlds.storyboard.world import TERSE

BATCH = 160
FORGETFUL = 0.25  # share of examples without the picture before: asked so, the critic is one of captions


def happening(rng: np.random.Generator, split: Split) -> tuple[Scene, Event, Scene]:
    """A scene, what happens, and the scene after it."""
    while True:
        before = scene_of(rng, split)
        event = random_event(rng, before, VERBS)
        if event is not None and in_split([before, after := event.apply(before)], split):
            return before, event, after


def drawn(rng: np.random.Generator, before: Scene, after: Scene) -> Scene:
    """What a picture shows instead of `after`, or `after` itself in two of five cases."""
    kind = rng.random()
    if kind < 0.4:
        return after
    if kind < 0.75:
        return spoil(rng, after)
    if kind < 0.82:
        return spoil(rng, spoil(rng, after))
    if kind < 0.88:
        return before
    other = random_event(rng, before, VERBS)
    return spoil(rng, after) if other is None else other.apply(before)


def step_batch(rng: np.random.Generator, redrawer: Redrawer, size: int, split: Split = "train") -> tuple[list[Step], Tensor]:
    """`size` steps of a document, and targets (size,) = 0.5 ** (number of wrong facts), lowered where a patch is from elsewhere."""
    steps: list[Step] = []
    shown: list[Scene] = []
    truths: list[Scene] = []
    whole = torch.ones(size)
    for i in range(size):
        before, event, after = happening(rng, split)
        shown.append(drawn(rng, before, after))
        truths.append(after)
        array = redrawer.draw(shown[-1])
        if split == "train" and rng.random() < 0.1:
            other = redrawer.draw(scene_of(rng, split))
            y, x = (int(v) * 32 for v in rng.integers(3, size=2))
            if np.abs(array[y : y + 32, x : x + 32].astype(int) - other[y : y + 32, x : x + 32]).mean() > 4:
                array = array.copy()
                array[y : y + 32, x : x + 32] = other[y : y + 32, x : x + 32]
                whole[i] = 0.4
        remembered = split == "test" or rng.random() >= FORGETFUL
        first = PIL.Image.fromarray(redrawer.draw(before)) if remembered else None
        steps.append(Step(first, language.step_text(event, after, TERSE), PIL.Image.fromarray(array)))
    wrong = torch.stack([differences([truth], [scene])[0, 0] for truth, scene in zip(truths, shown, strict=True)])
    return steps, 0.5 ** wrong.float() * whole


def train_next_picture(codec: PatchCodec, work: Path, steps: int, seed: int, log: Log) -> NextPictureCritic:
    torch.manual_seed(seed + 2)
    model = NextPictureCritic(build_tokenizer(language.vocabulary()))
    redrawer = Redrawer(codec)

    def loss_of(rng: np.random.Generator) -> Tensor:
        judged, targets = step_batch(rng, redrawer, BATCH)
        return nn.functional.binary_cross_entropy_with_logits(model(judged), targets)

    train_critic(model, loss_of, work / "next_picture_checkpoint", steps, 2e-3, seed, lambda: measure_next_picture(model, redrawer), log)
    return model


@torch.no_grad()
def measure_next_picture(model: NextPictureCritic, redrawer: Redrawer) -> dict[str, float]:
    """On scenes of the test split: the chance that a right picture gets more than a wrong one (AUC), and the mean values of both; and the
    AUC without the picture before."""
    steps, targets = step_batch(make_rng(0, 97), redrawer, 600, "test")
    right = targets == 1
    values = torch.cat([model(steps[i : i + 200]) for i in range(0, 600, 200)]).sigmoid()
    alone = [step._replace(before=None) for step in steps]
    forgetful = torch.cat([model(alone[i : i + 200]) for i in range(0, 600, 200)])
    return {
        "auc": round(_auc(values, right), 3),
        "mean_right": round(float(values[right].mean()), 3),
        "mean_wrong": round(float(values[~right].mean()), 3),
        "auc_without_memory": round(_auc(forgetful, right), 3),
    }


def _auc(values: Tensor, right: Tensor) -> float:
    return float((values[right][:, None] > values[~right]).float().mean())
