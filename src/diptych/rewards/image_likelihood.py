"""`image_likelihood`: how likely a frozen model finds each picture, given the picture before it and the text that leads to it.

A unified model can often make the next picture of one picture and one sentence before it can do so in a document of its own. Its own
likelihood then judges the pictures of its documents, remembers what was there, and no reward model has to be trained.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field

from diptych.config import Config, ImageSampling, SamplingParams, build
from diptych.document import Document, Image, Text
from diptych.models import load_model
from diptych.models.codes import RecentCodes
from diptych.runtime import pick_device
from diptych.sampling.logprobs import score
from diptych.tokens import AnswerForm, TokenRow, collate


class ImageLikelihoodOptions(Config):
    may_change: ClassVar[frozenset[str]] = frozenset({"device", "batch_size"})
    model: str = Field(
        "storyboard_terse", min_length=1, description="packaged name, checkpoint folder, or hub id; of the policy's image codes"
    )
    instruction: str = Field("draw the next picture .", description="stands behind the text and asks for the picture; may be empty")
    memory: int = Field(1, ge=0, description="how many of the pictures before it are shown; 0: the text alone")
    per_code: bool = Field(False, description="the geometric mean over the codes of a picture, for pictures that can be drawn in many ways")
    guidance_scale: float = Field(1.0, ge=0, description="1: the plain likelihood; otherwise that of the guided distribution")
    from_pixels: bool = Field(False, description="encode pictures that come without codes; a decoded picture may get other codes")
    image_size: int | None = Field(None, ge=1, description="pixels a side of the policy's pictures, for families that can choose (Emu3)")
    device: str = Field("auto", description="auto: the GPU where there is one")
    dtype: str = Field("auto", description="auto (the checkpoint's own), float32 or bfloat16")
    batch_size: int = Field(96, ge=1, description="pictures in one forward pass")


class ImageLikelihood:
    """The value of a picture is exp(sum of log p) of its codes, in 0..1; with `per_code` exp(mean of log p).

    log p is the likelihood under the model, asked for one picture (`AnswerForm.IMAGE`): it sees the last `memory` pictures before it, of
    the prompt or of the answer, then the text just before it with the instruction behind. So an error is charged once, to the picture that
    made it. The sum punishes one wrong code as hard as many; it underflows where a picture has hundreds of codes, and there `per_code` is
    the choice. Guidance makes likely pictures likelier: values go towards 0 and 1, and differences between two right pictures vanish.

    Codes are taken as they were sampled. Encoding a decoded picture can give other codes, which no model finds likely, so a picture without
    codes is missing unless `from_pixels` asks for it. Says nothing of texts, and of pictures without a text before them; a picture whose
    row does not fit the model's context is missing.
    """

    options_class = ImageLikelihoodOptions

    def __init__(self, **options: Any) -> None:
        """Raises ValueError for wrong options and for a model that cannot be loaded."""
        self.options = build(ImageLikelihoodOptions, options)
        loaded = load_model(self.options.model, dtype=self.options.dtype, image_size=self.options.image_size)
        self.model = loaded.to(pick_device(self.options.device)).requires_grad_(False)
        self.model.code_cache = RecentCodes()  # a group has one prompt
        self._faults: Counter[str] = Counter()
        self._told = ""

    def about(self) -> str:
        seen = (
            f"the text and {self.options.memory} picture{'s' * (self.options.memory != 1)} before it" if self.options.memory else "the text"
        )
        return (
            f"image_likelihood: each picture given {seen}, by {self.options.model}, guidance {self.options.guidance_scale:g}; "
            f"value exp of the {'mean' if self.options.per_code else 'sum'} of log p, 0..1"
        )

    def take_faults(self) -> tuple[dict[str, int], str]:
        """Missing values by cause since the last time this was called, and what happened last."""
        found, self._faults = dict(self._faults), Counter()
        return found, self._told if found else ""

    def __call__(
        self, prompts: list[list[dict[str, Any]]], completions: list[list[dict[str, Any]]],
        completion_documents: Sequence[Document] | None = None, **_: Any,
    ) -> list[list[float | None]]:  # fmt: skip
        """Per step; None for texts and pictures without a text before them, NaN for pictures that cannot be judged.

        `completion_documents`: the same answers with the codes of their pictures.
        """
        answers = completion_documents or [Document.from_blocks(messages[-1]["content"]) for messages in completions]
        values: list[list[float | None]] = []
        rows: list[TokenRow] = []
        owners: list[tuple[int, int]] = []  # of each row: its document, and the place of its picture
        for prompt, answer in zip(prompts, answers, strict=True):
            earlier = Document.from_blocks(prompt[-1]["content"]).images
            captions = {place: text for place, text, _ in answer.captions() if isinstance(answer.segments[place - 1], Text)}
            values.append([None] * len(answer))
            for place, segment in enumerate(answer):
                if not isinstance(segment, Image):
                    continue
                if place in captions:
                    values[-1][place] = float("nan")
                    try:
                        rows.append(self._row(earlier, captions[place], segment))
                        owners.append((len(values) - 1, place))
                    except _CannotBeJudged as error:
                        self._faults[error.cause] += 1
                        self._told = str(error)
                earlier = [*earlier, segment]
        for begin in range(0, len(rows), self.options.batch_size):
            some = slice(begin, begin + self.options.batch_size)
            for (document, place), value in zip(owners[some], self._values(rows[some]), strict=True):
                values[document][place] = value
        return values

    def _row(self, earlier: Sequence[Image], text: str, picture: Image) -> TokenRow:
        shown = earlier[len(earlier) - min(self.options.memory, len(earlier)) :]
        if not self.options.from_pixels and picture.codes is None:
            raise _CannotBeJudged("no_codes", "a picture came without the codes that were sampled; set from_pixels to have it encoded")
        expected, codes = (self.model.image_spec.num_positions, self.model.image_spec.depth), picture.codes
        if codes is not None and tuple(codes.shape) != expected:
            raise _CannotBeJudged(
                "other_codes",
                f"a picture has codes {tuple(codes.shape)}, and {self.options.model} draws {expected}: they are of another family",
            )
        asked = Document((*shown, Text(f"{text} {self.options.instruction}".strip())))
        try:
            return self.model.encode_example(asked, Document((picture,)), form=AnswerForm.IMAGE)
        except ValueError as error:  # longer than the context
            raise _CannotBeJudged("too_long", str(error)) from error

    @torch.no_grad()
    def _values(self, rows: Sequence[TokenRow]) -> list[float]:
        batch = collate(rows).to(self.model.device)
        guided = self.options.guidance_scale != 1
        params = SamplingParams(image=ImageSampling(guidance_scale=self.options.guidance_scale), form=AnswerForm.IMAGE, max_images=1)
        logprobs = score(self.model, batch, params if guided else None).logprobs  # (B, T, D)
        chosen = batch.choice_mask & batch.image_mask[..., None]
        total = (logprobs * chosen).sum((1, 2))
        return (total / chosen.sum((1, 2)) if self.options.per_code else total).exp().tolist()


class _CannotBeJudged(ValueError):
    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause
