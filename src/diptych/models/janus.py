"""Janus and Janus-Pro: two heads and two embeddings around one Llama; prompt pictures are SigLIP features, drawn ones VQ codes.

arXiv:2501.17811. Stock class: `JanusForConditionalGeneration`. A folder is in transformers' layout or in DeepSeek's own
(`models/janus_config.py`, `models/janus_weights.py`), and is written in the one that it was read in.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import JanusForConditionalGeneration
from transformers.models.janus.processing_janus import DEFAULT_SYSTEM_PROMPT

from diptych.config import ImageSampling, SamplingParams
from diptych.document import Image
from diptych.models import janus_config, janus_weights
from diptych.models.base import check_image_size
from diptych.models.hf import HFModel, load_weights
from diptych.models.image_spec import ImageSpec
from diptych.models.pixels import full_precision, square, to_pixels
from diptych.pictures import to_rgb
from diptych.tokens import TokenRow

BEGIN, END, PLACEHOLDER, PAD = janus_config.TAGS.values()
# Kept in full precision under 4 bits: small, or what draws.
_NOT_IN_4BIT = ["vision_model", "aligner", "vqmodel", "generation_embeddings", "generation_aligner", "generation_head", "lm_head"]


def chat_template(marker: str, user: str, assistant: str) -> str:
    """As DeepSeek's code writes a conversation: stripped, and an empty message is its role alone. Jinja drops a newline right after a
    block, so those of the template are written as expressions."""
    return (
        "{% for m in messages %}{% set said = namespace(text='') %}{% for c in m['content'] %}{% if c['type'] == 'image' %}"
        "{% set said.text = said.text + '" + marker + "\\n' %}{% else %}{% set said.text = said.text + c['text'] | trim %}{% endif %}"
        "{% endfor %}" + user + ":{{ ' ' + said.text | trim + '\\n\\n' if said.text | trim }}{% endfor %}" + assistant + ":"
    )


class JanusModel(HFModel):
    family = "janus"
    hf_class = JanusForConditionalGeneration
    image_marker = PLACEHOLDER
    default_template = chat_template(PLACEHOLDER, *janus_config.ROLES["deepseek"])
    default_sampling = SamplingParams(image=ImageSampling(guidance_scale=5.0))

    def __init__(self, hf: Any, tokenizer: Any, image_processor: Any, folder: Path) -> None:
        super().__init__(hf, tokenizer, image_processor, folder)
        vision, vq = hf.config.vision_config, hf.config.vq_config
        self.deepseek = janus_weights.DeepSeekFiles.of(folder)
        tags = self.deepseek.tags if self.deepseek else janus_config.TAGS
        grid = vq.num_patches
        self.image_spec = ImageSpec.plain(
            num_positions=grid**2,
            depth=1,
            codebook_size=vq.num_embeddings,
            pixel_size=grid * 2 ** (len(vq.channel_multiplier) - 1),
            begin_id=self.token_id(tags["image_start_tag"]),
            end_id=self.token_id(tags["image_end_tag"]),
        )
        self.num_features = int(vision.num_image_tokens)
        # by name first, as DeepSeek's code
        pads = (self.vocabulary.get(tags["pad_tag"]), hf.generation_config.pad_token_id, tokenizer.pad_token_id)
        pad = next((i for i in pads if i is not None), None)
        if pad is None:
            raise ValueError(f"{folder} names no pad token, of which Janus makes its unconditional prompt; use the release's files")
        self._pad = int(pad)
        self.image_marker = tags["image_tag"]
        placeholder = self.token_id(self.image_marker)
        if self.deepseek is None:
            processor = json.loads(self.side_files.get("processor_config.json", b"{}"))
            self.system_prompt = DEFAULT_SYSTEM_PROMPT if processor.get("use_default_system_prompt") else ""
        else:
            self.system_prompt = self.deepseek.system_prompt
            hf.config.image_token_id = placeholder
            hf.generation_config = janus_config.generation_config(tokenizer, self._pad)
            if self.template == self.default_template:
                self.template = chat_template(self.image_marker, *self.deepseek.roles)
        self.freeze()

    # --- tensors ---
    def embed_codes(self, codes: Tensor) -> Tensor:
        return self.hf.prepare_embeddings_for_image_generation(codes[:, 0])

    def prompt_image_embeds(self, pixels: Tensor) -> Tensor:
        return self.hf.model.get_image_features(pixels, return_dict=True).pooler_output

    def image_logits(self, hidden: Tensor, codes: Tensor) -> Tensor:
        return self.hf.model.generation_head(hidden)[:, None]

    def image_step(self, hidden: Tensor, code_prefix: Tensor) -> Tensor:
        return self.hf.model.generation_head(hidden)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """The nearest row of the codebook by direction, the first of equals, as DeepSeek's tokenizer finds it; transformers' `encode`
        counts lengths too and finds others. In float32 whatever the weights' type: in less, rounding decides close calls."""
        vq = self.hf.model.vqmodel
        with full_precision(pixels.device):
            latents = _in_float32(vq.quant_conv, _in_float32(vq.encoder, pixels.float()))  # (N, C, s, s)
            vectors = F.normalize(latents.flatten(2).transpose(1, 2), dim=-1)  # (N, positions, C)
            rows = F.normalize(vq.quantize.embedding.weight.float(), dim=-1)  # (K, C)
            distances = rows.square().sum(1) - 2 * vectors @ rows.T  # (N, positions, K), less what all codes share
            return distances.argmin(-1, keepdim=True)

    @torch.no_grad()
    def decode_codes(self, codes: Tensor) -> Tensor:
        return self.hf.model.vqmodel.decode(codes[..., 0])

    # --- words and pictures ---
    def unconditional_prompt(self, prompt_length: int) -> list[int]:
        """Every token of the prompt but its first replaced by padding, as DeepSeek's code does: positions stay what they were.
        transformers' `generate` keeps the begin tokens of the prompt's pictures too."""
        return [self.bos_id] + [self._pad] * (prompt_length - 1)

    def begin_prompt(self, rendered: str, num_images: int) -> str:
        """As the release was trained: with its system prompt where pictures are read, without it where one is only drawn. The begin
        token stands first and once, whether or not the template writes one."""
        bos = self.tokenizer.bos_token
        return bos + (self.system_prompt if num_images else "") + rendered.replace(bos, "")

    def target_pixels(self, image: PIL.Image.Image) -> Tensor:
        return to_pixels([square(to_rgb(image))], self.image_spec.pixel_size)[0]

    def processed(self, image: PIL.Image.Image) -> Tensor:
        """(3, S, S) float32. Sides are cut off to whole pixels, as in DeepSeek's code. The stock processor, which does the rest here,
        rounds them, and a side that is one pixel longer changes all of the picture."""
        settings, rgb = self.image_processor, to_rgb(image)
        size = settings.size["height"]
        width, height = (max(int(side / max(rgb.size) * size), settings.min_size) for side in rgb.size)
        canvas = PIL.Image.new("RGB", (size, size), settings.background_color)
        resized = rgb.resize((width, height), PIL.Image.Resampling.BICUBIC)
        canvas.paste(resized, ((size - width) // 2, (size - height) // 2))
        return super().processed(canvas)

    def stand_in_row(self) -> TokenRow:
        return self._features_row(torch.zeros(3, 1, 1))

    def prompt_image_row(self, image: Image) -> TokenRow:
        """SigLIP features between the image tokens; a picture that has codes only is decoded first."""
        pixels = image.pixels
        if pixels is None:
            assert image.codes is not None
            pixels = self.to_pictures(image.codes[None])[0]
        return self._features_row(self.processed(pixels))

    def _features_row(self, pixels: Tensor) -> TokenRow:
        spec = self.image_spec
        begin, end = TokenRow.text([spec.begin_id], spec.depth), TokenRow.text([spec.end_id], spec.depth)
        return TokenRow.concat([begin, TokenRow.feature(pixels, self.num_features, spec.depth), end])

    # --- files and training ---
    @property
    def language_model(self) -> nn.Module:
        return self.hf.model.language_model

    def frozen_modules(self) -> list[nn.Module]:
        """The order is part of the name that `code_cache` gives its folder (`tokenizer_hash`). It was the other way round while codes were
        those of transformers' `encode`, which must not be found again."""
        return [self.hf.model.vqmodel, self.hf.model.vision_model]

    def write_weights(self, folder: Path) -> None:
        if self.deepseek is None:
            super().write_weights(folder)
        else:
            self.deepseek.save(self.hf, folder)

    @classmethod
    def stock_config(cls, folder: Path) -> Any:
        return janus_config.stock_config(folder) if janus_config.is_deepseek(folder) else super().stock_config(folder)

    @classmethod
    def stock_model(cls, folder: Path, **options: Any) -> Any:
        if not janus_config.is_deepseek(folder):
            return super().stock_model(folder, **options)
        config, stored = cls.stock_config(folder), janus_weights.stored_tensors(folder)
        if options["dtype"] == "auto":  # as they are, whatever config.json says
            tensor = stored.get(janus_weights.EMBEDDING) or next(iter(stored.values()), None)
            options["dtype"] = tensor.dtype if tensor else torch.float32
        weights = janus_weights.in_stock_names(stored)
        return load_weights(cls.hf_class, folder, janus_weights.deepseek_name, config=config, state_dict=weights, **options)

    @classmethod
    def check_tokenizer(cls, tokenizer: Any, folder: Path) -> None:
        super().check_tokenizer(tokenizer, folder)
        if janus_config.is_deepseek(folder):
            janus_config.add_image_tag(tokenizer, folder)

    @classmethod
    def read_image_processor(cls, folder: Path) -> Any:
        deepseek = janus_config.is_deepseek(folder)
        return janus_config.image_processor(folder) if deepseek else super().read_image_processor(folder)

    @classmethod
    def load(
        cls, folder: Path, *, dtype: torch.dtype | None = None, load_in_4bit: bool = False, image_size: int | None = None
    ) -> JanusModel:
        hf, tokenizer = cls.load_parts(folder, dtype, load_in_4bit, _NOT_IN_4BIT)
        # JanusConfig's default is a tied head; the releases' are not, and a config.json that leaves it open must not say so when saved
        hf.config.tie_word_embeddings = hf.lm_head.weight is hf.get_input_embeddings().weight
        model = cls(hf, tokenizer, cls.read_image_processor(folder), folder)
        if model.deepseek is not None:
            model.deepseek.read_unused(folder)
        check_image_size(image_size, model.image_spec.pixel_size, cls.family)
        return model


def _in_float32(module: nn.Module, inputs: Tensor) -> Tensor:
    """Its output with weights cast for this call alone: nothing is kept, saved or hashed twice."""
    return torch.func.functional_call(module, {name: value.float() for name, value in module.state_dict().items()}, (inputs,))
