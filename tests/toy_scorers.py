"""A CLIP model with random weights and a vocabulary of letters, as a folder that transformers opens."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

LETTERS = "abcdefghijklmnopqrstuvwx"


def write_tokenizer(folder: Path) -> Path:
    """50 words: a letter each, the same letter at the end of a word, start and end."""
    words = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[]).save_pretrained(folder)
    return folder


def write_clip(folder: Path, seed: int = 0) -> Path:
    """Random weights; attention dropout 0.5, so that training mode would show."""
    torch.manual_seed(seed)
    both = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "attention_dropout": 0.5}
    text = both | {"vocab_size": 50, "max_position_embeddings": 12, "bos_token_id": 48, "eos_token_id": 49, "pad_token_id": 49}
    vision = both | {"image_size": 32, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16, logit_scale_init_value=1.5))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    model.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return write_tokenizer(folder)
