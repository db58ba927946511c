"""Numbers out of a judge's reply. What is not unambiguous is refused: a wrong value is worse than a missing one."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

NUMBER = r"[-+]?\d+(?:\.\d+)?"
POINTS = rf"({NUMBER})(?: ?(?:/|out of) ?(\d+)| ?(%|percent))?"  # groups: the number, what it is out of, whether in percent
LABEL = r"(?:(?:the|my|final|overall|total) ){0,2}(?:score|rating) ?(?:[:=]|is ) ?"
GIVING = (
    r"(?:rate|score|grade|give|award|assign) "
    r"(?:(?:it|this|that|the|a|an|at|as|with|text|answer|response|caption|picture|image|score|rating|of) ){0,7}"
)
OWN_WORDS = rf"(?:(?:overall|so|thus|therefore|hence),? )?i(?:['’]d| would| will)? {GIVING}"
# What may follow in the same sentence: nothing, or a reason. "85 or 90", "85-90", "85 if it were true" are no verdicts.
END = r"(?: ?[.!;]?$| ?[-–—:] (?=(?-i:[A-Z]))|,? (?:because|since|due to|based on|given)\b)"
VERDICT = re.compile(rf"(?:{LABEL}|{OWN_WORDS}){POINTS}{END}", re.I)
VERDICT_BEGIN = re.compile(rf"(?:{LABEL}|{OWN_WORDS})[-+]?\d", re.I)
BARE = re.compile(POINTS, re.I)
MARKS = re.compile(r"[\s*_#•`\[\]()]+")  # of lists, headings and emphasis; none of a quotation
SENTENCE_END = re.compile(r"(?<=[.!?;]) (?!\d)")
SAID_IN_TEXT = re.compile(
    rf"(?:score|rating)\W*+(?:\d+\W+\d+\W++(?=\d))?(?:(?:is|of)\W++)?({NUMBER})"
    rf"|{GIVING}({NUMBER})|(?<!\d)({NUMBER}) ?(?:/|out of) ?\d", re.I,
)  # fmt: skip
NUMBER_ALONE = re.compile(rf"[\W_]*({NUMBER})[\W_]*")
REFUSAL = re.compile(r"^\W*(?:i[' ’]?a?m (?:very )?sorry|sorry\b|i can(?:no|['’])t|i am unable|i[' ’]m (?:unable|not able))", re.I)


class UnusableReplyError(Exception):
    """`cause`: "unparsed" or "refused"."""

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(detail)
        self.cause, self.detail = cause, detail


def one_score(reply: str, low: float, high: float, judged: str) -> list[float | None]:
    """The only score in a free-text reply, as [score]; [None] where it lies outside low..high.

    A score is a sentence such as `Score: 85`, `**Final Score:** 85/100`, `- Score: 85%` or `I would rate it 85 out of 100.`, or a first
    line that is the number. `judged` is the text under judgement: a score that it announces itself might be quoted and is not believed.

    Raises UnusableReplyError for none, two different ones, a range, a condition, or a denominator other than `high`.
    """
    text = without_thoughts(reply)
    begun = [sentence for sentence in _sentences(text) if VERDICT_BEGIN.match(sentence)]
    verdicts = [match for match in map(VERDICT.match, begun) if match]
    if len(verdicts) < len(begun):
        raise _unusable(text, "more than one score, a range, or a score with a condition")
    alone = [BARE.fullmatch(line.strip("*_ \t")) for line in text.splitlines()]
    if alone and alone[0]:
        verdicts += [match for match in alone if match]
    found = {float(match[1]) for match in verdicts}
    if not found:
        raise _unusable(text, "no sentence is a score and nothing else")
    if len(found) > 1:
        raise _unusable(text, "more than one score")
    if any((match[2] and float(match[2]) != high) or (match[3] and high != 100) for match in verdicts):
        raise _unusable(text, f"a score out of something else than {high:g}")
    _refuse_announced(text, found, judged)
    (value,) = found
    return [_in_range(value, low, high)]


def mean_score(reply: str, axes: Sequence[str], low: float, high: float, judged: str) -> list[float | None]:
    """The mean of the scores of `axes`, as [score]; [None] where one lies outside low..high.

    Each has a line of its own, such as `Style Score (1-5): 3.5`. `judged` as for `one_score`.

    Raises UnusableReplyError where an axis has no such line, or two.
    """
    text = without_thoughts(reply)
    line = re.compile(rf"({'|'.join(axes)}) score(?: {low:g} ?[-–] ?{high:g})? ?: ?(.*)", re.I)
    told = [(match[1].lower(), match[2]) for match in map(line.match, map(_plain, text.splitlines())) if match]
    if sorted(axis for axis, _ in told) != sorted(axis.lower() for axis in axes):
        raise _unusable(text, f"one line with a score is needed for each of {', '.join(axes)}")
    if not all(re.fullmatch(NUMBER, number) for _, number in told):
        raise _unusable(text, "a score is not a number")
    found = [float(number) for _, number in told]
    _refuse_announced(text, set(found), judged)
    return [None if any(_in_range(value, low, high) is None for value in found) else sum(found) / len(found)]


def _plain(line: str) -> str:
    """Without marks of lists, headings and emphasis; words one space apart."""
    return MARKS.sub(" ", line).strip().removeprefix("- ").strip()


def _sentences(text: str) -> list[str]:
    return [sentence for line in text.splitlines() for sentence in SENTENCE_END.split(_plain(line))]


def _refuse_announced(text: str, found: set[float], judged: str) -> None:
    said = {float(a or b or c) for a, b, c in SAID_IN_TEXT.findall(_plain(judged))}
    said |= {float(match[1]) for match in map(NUMBER_ALONE.fullmatch, judged.splitlines()) if match}
    if found & said:
        raise _unusable(text, "the text under judgement announces the same score itself")


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
