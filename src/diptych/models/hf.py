"""Families that transformers itself implements: their stock class, tokenizer and image processor behind our contract."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from diptych.document import Document, Text
from diptych.models.attention import Layout, accept_layouts
from diptych.models.base import UnifiedModel
from diptych.models.chat_templates import MORE_TEMPLATES, chat_template, check_template_files
from diptych.models.control_tokens import TextReader, stand_ins
from diptych.models.pixels import not_too_long
from diptych.pictures import to_rgb
from diptych.tokens import AnswerForm, TokenRow

HARMLESS_KEYS = r"rotary_emb\.inv_freq$|^model\.vqmodel\.decoder\."  # of old files: computed anew; loaded elsewhere
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".index.json")


class TokenizerModel(TextReader, UnifiedModel):
    """A family with a tokenizer of transformers."""

    def token_id(self, token: str) -> int:
        """Raises ValueError where the tokenizer lacks the token."""
        found = self.vocabulary.get(token)
        if found is None:
            raise ValueError(
                f"the tokenizer in {self._tokenizer_folder} has no token {token!r}, which {self.family} needs around pictures; use the "
                "tokenizer files that came with the checkpoint"
            )
        return int(found)

    def decode_text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def forbidden_text_ids(self) -> list[int]:
        """Control tokens, and ids that the tokenizer cannot decode, but for the end and the choice to draw."""
        known = set(self.vocabulary.values())
        unknown = {i for i in range(self.vocab_size) if i not in known}
        return sorted({*self.controls, *unknown} - {self.eos_id, self.image_spec.begin_id})


class HFModel(TokenizerModel):
    """A unified model around `self.hf`, the stock class of the family.

    A subclass names the class, its tokens and its default chat template, and maps the contract to the class's parts.
    """

    hf_class: ClassVar[type[PreTrainedModel]]
    image_marker: str  # what the chat template writes for a picture
    default_template: ClassVar[str]  # Jinja, where the checkpoint brings none
    answer_lead: ClassVar[str] = " "  # what stands between the prompt and an answer that begins with text

    hf: Any

    def __init__(self, hf: Any, tokenizer: Any, image_processor: Any, folder: Path) -> None:
        super().__init__()
        self.hf, self.image_processor = hf, image_processor
        self.set_tokenizer(tokenizer, folder)
        self.side_files = read_side_files(folder)
        self.template = chat_template(folder, self.side_files, tokenizer) or self.default_template
        self.folder = folder
        self.vocab_size = hf.get_input_embeddings().weight.shape[0]
        self.max_positions = hf.config.get_text_config().max_position_embeddings

    # --- tensors ---
    def embed_text(self, ids: Tensor) -> Tensor:
        return self.hf.get_input_embeddings()(ids)

    def backbone(self, embeds: Tensor, position_ids: Tensor, attention: Tensor | Layout) -> Tensor:
        return decode(self.language_model, embeds, position_ids, attention)

    def text_logits(self, hidden: Tensor) -> Tensor:
        return self.hf.lm_head(hidden)

    # --- words ---
    def encode_text(self, text: str) -> list[int]:
        hide, show = stand_ins([text])
        return self.rendered_ids(text.translate(hide), show)

    def answer_text_ids(self, document: Document, index: int) -> list[int]:
        segment = document.segments[index]
        assert isinstance(segment, Text)
        return self.encode_text(self.answer_lead + segment.text if index == 0 else segment.text)

    def encode_prompt_row(self, document: Document, form: AnswerForm) -> TokenRow:
        """The chat template, then tokens piece by piece, with each picture's positions where the template marks it."""
        shape, show = self._rendered(document)
        pieces = self.begin_prompt(shape, len(document.images)).split(self.image_marker)
        if len(pieces) != len(document.images) + 1:
            raise ValueError(
                f"the chat template of {self.folder} wrote {len(pieces) - 1} times {self.image_marker!r} for {len(document.images)} "
                "pictures; a template must write it once for each block of type image"
            )
        depth, rows = self.image_spec.depth, []
        for piece, image in zip(pieces, [*document.images, None], strict=True):
            rows.append(TokenRow.text(self.rendered_ids(piece, show), depth))
            if image is not None:
                rows.append(self.picture_row(image))
        return TokenRow.concat(rows)

    def _rendered(self, document: Document) -> tuple[str, dict[int, str]]:
        """The rendered template and what its stand-ins hide.

        Raises ValueError where a template that does more with the text than trimming it makes a control token of it.
        """
        hide, show = stand_ins([segment.text for segment in document if isinstance(segment, Text)])
        shape, string = self._render(document, hide), self._render(document, {})
        if shape.translate(show) == string:
            return shape, show
        marks = [(text.count(self.image_marker), [number for number, *_ in self._read(text)[1]]) for text in (shape, string)]
        if marks[0] != marks[1]:
            raise ValueError(
                f"the text spells a control token in the chat template of {self.folder}, which does more with it than trimming, so it "
                f"cannot be read as plain text; write it differently: {string!r:.300}"
            )
        return string, {}

    def _render(self, document: Document, hide: dict[int, str]) -> str:
        content = [{"type": "text", "text": s.text.translate(hide)} if isinstance(s, Text) else {"type": "image"} for s in document]
        try:
            return self.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], chat_template=self.template, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is a program of the checkpoint's: it may fail in any way
            raise ValueError(f"the chat template of {self.folder} fails for this prompt: {error}") from error

    def begin_prompt(self, rendered: str, num_images: int) -> str:
        """The rendered template, with the begin-of-sequence token in front where it is missing."""
        bos = self.tokenizer.bos_token
        return rendered if rendered.startswith(bos) else bos + rendered

    # --- pictures ---
    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        vqmodel = self.hf.model.vqmodel
        return vqmodel.encode(pixels.to(vqmodel.dtype), return_dict=True).image_tokens.view(len(pixels), -1, 1)

    def prompt_pixels(self, image: PIL.Image.Image) -> Tensor:
        return self.processed(image)

    def processed(self, image: PIL.Image.Image) -> Tensor:
        """(3, S, S) float32: a picture as the family's own image processor prepares it.

        It is given channels first, and that is stated: left to itself it takes the rows of a picture 1 or 3 pixels high for channels.
        Raises ValueError for a picture that is no picture (`to_rgb`) or too long for its width.
        """
        pixels = np.asarray(not_too_long(to_rgb(image), self.family)).transpose(2, 0, 1)  # (3, height, width)
        return self.image_processor(images=[pixels], input_data_format="channels_first", return_tensors="pt")["pixel_values"][0].float()

    # --- files and training ---
    @property
    def lora_root(self) -> nn.Module:
        return self.hf

    def save_pretrained(self, folder: Path) -> None:
        """The family's own layout: config and weights by transformers, every other small file as it was."""
        folder.mkdir(parents=True, exist_ok=True)
        self.write_weights(folder)
        for name, content in self.side_files.items():
            if not (folder / name).exists():
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(content)

    def write_weights(self, folder: Path) -> None:
        """Config and weights."""
        self.hf.save_pretrained(folder)

    @classmethod
    def load_parts(cls, folder: Path, dtype: torch.dtype | None, load_in_4bit: bool, skip_4bit: list[str]) -> tuple[Any, Any]:
        """Stock model (on the CPU, or quantised) and tokenizer. Raises ValueError where files are missing or do not fit."""
        options: dict[str, Any] = {"dtype": dtype or "auto"}
        if load_in_4bit:
            options["quantization_config"] = nf4(dtype, skip_4bit)
        return cls.stock_model(folder, **options), load_tokenizer(folder, cls.check_tokenizer)

    # What a family with a second layout of its files reads there in its own way
    @classmethod
    def stock_config(cls, folder: Path) -> Any:
        config_class: Any = cls.hf_class.config_class
        return config_class.from_pretrained(folder)

    @classmethod
    def stock_model(cls, folder: Path, **options: Any) -> Any:
        return load_weights(cls.hf_class, folder, **options)

    @classmethod
    def check_tokenizer(cls, tokenizer: Any, folder: Path) -> None:
        check_tokenizer(tokenizer, folder)

    @classmethod
    def read_image_processor(cls, folder: Path) -> Any:
        return load_image_processor(folder)


class OneVocabularyModel(HFModel):
    """A family whose image codes are tokens of the text vocabulary (Chameleon, Emu3): one embedding, one head, depth 1.

    `code_ids`: (K,) int64, the vocabulary id of each code.
    """

    code_ids: Tensor

    def set_code_ids(self, ids: Tensor) -> None:
        """Raises ValueError for ids that the embedding does not have."""
        if int(ids.max()) >= self.vocab_size:
            raise ValueError(
                f"the vocabulary_map in {self.folder / 'config.json'} gives codes ids up to {int(ids.max())}, but the embedding has "
                f"{self.vocab_size} rows; take config.json and weights from one release"
            )
        self.register_buffer("code_ids", ids.long(), persistent=False)
        self.add_controls(set(ids.tolist()))
        self._first, self._last = int(ids.min()), int(ids.max())

    def embed_codes(self, codes: Tensor) -> Tensor:
        return self.embed_text(self.code_ids[codes[:, 0]])

    def _code_logits(self, hidden: Tensor) -> Tensor:
        """(N, H) -> (N, K). Only the rows of the head between the first and the last code are multiplied."""
        rows = slice(self._first, self._last + 1)
        head = self.hf.lm_head
        bias = None if head.bias is None else head.bias[rows]
        return nn.functional.linear(hidden, head.weight[rows], bias)[:, self.code_ids - self._first]

    def image_logits(self, hidden: Tensor, codes: Tensor) -> Tensor:
        return self._code_logits(hidden)[:, None]

    def image_step(self, hidden: Tensor, code_prefix: Tensor) -> Tensor:
        return self._code_logits(hidden)


def decode(decoder: Any, embeds: Tensor, position_ids: Tensor, attention: Tensor | Layout) -> Tensor:
    """Hidden states (B, T, H) of a transformers decoder, after its final norm; arguments as `UnifiedModel.backbone`.

    Gradient checkpointing works on layers in training mode only; the layers' own flag is set, and not that of what is in
    them, so that dropout stays off: the policy that is trained is the policy that sampled.
    """
    for layer in decoder.layers:
        layer.training = torch.is_grad_enabled()
    accept_layouts(decoder.config)
    if isinstance(attention, Tensor):
        arguments: dict[str, Any] = {"attention_mask": attention}
    else:  # a mask of four dimensions is left alone; none at all would be built
        arguments = {"attention_mask": embeds.new_ones(1, 1, 1, 1), "layout": attention}
    output = decoder(inputs_embeds=embeds, position_ids=position_ids, use_cache=False, **arguments)
    return output.last_hidden_state


def load_weights(cls: Any, folder: Path, named: Callable[[str], str] = str, **options: Any) -> Any:
    """`from_pretrained` (meta device, shard by shard) that refuses what transformers only warns of.

    `named`: what the files call a weight. With a `config` and a `state_dict` among the options the folder is not read.
    Raises ValueError naming what is missing, truncated or misshapen.
    """
    try:
        source = None if "state_dict" in options else folder
        reporting = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # they are refused below, by name
        model, report = cls.from_pretrained(source, local_files_only=True, **reporting, **options)
    except Exception as error:  # a config.json may hold any nonsense, on which transformers fails in any way
        raise ValueError(f"{folder} cannot be loaded as {cls.__name__}: {str(error)[:400]}. Copy the whole checkpoint again") from error
    leftover = sorted(key for key in report["unexpected_keys"] if not re.search(HARMLESS_KEYS, key))
    if leftover:
        first = named(leftover[0])
        raise ValueError(
            f"{folder} holds {len(leftover)} weights that its config.json leaves no place for (first: {first}), so they would be lost when "
            "it is saved; take config.json and weights from one release"
        )
    wrong = [*report["missing_keys"], *(key[0] if isinstance(key, tuple) else key for key in report["mismatched_keys"])]
    if wrong:
        raise ValueError(
            f"{folder} lacks {len(wrong)} weights of {cls.__name__}, or has them in another shape (first: {named(sorted(wrong)[0])}); "
            "copy every shard of the checkpoint and the config.json that belongs to them"
        )
    return model.eval()


def load_tokenizer(folder: Path, check: Callable[[Any, Path], None] | None = None) -> Any:
    """Raises ValueError where files are missing or broken, or are misread."""
    check_template_files(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        said = " ".join(str(error).split())[:160]
        raise ValueError(
            f"the tokenizer in {folder} cannot be read ({said}); copy the tokenizer files that came with the checkpoint"
        ) from error
    (check or check_tokenizer)(tokenizer, folder)
    return tokenizer


def check_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Some versions of transformers 5 take the byte-level tokenizers of Janus and Chameleon for sentencepiece ones and drop
    spaces without a word. Raises ValueError where text does not come back."""
    text = "The red ball, and 2 trees."
    back = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False), clean_up_tokenization_spaces=False)
    if back.strip() != text:
        raise ValueError(
            f"the tokenizer in {folder} turns {text!r} into {back!r}: this version of transformers misreads its files. "
            "Upgrade transformers (5.24 reads them), or use the tokenizer files that came with the checkpoint"
        )


def nf4(dtype: torch.dtype | None, skip: list[str]) -> BitsAndBytesConfig:
    """4-bit NormalFloat with double quantisation, but for the modules named in `skip` (transformers matches from the start of the
    full name). Source: QLoRA, arXiv:2305.14314, Sec. 3. Raises ValueError without bitsandbytes."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of optional CPU kernels at import
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ValueError("load_in_4bit needs the extra: pip install 'diptych[gpu]'") from error
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype or torch.bfloat16, llm_int8_skip_modules=[f".*{name}" for name in skip],
    )  # fmt: skip


def read_side_files(folder: Path) -> dict[str, bytes]:
    """Tokenizer, templates and processor settings: what belongs to a checkpoint beside config and weights."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted([*folder.iterdir(), *folder.glob(f"{MORE_TEMPLATES}/*.jinja")])
        if path.is_file() and path.name != "config.json" and not path.name.endswith(_WEIGHTS) and not path.name.startswith(".")
    }


def load_image_processor(folder: Path) -> Any:
    """The checkpoint's own. Raises ValueError where its settings are missing or broken."""
    try:
        return AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    except Exception as error:
        raise ValueError(f"the image processor's settings in {folder} cannot be read: {str(error)[:300]}") from error
