"""The scorers that are CLIP models: `clip_score`, `pick_score` and `hps`. Their raw scores are cosines; PickScore's is scaled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import PIL.Image
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate, pad
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from diptych.rewards.scorers.base import (
    CLIP_MEAN,
    CLIP_STD,
    CaptionOptions,
    CaptionScorer,
    Pair,
    load_exactly,
)


class ClipOptions(CaptionOptions):
    """0.4 is 1, so that a value is 2.5 times the cosine, as in CLIPScore (arXiv:2104.08718), which also sets negative ones to 0."""

    model: str = "openai/clip-vit-large-patch14"
    high: float = 0.4


class PickOptions(CaptionOptions):
    """Divided by 26, as Flow-GRPO does."""

    model: str = "yuvalkirstain/PickScore_v1"
    high: float = 26.0


class HpsOptions(CaptionOptions):
    version: Literal["v2.0", "v2.1"] = Field(
        description="which of the two checkpoints `model` was converted from; their scores do not compare"
    )


class ClipScore(CaptionScorer):
    """`clip_score`: cosine of a picture and its caption by a CLIP model of transformers. Raw -1..1, for good pairs about 0.15..0.35."""

    name = "clip_score"
    raw_range = "cosine, -1..1, good pairs about 0.15..0.35"
    options_class: ClassVar[type[CaptionOptions]] = ClipOptions

    def load(self) -> None:
        folder = self.checkpoint()
        check_type(folder, ("clip",))
        self.model = load_exactly(CLIPModel, folder).to(self.device, self.dtype)
        self.tokenizer = load_words(folder, self.model.config.text_config.vocab_size)
        self.max_tokens = self.model.config.text_config.max_position_embeddings
        self.load_images(folder)

    def load_images(self, folder: Path) -> None:
        self.processor = load_processor(folder)

    def pixel_values(self, pictures: list[PIL.Image.Image]) -> Tensor:
        """(N, 3, S, S)"""
        return self.processor(pictures, return_tensors="pt")["pixel_values"]

    def scores(self, pairs: list[Pair]) -> Tensor:
        ids, mask = self.token_ids(self.tokenizer, [caption for caption, _ in pairs], self.max_tokens)
        pixels = self.pixel_values([picture for _, picture in pairs]).to(self.device, self.dtype)
        texts = self.model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output  # (N, E)
        images = self.model.get_image_features(pixel_values=pixels).pooler_output  # (N, E)
        return cosine_similarity(texts.float(), images.float())


class PickScore(ClipScore):
    """`pick_score`: what people would pick, by PickScore (arXiv:2305.01569). Raw exp(logit_scale) * cosine, about 18..24."""

    name = "pick_score"
    raw_range = "exp(logit_scale) * cosine, about 18..24"
    options_class = PickOptions

    def scores(self, pairs: list[Pair]) -> Tensor:
        return self.model.logit_scale.exp().float() * super().scores(pairs)


class HpsScore(ClipScore):
    """`hps`: what people prefer, by HPSv2 or HPSv2.1 (arXiv:2306.09341). Raw cosine, about 0.2..0.35; tables print it times 100.

    `model` is a folder that `python -m diptych.rewards.scorers.open_clip` wrote. Scores of the two versions do not compare, so the version
    must be named and be that of the folder.
    """

    name = "hps"
    raw_range = "cosine, about 0.2..0.35"
    options: HpsOptions
    options_class = HpsOptions

    def load(self) -> None:
        folder = self.checkpoint()
        found, asked = read_config(folder).get("hps_version"), self.options.version
        if found != asked:
            held = "no converted HPS model" if found is None else f"HPS {found}"
            raise ValueError(
                f"hps: {folder} holds {held}, but version={asked} was asked for. Convert the published file: "
                " python -m diptych.rewards.scorers.open_clip HPS_v2.1_compressed.pt FOLDER --version v2.1"
            )
        super().load()

    def load_images(self, folder: Path) -> None:
        """Nothing to load: the package's preprocessing is not CLIP's."""

    def pixel_values(self, pictures: list[PIL.Image.Image]) -> Tensor:
        return torch.stack([letterbox(picture, self.model.config.vision_config.image_size) for picture in pictures])


def letterbox(picture: PIL.Image.Image, side: int) -> Tensor:
    """(3, side, side): the long side becomes `side` (bicubic, antialiased), the rest is black, then CLIP's normalization.

    Source: image_transform(resize_longest_max=True) in HPSv2, which resizes tensors, with torchvision 0.17 or newer.
    """
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255  # (3, H, W)
    scale = side / max(picture.size)
    if scale != 1:
        height, width = (max(1, round(length * scale)) for length in pixels.shape[1:])
        pixels = interpolate(pixels[None], (height, width), mode="bicubic", antialias=True)[0]
    left, top = (side - pixels.shape[2]) // 2, (side - pixels.shape[1]) // 2
    pixels = pad(pixels, (left, side - pixels.shape[2] - left, top, side - pixels.shape[1] - top))
    return (pixels - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


def read_config(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"no checkpoint in {folder}: config.json is missing or not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{folder / 'config.json'} holds a {type(found).__name__}; an object is needed")
    return found


def check_type(folder: Path, allowed: tuple[str, ...]) -> str:
    """The checkpoint's model_type. Raises ValueError unless it is one of those allowed."""
    kind = read_config(folder).get("model_type")
    if kind not in allowed:
        raise ValueError(f"{folder / 'config.json'} has model_type {kind!r}; allowed here is {' or '.join(allowed)}")
    return kind


def load_processor(folder: Path) -> Any:
    """The image processor that lies with a model, the one on PIL: the same pixels with and without torchvision."""
    try:
        return AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    except Exception as error:
        raise ValueError(
            f"{folder} has no image processor that can be loaded: {str(error)[:200]}. Copy preprocessor_config.json there from the model's "
            "own repository"
        ) from error


def load_words(folder: Path, needed: int) -> Any:
    """CLIP's tokenizer of `needed` words. Raises ValueError for another number: without files transformers makes one of two words."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ValueError(f"{folder} has no tokenizer that can be loaded: {str(error)[:200]}") from error
    if len(tokenizer) != needed:
        raise ValueError(
            f"the tokenizer in {folder} has {len(tokenizer)} words, but the model has {needed}; they do not belong together. "
            "Copy the files of the model's own tokenizer there (tokenizer.json, or vocab.json and merges.txt)"
        )
    return tokenizer
