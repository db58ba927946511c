"""Emu3.5: text, and codes of pictures in one vocabulary; a picture states its size in codes first and separates its rows.

arXiv:2510.26583. Stock class: `Qwen3ForCausalLM`, whose names and arithmetic are those of the release's decoder. A picture in the
sequence, W codes to each of H rows:

    <|image start|> H * W <|image token|>  code * W <|extra_200|>  ...  code * W <|image end|>

The model chooses `<|image start|>` and the codes; everything else is forced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.document import Document, Image, Text
from diptych.models.attention import Layout
from diptych.models.control_tokens import stand_ins
from diptych.models.emu3_5 import checkpoint, tokenizer
from diptych.models.emu3_5.config import LanguageConfig, Options, read_language_config, read_options
from diptych.models.emu3_5.prompts import ASSISTANT, SAMPLING, UNCONDITIONAL, before_question, in_order, task_of
from diptych.models.emu3_5.vision import VisionTokenizer
from diptych.models.hf import TokenizerModel, decode, read_side_files
from diptych.models.image_spec import CODE, ImageSpec
from diptych.models.options_file import OPTIONS_FILE
from diptych.models.pixels import not_too_long
from diptych.pictures import to_rgb
from diptych.tokens import AnswerForm, Modality, TokenRow


@dataclasses.dataclass
class Files:
    """What belongs to a checkpoint beside its weights. `vision`: of the vision tokenizer's folder."""

    config: bytes
    language: dict[str, bytes]
    vision: dict[str, bytes]

    @classmethod
    def of(cls, folder: Path, vision: Path | None) -> Files:
        beside = {} if vision is None else checkpoint.vision_files(vision)
        return cls((folder / "config.json").read_bytes(), read_side_files(folder), beside)


class Emu35Model(TokenizerModel):
    """`vocab_size` counts text ids alone, which all lie below the first code: `text_logits` multiplies no other rows of the head."""

    family = "emu3_5"
    default_sampling = SAMPLING["story"]

    def __init__(
        self, hf: Any, language: LanguageConfig, words: Any, num_codes: int, vision: VisionTokenizer, options: Options, files: Files,
        folder: Path,
    ) -> None:  # fmt: skip
        """`words`: the tokenizer without visual tokens; `num_codes`: how many of these there are."""
        super().__init__()
        self.hf, self.vision_tokenizer, self.options, self.files, self.folder = hf, vision, options, files, folder
        self.set_tokenizer(words, folder)
        rows, codebook = hf.get_input_embeddings().weight.shape[0], vision.config.codebook_size
        self.vocab_size, self.max_positions = rows - num_codes, language.max_position_embeddings
        if (self.vocab_size, num_codes) != (len(words), codebook):
            raise ValueError(
                f"{folder} does not fit together: the tokenizer has {len(words)} text tokens and {num_codes} visual ones, the embedding "
                f"{rows} rows and the vision tokenizer {codebook} codes. Take {tokenizer.RANKS}, {tokenizer.VISUAL}, config.json, weights "
                "and vision tokenizer from one release"
            )
        self.prompt_area, self.default_sampling = options.prompt_area or language.image_area, SAMPLING[options.task]
        self._begin, self._end = self.token_id(tokenizer.BEGIN), self.token_id(tokenizer.END)
        self._size_end, self._row_end = self.token_id(tokenizer.SIZE_END), self.token_id(tokenizer.ROW_END)
        self._answer_end = self.token_id(tokenizer.END_ANSWER)
        self._thoughts = {self.token_id(begin): self.token_id(end) for begin, end in tokenizer.THOUGHTS}
        self._before, self._behind = self.rendered_ids(UNCONDITIONAL, {}), self.rendered_ids(ASSISTANT, {})
        self._unconditional = self.rendered_ids(UNCONDITIONAL + ASSISTANT, {})
        self.grid = self._grid(vision.config.factor)
        height, width = self.grid
        self.image_spec = ImageSpec(
            layout=self._layout(height, width),
            depth=1,
            codebook_size=codebook,
            pixel_size=round(sqrt(height * width) * vision.config.factor),
            begin_id=self._begin,
        )
        self.freeze()

    def _grid(self, factor: int) -> tuple[int, int]:
        """Height and width of drawn pictures in codes."""
        size = self.options.image_size
        if self.options.grid is not None:
            return self.options.grid
        if size < factor or size % factor:
            raise ValueError(f"image_size={size} is no multiple of the {factor} pixels that a code of Emu3.5 covers")
        return size // factor, size // factor

    def _layout(self, height: int, width: int) -> tuple[int, ...]:
        """What follows `<|image start|>` for a grid of codes: its rows have separators between them, none behind the last."""
        codes = (*((*(CODE,) * width, self._row_end) * height)[:-1], self._end)
        return (*self.encode_text(f"{height}*{width}"), self._size_end, *codes)

    # --- tensors ---
    def embed_text(self, ids: Tensor) -> Tensor:
        return self.hf.get_input_embeddings()(ids)

    def embed_codes(self, codes: Tensor) -> Tensor:
        return self.embed_text(codes[:, 0] + self.vocab_size)

    def backbone(self, embeds: Tensor, position_ids: Tensor, attention: Tensor | Layout) -> Tensor:
        return decode(self.language_model, embeds, position_ids, attention)

    def text_logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.hf.lm_head.weight[: self.vocab_size])

    def image_logits(self, hidden: Tensor, codes: Tensor) -> Tensor:
        return self.image_step(hidden, codes)[:, None]

    def image_step(self, hidden: Tensor, code_prefix: Tensor) -> Tensor:
        return F.linear(hidden, self.hf.lm_head.weight[self.vocab_size :])

    def encode_images(self, pixels: Tensor) -> Tensor:
        return torch.stack([self.vision_tokenizer.encode(picture).reshape(-1, 1) for picture in pixels])

    def decode_codes(self, codes: Tensor) -> Tensor:
        return torch.stack([self.vision_tokenizer.decode(one.view(self.grid)) for one in codes])

    # --- words ---
    def encode_text(self, text: str) -> list[int]:
        hide, show = stand_ins([text])
        return self.rendered_ids(text.translate(hide), show)

    def decode_text(self, ids: list[int]) -> str:
        """Without the model's thoughts; one that is not ended goes to the end."""
        kept, end = [], None
        for number in ids:
            if end is None and number in self._thoughts:
                end = self._thoughts[number]
            elif end is None:
                kept.append(number)
            elif number == end:
                end = None
        return super().decode_text(kept)

    def forbidden_text_ids(self) -> list[int]:
        """Thoughts and the end of an answer are the model's to write."""
        return sorted({*super().forbidden_text_ids()} - {*self._thoughts, *self._thoughts.values(), self._answer_end})

    @property
    def answer_end_ids(self) -> list[int]:
        return [self._answer_end, self.eos_id]

    def encode_prompt_row(self, document: Document, form: AnswerForm) -> TokenRow:
        task = task_of(self.options.task, form, bool(document.images))
        hide, show = stand_ins([segment.text for segment in document if isinstance(segment, Text)])
        piece, rows = before_question(task), []
        for segment in in_order(document, task):
            if isinstance(segment, Text):
                piece += segment.text.translate(hide)
            else:
                rows += [TokenRow.text(self.rendered_ids(piece, show), 1), self.picture_row(segment)]
                piece = ""
        return TokenRow.concat([*rows, TokenRow.text(self.rendered_ids(piece + ASSISTANT, show), 1)])

    def unconditional_prompt(self, prompt_length: int) -> list[int]:
        return list(self._unconditional)

    def unconditional_row(self, prompt_length: int, context: Callable[[], TokenRow]) -> TokenRow:
        """Guidance takes away words, never pictures: the prompt's stand in their place in the unconditional prompt, then the drawn ones."""
        row = context()
        asked, drawn = self._pictures(row[:prompt_length]), self._pictures(row[prompt_length:])
        if not asked:
            return TokenRow.concat([TokenRow.text(self._unconditional, 1), *drawn])
        return TokenRow.concat([TokenRow.text(self._before, 1), *asked, TokenRow.text(self._behind, 1), *drawn])

    def _pictures(self, row: TokenRow) -> list[TokenRow]:
        """The pictures of a sequence, from `<|image start|>` to `<|image end|>`, nothing in them chosen."""
        is_text = row.modality == Modality.TEXT
        begins = (is_text & (row.text_ids == self._begin)).nonzero().flatten().tolist()
        ends = (is_text & (row.text_ids == self._end)).nonzero().flatten().tolist()
        return [row[begin : end + 1].forced() for begin, end in zip(begins, ends, strict=True)]

    # --- pictures ---
    def target_pixels(self, image: PIL.Image.Image) -> Tensor:
        """The largest part in the middle that has the shape of drawn pictures, in their size."""
        rgb, (rows, columns), factor = to_rgb(image), self.grid, self.vision_tokenizer.config.factor
        width, height = min(rgb.width, max(1, rgb.height * columns // rows)), min(rgb.height, max(1, rgb.width * rows // columns))
        left, top = (rgb.width - width) // 2, (rgb.height - height) // 2
        middle = rgb.crop((left, top, left + width, top + height))
        return _pixels(middle.resize((columns * factor, rows * factor), PIL.Image.Resampling.BICUBIC))

    def prompt_pixels(self, image: PIL.Image.Image) -> Tensor:
        """In its own shape, scaled to the area that the release reads."""
        rgb = not_too_long(to_rgb(image), self.family)
        size = smart_size(*rgb.size, self.prompt_area, self.vision_tokenizer.config.factor)
        return _pixels(rgb.resize(size, PIL.Image.Resampling.BICUBIC))

    def stand_in_row(self) -> TokenRow:
        return self._picture_of(torch.zeros(1, 1, dtype=torch.long))

    def prompt_image_row(self, image: Image) -> TokenRow:
        """A picture from outside in its own shape; a sampled one with the codes it has."""
        if image.codes is not None:
            return super().prompt_image_row(image)
        assert image.pixels is not None
        return self._picture_of(self.vision_tokenizer.encode(self.prompt_pixels(image.pixels).to(self.device)).cpu())

    def _picture_of(self, codes: Tensor) -> TokenRow:
        """(H, W), of any size."""
        spec = dataclasses.replace(self.image_spec, layout=self._layout(*codes.shape))
        return spec.row(codes.reshape(-1, 1), chosen=False, step=-1, begin_step=-1)

    # --- files and training ---
    @property
    def language_model(self) -> nn.Module:
        return self.hf.model

    @property
    def lora_root(self) -> nn.Module:
        return self.hf

    def frozen_modules(self) -> list[nn.Module]:
        return [self.vision_tokenizer]

    def save_pretrained(self, folder: Path) -> None:
        """Both repositories of the release, the vision tokenizer inside, so that the folder is complete."""
        options = self.options.model_copy(update={"vision_tokenizer": None}).model_dump_json(exclude_none=True).encode()
        checkpoint.save_language_model(self.hf, self.files.config, {**self.files.language, OPTIONS_FILE: options}, folder)
        checkpoint.save_vision(self.vision_tokenizer, self.files.vision, folder / checkpoint.VISION_FOLDER)

    @classmethod
    def load(
        cls, folder: Path, *, dtype: torch.dtype | None = None, load_in_4bit: bool = False, image_size: int | None = None
    ) -> Emu35Model:
        """`image_size`: pixels a side of drawn pictures, a multiple of 16; kept in `diptych.json` when saved."""
        language, options = read_language_config(folder), read_options(folder)
        if image_size is not None:
            options = options.model_copy(update={"image_size": image_size, "grid": None})
        words, num_codes = tokenizer.read_tokenizer(folder)
        vision_folder = checkpoint.find_vision_folder(folder, options.vision_tokenizer)
        vision = checkpoint.load_vision(vision_folder)
        hf = checkpoint.load_language_model(folder, language, dtype, load_in_4bit)
        return cls(hf, language, words, num_codes, vision, options, Files.of(folder, vision_folder), folder)


def smart_size(width: int, height: int, area: int, factor: int) -> tuple[int, int]:
    """Width and height of about `area` pixels in the picture's own shape, as multiples of `factor`."""
    rows = int(sqrt(area / (width / height)))
    sides = int(rows * (width / height)), rows
    wide, high = (max(factor, (side + factor // 2) // factor * factor) for side in sides)
    return wide, high


def _pixels(image: PIL.Image.Image) -> Tensor:
    """(3, height, width) float32 in -1..1."""
    return torch.from_numpy((np.asarray(image) / 127.5 - 1).astype(np.float32)).permute(2, 0, 1)
