"""Which words a picture of an answer is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from diptych.document import Document, Image
from diptych.forms import AnswerForm

Against = Literal["text", "prompt"]
Compared = tuple[int, str, Image]  # step, words, picture
AGAINST = "text: the text just before the picture, and for answers of form `image` what was asked for; prompt: always what was asked for"


def check_against(against: str = "text", **_: Any) -> None:
    if against not in ("text", "prompt"):
        raise ValueError(f"against is {against!r}; allowed are text and prompt ({AGAINST})")


def no_values(completions: Sequence[list[dict[str, Any]]]) -> list[list[float | None]]:
    """None for every step of every answer."""
    contents = [messages[-1]["content"] for messages in completions]
    return [[None] * (1 if isinstance(content, str) else len(content)) for content in contents]


def compared(
    prompts: Sequence[list[dict[str, Any]]] | None, completions: Sequence[list[dict[str, Any]]], against: Against = "text",
    answer_form: Sequence[str] | None = None, caption: Sequence[Any] | None = None, **_: Any,
) -> list[list[Compared]]:  # fmt: skip
    """For each answer its pictures that are compared, with their words.

    What was asked for is the column `caption` where the record has one (of a list the first), otherwise the prompt's text. Under `prompt`
    it is asked of a plan's picture too: a plan must not be able to make its own task easier. Pictures without words are left out.

    Raises ValueError for another `against`.
    """
    check_against(against)
    found = []
    for row, messages in enumerate(completions):
        answer = Document.from_blocks(messages[-1]["content"])
        alone = answer_form is not None and answer_form[row] == AnswerForm.IMAGE and isinstance((*answer, None)[0], Image)
        if against == "text" and not alone:
            found.append(answer.captions())
            continue
        captions = [None] if caption is None else caption[row] if isinstance(caption[row], list) else [caption[row]]
        words = next((one for one in captions if isinstance(one, str) and one.strip()), None)
        if words is None:
            words = Document.from_blocks(prompts[row][-1]["content"]).text if prompts is not None else ""
        found.append([(place, words, segment) for place, segment in enumerate(answer) if isinstance(segment, Image) and words.strip()])
    return found
