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
    count, depth = num_branches(image), model.image_spec.depth
    begin = TokenRow.text([model.image_spec.begin_id], depth)
    bare = TokenRow.text(model.unconditional_prompt(prompt_length), depth)
    kept = model.unconditional_row(prompt_length, context) if count else None
    rows = [bare if kept is None or count == 2 else kept]
    if count == 2:
        rows.append(TokenRow.concat(pictures_alone(model, bare, prompt_length, context())) if kept is None else kept)
    return [TokenRow.concat([row, begin]) for row in rows[:count]]


def pictures_alone(model: UnifiedModel, bare: TokenRow, prompt_length: int, context: TokenRow) -> list[TokenRow]:
    """The unconditional prompt and every picture of the context. Where the unconditional prompt is as long as the prompt (Janus),
    the prompt's pictures stand at their own places in it."""
    spans = picture_spans(model, context)
    if len(bare) != prompt_length:
        return [bare, *_cut(context, spans)]
    pieces, end = [], 0
    for span in [s for s in spans if s.stop <= prompt_length]:
        pieces += [bare[end : span.start], *_cut(context, [span])]
        end = span.stop
    rest = _cut(context, [s for s in spans if s.stop > prompt_length])
    return [*pieces, bare[end:], *rest]


def picture_spans(model: UnifiedModel, row: TokenRow) -> list[slice]:
    """Where the pictures of a sequence stand: codes or features, with the tokens of the family around and between them."""
    seen = (row.modality == Modality.IMAGE) | (row.modality == Modality.FEATURE)
    text = row.modality == Modality.TEXT
    begins = (text & (row.text_ids == model.image_spec.begin_id)).nonzero().flatten().tolist()
    ends = (text & (row.text_ids == model.image_spec.end_id)).nonzero().flatten().tolist()
    spans: list[slice] = []
    for position in seen.nonzero().flatten().tolist():
        if spans and position < spans[-1].stop:
            continue
        begin = max((b for b in begins if b < position), default=None)
        end = min((e for e in ends if e > position), default=None)
        if begin is not None and end is not None and not any(begin < e < position for e in ends):
            spans.append(slice(begin, end + 1))
        else:  # a bare picture (VILA-U's own inference): as far as it goes
            gap = (~seen[position:]).nonzero().flatten().tolist()
            spans.append(slice(position, position + gap[0] if gap else len(row)))
    return spans


def _cut(row: TokenRow, spans: Sequence[slice]) -> list[TokenRow]:
    """Slices of a row, nothing in them chosen; pictures given as features go with the span that they stand in."""
    cut = []
    for span in spans:
        modality = row.modality[span]
        first = _num_features(row, span.start)
        held = row.pixels[first : first + _num_features(row, span.stop) - first]
        nothing = torch.zeros_like(row.completion_mask[span])
        cut.append(TokenRow(row.text_ids[span], row.codes[span], modality, row.step_ids[span], nothing, held))
    return cut


def _num_features(row: TokenRow, stop: int) -> int:
    """Pictures given as features that begin before a position."""
    feature = (row.modality[:stop] == Modality.FEATURE).long()
    return int((feature.diff(prepend=feature.new_zeros(1)) == 1).sum())


def mix(conditional: Tensor, others: Sequence[Tensor], image: ImageSampling) -> Tensor:
    """Guided logits, float32, from those of the conditional branch and of the others, in the order of `branch_prefixes`. They are mixed in
    float32: a difference of two bfloat16 numbers has hardly a digit left, and the scale multiplies what it lost.

    One other branch u: u + s * (c - u). Source: arXiv:2207.12598; s = 1 is no guidance.
    Two, u and i (the pictures without the words): u + s_i * (i - u) + s * (c - i). Source: arXiv:2211.09800, Eq. 3; Chameleon draws so.
    """
    conditional, others = conditional.float(), [other.float() for other in others]
    if not others:
        return conditional
    scale, image_scale = image.guidance_scale, image.image_guidance_scale
    assert scale is not None
    if len(others) == 1:
        return others[0] + scale * (conditional - others[0])
    assert image_scale is not None
    unconditional, pictures = others
    return unconditional + image_scale * (pictures - unconditional) + scale * (conditional - pictures)
