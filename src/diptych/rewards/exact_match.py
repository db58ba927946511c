"""`exact_match`: is an answer in words the right one? For questions whose answer is known."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Any

from diptych.document import Document

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation, " "))


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and more than single spaces.

    Source: SQuAD's evaluation (arXiv:1606.05250); punctuation becomes a space here, so that "1,5" and "15" stay apart.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(
    completions: list[list[dict[str, Any]]], solution: Sequence[str | Sequence[str] | None], pattern: str | None = None, **_: Any
) -> list[float | None]:
    """One value per document: 1 where its text is the column `solution` (a text, or a list of which any will do), else 0; None where the
    record has no solution. An answer with a picture in it is wrong.

    `pattern`: a regular expression that finds the answer in the text, in its first group, such as `<answer>(.*?)</answer>`; 0 where it
    finds none. Raises ValueError for one without a group.
    """
    find = None if pattern is None else re.compile(pattern, re.DOTALL)
    if find is not None and find.groups < 1:
        raise ValueError(f"pattern {pattern!r} has no group; put what is the answer in parentheses")
    return [_value(Document.from_blocks(said[-1]["content"]), right, find) for said, right in zip(completions, solution, strict=True)]


def _value(answer: Document, right: str | Sequence[str] | None, find: re.Pattern[str] | None) -> float | None:
    if right is None:
        return None
    said: str | None = answer.text
    if find is not None:
        match = find.search(answer.text)
        said = match[1] if match else None
    rights = [right] if isinstance(right, str) else right
    return float(said is not None and not answer.images and normalised(said) in {normalised(one) for one in rights})
