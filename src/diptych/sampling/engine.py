"""Sampling whole documents: what fits, and the rollouts of a list of prompts. How they are written: `batch.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diptych.config import SamplingParams
from diptych.models.base import UnifiedModel
from diptych.models.steps import prepared
from diptych.sampling.batch import Asked, Batch, num_uniforms
from diptych.sampling.distribution import resolve
from diptych.sampling.rollout import PartialRollout, Rollout, finish, is_broken
from diptych.tokens import AnswerForm, TokenRow

NOT_FINITE = (
    "the model's logits are not finite, so nothing can be sampled from them; look at its weights (a training that diverged?) "
    "or use another dtype"
)


def context_needed(model: UnifiedModel, params: SamplingParams, row: TokenRow | None = None) -> int:
    """The most positions that an answer can take: one of the form in the settings, or behind a prompt of a form of its own."""
    text, picture = params.max_text_tokens, len(model.image_spec.layout)
    form = params.form if row is None or row.form is None else row.form
    if form is AnswerForm.TEXT:
        return text
    if form.ends_with_image:
        begins = 0 if form is AnswerForm.IMAGE and row is not None and row.form is not None else 1  # else it is in the prompt
        return (text if form is AnswerForm.TEXT_IMAGE else 0) + begins + picture + len(model.answer_end_ids)
    left = max(0, params.max_images - (0 if row is None else PartialRollout(row).num_given))
    return (left + 1) * text + left * picture


def most_choices(model: UnifiedModel, params: SamplingParams) -> int:
    """The most choices of an answer of the form in the settings; a code is one."""
    forms = {AnswerForm.IMAGE: (0, 1), AnswerForm.TEXT: (1, 0), AnswerForm.TEXT_IMAGE: (1, 1)}
    texts, images = forms.get(params.form, (params.max_images + 1, params.max_images))
    return texts * params.max_text_tokens + images * model.image_spec.num_positions * model.image_spec.depth


def check_room(model: UnifiedModel, row: TokenRow, params: SamplingParams) -> None:
    """Raises ValueError where the longest possible answer does not fit behind a prompt."""
    needed = context_needed(model, params, row)
    if len(row) + needed > model.max_positions:
        raise ValueError(
            f"a prompt of {len(row)} positions and an answer of up to {needed} exceed the model's context of {model.max_positions}; "
            "shorten the prompt or lower max_images or max_text_tokens"
        )


def fit_to_context(model: UnifiedModel, prompt: TokenRow, params: SamplingParams) -> SamplingParams:
    """The same settings with `max_images`, of free answers, lowered to what fits behind the prompt (0 at least: `sample` says what is too
    long)."""
    if (prompt.form or params.form) is not AnswerForm.FREE:
        return params
    for max_images in range(params.max_images, 0, -1):
        lowered = params.model_copy(update={"max_images": max_images})
        if len(prompt) + context_needed(model, lowered, prompt) <= model.max_positions:
            return lowered
    return params.model_copy(update={"max_images": 0})


@torch.no_grad()
def sample(
    model: UnifiedModel, prompts: list[TokenRow], params: SamplingParams, *, num_generations: int = 1,
    generator: torch.Generator | Sequence[torch.Generator], graphs: bool | None = None,
) -> list[Rollout]:  # fmt: skip
    """Samples `num_generations` documents for each prompt; those of one prompt are adjacent.

    `generator`: on the CPU; one for all, or one for each prompt, so that its documents do not depend on what stands before it.
    `graphs`: steps of unchanging shape, replayed as CUDA graphs; None: on a GPU. On a CPU they are only of use to tests.

    A prompt brings the form of its answers (`UnifiedModel.encode_prompt`); different forms may stand together.

    Raises ValueError where a prompt and the longest possible answer do not fit the context, and where the settings ask for a form that
    the prompts were not encoded for, and FloatingPointError where a model's logits are NaN.
    """
    if not prompts:
        raise ValueError("no prompts to sample from")
    if not isinstance(generator, torch.Generator) and len(generator) != len(prompts):
        raise ValueError(f"{len(generator)} generators were given for {len(prompts)} prompts; give one, or one for each")
    params = resolve(params, model)
    if params.form is not AnswerForm.FREE and any(prompt.form is None for prompt in prompts):
        raise ValueError(f"the settings ask for form {params.form}, and a prompt was encoded for none: use encode_prompt(prompt, form)")
    if params.form.ends_with_image or any(prompt.form is not None and prompt.form.ends_with_image for prompt in prompts):
        model.check_can_draw()
    for prompt in prompts:
        check_room(model, prompt, params)
    generators = [generator] * len(prompts) if isinstance(generator, torch.Generator) else generator
    asked = [Asked(prompt, one, num_generations, params.max_images) for prompt, one in zip(prompts, generators, strict=True)]
    was_training = model.training
    model.eval()
    try:
        with model.gathered(), prepared(model):
            return model.run(lambda _: _sample(model, asked, params, graphs))
    finally:
        model.train(was_training)


def _sample(model: UnifiedModel, asked: list[Asked], params: SamplingParams, graphs: bool | None) -> list[Rollout]:
    batch = Batch(model, params, graphs)
    partials = batch.join(asked)
    while batch.partials:
        batch.advance()
    if any(map(is_broken, partials)):
        raise FloatingPointError(NOT_FINITE)
    return finish(model, partials, params)


def noise_of(
    model: UnifiedModel, params: SamplingParams, num_generations: int, generator: torch.Generator, places: Sequence[int]
) -> list[torch.Generator]:
    """For each prompt a generator that stands where its documents' numbers begin in a stream that all prompts of a step share, place by
    place: who samples only some of them draws what who samples all would have drawn."""
    count = num_generations * num_uniforms(model, params)
    states = []
    for _ in range(max(places, default=-1) + 1):
        states.append(generator.get_state())
        torch.rand(count, dtype=torch.float64, generator=generator)
    found = []
    for place in places:
        found.append(torch.Generator())
        found[-1].set_state(states[place])
    return found
