"""Janus and Janus-Pro: two heads and two embeddings around one Llama; prompt pictures are SigLIP features, drawn ones VQ codes.

arXiv:2501.17811. Stock class: `JanusForConditionalGeneration`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor, nn
from transformers import JanusForConditionalGeneration
from transformers.models.janus.processing_janus import DEFAULT_SYSTEM_PROMPT

from diptych.config import ImageSampling, SamplingParams
from diptych.document import Image, to_rgb
from diptych.models.base import ImageSpec, check_image_size
from diptych.models.hf import HFModel, load_image_processor
from diptych.models.pixels import square, to_images, to_pixels
from diptych.tokens import TokenRow

BEGIN, END, PLACEHOLDER = "<begin_of_image>", "<end_of_image>", "<image_placeholder>"
# Kept in full precision under 4 bits: small, or what draws.
_NOT_IN_4BIT = ["vision_model", "aligner", "vqmodel", "generation_embeddings", "generation_aligner", "generation_head", "lm_head"]


class JanusModel(HFModel):
    family = "janus"
    hf_class = JanusForConditionalGeneration
    image_marker = PLACEHOLDER
    # Jinja drops a newline right after a block, so those of the template are written as expressions
    default_template = (
        "{% for m in messages %}<|User|>: {% for c in m['content'] %}{% if c['type'] == 'image' %}"
        "{{ '" + PLACEHOLDER + "\\n' }}{% else %}{{ c['text'] | trim }}{% endif %}{% endfor %}{{ '\\n\\n' }}{% endfor %}<|Assistant|>:"
    )
    default_sampling = SamplingParams(image=ImageSampling(guidance_scale=5.0))

    def __init__(self, hf: Any, tokenizer: Any, image_processor: Any, folder: Path) -> None:
        super().__init__(hf, tokenizer, image_processor, folder)
        vision, vq = hf.config.vision_config, hf.config.vq_config
        grid = vq.num_patches
        self.image_spec = ImageSpec.plain(
            num_positions=grid**2,
            depth=1,
            codebook_size=vq.num_embeddings,
            pixel_size=grid * 2 ** (len(vq.channel_multiplier) - 1),
            begin_id=self.token_id(BEGIN),
            end_id=self.token_id(END),
        )
        self.num_features = int(vision.num_image_tokens)
        pad = hf.generation_config.pad_token_id if hf.generation_config.pad_token_id is not None else tokenizer.pad_token_id
        if pad is None:
            raise ValueError(f"{folder} names no pad token, of which Janus makes its unconditional prompt; use the release's files")
        self._pad = int(pad)
        processor = json.loads(self.side_files.get("processor_config.json", b"{}"))
        self.system_prompt = DEFAULT_SYSTEM_PROMPT if processor.get("use_default_system_prompt") else ""
        self.token_id(PLACEHOLDER)
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
    def decode_codes(self, codes: Tensor) -> Tensor:
        return self.hf.model.vqmodel.decode(codes[..., 0])

    # --- words and pictures ---
    def unconditional_prompt(self, prompt_length: int) -> list[int]:
        """Every token of the prompt but its first replaced by padding, as `generate` does: positions stay what they were."""
        return [self.bos_id] + [self._pad] * (prompt_length - 1)

    def begin_prompt(self, rendered: str, num_images: int) -> str:
        """As the release was trained: with its system prompt where pictures are read, without it where one is only drawn."""
        return super().begin_prompt(self.system_prompt + rendered if num_images else rendered, num_images)

    def target_pixels(self, image: PIL.Image.Image) -> Tensor:
        return to_pixels([square(to_rgb(image))], self.image_spec.pixel_size)[0]

    def prompt_image_row(self, image: Image) -> TokenRow:
        """SigLIP features between the image tokens; a picture that has codes only is decoded first."""
        spec, pixels = self.image_spec, image.pixels
        if pixels is None:
            assert image.codes is not None
            pixels = to_images(self.decode_codes(image.codes[None].to(self.device)))[0]
        begin, end = TokenRow.text([spec.begin_id], spec.depth), TokenRow.text([spec.end_id], spec.depth)
        return TokenRow.concat([begin, TokenRow.feature(self.processed(pixels), self.num_features, spec.depth), end])

    # --- files and training ---
    @property
    def language_model(self) -> nn.Module:
        return self.hf.model.language_model

    def frozen_modules(self) -> list[nn.Module]:
        return [self.hf.model.vision_model, self.hf.model.vqmodel]

    @classmethod
    def load(
        cls, folder: Path, *, dtype: torch.dtype | None = None, load_in_4bit: bool = False, image_size: int | None = None
    ) -> JanusModel:
        hf, tokenizer = cls.load_parts(folder, dtype, load_in_4bit, _NOT_IN_4BIT)
        model = cls(hf, tokenizer, load_image_processor(folder), folder)
        check_image_size(image_size, model.image_spec.pixel_size, cls.family)
        return model
