"""Numbers out of a judge's reply. What is not unambiguous is refused: a wrong value is worse than a missing one."""

from __future__ import annotations

import json
import re
from typing import Any

NUMBER = r"[-+]?\d+(?:\.\d+)?"
LABEL = r"(?:(?:the|my|final|overall|total)\s+){0,2}(?:score|rating)"
# A line that is a verdict and nothing else: "Score: 85", "**Final Score:** 4.5", "Score: 85/100", "The score is 85 out of 100."
VERDICT_LINE = re.compile(rf"^[ \t*_#]*{LABEL}[ \t*_]*(?::|=|is\b)[ \t*_]*({NUMBER})[ \t*_]*(?:(?:/|out of)[ \t]*(\d+))?[ \t*_.]*$", re.I)
VERDICT_BEGIN = re.compile(rf"^[ \t*_#]*{LABEL}[ \t*_]*(?::|=|is\b)[ \t*_]*[-+]?\d", re.I)
SAID_IN_TEXT = re.compile(rf"(?:score|rating)\W{{0,5}}(?:is|of)?\W{{0,5}}({NUMBER})|({NUMBER})\s*(?:/|out of)\s*\d", re.I)
REFUSAL = re.compile(r"^\W*(?:i[' ’]?a?m (?:very )?sorry|sorry\b|i can(?:no|['’])t|i am unable|i[' ’]m (?:unable|not able))", re.I)


class UnusableReplyError(Exception):
    """`cause`: "unparsed" or "refused"."""

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(detail)
        self.cause, self.detail = cause, detail


def one_score(reply: str, low: float, high: float, judged: str) -> list[float | None]:
    """The only score in a free-text reply, as [score]; [None] where it lies outside low..high.

    A score is a line of its own such as `Score: 85` or `Final Score: 4.5`, or the whole reply. `judged` is the text under
    judgement: a score that it announces itself might be quoted and is not believed.

    Raises UnusableReplyError for none, two different ones, a range, or a denominator other than `high`.
    """
    text = without_thoughts(reply)
    lines = [f"score: {text}"] if re.fullmatch(NUMBER, text) else [line.strip() for line in text.splitlines()]
    begun = [line for line in lines if VERDICT_BEGIN.match(line)]
    verdicts = [match for match in map(VERDICT_LINE.match, begun) if match]
    found = {float(match[1]) for match in verdicts}
    if not begun:
        raise _unusable(text, "no line is a score and nothing else")
    if len(verdicts) < len(begun) or len(found) > 1:
        raise _unusable(text, "more than one score, or a range")
    if any(match[2] and float(match[2]) != high for match in verdicts):
        raise _unusable(text, f"a score out of something else than {high:g}")
    (value,) = found
    if value in {float(a or b) for a, b in SAID_IN_TEXT.findall(judged)}:
        raise _unusable(text, "the text under judgement announces the same score itself")
    return [_in_range(value, low, high)]


def numbered_scores(reply: str, tag: str, count: int, low: float, high: float) -> list[float | None]:
    """Scores out of `{"verdict": tag, "scores": {"1": 7, "2": 9}}`, in order; None for each that lies outside low..high.

    `tag` is a word that the judged document cannot contain, so no object that it holds can be taken for the verdict. Other
    text around the object is allowed.

    Raises UnusableReplyError for no such object, more than one, and keys other than exactly "1" to `count`.
    """
    text = without_thoughts(reply)
    verdicts = [found for found in _objects(text) if found.get("verdict") == tag]
    if len(verdicts) != 1:
        raise _unusable(text, f"{len(verdicts)} JSON objects with the verdict's tag; exactly one is needed")
    scores = verdicts[0].get("scores")
    if not isinstance(scores, dict) or set(scores) != {str(step) for step in range(1, count + 1)}:
        raise _unusable(text, f"scores are not those of steps 1 to {count}")
    values = [scores[str(step)] for step in range(1, count + 1)]
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        raise _unusable(text, "a score is not a number")
    return [_in_range(value, low, high) for value in values]


def without_thoughts(reply: str) -> str:
    """What stands behind `</think>`. Raises UnusableReplyError where a thought does not end."""
    head, mark, tail = reply.rpartition("</think>")
    if "<think>" in tail:
        raise _unusable(reply, "the thought does not end")
    return (tail if mark else head + tail).strip()


def _in_range(value: float, low: float, high: float) -> float | None:
    return float(value) if low <= value <= high else None


def _objects(text: str) -> list[dict[str, Any]]:
    """Every outermost JSON object in a text."""
    decoder = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    found, at = [], text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
            found.append(value)
        except (ValueError, RecursionError):
            end = at + 1
        at = text.find("{", end)
    return found


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a name stands twice")
    return dict(pairs)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _unusable(text: str, detail: str) -> UnusableReplyError:
    shown = f"{detail}: {text[:160]!r}"
    return UnusableReplyError("refused" if REFUSAL.match(text) else "unparsed", shown)
