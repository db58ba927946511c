"""The contract between Diptych and a unified model. Sampling, scoring and both trainings are written against it once.

To add a family: one file (or folder) in `diptych/models/` with a subclass, and one line in `models/__init__.py`.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import PIL.Image
import torch
from torch import Tensor, nn

from diptych.config import SamplingParams
from diptych.document import NOTHING, STAND_IN, Document, Image, Text
from diptych.models.attention import Layout
from diptych.models.image_spec import ImageSpec
from diptych.models.pixels import to_images, to_pixels
from diptych.tokens import AnswerForm, TokenBatch, TokenRow, check_form, valid_text

T = TypeVar("T")


class TooLong(ValueError):
    """A document does not fit the context."""


class UnifiedModel(nn.Module, abc.ABC):
    """One transformer over text tokens and image codes.

    Hidden states predict the *next* position: the state at `begin_id` predicts the first image position. H is the
    hidden width, V the text vocabulary, K the codebook size, D the depth.

    default_sampling: how the family's release samples; its guidance scale stands in where a setting leaves it open.
    tables: methods without arguments that give a tensor made of weights alone; it is made once for a sampling.
    """

    family: str
    tables: ClassVar[tuple[str, ...]] = ()
    default_sampling: SamplingParams
    image_spec: ImageSpec
    eos_id: int
    vocab_size: int
    max_positions: int
    adapter: Any = None  # models.lora.LoraAdapter, where one is attached
    sharding: Any = None  # training.parallel.Sharding, where a training spreads the weights over processes
    image_decoder: Callable[[Tensor], Tensor] | None = None  # `decode_codes` of a user's own (models/image_decoder.py)
    code_cache: Callable[[Tensor, Callable[[], Tensor]], Tensor] | None = None  # codes known already (models/codes.py)
    _legal: Tensor | None = None

    # --- tensors -------------------------------------------------------------------------------------------------
    @abc.abstractmethod
    def embed_text(self, ids: Tensor) -> Tensor:
        """(...,) int64 -> (..., H)."""

    @abc.abstractmethod
    def embed_codes(self, codes: Tensor) -> Tensor:
        """Codes of image positions (N, D) -> (N, H)."""

    def prompt_image_embeds(self, pixels: Tensor) -> Tensor:
        """Features of prompt pictures, (N, 3, S, S) -> (N, F, H), for families that do not read them as codes (Janus)."""
        raise NotImplementedError(f"{self.family} reads prompt pictures as codes")

    @abc.abstractmethod
    def backbone(self, embeds: Tensor, position_ids: Tensor, attention: Tensor | Layout) -> Tensor:
        """Hidden states (B, T, H) after the final norm.

        `attention`: (B, T) bool, True at real tokens, for causal attention within each row; or a layout, which says what each
        position attends to and keeps the KV cache (`models/attention.py`).
        """

    @abc.abstractmethod
    def text_logits(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., V)."""

    @abc.abstractmethod
    def image_logits(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """Teacher-forced over depth: hidden (N, H) and codes (N, D) -> (N, D, K)."""

    @abc.abstractmethod
    def image_step(self, hidden: Tensor, code_prefix: Tensor) -> Tensor:
        """Logits of the next code of a position: hidden (N, H), the codes so far (N, d) with d < D -> (N, K)."""

    @abc.abstractmethod
    def encode_images(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) float as `target_pixels` gives them -> codes (N, num_positions, D)."""

    @abc.abstractmethod
    def decode_codes(self, codes: Tensor) -> Tensor:
        """Codes (N, num_positions, D) -> pixels (N, 3, S, S) float in -1..1."""

    def to_pictures(self, codes: Tensor) -> list[PIL.Image.Image]:
        """Pictures of codes (N, num_positions, D), by `image_decoder` where one is set."""
        return to_images((self.image_decoder or self.decode_codes)(codes.to(self.device)).float().cpu())

    def check_can_draw(self) -> None:
        """Raises ValueError where codes cannot become pictures."""

    # --- words and pictures --------------------------------------------------------------------------------------
    @abc.abstractmethod
    def unconditional_prompt(self, prompt_length: int) -> list[int]:
        """Text ids that stand before `begin_id` in the unconditional branch of classifier-free guidance.

        `prompt_length`: positions of the prompt that is guided; most families do not care.
        """

    def unconditional_row(self, prompt_length: int, context: Callable[[], TokenRow]) -> TokenRow | None:
        """What stands before `begin_id` in the unconditional branch of families that keep pictures there; None: `unconditional_prompt`.

        `context`: gives prompt and answer up to, without, `begin_id`.
        """
        return None

    @property
    def answer_end_ids(self) -> list[int]:
        """Text ids with which an answer ends."""
        return [self.eos_id]

    @abc.abstractmethod
    def encode_text(self, text: str) -> list[int]: ...

    @abc.abstractmethod
    def decode_text(self, ids: list[int]) -> str: ...

    @abc.abstractmethod
    def forbidden_text_ids(self) -> list[int]:
        """Text ids that no answer may contain (padding, role markers, forced tokens, image ids)."""

    def wrap_prompt(self, row: TokenRow) -> TokenRow:
        """What the chat template writes before and after the user's tokens. Families whose template works on strings
        override `encode_prompt_row` instead."""
        raise NotImplementedError

    def encode_prompt_row(self, document: Document, form: AnswerForm) -> TokenRow:
        """The prompt as the family writes it where an answer of this form is asked for."""
        return self.wrap_prompt(self.encode_segments(document, answer=False))

    def answer_text_ids(self, document: Document, index: int) -> list[int]:
        """Tokens of text segment `index` of an answer; families with rules about the neighbours of pictures override it."""
        segment = document.segments[index]
        assert isinstance(segment, Text)
        return self.encode_text(segment.text)

    def lead_in_ids(self, document: Document, index: int) -> list[int]:
        """Text tokens of an answer before `begin_id` of image segment `index` that belong to no text segment."""
        return []

    def target_pixels(self, image: PIL.Image.Image) -> Tensor:
        """A picture to be drawn, as `encode_images` takes it: (3, S, S) float32 in -1..1."""
        return to_pixels([image], self.image_spec.pixel_size)[0]

    def prompt_pixels(self, image: PIL.Image.Image) -> Tensor:
        """A picture that is read, as the family prepares it. Raises ValueError for one that it cannot."""
        return self.target_pixels(image)

    def picture_row(self, image: Image) -> TokenRow:
        """A picture in a prompt; for a stand-in as many positions as the shortest picture takes."""
        return self.stand_in_row() if image is STAND_IN else self.prompt_image_row(image)

    def stand_in_row(self) -> TokenRow:
        return self.image_spec.row(self.image_codes(STAND_IN), chosen=False, step=-1, begin_step=-1)

    def prompt_image_row(self, image: Image) -> TokenRow:
        """A picture in a prompt, from `begin_id` to its end."""
        return self.image_spec.row(self.image_codes(image), chosen=False, step=-1, begin_step=-1)

    # --- files and training --------------------------------------------------------------------------------------
    @property
    @abc.abstractmethod
    def language_model(self) -> nn.Module:
        """The decoder stack (a transformers model with `.layers`): where LoRA and gradient checkpointing apply."""

    @property
    def lora_root(self) -> nn.Module:
        """The module that PEFT wraps: the family's own Hugging Face class, so that adapters load into its home code."""
        return self.language_model

    @abc.abstractmethod
    def frozen_modules(self) -> list[nn.Module]:
        """What no training touches: image tokenizer, vision encoder."""

    @abc.abstractmethod
    def save_pretrained(self, folder: Path) -> None: ...

    @classmethod
    @abc.abstractmethod
    def load(
        cls, folder: Path, *, dtype: torch.dtype | None = None, load_in_4bit: bool = False, image_size: int | None = None
    ) -> UnifiedModel:
        """The model of a checkpoint folder, on the CPU, in eval mode, frozen modules frozen.

        Args:
            dtype: of the weights; None keeps the checkpoint's own.
            load_in_4bit: the language model's matrices in NF4 (bitsandbytes).
            image_size: pixels a side of drawn pictures, for families that can choose; None keeps the family's own.
        Raises:
            ValueError naming the file that is missing, truncated or does not fit.
        """

    def check_world(self, world: str) -> None:
        """Raises ValueError where the words and pictures of a built-in world (`worlds/`) are not those that this model knows. Families
        that read any text and picture have nothing to refuse."""

    # --- written once for all families ------------------------------------------------------------------------------
    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the embeddings; matrices may be quantised."""
        return self.embed_text(torch.zeros(1, dtype=torch.long, device=self.device)).dtype

    def run(self, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """`function` of this model. What computes with its weights enters here, so that they are there where they are sharded."""
        return function(self, *arguments, **options)

    @property
    def is_sharded(self) -> bool:
        """Whether processes hold parts of the weights."""
        return self.sharding is not None and not self.sharding.replicated

    def gathered(self) -> contextlib.AbstractContextManager[None]:
        """All weights at hand, for many calls of `run`."""
        return contextlib.nullcontext() if self.sharding is None else self.sharding.gathered()

    def legal_text(self) -> Tensor:
        """(V,) bool: what an answer's text may contain. Kept, because families with large vocabularies take long to say."""
        if self._legal is None or self._legal.device != self.device:
            legal = torch.ones(self.vocab_size, dtype=torch.bool)
            legal[self.forbidden_text_ids()] = False
            self._legal = legal.to(self.device)
        return self._legal

    def backward(self, loss: Tensor, *, more: bool = False) -> None:
        """Gradients of a loss, added to those that are there. `more`: another pass follows before the optimizer's step, and copies of the
        model in other processes may be heard then."""
        if self.sharding is not None:
            self.sharding.sum_copies(now=not more)
        loss.backward()

    def save(self, folder: Path) -> None:
        """A checkpoint that `load_model` reads: the adapter alone where one is attached, the whole model otherwise."""
        write = self.save_pretrained if self.adapter is None else self.adapter.save
        write(folder)

    def freeze(self) -> None:
        for module in self.frozen_modules():
            module.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> UnifiedModel:
        """Frozen modules stay in eval mode: some image tokenizers overwrite their codebook in training mode. 4-bit matrices stay
        in training mode: in eval mode bitsandbytes repacks them on a CPU, with scales rounded to bfloat16, and the sampler
        would use other weights than the trainer."""
        super().train(mode)
        for module in self.frozen_modules():
            module.eval()
        for module in self.modules():
            if type(module).__name__ == "Linear4bit":
                module.training = True
        return self

    def embed(self, batch: TokenBatch) -> Tensor:
        """Input embeddings of text tokens, image codes and prompt pictures, (B, T, H)."""
        embeds = self.embed_text(batch.text_ids)
        images = batch.image_mask.nonzero(as_tuple=True)
        if len(images[0]):
            embeds = embeds.index_put(images, self.embed_codes(batch.codes[images]).to(embeds.dtype))
        if any(batch.pixels):
            pictures = [picture for row in batch.pixels for picture in row]
            unique = {id(picture): picture for picture in pictures}  # a group's prompt is one object: encoded once
            places = {key: place for place, key in enumerate(unique)}
            features = self.prompt_image_embeds(torch.stack(list(unique.values())).to(embeds))  # (U, F, H)
            ordered = features[[places[id(picture)] for picture in pictures]]
            embeds = embeds.index_put(batch.feature_mask.nonzero(as_tuple=True), ordered.flatten(0, 1).to(embeds.dtype))
        return embeds

    def image_codes(self, image: Image) -> Tensor:
        """(num_positions, D) codes of an image segment, encoding its pixels if it has no codes."""
        if image is STAND_IN:
            return torch.zeros(self.image_spec.num_positions, self.image_spec.depth, dtype=torch.long)
        if image.codes is not None:
            return image.codes
        assert image.pixels is not None
        return self.codes_of(self.target_pixels(image.pixels))

    @torch.no_grad()
    def codes_of(self, pixels: Tensor) -> Tensor:
        """(num_positions, D) codes, on the CPU, of one picture as `encode_images` takes it; from `code_cache` where it is there."""

        def encode() -> Tensor:
            return self.encode_images(pixels[None].to(self.device))[0].cpu()

        return encode() if self.code_cache is None else self.code_cache(pixels, encode)

    def encode_segments(self, document: Document, *, answer: bool, form: AnswerForm | None = None, num_given: int = 0) -> TokenRow:
        """Segments to tokens. In an answer each segment is a step, and everything is a choice but what the family or `form` prescribes and
        the first `num_given` segments (a text that goes on where a given one ends is of its step).

        Raises ValueError for text that is no valid Unicode, and an answer that is not of the form.
        """
        depth, rows = self.image_spec.depth, []
        if answer:
            check_form(document, form, num_given)
        segments = document.segments
        goes_on = 0 < num_given < len(segments) and isinstance(segments[num_given - 1], Text) and isinstance(segments[num_given], Text)
        step = 0
        for index, segment in enumerate(segments):
            step = index - (goes_on and index >= num_given)
            chosen = answer and index >= num_given
            if isinstance(segment, Text):
                valid_text(segment.text)
                ids = self.answer_text_ids(document, index) if answer else self.encode_text(segment.text)
                rows.append(TokenRow.text(ids, depth, chosen=chosen, step=step if answer else -1))
            elif not answer:
                rows.append(self.picture_row(segment))
            else:
                begins_a_row = index == 0 or isinstance(segments[index - 1], Image)
                begin_step = step if begins_a_row else step - 1  # the choice to draw ends the text step
                begin = TokenRow.text(self.lead_in_ids(document, index), depth, chosen=chosen, step=begin_step)
                image = self.image_spec.row(self.image_codes(segment), chosen=chosen, step=step, begin_step=begin_step)
                if form is AnswerForm.IMAGE and index == len(segments) - 1:  # the choice to draw is none
                    begin, image = begin.forced(), TokenRow.concat([image[:1].forced(), image[1:]])
                rows += [begin, image]
        if answer:
            ends = not (form is not None and form.ends_with_image)
            rows.append(TokenRow.text(self.answer_end_ids, depth, chosen=ends, step=step))
        return TokenRow.concat(rows) if rows else TokenRow.text([], depth)

    def encode_beginning(self, form: AnswerForm, given: Document) -> TokenRow:
        """What of an answer stands before the first choice: its given beginning, and what begins a picture that the form prescribes."""
        draws = form is AnswerForm.IMAGE
        row = self.encode_segments(Document((*given, STAND_IN)) if draws else given, answer=True)
        behind = len(self.answer_end_ids) + (len(self.image_spec.layout) if draws else 0)
        return row[: len(row) - behind].forced()

    def encode_prompt(self, document: Document, form: AnswerForm | None = None, given: Document = NOTHING) -> TokenRow:
        """The prompt, and of the answer what stands before its first choice (`encode_beginning`).

        `form`: of the answer; None: free. `given`: the segments with which the answer begins.

        Raises ValueError where that leaves no room for an answer in the context, and for text that is no valid Unicode.
        """
        for segment in document:
            if isinstance(segment, Text):
                valid_text(segment.text)
        row = self.encode_prompt_row(document, form or AnswerForm.FREE)
        if form is not None or len(given):
            row = TokenRow.concat([row, self.encode_beginning(form or AnswerForm.FREE, given)])
            row = dataclasses.replace(row, form=form, given=given.segments)
        if len(row) >= self.max_positions:
            count = len(document.images) + len(given.images)
            pictures = f" ({count} pictures of {self.image_spec.length} positions each)" if count else ""
            raise TooLong(f"the prompt has {len(row)} positions{pictures} and the model's context {self.max_positions}; shorten the prompt")
        return row

    def encode_example(
        self, prompt: Document, answer: Document, *, form: AnswerForm | None = None, given: Document = NOTHING, unconditional: bool = False
    ) -> TokenRow:
        """Prompt and answer for supervised training; `unconditional` puts the unconditional prompt in the place of the
        real one (caption dropout).

        `answer`: what comes behind the `given` beginning; of the form, where one is asked for.

        Raises ValueError where the example is longer than the context or the answer is not of the form, and for text that is no valid
        Unicode.
        """
        begin = self.encode_prompt(prompt, form)
        begin = begin[: begin.prompt_length]
        if unconditional:
            full = begin
            kept = self.unconditional_row(len(full), lambda: full)
            begin = TokenRow.text(self.unconditional_prompt(len(full)), self.image_spec.depth) if kept is None else kept
        answer_row = self.encode_segments(Document((*given, *answer)), answer=True, form=form, num_given=len(given))
        row = dataclasses.replace(TokenRow.concat([begin, answer_row]), form=form)
        if len(row) > self.max_positions:
            raise TooLong(
                f"the example has {len(row)} positions ({len(answer.images)} pictures in the answer) and the model's context "
                f"{self.max_positions}; shorten it"
            )
        return row


def check_image_size(asked: int | None, own: int, family: str) -> None:
    """Raises ValueError where another size is asked of a family that draws one size only."""
    if asked is not None and asked != own:
        raise ValueError(f"image_size={asked}, but {family} draws pictures of {own} pixels a side only; leave it out")
