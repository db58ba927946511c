"""VILA-U: a Llama that reads and writes residual codes, four to a position, through a depth transformer.

arXiv:2409.04429; the paper's base model. The release has no Hugging Face class: this adapter reads and writes its folder
(`llm/`, `vision_tower/`, `mm_projector/`) with modules of its own around the stock `LlamaForCausalLM`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from diptych.config import ImageSampling, SamplingParams, TextSampling
from diptych.document import Document, Image, Text
from diptych.models.attention import Layout
from diptych.models.base import check_image_size
from diptych.models.control_tokens import stand_ins
from diptych.models.hf import TokenizerModel, decode, load_tokenizer, load_weights, nf4, read_side_files
from diptych.models.image_spec import ImageSpec
from diptych.models.pixels import padded, square, to_pixels
from diptych.models.vila_u.config import read_json
from diptych.models.vila_u.vision import Projector, VisionTower
from diptych.pictures import to_rgb
from diptych.tokens import AnswerForm, TokenRow

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
BEGIN, END, MARKER, SPACE = "<im_start>", "<im_end>", "<image>", "▁"


class VilaUModel(TokenizerModel):
    """`wrap_prompt_images`: `<im_start>` and `<im_end>` around prompt pictures, as in training; the release's own inference
    code leaves them out."""

    family = "vila_u"
    default_sampling = SamplingParams(
        text=TextSampling(temperature=0.9, top_p=0.6), image=ImageSampling(guidance_scale=3.0, top_k=900, top_p=0.96)
    )

    def __init__(self, llm: LlamaForCausalLM, vision: VisionTower, projector: Projector, tokenizer: Any, folder: Path) -> None:
        super().__init__()
        self.llm, self.vision, self.projector, self.wrap_prompt_images = llm, vision, projector, True
        self.set_tokenizer(tokenizer, folder / "llm")
        self._space = self.token_id(SPACE)
        self._unconditional = [self.bos_id, *self.piece_ids(self._template("")), self._space]
        self.root_files, self.llm_files = read_side_files(folder), read_side_files(folder / "llm")
        self.pads = read_json(folder / "config.json").get("image_aspect_ratio", "resize") == "pad"
        self.root_files["config.json"] = (folder / "config.json").read_bytes()
        self.llm_files["config.json"] = (folder / "llm" / "config.json").read_bytes()  # transformers would write it in its new form
        self.vocab_size = llm.config.vocab_size
        self.max_positions = context_length(llm.config)
        self.image_spec = ImageSpec.plain(
            num_positions=vision.config.num_positions,
            depth=vision.config.codes_per_position,
            codebook_size=vision.config.codec.n_embed,
            pixel_size=vision.config.pixel_size,
            begin_id=self.token_id(BEGIN),
            end_id=self.token_id(END),
        )
        self.freeze()

    # --- tensors ---
    def embed_text(self, ids: Tensor) -> Tensor:
        return self.llm.model.embed_tokens(ids)

    def embed_codes(self, codes: Tensor) -> Tensor:
        return self.projector(self.vision.code_sums(codes))

    def backbone(self, embeds: Tensor, position_ids: Tensor, attention: Tensor | Layout) -> Tensor:
        return decode(self.llm.model, embeds, position_ids, attention)

    def text_logits(self, hidden: Tensor) -> Tensor:
        return self.llm.lm_head(hidden)

    def image_logits(self, hidden: Tensor, codes: Tensor) -> Tensor:
        return self.vision.image_logits(hidden, codes)

    def image_step(self, hidden: Tensor, code_prefix: Tensor) -> Tensor:
        return self.vision.image_step(hidden, code_prefix)

    def encode_images(self, pixels: Tensor) -> Tensor:
        return self.vision.encode(pixels)

    def decode_codes(self, codes: Tensor) -> Tensor:
        return self.vision.decode(codes)

    # --- words ---
    def piece_ids(self, piece: str, show: dict[int, str] | None = None) -> list[int]:
        """Tokens of a piece of text between pictures, no begin token; special tokens are read as such, but for those in what
        stand-ins hide (`rendered_ids`).

        The release's tokenizer keeps a literal space at the very beginning as a token of its own; transformers 5 drops it.
        """
        ids = self.rendered_ids(piece, show or {})
        return [self._space, *ids] if piece.startswith(" ") and piece.strip() else ids

    def encode_text(self, text: str) -> list[int]:
        hide, show = stand_ins([text])
        return self.piece_ids(text.strip().translate(hide), show)

    def encode_prompt_row(self, document: Document, form: AnswerForm) -> TokenRow:
        """`vicuna_v1`: SYSTEM USER: {message} ASSISTANT:, where an empty message has no spaces. A wrapped picture has a space
        before it, as in training data; a bare one has none; the text after either stands on a new line."""
        picture = f" {BEGIN}{MARKER}{END}\n" if self.wrap_prompt_images else f"{MARKER}\n"
        hide, show = stand_ins([segment.text for segment in document if isinstance(segment, Text)])
        message = "".join(picture if isinstance(s, Image) else s.text.strip().translate(hide) for s in document).strip()
        pieces = self._template(message).split(MARKER)
        spec, rows = self.image_spec, [TokenRow.text([self.bos_id], self.image_spec.depth)]
        for piece, image in zip(pieces, [*document.images, None], strict=True):
            rows.append(TokenRow.text(self.piece_ids(piece, show), spec.depth))
            if image is not None:
                rows.append(TokenRow.image(self.prompt_codes(image)))
        return TokenRow.concat(rows)

    def _template(self, message: str) -> str:
        return f"{SYSTEM} USER: {message} ASSISTANT:" if message else f"{SYSTEM} USER:ASSISTANT:"

    def unconditional_prompt(self, prompt_length: int) -> list[int]:
        """The template with an empty message, and the space that stands before `<im_start>`."""
        return list(self._unconditional)

    def answer_text_ids(self, document: Document, index: int) -> list[int]:
        """As the release formats training data: a space before a picture, a new line after one."""
        segment = document.segments[index]
        assert isinstance(segment, Text)
        before_image = index + 1 < len(document) and isinstance(document.segments[index + 1], Image)
        hide, show = stand_ins([segment.text])
        text = segment.text.strip().translate(hide) + (" " if before_image else "")
        after_image = index > 0 and isinstance(document.segments[index - 1], Image)
        return self._after_image("\n" + text, show) if after_image else self.piece_ids(text, show)

    def lead_in_ids(self, document: Document, index: int) -> list[int]:
        if index == 0:
            return [self._space]
        return self._after_image("\n ") if isinstance(document.segments[index - 1], Image) else []

    def _after_image(self, text: str, show: dict[int, str] | None = None) -> list[int]:
        return self.piece_ids(END + text, show)[1:]  # a piece that begins with a special token gets no leading space

    # --- pictures ---
    def target_pixels(self, image: PIL.Image.Image) -> Tensor:
        """A square of the short side; of a portrait the topmost."""
        return to_pixels([square(to_rgb(image), keep_top=True)], self.image_spec.pixel_size)[0]

    def prompt_pixels(self, image: PIL.Image.Image) -> Tensor:
        """(3, S, S): squashed into the square, or padded to one, as `image_aspect_ratio` in the config says."""
        return to_pixels([padded(image) if self.pads else image], self.image_spec.pixel_size)[0]

    def prompt_codes(self, image: Image) -> Tensor:
        """(num_positions, D) codes of a picture that is read."""
        if image.codes is not None:
            return self.image_codes(image)
        assert image.pixels is not None
        return self.codes_of(self.prompt_pixels(image.pixels))

    # --- files and training ---
    @property
    def language_model(self) -> nn.Module:
        return self.llm.model

    @property
    def lora_root(self) -> nn.Module:
        return self.llm

    def frozen_modules(self) -> list[nn.Module]:
        return [self.vision.rqvaesiglip]

    def save_pretrained(self, folder: Path) -> None:
        """The release's layout and keys; every config and tokenizer file as it was."""
        (folder / "llm").mkdir(parents=True, exist_ok=True)
        self.llm.save_pretrained(folder / "llm")
        for target, files in ((folder, self.root_files), (folder / "llm", self.llm_files)):
            for name, content in files.items():
                (target / name).parent.mkdir(exist_ok=True)
                (target / name).write_bytes(content)
        self.vision.save(folder)
        self.projector.save(folder)

    @classmethod
    def load(
        cls, folder: Path, *, dtype: torch.dtype | None = None, load_in_4bit: bool = False, image_size: int | None = None
    ) -> VilaUModel:
        root = read_json(folder / "config.json")
        for part in ("llm", "vision_tower", "mm_projector"):
            if not (folder / part / "config.json").is_file():
                raise ValueError(
                    f"{folder / part / 'config.json'} is missing; a VILA-U checkpoint has llm/, vision_tower/ and mm_projector/"
                )
        options: dict[str, Any] = {"dtype": dtype or "auto"}
        if load_in_4bit:
            options["quantization_config"] = nf4(dtype, ["lm_head"])
        llm = load_weights(LlamaForCausalLM, folder / "llm", **options)
        assert isinstance(llm, LlamaForCausalLM)
        kind = llm.model.embed_tokens.weight.dtype
        vision = VisionTower.load(folder, kind)
        widths = vision.config.codec.embed_dim, llm.config.hidden_size
        if (root.get("mm_hidden_size", widths[0]), root.get("hidden_size", widths[1])) != widths:
            raise ValueError(f"{folder / 'config.json'} states widths other than its parts have: {widths}; copy the whole checkpoint again")
        projector = Projector.load(folder, *widths, kind)
        model = cls(llm, vision, projector, load_tokenizer(folder / "llm"), folder)
        check_image_size(image_size, model.image_spec.pixel_size, cls.family)
        return model


def context_length(config: Any) -> int:
    """Positions that the LLM was trained for: linear RoPE scaling stretches those of its config."""
    scaling = getattr(config, "rope_parameters", None) or {}
    factor = scaling.get("factor", 1.0) if scaling.get("rope_type", scaling.get("type")) == "linear" else 1.0
    return int(config.max_position_embeddings * factor)
