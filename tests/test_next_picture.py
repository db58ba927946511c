"""`next_picture`, the learned critic that remembers: what it speaks of, that batches change nothing, and how often it is right."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from diptych.document import Document, Image, Text, to_message
from diptych.models import packaged_folder
from diptych.pretrain import pretrain
from diptych.pretrain.next_picture import drawn, happening
from diptych.rewards import load_reward
from diptych.rewards.next_picture import NextPictureCritic, Step, next_picture
from diptych.runtime import rng
from diptych.worlds.storyboard import language
from diptych.worlds.storyboard.render import render
from diptych.worlds.storyboard.scene import Event, Scene, Thing
from diptych.worlds.storyboard.world import TERSE

BALL = Thing("ball", "red", "small")
BEFORE = Scene("meadow", (BALL, None, Thing("tree", "green", "big")))
GROWS = "the ball grows ."
AFTER = Scene("meadow", (dataclasses.replace(BALL, size="big"), *BEFORE.places[1:]))
FORGOT = Scene("meadow", (AFTER.places[0], None, Thing("tree", "blue", "big")))  # the tree was green


def asked(prompt: Document, *answers: Document, **options) -> list[list[float | None]]:
    return next_picture([[to_message("user", prompt)]] * len(answers), [[to_message("assistant", answer)] for answer in answers], **options)


def told(*parts: str | Scene) -> Document:
    return Document(tuple(Text(part) if isinstance(part, str) else Image(render(part)) for part in parts))


def test_it_speaks_of_pictures_behind_a_text_and_sees_what_is_before_them():
    assert load_reward("next_picture") is next_picture
    prompt = told(BEFORE, "tell the story")
    right, forgot = asked(prompt, told(GROWS, AFTER, AFTER), told(GROWS, FORGOT, "it is late"))
    assert (right[0], right[2], forgot[0], forgot[2]) == (None,) * 4
    assert right[1] is not None
    assert forgot[1] is not None
    assert right[1] > 0.7 > 0.6 > forgot[1]
    # the same pictures are right after another picture: only the one before tells them apart
    other = asked(told(Scene("meadow", (BALL, None, FORGOT.places[2])), "tell the story"), told(GROWS, AFTER), told(GROWS, FORGOT))
    assert other[1][1] > other[0][1]
    alone = asked(prompt, told(GROWS, AFTER), memory=0), asked(told("tell the story"), told(GROWS, AFTER))
    assert alone[0][0][1] == pytest.approx(alone[1][0][1], abs=1e-6)
    # the picture before is the one that was drawn, not the one of the prompt
    second = asked(prompt, told(GROWS, FORGOT, "the ball shrinks .", Scene("meadow", (BALL, *FORGOT.places[1:]))))[0]
    assert second[3] > 0.6


def test_another_memory_is_refused():
    with pytest.raises(ValueError, match=r"memory is 2; allowed are 0 \(text and picture alone\) and 1"):
        asked(told(BEFORE, "tell"), told(GROWS, AFTER), memory=2)


def steps_of(count: int, split: str = "test") -> tuple[list[Step], np.ndarray]:
    random, steps, right = rng(5, 1), [], []
    for _ in range(count):
        before, event, after = happening(random, split)
        shown = drawn(random, before, after)
        steps.append(Step(render(before), language.step_text(event, after, TERSE), render(shown)))
        right.append(shown == after)
    return steps, np.array(right)


def test_a_batch_says_what_each_step_by_itself_says():
    critic = NextPictureCritic.load(packaged_folder("next_picture"))
    steps, _ = steps_of(6)
    steps.append(steps[0]._replace(before=None))
    together = critic(steps)
    assert torch.allclose(together, torch.cat([critic([step]) for step in steps]), atol=1e-4)
    assert not torch.allclose(together[0], together[-1], atol=1e-2)


def test_right_pictures_of_held_out_scenes_get_more_than_wrong_ones():
    """The measure that was taken when it was trained, on other scenes, drawn by the world's renderer and not through the codec."""
    critic = NextPictureCritic.load(packaged_folder("next_picture"))
    steps, right = steps_of(300)
    values, alone = (critic(some).numpy() for some in (steps, [step._replace(before=None) for step in steps]))
    auc, forgetful = (float((v[right][:, None] > v[~right]).mean()) for v in (values, alone))
    assert auc > 0.9
    assert forgetful < 0.75


def test_its_part_of_pretraining_can_be_loaded(tmp_path):
    lines: list[str] = []
    pretrain(tmp_path, seed=0, scale=0.001, log=lines.append, parts=("next_picture",), init_from=packaged_folder("storyboard_terse"))
    critic = NextPictureCritic.load(tmp_path / "next_picture")
    assert critic([Step(render(BEFORE), language.tell(Event("grow", "ball")) + " .", render(AFTER))]).shape == (1,)
    assert "auc" in lines[-1]
    with pytest.raises(ValueError, match="cannot load the reward model"):
        NextPictureCritic.load(tmp_path)
