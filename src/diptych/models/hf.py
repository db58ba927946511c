"""Families that transformers itself implements: their stock class, tokenizer and image processor behind our contract."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel
from transformers.utils.chat_template_utils import render_jinja_template

from diptych.document import Document, Text, to_rgb
from diptych.models.attention import Layout, accept_layouts
from diptych.models.base import UnifiedModel
from diptych.models.pixels import not_too_long
from diptych.tokens import TokenRow

HARMLESS_KEYS = r"rotary_emb\.inv_freq$|^model\.vqmodel\.decoder\."  # of old files: computed anew; loaded elsewhere
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".index.json")
_TEMPLATE_FILES, _MORE_TEMPLATES = ("chat_template.jinja", "chat_template.json"), "additional_chat_templates"
_NO_CHARACTERS = range(0x40000, 0xE0000)  # code points that Unicode has given to nothing: no white space, no case, in no token
Control = tuple[int, int, int]  # a control token in a string: its id, where its characters begin, where they end


class TokenizerModel(UnifiedModel):
    """A family with a tokenizer of transformers; everything is asked of it once, because large vocabularies answer slowly.

    `controls`: id -> token of the control tokens, which no text may become (`rendered_ids`): special tokens, added ones that are no
    words, and what a family adds for its pictures.
    """

    def set_tokenizer(self, tokenizer: Any, folder: Path) -> None:
        """Raises ValueError where the tokenizer names no begin or end token."""
        for name in ("bos_token", "eos_token"):
            if getattr(tokenizer, f"{name}_id", None) is None:
                raise ValueError(f"the tokenizer in {folder} names no {name}; use the tokenizer files that came with the checkpoint")
        self.tokenizer, self._tokenizer_folder = tokenizer, folder
        self.bos_id, self.eos_id = int(tokenizer.bos_token_id), int(tokenizer.eos_token_id)
        self.vocabulary: dict[str, int] = tokenizer.get_vocab()
        added = tokenizer.get_added_vocab()
        special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special} if added else set()
        self.controls: dict[int, str] = {}
        self.add_controls({*tokenizer.all_special_ids, *(i for token, i in added.items() if token in special or not is_word(token))})

    def add_controls(self, ids: set[int]) -> None:
        self.controls |= {number: token for token, number in self.vocabulary.items() if number in ids}
        self._renamed: dict[str, Tokenizer] = {}  # see `_read_renamed`

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

    def rendered_ids(self, shape: str, show: dict[int, str]) -> list[int]:
        """Tokens of a rendered template in which stand-ins hide the user's characters (`stand_ins`).

        They are those of the string that it stands for, as the family's own code reads it, where that finds no control tokens but the
        template's. Where the text spells one, alone or together with what stands beside it, its characters are read as those of
        any word.

        Raises ValueError where the tokenizer cannot do that.
        """
        string = shape.translate(show)
        ids, found = self._read(string)
        if not show or found == (written := self._written(shape, show)):
            return ids
        fast = getattr(self.tokenizer, "is_fast", False)
        ids, read = self._read_renamed(shape, written, show) if fast else (ids, found)
        if self._without_unknown(read) != self._without_unknown(written):
            names = sorted({self.controls[number] for number, *_ in {*found} - {*written}})
            raise ValueError(
                f"the text spells the control token {' or '.join(map(repr, names))} ({string!r:.300}), which the tokenizer in "
                f"{self._tokenizer_folder} cannot read as plain text; write it differently"
            )
        return ids

    def _read(self, string: str) -> tuple[list[int], list[Control]]:
        """Tokens, and the control tokens among them."""
        if not getattr(self.tokenizer, "is_fast", False):  # it tells no places
            ids = self.tokenizer.encode(string, add_special_tokens=False)
            return ids, [(number, 0, 0) for number in ids if number in self.controls]
        return self._with_controls(self.tokenizer(string, add_special_tokens=False).encodings[0])

    def _with_controls(self, encoding: Encoding) -> tuple[list[int], list[Control]]:
        places = zip(encoding.ids, encoding.offsets, strict=True)
        return encoding.ids, [(number, *place) for number, place in places if number in self.controls]

    def _written(self, shape: str, show: dict[int, str]) -> list[Control]:
        """The control tokens that the template wrote: all but those that unknown stand-ins become."""
        return [c for c in self._read(shape)[1] if not any(ord(character) in show for character in shape[c[1] : c[2]])]

    def _without_unknown(self, controls: list[Control]) -> list[int]:
        return [number for number, *_ in controls if number != self.tokenizer.unk_token_id]

    def _read_renamed(self, shape: str, written: list[Control], show: dict[int, str]) -> tuple[list[int], list[Control]]:
        """As `_read`, by a tokenizer that knows control tokens under names which the string does not hold: the template's, and only
        they, are written with these names."""
        string = shape.translate(show)
        mark = next(character for character in map(chr, _NO_CHARACTERS) if character not in string)
        if mark not in self._renamed:
            self._renamed[mark] = rename_controls(self.tokenizer.backend_tokenizer, self.controls, mark)
        parts, end = [], 0
        for number, start, stop in written:
            parts += [shape[end:start].translate(show), new_name(number, mark)]  # with the spaces that some tokens take in
            end = stop
        string = "".join([*parts, shape[end:].translate(show)])
        return self._with_controls(self._renamed[mark].encode(string, add_special_tokens=False))


class HFModel(TokenizerModel):
    """A unified model around `self.hf`, the stock class of the family.

    A subclass names the class, its tokens and its default chat template, and maps the contract to the class's parts.
    """

    hf_class: ClassVar[type[PreTrainedModel]]
    image_marker: ClassVar[str]  # what the chat template writes for a picture
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

    def encode_prompt_row(self, document: Document) -> TokenRow:
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

        It is given channels first and told so: left to itself it takes the rows of a picture 1 or 3 pixels high for channels.
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
        self.hf.save_pretrained(folder)
        for name, content in self.side_files.items():
            if not (folder / name).exists():
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(content)

    @classmethod
    def load_parts(cls, folder: Path, dtype: torch.dtype | None, load_in_4bit: bool, skip_4bit: list[str]) -> tuple[Any, Any]:
        """Stock model (on the CPU, or quantised) and tokenizer. Raises ValueError where files are missing or do not fit."""
        options: dict[str, Any] = {"dtype": dtype or "auto"}
        if load_in_4bit:
            options["quantization_config"] = nf4(dtype, skip_4bit)
        return load_weights(cls.hf_class, folder, **options), load_tokenizer(folder)


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


def load_weights(cls: Any, folder: Path, **options: Any) -> Any:
    """`from_pretrained` (meta device, shard by shard) that refuses what transformers only warns of.

    Raises ValueError naming what is missing, truncated or misshapen.
    """
    try:
        model, report = cls.from_pretrained(folder, local_files_only=True, output_loading_info=True, **options)
    except Exception as error:  # a config.json may hold any nonsense, on which transformers fails in any way
        raise ValueError(f"{folder} cannot be loaded as {cls.__name__}: {str(error)[:400]}. Copy the whole checkpoint again") from error
    leftover = sorted(key for key in report["unexpected_keys"] if not re.search(HARMLESS_KEYS, key))
    if leftover:
        raise ValueError(
            f"{folder} holds {len(leftover)} weights that its config.json leaves no place for (first: {leftover[0]}), so they would be "
            "lost when it is saved; take config.json and weights from one release"
        )
    wrong = [*report["missing_keys"], *(key[0] if isinstance(key, tuple) else key for key in report["mismatched_keys"])]
    if wrong:
        raise ValueError(
            f"{folder} lacks {len(wrong)} weights of {cls.__name__}, or has them in another shape (first: {sorted(wrong)[0]}); "
            "copy every shard of the checkpoint and the config.json that belongs to them"
        )
    return model.eval()


def load_tokenizer(folder: Path) -> Any:
    """Raises ValueError where files are missing or broken, or are misread."""
    check_template_files(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        said = " ".join(str(error).split())[:160]
        raise ValueError(
            f"the tokenizer in {folder} cannot be read ({said}); copy the tokenizer files that came with the checkpoint"
        ) from error
    check_tokenizer(tokenizer, folder)
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
        for path in sorted([*folder.iterdir(), *folder.glob(f"{_MORE_TEMPLATES}/*.jinja")])
        if path.is_file() and path.name != "config.json" and not path.name.endswith(_WEIGHTS) and not path.name.startswith(".")
    }


def is_word(token: str) -> bool:
    """Whether an added token that is not special is only text which got a token of its own, as "ü" in Janus' tokenizer."""
    return len(token) == 1 or all(character.isalnum() or character.isspace() for character in token)


def stand_ins(texts: Iterable[str]) -> tuple[dict[int, str], dict[int, str]]:
    """Two tables for `str.translate`: one that hides every character of the texts behind one that no template writes and no token
    has, and its inverse. White space is not hidden, so templates trim as they do."""
    characters = sorted({character for text in texts for character in text if not character.isspace()})
    pairs = list(zip(map(ord, characters), _NO_CHARACTERS, strict=False))
    return {character: chr(hidden) for character, hidden in pairs}, {hidden: chr(character) for character, hidden in pairs}


def new_name(number: int, mark: str) -> str:
    return f"{mark}{number}{mark}"


def rename_controls(tokenizer: Tokenizer, controls: dict[int, str], mark: str) -> Tokenizer:
    """The same tokenizer with control tokens under `new_name`: neither are their old names looked for in a string, nor are they put
    together by merges."""
    state = json.loads(tokenizer.to_str())
    model, names = state["model"], {token: new_name(number, mark) for number, token in controls.items()}

    def named(token: Any) -> Any:
        return names.get(token, token)

    words = model["vocab"]
    model["vocab"] = {named(t): i for t, i in words.items()} if isinstance(words, dict) else [[named(t), score] for t, score in words]
    if "merges" in model:
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if names.keys().isdisjoint([*pair, "".join(pair)])]
    if "unk_token" in model:
        model["unk_token"] = named(model["unk_token"])
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = {token["content"] for token in state["added_tokens"]}
    state["added_tokens"] = [{**token, "content": named(token["content"])} for token in state["added_tokens"]]
    state["added_tokens"] += [{"id": i, "content": names[t], **flags, "special": True} for i, t in controls.items() if t not in added]
    return Tokenizer.from_str(json.dumps({**state, "post_processor": None, "truncation": None, "padding": None}))


def load_image_processor(folder: Path) -> Any:
    """The checkpoint's own. Raises ValueError where its settings are missing or broken."""
    try:
        return AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    except Exception as error:
        raise ValueError(f"the image processor's settings in {folder} cannot be read: {str(error)[:300]}") from error


def decoded(path: Path, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start + 1}: {error.reason}); copy it again") from error


def check_template_files(folder: Path) -> None:
    """Raises ValueError naming the file, which transformers would not, where a template cannot be read."""
    for path in (folder / _TEMPLATE_FILES[0], *sorted(folder.glob(f"{_MORE_TEMPLATES}/*.jinja"))):
        if path.is_file():
            decoded(path, path.read_bytes())
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        template_in_json(settings, settings.read_bytes())


def template_in_json(path: Path, content: bytes) -> str | dict[str, str] | None:
    """What stands at "chat_template": one template, or several by their names."""
    try:
        found = json.loads(decoded(path, content)).get("chat_template")
        return {entry["name"]: entry["template"] for entry in found} if isinstance(found, list) else found
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the chat template in {path} cannot be read ({type(error).__name__}: {error}); it must be JSON with a string at "
            "'chat_template', or a list of objects with a 'name' and a 'template'"
        ) from error


def chat_template(folder: Path, files: dict[str, bytes], tokenizer: Any) -> str | None:
    """The checkpoint's own template, from whichever place it is kept in; "default" where there are several.

    Raises ValueError naming the file where it is broken, or where none is "default".
    """
    jinja, legacy = _TEMPLATE_FILES
    source, found = folder / "tokenizer_config.json", tokenizer.chat_template
    if jinja in files:
        source, found = folder / jinja, decoded(folder / jinja, files[jinja])
    elif legacy in files:
        source, found = folder / legacy, template_in_json(folder / legacy, files[legacy])
        if found is None:
            raise ValueError(f"{source} has no 'chat_template'; copy it again, or delete it")
    if isinstance(found, dict):
        if "default" not in found:
            raise ValueError(
                f"the tokenizer files in {folder} hold the chat templates {', '.join(sorted(found))}, and none is 'default'; give the one "
                f"to be used that name, or put it into {jinja}"
            )
        found = found["default"]
    if found is None:
        return None
    known = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token, **getattr(tokenizer, "special_tokens_map", {})}
    text = chr(_NO_CHARACTERS[0])  # written in any other way than as itself, it is lost
    message = {"role": "user", "content": [{"type": "text", "text": text}]}
    try:
        rendered: Any = render_jinja_template(conversations=[[message]], chat_template=found, add_generation_prompt=True, **known)
    except Exception as error:  # a template is a program of the checkpoint's: it may fail in any way
        raise ValueError(
            f"the chat template in {source} fails for a message of one text block ({type(error).__name__}: {error}); copy it again"
        ) from error
    if text not in rendered[0][0]:
        raise ValueError(
            f"the chat template in {source} does not write the text of a message of blocks, {message['content']}; a template must do so"
        )
    return found
