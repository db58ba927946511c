"""A small transformer that reads text and pictures: the body of the packaged learned rewards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from diptych.document import Document, Text
from diptych.models.pixels import to_pixels


class Critic(nn.Module):
    """What a packaged learned reward has on disk: weights, its tokenizer, and the `settings` that it is made with."""

    tokenizer: Tokenizer
    settings: dict[str, int]

    def save(self, folder: Path, measures: dict[str, float] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({**self.settings, "measures": measures or {}}, indent=1) + "\n")
        self.tokenizer.save(str(folder / "tokenizer.json"))
        save_file(self.state_dict(), folder / "model.safetensors")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Raises ValueError where the folder is missing or damaged."""
        try:
            settings = json.loads((folder / "config.json").read_text())
            settings.pop("measures", None)
            model = cls(Tokenizer.from_file(str(folder / "tokenizer.json")), **settings)
            model.load_state_dict(load_file(folder / "model.safetensors"))
        except Exception as error:
            raise ValueError(f"cannot load the reward model in {folder}: {str(error)[:300]}") from error
        return model.eval().requires_grad_(False)


class DocumentEncoder(Critic):
    """Words and 32 x 32 picture patches through a causal transformer; every segment ends in a read-out state.

    `head_size` outputs are read at the end of each segment.
    """

    def __init__(self, tokenizer: Tokenizer, head_size: int, width: int = 128, layers: int = 3, pixel_size: int = 96) -> None:
        super().__init__()
        self.tokenizer, self.patch, self.pixel_size = tokenizer, 32, pixel_size
        self.settings = {"head_size": head_size, "width": width, "layers": layers, "pixel_size": pixel_size}
        vocab = tokenizer.get_vocab_size()
        self.end_id = vocab  # one more word: the end of a segment
        self.words = nn.Embedding(vocab + 1, width)
        self.patches = nn.Sequential(nn.Linear(3 * self.patch**2, width), nn.SiLU(), nn.Linear(width, width))
        self.body = LlamaModel(
            LlamaConfig(
                vocab_size=1,
                hidden_size=width,
                intermediate_size=3 * width,
                num_hidden_layers=layers,
                pad_token_id=None,
                bos_token_id=None,
                eos_token_id=None,
                num_attention_heads=4,
                max_position_embeddings=1024,
            )
        )
        self.head = nn.Linear(width, head_size)
        self.scale = nn.Parameter(torch.tensor([10.0, -5.0]))  # of logits, where the head gives embeddings

    def forward(self, documents: Sequence[Document]) -> list[Tensor]:
        """For each document the head's outputs at the ends of its segments, (num_segments, head_size)."""
        outputs, _, ends = self.every_token(documents)
        return [outputs[i, stops] for i, stops in enumerate(ends)]

    def every_token(self, documents: Sequence[Document]) -> tuple[Tensor, Tensor, list[list[int]]]:
        """Outputs (B, T, head_size) at every token, which of them are real (B, T), and where segments end."""
        ids, ends, pictures = [], [], []
        per_picture = (self.pixel_size // self.patch) ** 2
        for document in documents:
            row: list[int] = []
            stops: list[int] = []
            for segment in document:
                if isinstance(segment, Text):
                    row += self.tokenizer.encode(segment.text, add_special_tokens=False).ids
                else:
                    assert segment.pixels is not None
                    pictures.append(segment.pixels)
                    row += [-1] * per_picture
                row.append(self.end_id)
                stops.append(len(row) - 1)
            ids.append(torch.tensor(row or [self.end_id]))
            ends.append(stops)
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-2)  # (B, T)
        embeds = self.words(padded.clamp(min=0))
        if pictures:
            embeds = embeds.masked_scatter((padded == -1)[..., None], self._embed_patches(pictures).flatten())
        real = padded != -2
        hidden = self.body(inputs_embeds=embeds, attention_mask=real).last_hidden_state
        return self.head(hidden), real, ends

    def _embed_patches(self, pictures: list) -> Tensor:
        pixels = to_pixels(pictures, self.pixel_size)  # (N, 3, S, S)
        tiles = nn.functional.unfold(pixels, self.patch, stride=self.patch).transpose(1, 2)  # (N, 9, 3072)
        return self.patches(tiles)
