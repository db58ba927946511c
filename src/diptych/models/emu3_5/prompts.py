"""How Emu3.5's prompts are written, and how its release samples, by the task that a prompt names."""

from __future__ import annotations

from itertools import groupby

from diptych.config import ImageSampling, SamplingParams, TextSampling
from diptych.document import Document, Image, Segment, Text
from diptych.models.emu3_5.config import Task
from diptych.models.emu3_5.tokenizer import BEGIN_ANSWER, BOS
from diptych.tokens import AnswerForm

SYSTEM = BOS + "You are a helpful assistant"
INTERLEAVED = " Please generate a response with interleaved text and images."  # howto's alone
UNCONDITIONAL = f"{SYSTEM}. USER: "  # then the pictures of the prompt
ASSISTANT = f" ASSISTANT: {BEGIN_ANSWER}"


def _sampling(text: TextSampling, image_top_k: int, guidance: float) -> SamplingParams:
    return SamplingParams(text=text, image=ImageSampling(top_k=image_top_k, guidance_scale=guidance))


_TEXT = TextSampling(top_k=1024, top_p=0.9)
SAMPLING: dict[Task, SamplingParams] = {
    "story": _sampling(_TEXT, 10240, 3.0),
    "howto": _sampling(TextSampling(temperature=0.7, top_k=200, top_p=0.8), 10240, 3.0),
    "explore": _sampling(_TEXT, 10240, 3.0),
    "vla": _sampling(_TEXT, 10240, 3.0),
    "t2i": _sampling(_TEXT, 5120, 5.0),
    "x2i": _sampling(_TEXT, 5120, 3.0),
}


def task_of(task: Task, form: AnswerForm, has_pictures: bool) -> Task:
    """A picture alone is asked for in the release's own words for that."""
    if form is not AnswerForm.IMAGE or task in ("t2i", "x2i"):
        return task
    return "x2i" if has_pictures else "t2i"


def before_question(task: Task) -> str:
    return f"{SYSTEM} for {task} task.{INTERLEAVED if task == 'howto' else ''} USER: "


def in_order(document: Document, task: Task) -> list[Segment]:
    """A question and its pictures as the release has them: all pictures together, behind the words, and before them under x2i.

    Where texts stand between pictures, which it never writes, all stays in its place. Texts that touch are joined by a space.
    """
    runs = [list(run) for _, run in groupby(document, type)]
    if len(runs) == 2:
        runs.sort(key=lambda run: isinstance(run[0], Image) is (task != "x2i"))
    joined: list[Segment] = []
    for run in runs:
        joined += run if isinstance(run[0], Image) else [Text(Document(tuple(run)).text)]
    return joined
