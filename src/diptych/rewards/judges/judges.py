"""The judges as rewards: which parts of a document are asked about, and what a raw score becomes.

Each value is (raw - lowest) / (highest - lowest), so 0..1, and belongs to one step; None where a judge says nothing of a step;
NaN where it owes a value that could not be had. Causes are counted and logged.
"""

from __future__ import annotations

import functools
import logging
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

from diptych.config import build
from diptych.document import Document, Image, Text
from diptych.rewards.captions import Compared, compared
from diptych.rewards.judges.client import Answer, JudgeClient, Question
from diptych.rewards.judges.options import JudgeOptions, UnifiedRewardOptions
from diptych.rewards.judges.prompts import AXES, document_messages, picture_axes_messages, picture_messages, text_critic_messages
from diptych.rewards.judges.replies import mean_score, numbered_scores, one_score

logger = logging.getLogger(__name__)
Asked = tuple[list[int], Question]  # the steps that a question is about (0 is the first), and the question


class Judge(ABC):
    """A reward behind a server. Made once for a recipe's entry, called once a batch.

    `listen`, if set, is called with every question and its answer.
    """

    name: str
    lowest: float
    highest: float
    options_class: ClassVar[type[JudgeOptions]] = JudgeOptions

    def __init__(self, **options: Any) -> None:
        """Raises ValueError naming each wrong option."""
        if "api_key" in options:
            raise ValueError(f"reward {self.name!r}: a key is read from the environment only; name its variable with api_key_env")
        self.options = build(self.options_class, options)
        self.client = JudgeClient(self.options)
        self.listen: Callable[[Question, Answer], None] | None = None
        self._faults: Counter[str] = Counter()
        self._last = ""

    def about(self) -> str:
        """One line: the model and its revision, where it runs, and what a raw score becomes."""
        given = self.options
        revision = f"at revision {given.revision}" if given.revision else "(no revision named)"
        span = self.highest - self.lowest
        value = f"(raw - {self.lowest:g}) / {span:g}" if self.lowest else f"raw / {span:g}"
        return f"{self.name}: {given.model} {revision} behind {given.base_url}; raw {self.lowest:g}..{self.highest:g}; value {value}"

    @abstractmethod
    def questions(self, prompt: Document, answer: Document, pictures: list[Compared]) -> list[Asked]:
        """What is asked about one document. `pictures`: those of it that have words, with these."""

    async def __call__(
        self, prompts: list[list[dict[str, Any]]], completions: list[list[dict[str, Any]]], **columns: Any
    ) -> list[list[float | None]]:
        values: list[list[float | None]] = []
        asked: list[tuple[int, list[int], Question]] = []
        pictures = compared(prompts, completions, getattr(self.options, "against", "text"), **columns)
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            answer = Document.from_blocks(completion[-1]["content"])
            values.append([None] * len(answer))
            for steps, question in self.questions(Document.from_blocks(prompt[-1]["content"]), answer, pictures[row]):
                asked.append((row, steps, question))
        answers = await self.client.ask([question for _, _, question in asked])
        before = self._faults.total()
        for (row, steps, question), found in zip(asked, answers, strict=True):
            if self.listen:
                self.listen(question, found)
            raws = found.values if found.values is not None else [None] * len(steps)
            for step, raw in zip(steps, raws, strict=True):
                values[row][step] = math.nan if raw is None else (raw - self.lowest) / (self.highest - self.lowest)
                if raw is None:
                    self._faults[found.cause or "out_of_range"] += 1
                    self._last = found.detail or f"a score outside {self.lowest:g}..{self.highest:g}: {found.reply!r:.160}"
        lost = self._faults.total() - before
        if lost:
            owed = sum(len(steps) for _, steps, _ in asked)
            label = f"{self.name} ({self.options.model})" if self.options.model else self.name
            logger.warning("reward %s: %d of %d values are missing; %s; last: %s", label, lost, owed, self._shown(), self._last)
        return values

    def take_faults(self) -> tuple[dict[str, int], str]:
        """Missing values by cause since the last time this was called, and what happened last."""
        taken, shown = dict(self._faults), f"{self._shown()}; last: {self._last}"
        self._faults.clear()
        return taken, shown

    def _shown(self) -> str:
        return ", ".join(f"{cause} {count}" for cause, count in self._faults.most_common())


class LLMTextCritic(Judge):
    """`llm_text_critic`: each text against the prompt with its pictures, by LLaVA-Critic or another model. Raw 0..100.

    None for pictures and for empty texts (the format reward sees to those).
    """

    name, lowest, highest = "llm_text_critic", 0.0, 100.0

    def questions(self, prompt: Document, answer: Document, pictures: list[Compared]) -> list[Asked]:
        found: list[Asked] = []
        for step, segment in enumerate(answer):
            if isinstance(segment, Text) and segment.text.strip():
                judged = f"{prompt.text}\n{segment.text}"
                read = functools.partial(one_score, low=self.lowest, high=self.highest, judged=judged)
                found.append(([step], Question(text_critic_messages(prompt, segment.text), read)))
        return found


class UnifiedReward(Judge):
    """`unified_reward`: each picture against its caption, and its quality, by a UnifiedReward model. Raw 1..5: one score, or with
    `version: v2` the mean of three.

    None for texts and for pictures without a caption.
    """

    name, lowest, highest = "unified_reward", 1.0, 5.0
    options: UnifiedRewardOptions
    options_class = UnifiedRewardOptions

    def questions(self, prompt: Document, answer: Document, pictures: list[Compared]) -> list[Asked]:
        return [([step], self._question(caption, picture)) for step, caption, picture in pictures]

    def _question(self, caption: str, picture: Image) -> Question:
        if self.options.version == "v2":
            mean = functools.partial(mean_score, axes=AXES, low=self.lowest, high=self.highest, judged=caption)
            return Question(picture_axes_messages(caption, picture), mean)
        one = functools.partial(one_score, low=self.lowest, high=self.highest, judged=caption)
        return Question(picture_messages(caption, picture), one)


class DocumentJudge(Judge):
    """`document_judge`: the whole document with its pictures in one question; a score for every step. Raw 0..10."""

    name, lowest, highest = "document_judge", 0.0, 10.0

    def questions(self, prompt: Document, answer: Document, pictures: list[Compared]) -> list[Asked]:
        if not len(answer):
            return []
        messages, tag = document_messages(prompt, answer)
        read = functools.partial(numbered_scores, tag=tag, count=len(answer), low=self.lowest, high=self.highest)
        return [(list(range(len(answer))), Question(messages, read))]
