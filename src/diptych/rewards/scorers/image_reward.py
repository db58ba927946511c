"""`image_reward`: ImageReward (arXiv:2304.05977), the published checkpoint in transformers' own BLIP classes.

BLIP's ViT-L reads the picture, BERT with cross-attention reads the caption and the picture, five linear layers without anything between
them give one number from its first state. Source: the package image-reward 1.5, which does not run on current transformers.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from diptych.rewards.scorers.base import CLIP_MEAN, CLIP_STD, CaptionOptions, CaptionScorer, Pair, checkpoint_folder

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the network's outputs; the package has the same constants
HEAD_WIDTH = 64  # of one attention head of BLIP's ViT-B and ViT-L
WEIGHTS, SETTINGS = "ImageReward.pt", "med_config.json"
UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\.|blip\.text_encoder\.embeddings\.position_ids$")  # of BLIP's other tasks
RENAMED = (
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision.encoder.layers.\1.layer_norm\2."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision.encoder.layers.\1.self_attn.qkv."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision.encoder.layers.\1.mlp."),
    (r"^blip\.text_encoder\.", "text."),
    (r"^mlp\.layers\.", "head."),
)


class ImageRewardOptions(CaptionOptions):
    """-2 becomes 0 and 2 becomes 1."""

    model: str = "THUDM/ImageReward"
    tokenizer: str | None = Field(
        None, description="folder or hub id of BERT's tokenizer; None: the model's folder, else bert-base-uncased"
    )
    low: float = -2.0
    high: float = 2.0


class Network(nn.Module):
    def __init__(self, vision: BlipVisionConfig, text: BlipTextConfig) -> None:
        super().__init__()
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.head = nn.Sequential(  # dropout has no weights, but it counts in their names
            nn.Linear(text.hidden_size, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64), nn.Dropout(0.1),
            nn.Linear(64, 16), nn.Linear(16, 1),
        )  # fmt: skip

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Pictures (N, 3, S, S), token ids (N, T) and which of them are real (N, T) -> (N,) about standard normal, float32."""
        seen = self.vision(pixel_values=pixels).last_hidden_state  # (N, 1 + patches, H)
        read = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state  # (N, T, H)
        return (self.head(read[:, 0].float())[:, 0] - MEAN) / STD


class ImageReward(CaptionScorer):
    """`image_reward`: what people prefer, given the caption. Raw about standard normal, most in -2..2. Reads 35 tokens and the
    centred square of the picture at 224 pixels."""

    name = "image_reward"
    max_tokens = 35
    raw_range = "about standard normal, most in -2..2"
    options: ImageRewardOptions
    options_class: ClassVar[type[CaptionOptions]] = ImageRewardOptions

    def load(self) -> None:
        folder = self.checkpoint((WEIGHTS, SETTINGS))
        self.network = load_network(folder)
        self.network.to(self.device)
        for part in (self.network.vision, self.network.text):  # the head stays in float32, as in the package
            nn.Module.to(part, self.dtype)
        self.side = int(self.network.vision.config.image_size)  # type: ignore[arg-type]
        self.tokenizer = load_tokenizer(self.options.tokenizer, folder)
        words, needed = len(self.tokenizer), self.network.text.config.vocab_size
        if words != needed:
            raise ValueError(
                f"BERT's tokenizer with [DEC] and [ENC] has {words} words, but the checkpoint has {needed}; give its own with `tokenizer`"
            )

    def scores(self, pairs: list[Pair]) -> Tensor:
        ids, mask = self.token_ids(self.tokenizer, [caption for caption, _ in pairs], self.max_tokens)
        pixels = torch.stack([preprocess(picture, self.side) for _, picture in pairs]).to(self.device, self.dtype)
        return self.network(pixels, ids, mask)


def preprocess(picture: PIL.Image.Image, side: int) -> Tensor:
    """(3, side, side): the short side becomes `side` (bicubic), the middle is cut out, CLIP's normalization. As torchvision rounds."""
    short, width, height = min(picture.size), *picture.size
    if short != side:
        width, height = (side if length == short else int(side * length / short) for length in picture.size)
        picture = picture.resize((width, height), PIL.Image.Resampling.BICUBIC)
    left, top = round((width - side) / 2), round((height - side) / 2)
    pixels = torch.from_numpy(np.array(picture.crop((left, top, left + side, top + side)))).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


def load_tokenizer(source: str | None, folder: Path) -> Any:
    """BERT's tokenizer with the two words that BLIP adds. Raises ValueError where there is none."""
    own = any((folder / name).is_file() for name in ("vocab.txt", "tokenizer.json"))
    place = folder if source is None and own else checkpoint_folder(source or "google-bert/bert-base-uncased", patterns=("*.json", "*.txt"))
    try:
        tokenizer = BertTokenizer.from_pretrained(place, local_files_only=True)
    except Exception as error:
        raise ValueError(f"cannot load BERT's tokenizer from {place}: {str(error)[:200]}") from error
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    return tokenizer


def load_network(folder: Path) -> Network:
    """The network of a folder with ImageReward.pt and med_config.json, in float32, eval mode and without gradients.

    Raises ValueError where a file is missing or damaged, and for any weight that is missing, unknown or of another shape.
    """
    try:
        med = json.loads((folder / SETTINGS).read_text())
        state = torch.load(folder / WEIGHTS, map_location="cpu", weights_only=True)
        state = renamed(state)
        vision, text = configs(state, med)
    except Exception as error:
        raise ValueError(
            f"cannot read ImageReward from {folder} ({WEIGHTS}, {SETTINGS}): {type(error).__name__}: {str(error)[:300]}"
        ) from error
    network = Network(vision, text)
    try:
        network.load_state_dict({name: value.float() for name, value in state.items()})
    except RuntimeError as error:
        raise ValueError(f"{folder / WEIGHTS} does not fit {SETTINGS}: {str(error)[:600]}") from error
    return network.eval().requires_grad_(False)


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The package's names of weights to ours, without those that this task does not use. Raises ValueError for an unknown name."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if UNUSED.match(name):
            continue
        for pattern, ours in RENAMED:
            if re.match(pattern, name):
                found[re.sub(pattern, ours, name)] = value
                break
        else:
            raise ValueError(
                f"unknown weight {name!r}; an ImageReward checkpoint has blip.visual_encoder, blip.text_encoder and mlp.layers"
            )
    return found


def configs(state: dict[str, Tensor], med: dict[str, Any]) -> tuple[BlipVisionConfig, BlipTextConfig]:
    """Sizes of the vision part from the shapes of its weights, of the text part from med_config.json."""
    _, positions, width = state["vision.embeddings.position_embedding"].shape
    patch = state["vision.embeddings.patch_embedding.weight"].shape[-1]
    layers = {name.split(".")[3] for name in state if name.startswith("vision.encoder.layers.")}
    vision = BlipVisionConfig(
        hidden_size=width, intermediate_size=state["vision.encoder.layers.0.mlp.fc1.weight"].shape[0], num_hidden_layers=len(layers),
        num_attention_heads=width // HEAD_WIDTH, image_size=round((positions - 1) ** 0.5) * patch, patch_size=patch,
        hidden_act="gelu", layer_norm_eps=1e-6,  # timm's, not the 1e-5 of BLIP in transformers
    )  # fmt: skip
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "hidden_act",
            "layer_norm_eps", "vocab_size", "pad_token_id")  # fmt: skip
    text = BlipTextConfig(
        **{name: med[name] for name in same}, encoder_hidden_size=width, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    return vision, text
