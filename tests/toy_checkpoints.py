"""Toy checkpoints with random weights of the families that transformers implements, in the files and layout of the released ones.

Run as a program: `python tests/toy_checkpoints.py FAMILY FOLDER`.
"""

from __future__ import annotations

import argparse
import base64
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    ChameleonProcessor,
    Emu3Config,
    Emu3ForConditionalGeneration,
    Emu3ImageProcessor,
    Emu3Processor,
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3ForCausalLM,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from diptych.models.emu3_5 import config as emu3_5_config
from diptych.models.emu3_5 import tokenizer as emu3_5_words
from diptych.models.emu3_5.checkpoint import VISION_FOLDER, save_language_model, save_vision
from diptych.models.emu3_5.vision import VisionTokenizer
from diptych.models.vila_u.config import DecoderConfig
from diptych.models.vila_u.decoder import PixelDecoder

VILA_U = Path(__file__).parent / "data" / "vila_u" / "toy_checkpoint"
CODES, GRID, PIXELS = 64, 4, 32
WORDS = " the| and| red| blue| green| ball| box| is| in| on| of| to| picture| small| big| then| moves|left|right|ing"
TEXT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}  # fmt: skip
CODEC: dict[str, Any] = {"base_channels": 32, "channel_multiplier": [1, 1, 1, 1], "num_res_blocks": 1}  # 32 groups: channels by 32

JANUS_TEMPLATE = """\
{%- for message in messages -%}
  {%- set user = message['role'] == 'user' -%}
  {{- '<|User|>: ' if user else '<|Assistant|>: ' -}}
  {%- for block in message['content'] -%}
    {%- if block['type'] == 'image' -%}
      {{- ('' if loop.first else '\\n') + '<image_placeholder>' + ('' if loop.last else '\\n') -}}
    {%- else -%}
      {%- set text = block['text'].lstrip() if loop.first else block['text'] -%}
      {{- ' ' if loop.previtem is defined and loop.previtem['type'] == 'text' -}}
      {{- text.rstrip() if loop.last else text -}}
    {%- endif -%}
  {%- endfor -%}
  {%- if add_generation_prompt or not loop.last -%}{{- '\\n\\n' if user else '<｜end▁of▁sentence｜>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|Assistant|>:' -}}{%- endif -%}
"""
EMU3_TEMPLATE = """\
{%- for message in messages -%}
  {%- if message['role'] != 'system' -%}{{- message['role'].upper() + ': ' -}}{%- endif -%}
  {%- for block in message['content'] if block['type'] == 'image' -%}{{- '<image>' -}}{%- endfor -%}
  {%- for block in message['content'] if block['type'] == 'text' -%}{{- block['text'] + ' ' -}}{%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""


# --- tokenizers ---
def byte_level() -> tuple[list[str], list[tuple[str, str]]]:
    """Tokens and merges of a byte-level BPE: every byte, and the words of WORDS built up from the left."""
    merges: list[tuple[str, str]] = []
    for word in WORDS.replace(" ", "Ġ").split("|"):
        merges += [pair for n in range(1, len(word)) if (pair := (word[:n], word[n])) not in merges]
    return [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)], merges


def make_tokenizer(before: Sequence[str] = (), after: Sequence[str] = (), **named: Any) -> PreTrainedTokenizerFast:
    """Special tokens `before` and `after` the text's; `named` are bos_token and the like."""
    tokens, merges = byte_level()
    vocabulary = {token: i for i, token in enumerate([*before, *tokens, *after])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*before, *after)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, model_max_length=TEXT["max_position_embeddings"], **named
    )


# --- weights ---
@torch.no_grad()
def randomise(module: nn.Module, seed: int) -> None:
    """Every parameter and running statistic anew: norms near 1, no bias 0, embeddings and heads large enough for peaked softmaxes."""
    source = torch.Generator().manual_seed(seed)
    for name, part in module.named_modules():
        is_norm = "Norm" in type(part).__name__
        for key, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            noise = torch.randn(tensor.shape, generator=source)
            if key == "running_var":
                value = noise.mul(0.2).exp()
            elif not isinstance(tensor, nn.Parameter) and key != "running_mean":
                continue
            elif key == "weight" and is_norm:
                value = 1 + 0.2 * noise
            elif tensor.dim() == 1 or is_norm:
                value = 0.2 * noise
            elif isinstance(part, nn.Embedding):
                value = noise * (0.5 if "quantize" in name else 1.0)
            else:
                gain = 2.5 if name.endswith(("lm_head", "vision_head")) or tensor.dim() == 5 else 1.0  # 5: Emu3's convolutions over time
                value = noise * gain / tensor[0].numel() ** 0.5
            tensor.copy_(value)


def build(cls: type[PreTrainedModel], config: Any, seed: int, raised_rows: Sequence[int], raise_by: float) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):  # transformers draws initial weights too
        model = cls(config)
    randomise(model, seed)
    with torch.no_grad():
        model.lm_head.weight[list(raised_rows)] *= raise_by
    return model.eval()


def save(folder: Path, model: PreTrainedModel, processor: Any, generation: dict[str, Any], shards: bool, dtype: torch.dtype) -> Path:
    """As the released repositories are laid out: picture settings in their own file, not inside processor_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(**generation)
    model.to(dtype).save_pretrained(folder, max_shard_size="500KB" if shards else "1GB")
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    edit_json(folder / "processor_config.json", lambda settings: settings.pop("image_processor"))
    return folder


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


# --- families ---
def make_janus(folder: Path, *, seed: int = 0, shards: bool = False, dtype: torch.dtype = torch.float32, raise_by: float = 4.0) -> Path:
    """Codes are no tokens here: they have their own embeddings and head. There are more embedding rows than tokens.

    `raise_by`: factor on the head's rows of begin-of-image and end-of-sequence, so that sampled documents have pictures and end.
    """
    boi, eoi, image = "<begin_of_image>", "<end_of_image>", "<image_placeholder>"
    bos, eos, pad = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
    tokenizer = make_tokenizer(
        after=[bos, eos, pad, boi, "<|User|>", "<|Assistant|>", image, eoi],
        bos_token=bos, eos_token=eos, pad_token=pad, add_bos_token=True,
        extra_special_tokens={"image_token": image, "boi_token": boi, "eoi_token": eoi},
    )  # fmt: skip
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = JanusConfig(
        text_config={"model_type": "llama", "vocab_size": len(tokenizer) + 12, "rms_norm_eps": 1e-6, **TEXT, **ids},
        vision_config={
            "image_size": PIXELS, "patch_size": PIXELS // GRID, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_image_tokens": GRID**2, "projection_dim": TEXT["hidden_size"], "depth": 2,
        },
        vq_config={
            **CODEC, "num_embeddings": CODES, "embed_dim": 8, "latent_channels": 16, "num_patches": GRID,
            "image_token_embed_dim": TEXT["hidden_size"], "projection_dim": TEXT["hidden_size"],
        },
        image_token_id=tokenizer.image_token_id,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = build(JanusForConditionalGeneration, config, seed, [tokenizer.boi_token_id, tokenizer.eos_token_id], raise_by)
    processor = JanusProcessor(
        JanusImageProcessorPil(size={"height": PIXELS, "width": PIXELS}, image_mean=[0.5] * 3, image_std=[0.5] * 3),
        tokenizer, chat_template=JANUS_TEMPLATE, use_default_system_prompt=True, num_image_tokens=GRID**2,
    )  # fmt: skip
    generation = {"guidance_scale": 5, "generation_kwargs": {"boi_token_id": tokenizer.boi_token_id}, **ids}
    return save(folder, model, processor, generation, shards, dtype)


def make_emu3(folder: Path, *, seed: int = 0, shards: bool = False, dtype: torch.dtype = torch.float32, raise_by: float = 4.0) -> Path:
    """The codec shrinks by 8, as the processor takes for granted: a picture of 32 pixels is 4 rows of 4 codes and an end of row."""
    boi, eoi, wrapper, image = "<|image start|>", "<|image end|>", "<|image token|>", "<image>"
    bos, eos, pad, eol, eof = "<|extra_203|>", "<|extra_204|>", "<|endoftext|>", "<|extra_200|>", "<|extra_201|>"
    tokenizer = make_tokenizer(
        after=[pad, image, eol, eof, "<|extra_202|>", bos, eos, boi, eoi, wrapper, *(f"<|visual token {i:06d}|>" for i in range(CODES))],
        bos_token=bos, eos_token=eos, pad_token=pad, unk_token=pad,
        extra_special_tokens={
            "image_token": image, "boi_token": boi, "eoi_token": eoi, "image_wrapper_token": wrapper, "eof_token": eof,
        },
    )  # fmt: skip
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Emu3Config(
        text_config={"vocab_size": len(tokenizer), "num_key_value_heads": 2, **TEXT, **ids},
        vq_config={
            **CODEC, "codebook_size": CODES, "embed_dim": 4, "latent_channels": 4, "attn_resolutions": [3],
            "hidden_size": CODEC["base_channels"] * CODEC["channel_multiplier"][-1],
        },
        vocabulary_map=tokenizer.get_vocab(),
        tie_word_embeddings=False,
    )  # fmt: skip
    model = build(Emu3ForConditionalGeneration, config, seed, [tokenizer.boi_token_id, tokenizer.eos_token_id], raise_by)
    image_processor = Emu3ImageProcessor(min_pixels=PIXELS**2, max_pixels=PIXELS**2)
    save(folder, model, Emu3Processor(image_processor, tokenizer, chat_template=EMU3_TEMPLATE), ids, shards, dtype)
    edit_json(folder / "tokenizer_config.json", lambda settings: settings.update(tokenizer_class="GPT2Tokenizer"))
    return folder


def make_chameleon(
    folder: Path, *, seed: int = 0, shards: bool = False, dtype: torch.dtype = torch.float32, raise_by: float = 4.0,
    swin_norm: bool = False, decoder: bool = True,
) -> Path:  # fmt: skip
    """Ids of codes are contiguous but not in order. `decoder`: the picture decoder that the hub's repository lacks, as vqgan.ckpt."""
    boi, eoi, sep, image = "<racm3:break>", "<eoss>", "<reserved08706>", "<image>"
    order = torch.randperm(CODES, generator=torch.Generator().manual_seed(seed)).tolist()
    codes = ["IMGIMG" + "".join(chr(ord("A") + int(digit)) for digit in str(code)) + "Z" for code in order]
    reserved = [f"<reserved{number:05d}>" for number in range(8194, 8198)]
    tokenizer = make_tokenizer(
        before=["<s>", "<pad>", "</s>", "<unk>", *codes, eoi, boi, *reserved, sep, image],
        bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>", sep_token=sep, add_bos_token=True,
        extra_special_tokens={"image_token": image, "boi_token": boi, "eoi_token": eoi},
    )  # fmt: skip
    config = ChameleonConfig(  # as released, with bos_token_id 1 and no pad_token_id, which is not what the tokenizer says
        vocab_size=len(tokenizer),
        num_key_value_heads=TEXT["num_attention_heads"],
        swin_norm=swin_norm,
        vq_config={
            **CODEC, "channel_multiplier": [1, 1, 1, 2], "num_embeddings": CODES, "embed_dim": 8, "latent_channels": 16,
            "resolution": PIXELS,
        },
        vocabulary_map=tokenizer.get_vocab(),
        **TEXT,
    )  # fmt: skip
    model = build(ChameleonForConditionalGeneration, config, seed, [tokenizer.boi_token_id, tokenizer.eos_token_id], raise_by)
    size = {"height": PIXELS, "width": PIXELS}
    processor = ChameleonProcessor(
        ChameleonImageProcessorPil(size={"shortest_edge": PIXELS}, crop_size=size), tokenizer, image_seq_length=GRID**2
    )
    save(folder, model, processor, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 1}, shards, dtype)
    if decoder:
        torch.save({"state_dict": chameleon_decoder(config.vq_config, seed)}, folder / "vqgan.ckpt")
    return folder


def chameleon_decoder(codec: Any, seed: int) -> dict[str, torch.Tensor]:
    """`decoder.*` and `post_quant_conv.*` under the names of VQGAN (arXiv:2012.09841), which are those of Meta's release."""
    with torch.random.fork_rng(devices=[]):
        parts = nn.ModuleDict(
            {
                "post_quant_conv": nn.Conv2d(codec.embed_dim, codec.latent_channels, 1),
                "decoder": PixelDecoder(
                    DecoderConfig(
                        ch=codec.base_channels, ch_mult=codec.channel_multiplier, num_res_blocks=codec.num_res_blocks,
                        attn_resolutions=(), resolution=codec.resolution, z_channels=codec.latent_channels,
                    )
                ),
            }
        )  # fmt: skip
    randomise(parts, seed + 1)
    return dict(parts.state_dict())


def make_emu3_5(folder: Path, *, seed: int = 0, shards: bool = False, dtype: torch.dtype = torch.float32, raise_by: float = 5.0) -> Path:
    """The vision tokenizer lies inside. A code covers 8 pixels; pictures of prompts are scaled to the area of drawn ones.

    `raise_by`: nats by which the head prefers to begin a picture and to end. The first number of every embedding is large, so that it is
    a constant in the last state, and the head reads it for these two ids alone.
    """
    bytes_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    ranks = [bytes(bytes_of[letter] for letter in token) for token in byte_level()[0]]
    around = [*emu3_5_words.SPECIAL, *emu3_5_words.AROUND]
    ids = {token: len(ranks) + i for i, token in enumerate(around)}
    named = {
        "pad": emu3_5_words.PAD, "bos": emu3_5_words.BOS, "eos": emu3_5_words.EOS, "img": emu3_5_words.SIZE_END,
        "boi": emu3_5_words.BEGIN, "eoi": emu3_5_words.END, "eol": emu3_5_words.ROW_END,
    }  # fmt: skip
    config = {
        "architectures": ["Emu3ForCausalLM"], "model_type": "Emu3", "attention_dropout": 0.1, "head_dim": 24, "hidden_act": "silu",
        "image_area": PIXELS**2, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 1e6, **TEXT,
        "max_position_embeddings": 1024, "torch_dtype": str(dtype).removeprefix("torch."), "vocab_size": len(ranks) + len(around) + CODES,
        **{f"{name}_token_id": ids[token] for name, token in named.items()},
    }  # fmt: skip
    language = emu3_5_config.LanguageConfig.model_validate(config)
    model: Any = build(Qwen3ForCausalLM, emu3_5_config.stock_config(language), seed, [], 1.0)
    vision_config = {
        "model_type": "Emu3p5VisionVQ", "codebook_size": CODES, "embed_dim": 8, "z_channels": 16, "in_channels": 3, "out_ch": 3,
        "ch": CODEC["base_channels"], "ch_mult": CODEC["channel_multiplier"], "num_res_blocks": CODEC["num_res_blocks"],
        "attn_resolutions": [GRID], "resolution": PIXELS, "dropout": 0.0, "double_z": False,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        vision = VisionTokenizer(emu3_5_config.VisionConfig.model_validate(vision_config))
    randomise(vision, seed + 1)
    with torch.no_grad():
        embedding, norm, head = model.model.embed_tokens.weight, model.model.norm.weight, model.lm_head.weight
        embedding[:, 0], norm[0], head[:, 0] = 16.0, 1.0, 0.0
        head[[ids[emu3_5_words.BEGIN], ids[emu3_5_words.EOS]], 0] = raise_by / 4
    tables = {
        emu3_5_words.RANKS: "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks)),
        emu3_5_words.VISUAL: "".join(
            f"{line}\n" for line in (*emu3_5_words.AROUND, *(f"<|visual token {code:06d}|>" for code in range(CODES)))
        ),
        "generation_config.json": json.dumps({f"{name}_token_id": ids[named[name]] for name in ("bos", "eos", "pad")}, indent=2) + "\n",
        "tokenizer_config.json": json.dumps({"tokenizer_class": "Emu3Tokenizer"}) + "\n",
        "diptych.json": json.dumps({"image_size": PIXELS}),
    }  # fmt: skip
    files = {name: content.encode() for name, content in tables.items()}
    size = "500KB" if shards else "5GB"
    save_language_model(model.to(dtype), (json.dumps(config, indent=2) + "\n").encode(), files, folder, size)
    save_vision(vision, {"config.json": json.dumps(vision_config).encode()}, folder / VISION_FOLDER)
    return folder


def make_vila_u(folder: Path) -> Path:
    return Path(shutil.copytree(VILA_U, folder, dirs_exist_ok=True))


MAKERS: dict[str, Callable[..., Path]] = {
    "janus": make_janus, "emu3": make_emu3, "chameleon": make_chameleon, "vila_u": make_vila_u,
}  # fmt: skip

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=MAKERS)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    print(MAKERS[arguments.family](arguments.folder))
