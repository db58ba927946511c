"""`exact_match`: is an answer in words the right one? For questions whose answer is known."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Any

from diptych.document import Document

Solution = str | float | Sequence[str | float] | None
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_SIGN = re.compile(r"(?<![\w.])-(?=\.?\d)")
_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation, " "))


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and more than single spaces; what is nothing else ("A", "+") stays as it is.

    Source: SQuAD's evaluation (arXiv:1606.05250), but punctuation becomes a space, so that "1,5" and "15" stay apart, and a sign before a
    number is a word.
    """
    lower = text.lower().strip()
    words = " ".join(_SIGN.sub("minus ", lower).translate(_PUNCTUATION).split())
    return " ".join(_ARTICLES.sub(" ", words).split()) or words or lower


def exact_match(
    completions: list[list[dict[str, Any]]], solution: Sequence[Solution], pattern: str | None = None, **_: Any
) -> list[float | None]:
    """One value per document: 1 where its text is the column `solution` (a text or a number, or a list of which any will do), else 0; None
    where the record has no solution. An answer with a picture in it is wrong.

    `pattern`: a regular expression that finds the answer in the text, in its first group, such as `<answer>(.*?)</answer>`; 0 where it
    finds none. Raises ValueError for one that is none, or has no group, and for solutions of other types.
    """
    find = _compiled(pattern)
    return [_value(Document.from_blocks(said[-1]["content"]), right, find) for said, right in zip(completions, solution, strict=True)]


def _compiled(pattern: str | None = None, **_: Any) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    try:
        find = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from error
    if find.groups < 1:
        raise ValueError(f"pattern {pattern!r} has no group; put what is the answer in parentheses")
    return find


exact_match.check_options = _compiled  # type: ignore[attr-defined]


def _value(answer: Document, right: Solution, find: re.Pattern[str] | None) -> float | None:
    if right is None or right != right:  # NaN is how pandas writes null
        return None
    said: str | None = answer.text
    if find is not None:
        match = find.search(answer.text)
        said = match[1] if match else None
    rights = [_text(one) for one in (right if isinstance(right, list | tuple) else [right])]
    return float(said is not None and not answer.images and normalised(said) in {normalised(one) for one in rights})


def _text(solution: Any) -> str:
    if isinstance(solution, bool) or not isinstance(solution, str | int | float):
        raise ValueError(f"a solution is {solution!r:.80}; it is a text, a number, or a list of these")
    return f"{solution:g}" if isinstance(solution, float) else str(solution)
