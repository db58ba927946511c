"""The other branches of classifier-free guidance: what stands before an image there, and how their logits are mixed.

One implementation for the sampler and the scorer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diptych.config import ImageSampling
from diptych.models.base import UnifiedModel
from diptych.tokens import Modality, TokenRow


def num_branches(image: ImageSampling) -> int:
    """How many branches are needed beside the conditional one: 0, 1 (unconditional), or 2 (and one that saw the pictures)."""
    scale, image_scale = image.guidance_scale, image.image_guidance_scale
    if image_scale is None:
        return 0 if scale == 1 else 1
    return 0 if scale == image_scale == 1 else 2


def branch_prefixes(model: UnifiedModel, image: ImageSampling, prompt_length: int, context: Callable[[], TokenRow]) -> list[TokenRow]:
    """For each branch the sequence up to and including `begin_id`.

    Args:
        prompt_length: positions of the prompt.
        context: gives prompt and answer up to, without, `begin_id`; asked only where a branch needs it.
    """
    spec = model.image_spec
    bare = TokenRow.text(model.unconditional_prompt(prompt_length), spec.depth)
    begin = TokenRow.text([spec.begin_id], spec.depth)
    prefixes = [TokenRow.concat([bare, begin])]
    if num_branches(image) == 2:
        prefixes.append(TokenRow.concat([bare, *pictures_of(model, context()), begin]))
    return prefixes[: num_branches(image)]


def pictures_of(model: UnifiedModel, row: TokenRow) -> list[TokenRow]:
    """The pictures of a sequence, each from `begin_id` to its end."""
    text = row.modality == Modality.TEXT
    spans, end = [], -1
    for begin in (text & (row.text_ids == model.image_spec.begin_id)).nonzero().flatten().tolist():
        if begin <= end:
            continue
        ends = (text & (row.text_ids == model.image_spec.end_id)).nonzero().flatten()
        later = ends[ends > begin]
        if not len(later):
            break
        end = int(later[0])
        spans.append(slice(begin, end + 1))
    return _cut(row, spans)


def _cut(row: TokenRow, spans: Sequence[slice]) -> list[TokenRow]:
    """Slices of a row, nothing in them chosen; pictures given as features go with the span that they stand in."""
    pixels = list(row.pixels)
    cut = []
    for span in spans:
        modality = row.modality[span]
        held = (pixels.pop(0),) if bool((modality == Modality.FEATURE).any()) else ()
        nothing = torch.zeros_like(row.completion_mask[span])
        cut.append(TokenRow(row.text_ids[span], row.codes[span], modality, row.step_ids[span], nothing, held))
    return cut


def mix(conditional: Tensor, others: Sequence[Tensor], image: ImageSampling) -> Tensor:
    """Guided logits from those of the conditional branch and of the others, in the order of `branch_prefixes`.

    One other branch u: u + s * (c - u). Source: arXiv:2207.12598; s = 1 is no guidance.
    Two, u and i (the pictures without the words): u + s_i * (i - u) + s * (c - i). Source: arXiv:2211.09800, Eq. 3; Chameleon draws so.
    """
    if not others:
        return conditional
    scale, image_scale = image.guidance_scale, image.image_guidance_scale
    assert scale is not None
    if len(others) == 1:
        return others[0] + scale * (conditional - others[0])
    assert image_scale is not None
    unconditional, pictures = others
    return unconditional + image_scale * (pictures - unconditional) + scale * (conditional - pictures)
