"""Emu3: one vocabulary for text and image codes; a grid states its size first and marks the end of each row.

arXiv:2409.18869. Stock class: `Emu3ForConditionalGeneration`. An image in the sequence, W codes to each of H rows:

    <|image start|> "H*W" <|image token|>  code * W <|extra_200|>  ... (H times)  <|extra_201|> <|image end|>

The model chooses `<|image start|>` and the codes; everything else is forced.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from transformers import Emu3ForConditionalGeneration

from diptych.config import ImageSampling, SamplingParams
from diptych.document import Document, Image
from diptych.models.hf import OneVocabularyModel, load_image_processor
from diptych.models.image_spec import CODE, ImageSpec
from diptych.models.options_file import OPTIONS_FILE, parse_options
from diptych.models.pixels import square, to_pixels
from diptych.pictures import to_rgb
from diptych.tokens import AnswerForm, TokenRow

BEGIN, SIZE_END, ROW_END, CODES_END, END = "<|image start|>", "<|image token|>", "<|extra_200|>", "<|extra_201|>", "<|image end|>"
PLACEHOLDER = "<image>"
DEFAULT_IMAGE_SIZE = 720  # the release draws 90 x 90 codes of 8 pixels


class Options(BaseModel):
    """What `diptych.json` beside the weights may hold."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_size: int = DEFAULT_IMAGE_SIZE
    negative_prompt: str = ""


class Emu3Model(OneVocabularyModel):
    family = "emu3"
    hf_class = Emu3ForConditionalGeneration
    image_marker = PLACEHOLDER
    default_template = (
        "You are a helpful assistant. {% for m in messages %}USER: {% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}" + PLACEHOLDER + "{% else %}{{ c['text'] | trim }}{% endif %}{% endfor %}. {% endfor %}ASSISTANT:"
    )
    default_sampling = SamplingParams(image=ImageSampling(guidance_scale=3.0, top_k=2048))

    def __init__(self, hf: Any, tokenizer: Any, image_processor: Any, folder: Path, image_size: int | None = None) -> None:
        super().__init__(hf, tokenizer, image_processor, folder)
        options = parse_options(Options, self.side_files.get(OPTIONS_FILE), folder / OPTIONS_FILE)
        mapping, factor = hf.model.vocabulary_mapping, hf.model.vqmodel.vision_spatial_factor
        size = options.image_size if image_size is None else image_size
        if size < factor or size % factor:
            raise ValueError(f"image_size={size} is no multiple of the {factor} pixels that a code of Emu3 covers")
        self.negative_prompt, self._negative_ids = options.negative_prompt, self.encode_text(options.negative_prompt)
        self.side_files[OPTIONS_FILE] = Options(image_size=size, negative_prompt=self.negative_prompt).model_dump_json().encode()
        codes = sorted(mapping.img2bpe)
        if codes != list(range(hf.config.vq_config.codebook_size)) or mapping.eol_token_id is None:
            raise ValueError(
                f"the vocabulary_map in {folder / 'config.json'} names {len(codes)} visual tokens and row separator "
                f"{mapping.eol_token_id}; Emu3 needs one for each of its {hf.config.vq_config.codebook_size} codes, and {ROW_END}. "
                "Use the release's config.json"
            )
        self.set_code_ids(torch.tensor([mapping.img2bpe[code] for code in codes]))
        self._row_end = int(mapping.eol_token_id)
        self._tail = (self.token_id(CODES_END), self.token_id(END))
        self._size_end, self._begin = self.token_id(SIZE_END), self.token_id(BEGIN)
        self.grid = size // factor
        self.image_spec = ImageSpec(
            layout=self._layout(self.grid, self.grid),
            depth=1,
            codebook_size=len(codes),
            pixel_size=size,
            begin_id=self._begin,
        )
        self.freeze()

    def _layout(self, height: int, width: int) -> tuple[int, ...]:
        """What follows `<|image start|>` for a grid of codes."""
        size = self.tokenizer.encode(f"{height}*{width}", add_special_tokens=False)
        return (*size, self._size_end, *((*(CODE,) * width, self._row_end) * height), *self._tail)

    # --- tensors ---
    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        return torch.stack([self._grid_codes(picture).reshape(-1, 1) for picture in pixels])

    def _grid_codes(self, pixels: Tensor) -> Tensor:
        """(3, height, width) -> codes (H, W)."""
        vqmodel = self.hf.model.vqmodel
        size = torch.tensor([pixels.shape[-2:]])
        return vqmodel.encode(pixels[None].to(vqmodel.device, vqmodel.dtype), size, return_dict=True).image_tokens[0].long()

    @torch.no_grad()
    def decode_codes(self, codes: Tensor) -> Tensor:
        """Pixels come in the normalisation of the image processor and are brought to -1..1."""
        side = self.grid
        pixels = torch.cat([self.hf.model.vqmodel.decode(one.reshape(1, side, side)) for one in codes]).float()  # (N, 3, S, S)
        mean, std = (torch.tensor(v, device=pixels.device)[:, None, None] for v in self._normalisation())
        return (pixels * std + mean) * 2 - 1

    def _normalisation(self) -> tuple[list[float], list[float]]:
        return list(self.image_processor.image_mean), list(self.image_processor.image_std)

    # --- words and pictures ---
    def unconditional_prompt(self, prompt_length: int) -> list[int]:
        """The release's negative prompt, alone after the begin token; "" unless `diptych.json` in the folder says otherwise."""
        return [self.bos_id, *self._negative_ids]

    def encode_prompt_row(self, document: Document, form: AnswerForm) -> TokenRow:
        """Where a picture alone is asked for in words, the release writes them as they are behind the begin token."""
        if form is not AnswerForm.IMAGE or document.images:
            return super().encode_prompt_row(document, form)
        return TokenRow.text([self.bos_id, *self.encode_text(document.text)], self.image_spec.depth)

    def forbidden_text_ids(self) -> list[int]:
        return sorted({*super().forbidden_text_ids(), self._row_end})

    def target_pixels(self, image: PIL.Image.Image) -> Tensor:
        mean, std = (torch.tensor(v)[:, None, None] for v in self._normalisation())
        unit = (to_pixels([square(to_rgb(image))], self.image_spec.pixel_size)[0] + 1) / 2
        return (unit - mean) / std

    def stand_in_row(self) -> TokenRow:
        spec = dataclasses.replace(self.image_spec, layout=self._layout(1, 1))
        return spec.row(torch.zeros(1, 1, dtype=torch.long), chosen=False, step=-1, begin_step=-1)

    def prompt_image_row(self, image: Image) -> TokenRow:
        """A picture of any shape, in the size that the image processor gives it; a sampled one with the codes it has."""
        if image.codes is not None:
            return super().prompt_image_row(image)
        assert image.pixels is not None
        with torch.no_grad():
            codes = self._grid_codes(self.processed(image.pixels)).cpu()  # (H, W)
        spec = dataclasses.replace(self.image_spec, layout=self._layout(*codes.shape))
        return spec.row(codes.reshape(-1, 1), chosen=False, step=-1, begin_step=-1)

    # --- files and training ---
    @property
    def language_model(self) -> nn.Module:
        return self.hf.model.text_model

    def frozen_modules(self) -> list[nn.Module]:
        return [self.hf.model.vqmodel]

    @classmethod
    def load(
        cls, folder: Path, *, dtype: torch.dtype | None = None, load_in_4bit: bool = False, image_size: int | None = None
    ) -> Emu3Model:
        """`image_size`: pixels a side of drawn pictures, a multiple of 8; kept in `diptych.json` when saved."""
        hf, tokenizer = cls.load_parts(folder, dtype, load_in_4bit, ["vqmodel", "lm_head"])
        return cls(hf, tokenizer, load_image_processor(folder), folder, image_size)
