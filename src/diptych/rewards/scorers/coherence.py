"""`image_coherence`: do the pictures of a document look alike, as pictures of one story do, without being copies?"""

from __future__ import annotations

from typing import Any, ClassVar

import PIL.Image
import torch
from pydantic import Field
from torch import Tensor
from transformers import CLIPModel, Dinov2Model

from diptych.document import Document, Image
from diptych.rewards.scorers.base import ImageScorer, Judged, ScorerOptions, load_exactly, picture_key, pixels_of
from diptych.rewards.scorers.clip import check_type, load_processor


class CoherenceOptions(ScorerOptions):
    model: str = Field("facebook/dinov2-base", min_length=1, description="a DINOv2 or a CLIP model: folder, or hub id")
    max_cosine: float | None = Field(0.95, gt=0, lt=1, description="above it two pictures count as copies; None: no cap")
    prompt_pictures: bool = Field(False, description="the pictures of the prompt count as earlier ones")


class ImageCoherence(ImageScorer):
    """`image_coherence`: the mean over the earlier pictures of `likeness`, -1..1.

    None for texts, and for a picture without earlier ones. Without `max_cosine` the best answer is one picture, repeated.
    """

    name = "image_coherence"
    raw_range = "mean of cosines, -1..1"
    options: CoherenceOptions
    options_class: ClassVar[type[ScorerOptions]] = CoherenceOptions

    def load(self) -> None:
        folder = self.checkpoint()
        self.kind = check_type(folder, ("dinov2", "clip"))
        self.model = load_exactly(CLIPModel if self.kind == "clip" else Dinov2Model, folder).to(self.device, self.dtype)
        self.processor = load_processor(folder)

    def probe(self, picture: PIL.Image.Image) -> Tensor:
        return self.embed([picture])

    def embed(self, pictures: list[PIL.Image.Image]) -> Tensor:
        """(N, E) unit vectors: CLIP's projected picture, DINOv2's normalized first state."""
        pixels = self.processor(pictures, return_tensors="pt")["pixel_values"].to(self.device, self.dtype)
        found = self.model.get_image_features(pixel_values=pixels) if self.kind == "clip" else self.model(pixel_values=pixels)
        return torch.nn.functional.normalize(found.pooler_output.float(), dim=-1)

    def __call__(self, prompts: list[list[dict[str, Any]]], completions: list[list[dict[str, Any]]], **_: Any) -> list[list[float | None]]:
        values: list[list[float | None]] = []
        before: list[list[PIL.Image.Image]] = []  # pictures of each prompt, where they count
        at: list[list[int]] = []  # steps of each answer that are pictures
        pictures: list[PIL.Image.Image] = []
        for prompt, completion in zip(prompts, completions, strict=True):
            asked, answer = (Document.from_blocks(messages[-1]["content"]) for messages in (prompt, completion))
            before.append([pixels_of(image) for image in asked.images] if self.options.prompt_pictures else [])
            at.append([step for step, segment in enumerate(answer) if isinstance(segment, Image)])
            pictures += before[-1] + [pixels_of(image) for image in answer.images]
            values.append([None] * len(answer))
        vectors = iter(self.remembered([picture_key(picture) for picture in pictures], pictures, self.embed))
        for row, steps in enumerate(at):
            earlier = [next(vectors) for _ in before[row]]
            for step in steps:
                vector = next(vectors)
                if earlier:
                    cosines = torch.stack(earlier) @ vector  # (num_earlier,)
                    raw = float(likeness(cosines, self.options.max_cosine).mean())
                    values[row][step] = self.rescaled(raw)
                    if self.listen:
                        shown = ", ".join(f"{cosine:.4f}" for cosine in cosines.tolist())
                        self.listen(Judged(step, raw, f"the earlier pictures, cosines {shown}"))
                earlier.append(vector)
        return values


def likeness(cosines: Tensor, max_cosine: float | None) -> Tensor:
    """The cosine, up to `max_cosine`; beyond it a straight line down to 0 for a copy, whose cosine is 1. Elementwise."""
    if max_cosine is None:
        return cosines
    return torch.where(cosines > max_cosine, max_cosine * (1 - cosines).clamp(min=0) / (1 - max_cosine), cosines)
