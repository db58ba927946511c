"""`text_likelihood`: how likely a frozen model finds each text when it is asked to answer in words alone.

A unified model can often say in words what it cannot yet tell and draw in turn. Its own answer in words then judges the texts of its
documents: no critic has to be trained, and what the model knows about words is not lost on the way to pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field

from diptych.config import Config, build
from diptych.document import Document, Text
from diptych.models import load_model
from diptych.models.codes import RecentCodes
from diptych.runtime import pick_device
from diptych.sampling.logprobs import score
from diptych.tokens import TokenRow, collate


class TextLikelihoodOptions(Config):
    may_change: ClassVar[frozenset[str]] = frozenset({"device", "batch_size"})
    model: str = Field("storyboard", min_length=1, description="packaged name, checkpoint folder, or hub id")
    instruction: str = Field("say it in words .", description="stands before the prompt and asks for words alone; may be empty")
    per_token: bool = Field(False, description="the geometric mean over the tokens of a text, for texts that can be said in many ways")
    device: str = Field("auto", description="auto: the GPU where there is one")
    dtype: str = Field("auto", description="auto (the checkpoint's own), float32 or bfloat16")
    batch_size: int = Field(48, ge=1, description="documents in one forward pass")


class TextLikelihood:
    """The value of a text is exp(sum of log p) of its tokens and of the choice after it (the next text, or the end), in 0..1; with
    `per_token` exp(mean of log p).

    log p is the plain likelihood under the model, given the instruction, the prompt with its pictures, and the texts before; pictures of
    the answer are not shown to it. The choice after a text counts because a text that stops early is no right text. Says nothing of
    pictures and empty texts; a document that does not fit the model's context is missing.
    """

    options_class = TextLikelihoodOptions

    def __init__(self, **options: Any) -> None:
        """Raises ValueError for wrong options and for a model that cannot be loaded."""
        self.options = build(TextLikelihoodOptions, options)
        self.model = load_model(self.options.model, dtype=self.options.dtype).to(pick_device(self.options.device)).requires_grad_(False)
        self.model.code_cache = RecentCodes()  # a group has one prompt
        self._too_long, self._told = 0, ""

    def about(self) -> str:
        return (
            f"text_likelihood: each text, by {self.options.model} asked {self.options.instruction!r}; "
            f"value exp of the {'mean' if self.options.per_token else 'sum'} of log p, 0..1"
        )

    def take_faults(self) -> tuple[dict[str, int], str]:
        """Missing values by cause since the last time this was called, and what happened last."""
        found = {"too_long": self._too_long} if self._too_long else {}
        self._too_long = 0
        return found, self._told if found else ""

    def __call__(self, prompts: list[list[dict[str, Any]]], completions: list[list[dict[str, Any]]], **_: Any) -> list[list[float | None]]:
        """Per step; None for pictures and empty texts, NaN for every text of a document that is too long."""
        values: list[list[float | None]] = []
        rows: list[TokenRow] = []
        owners: list[tuple[int, list[int]]] = []  # of each row: its document, and the places of its texts
        for prompt, completion in zip(prompts, completions, strict=True):
            asked, answer = Document.from_blocks(prompt[-1]["content"]), Document.from_blocks(completion[-1]["content"])
            texts = {place: s.text for place, s in enumerate(answer) if isinstance(s, Text) and s.text.strip()}
            values.append([float("nan") if place in texts else None for place in range(len(answer))])
            if not texts:
                continue
            try:
                rows.append(self._row(asked, list(texts.values())))
                owners.append((len(values) - 1, list(texts)))
            except ValueError as error:  # longer than the context
                self._too_long, self._told = self._too_long + len(texts), str(error)
        for begin in range(0, len(rows), self.options.batch_size):
            some = slice(begin, begin + self.options.batch_size)
            for (document, places), found in zip(owners[some], self._values(rows[some]), strict=True):
                for place, value in zip(places, found, strict=True):
                    values[document][place] = value
        return values

    def _row(self, asked: Document, texts: Sequence[str]) -> TokenRow:
        """The prompt behind the instruction, and the texts as one answer in which each is a step."""
        lead = (Text(self.options.instruction),) if self.options.instruction else ()
        spaced = [Text(text if k == 0 else f" {text}") for k, text in enumerate(texts)]
        return self.model.encode_example(Document((*lead, *asked.segments)), Document(tuple(spaced)))

    @torch.no_grad()
    def _values(self, rows: Sequence[TokenRow]) -> list[list[float]]:
        logprobs = score(self.model, collate(rows).to(self.model.device)).logprobs.sum(-1).cpu()  # (B, T); text stands in the first code
        found = []
        for row, line in zip(rows, logprobs, strict=True):
            chosen = row.completion_mask.nonzero()[:, 0]
            steps, line = row.step_ids[chosen], line[chosen]
            values = []
            for step in range(int(steps[-1]) + 1):
                last = int((steps <= step).sum())
                counted = line[int((steps < step).sum()) : last + 1]  # and the choice after it; at the end there is none
                values.append(float((counted.mean() if self.options.per_token else counted.sum()).exp()))
            found.append(values)
        return found
