"""`next_picture`: is each picture what the text before it makes of the picture before that? A critic that remembers, for Storyboard.

One value per picture in 0..1, about 1 where the told event has happened and everything else is as it was, and halved with each fact that is
not. It is learned from scenes of its own, and is no part of the policy: it can be wrong and can be hacked.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import PIL.Image
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from diptych.document import Document, Image, Text
from diptych.models import packaged_folder
from diptych.models.pixels import to_pixels
from diptych.rewards.captions import no_values
from diptych.rewards.encoder import Critic

BATCH = 256  # pictures in one forward pass


class Step(NamedTuple):
    """What is judged: a picture, the text before it, and the picture before that (None: it is not shown)."""

    before: PIL.Image.Image | None
    text: str
    picture: PIL.Image.Image


class NextPictureCritic(Critic):
    """Words, then the patches of a picture, each joined with the same patch of the picture before, through a causal transformer.

    To compare two pictures patch by patch is given, not learned: with the pictures one behind the other the transformer had learned nothing
    after 400 steps. The value is read at the last token.
    """

    def __init__(self, tokenizer: Tokenizer, width: int = 64, layers: int = 4, pixel_size: int = 96, patch: int = 32) -> None:
        super().__init__()
        self.tokenizer, self.patch, self.pixel_size = tokenizer, patch, pixel_size
        self.settings = {"width": width, "layers": layers, "pixel_size": pixel_size, "patch": patch}
        self.words = nn.Embedding(tokenizer.get_vocab_size() + 1, width)  # one more word: the end
        self.patches = nn.Linear(3 * patch**2, width)
        self.forgotten = nn.Parameter(torch.zeros(width))  # in the place of a patch of a picture that is not shown
        self.join = nn.Sequential(nn.Linear(2 * width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        self.body = LlamaModel(
            LlamaConfig(
                vocab_size=1, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, num_attention_heads=4,
                max_position_embeddings=256, pad_token_id=None, bos_token_id=None, eos_token_id=None,
            )
        )  # fmt: skip
        self.head = nn.Linear(width, 1)

    def forward(self, steps: Sequence[Step]) -> Tensor:
        """The logit (N,) of each step."""
        ids = [torch.tensor(self.tokenizer.encode(step.text, add_special_tokens=False).ids, dtype=torch.long) for step in steps]
        longest = max(map(len, ids))
        padded = torch.stack([nn.functional.pad(row, (longest - len(row), 0), value=-1) for row in ids])  # (N, W), padded on the left
        shown = self._tiles([step.picture for step in steps])  # (N, P, width)
        remembered = [i for i, step in enumerate(steps) if step.before is not None]
        before = self.forgotten.expand_as(shown)
        if remembered:
            pictures = [picture for step in steps if (picture := step.before) is not None]
            before = before.index_put((torch.tensor(remembered),), self._tiles(pictures))
        end = self.words.weight[-1].expand(len(steps), 1, -1)
        embeds = torch.cat([self.words(padded.clamp(min=0)), self.join(torch.cat([shown, before], -1)), end], 1)
        real = torch.cat([padded >= 0, torch.ones(len(steps), shown.shape[1] + 1, dtype=torch.bool)], 1)
        hidden = self.body(inputs_embeds=embeds, attention_mask=real).last_hidden_state
        return self.head(hidden[:, -1])[:, 0]

    def _tiles(self, pictures: Sequence[PIL.Image.Image]) -> Tensor:
        pixels = to_pixels(list(pictures), self.pixel_size)  # (N, 3, S, S)
        return self.patches(nn.functional.unfold(pixels, self.patch, stride=self.patch).transpose(1, 2))


@functools.cache
def _packaged() -> NextPictureCritic:
    return NextPictureCritic.load(packaged_folder("next_picture"))


@torch.no_grad()
def next_picture(
    prompts: list[list[dict[str, Any]]], completions: list[list[dict[str, Any]]], memory: int = 1, **_: Any
) -> list[list[float | None]]:
    """Per step; None for texts, and for pictures without a text before them.

    memory: 1, the critic is shown the picture before, of the prompt or of the answer; 0, the text and the picture alone, as a scorer of
    captions is. Raises ValueError for another.
    """
    if memory not in (0, 1):
        raise ValueError(f"memory is {memory!r}; allowed are 0 (text and picture alone) and 1 (the picture before them too)")
    values, steps, at = no_values(completions), [], []
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        answer = Document.from_blocks(completion[-1]["content"])
        before = next((image.pixels for image in reversed(Document.from_blocks(prompt[-1]["content"]).images)), None)
        captions = {place: text for place, text, _ in answer.captions() if isinstance(answer.segments[place - 1], Text)}
        for place, segment in enumerate(answer):
            if isinstance(segment, Image):
                assert segment.pixels is not None
                if place in captions:
                    steps.append(Step(before if memory else None, captions[place], segment.pixels))
                    at.append((row, place))
                before = segment.pixels
    for begin in range(0, len(steps), BATCH):
        some = slice(begin, begin + BATCH)
        for (row, place), value in zip(at[some], _packaged()(steps[some]).sigmoid().tolist(), strict=True):
            values[row][place] = value
    return values
