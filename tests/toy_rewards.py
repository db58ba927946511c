"""Rewards for tests, loaded by their dotted path as a user's own."""

from __future__ import annotations

import math
import os
import time

import torch


def likes_ball(completions, **_):
    """Share of words that are "ball": something that any model can learn in a few steps."""
    values = []
    for messages in completions:
        words = " ".join(b["text"] for b in messages[-1]["content"] if b["type"] == "text").split()
        values.append(words.count("ball") / max(1, len(words)))
    return values


def per_step(completions, **_):
    """A value for each step: brightness of pictures, length of texts."""
    return [
        [
            sum(block["image"].resize((1, 1)).getpixel((0, 0))) / 765 if block["type"] == "image" else len(block["text"].split()) / 10
            for block in messages[-1]["content"]
        ]
        for messages in completions
    ]


def texts_only(completions, **kwargs):
    """`per_step`, and nothing of pictures."""
    return [
        [None if block["type"] == "image" else value for block, value in zip(messages[-1]["content"], values, strict=True)]
        for messages, values in zip(completions, per_step(completions), strict=True)
    ]


class Draws:
    """Has weights of its own, drawn while it is made."""

    def __init__(self):
        self.weight = float(torch.rand(()))

    def __call__(self, completions, **_):
        return [self.weight * len(messages[-1]["content"]) for messages in completions]


def slow(completions, **kwargs):
    """Leaves time to be killed in the middle of a step."""
    time.sleep(float(os.environ.get("TOY_REWARD_SECONDS", "0")))
    return per_step(completions, **kwargs)


def always_equal(completions, **_):
    return [1.0] * len(completions)


def raises(completions, **_):
    raise ConnectionError("the judge is not there")


def not_a_number(completions, **_):
    return [math.nan] * len(completions)


def wrong_count(completions, **_):
    return [0.0]


def as_for_trl(completions, completion_ids, trainer_state, log_metric, log_extra, **kwargs):
    """What TRL gives: one string a document, ids, the trainer's state, and two ways to log."""
    pictures = [messages[0]["content"].count("<image>") for messages in completions]
    log_metric("progress", trainer_state.global_step / trainer_state.max_steps)
    log_extra("codes", [ids.count(-1) for ids in completion_ids])
    log_extra("pictures", pictures)
    return [float(n) for n in pictures]


def wrong_count_of_the_second(completions, **kwargs):
    """Breaks its contract in the second process alone."""
    return [] if os.environ.get("RANK") == "1" else per_step(completions, **kwargs)


def flat_for_some(prompts, completions, **kwargs):
    """Says the same of all answers to every other prompt, told by its text, so that some groups are sampled again."""
    values = per_step(completions, **kwargs)
    flat = [sum(map(ord, str(p[-1]["content"][0].get("text", "")))) % 2 for p in prompts]
    return [[0.5] * len(steps) if same else steps for same, steps in zip(flat, values, strict=True)]


def sometimes_missing(completions, **_):
    """No number for answers that begin with a letter of the alphabet's first half."""
    texts = ["".join(b["text"] for b in messages[-1]["content"] if b["type"] == "text") for messages in completions]
    return [math.nan if len(text) % 7 == 0 else float(len(text)) for text in texts]


def hangs_in_the_background(completions, **_):
    time.sleep(1000)
