"""Numbers out of a judge's reply. What is not unambiguous is refused: a wrong value is worse than a missing one."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

UNSIGNED = r"\d+(?:\.\d+|,\d{1,2}(?!\d))?"  # 4.5 or 4,5; 1,000 is neither
NUMBER = rf"[-+]?{UNSIGNED}"
POINTS = rf"(?P<points>{NUMBER})(?: ?(?:/|out of) ?(?P<out_of>{UNSIGNED})| ?(?P<percent>%|percent))?"
NAME = r"(?P<name>(?:(?:the|my|final|overall|total) ){0,2}(?:score|rating))"
LABEL = rf"{NAME} ?(?:[:=]|is ) ?"
GIVING = (
    r"(?:rate|score|grade|give|award|assign) "
    r"(?:(?:it|this|that|the|a|an|at|as|with|text|answer|response|caption|picture|image|score|rating|of) ){0,7}"
)
I_GIVE = rf"i(?:['’]d| would| will)? {GIVING}"
OWN_WORDS = rf"(?:(?:overall|so|thus|therefore|hence),? )?{I_GIVE}"
# What may follow in the same sentence: nothing, or a reason. "85 or 90", "85-90", "85 if it were true" are no verdicts.
END = r"(?: ?(?:[.;]|!+)?$| ?[-–—:] (?=(?-i:[A-Z]))|,? (?:because|since|due to|based on|given)\b)"
VERDICT = re.compile(rf"(?:{LABEL}|{OWN_WORDS}){POINTS}{END}", re.I)
VERDICT_BEGIN = re.compile(rf"(?:{LABEL}|{OWN_WORDS})[-+]?\d", re.I)
BARE = re.compile(POINTS, re.I)
MARKS = re.compile(r"[\s*_#•`\[\]()]+")  # of lists, headings and emphasis; none of a quotation
# "Score: 4. 3 balls are red" is two sentences; "Score: 4. 5", "Score: 4. 5 out of 5" and "Score: 85. 90 if ..." may be one.
SENTENCE_END = re.compile(r"(?<=[.!?;]) (?!\d)|(?<=[.!?]) (?=\d++ (?!(?:out|per|percent|points?|stars?)\b)[a-z]{3})", re.I)
# In a text: a name as in LABEL and a number, or "I give it" and a number, whatever stands around; "score: 3:2" and "3 to 2" are no numbers.
NUMBERED = rf"(?>{POINTS})(?! ?(?:[-–—:]|to) ?\d)"
NAMED = r"(?:\W++\d++\W+\d++)?(?>\W*?[:=：]|\W*is\b)\W*+"  # the words between may hold a range: "Score (1-5): 4"
SAID_IN_TEXT = re.compile(rf"\b(?:{NAME}{NAMED}|{I_GIVE}){NUMBERED}", re.I)
ALONE_IN_TEXT = re.compile(rf"[\W_]*{POINTS}[\W_]*", re.I)
THOUGHT = re.compile(r"^[ \t]*<think>", re.M)
REFUSAL = re.compile(r"^\W*(?:i[' ’]?a?m (?:very )?sorry|sorry\b|i can(?:no|['’])t|i am unable|i[' ’]m (?:unable|not able))", re.I)


class UnusableReplyError(Exception):
    """`cause`: "unparsed" or "refused"."""

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(detail)
        self.cause, self.detail = cause, detail


def one_score(reply: str, low: float, high: float, judged: str) -> list[float | None]:
    """The only score in a free-text reply, as [score]; [None] where it lies outside low..high.

    A score is a sentence such as `Score: 85`, `**Final Score:** 85/100`, `- Score: 85%` or `I would rate it 85 out of 100.`, or a first
    line that is the number. Where one of them is called final, the others are its parts.

    `judged` is the text under judgement. A judge may quote it, and a quotation is read as a verdict only where the text itself holds a
    score on this scale in the words of the verdict: `Final Score: 5` for 1..5, never `3/4 cup`, `4 out of 5 people` or `Score: 3:2`.
    Those words are then not believed, *whatever number* stands behind them: were only the text's own number refused, which values are
    missing would depend on the values. Other words of the judge for its score are.

    Raises UnusableReplyError for none, two different ones, a range, a condition, a denominator other than `high`, and words not believed.
    """
    text = without_thoughts(reply)
    verdicts = [(_words(match), match) for match in _verdicts(text, low, high, _plain(judged).lower())]
    if not verdicts:
        raise _unusable(text, "no sentence is a score and nothing else")
    if not all(_on_scale(match, high) for _, match in verdicts):
        raise _unusable(text, f"a score out of something else than {high:g}")
    alone = filter(None, map(ALONE_IN_TEXT.fullmatch, judged.splitlines()))
    scores = [*_scores(SAID_IN_TEXT, judged, low, high), *(match for match in alone if _is_score(match, low, high))]
    said = {(_words(match), _points(match)) for match in scores}
    own = [(words, match) for words, match in verdicts if not any(name.endswith(words) for name, _ in said)]
    if not own:
        raise _unusable(text, "the text under judgement announces a score in the same words")
    final = [match for words, match in own if "final" in words]
    counted = final or [m for words, m in verdicts if not any(name.endswith(words) and value == _points(m) for name, value in said)]
    found = {_points(match) for match in counted}
    if len(found) > 1:
        raise _unusable(text, "more than one score")
    return [_in_range(found.pop(), low, high)]


def _verdicts(text: str, low: float, high: float, quotable: str) -> list[re.Match[str]]:
    """What reads as a score, without what is off the scale and stands in the text under judgement: a quotation for certain."""
    read = [(sentence, VERDICT.match(sentence)) for sentence in _sentences(text) if VERDICT_BEGIN.match(sentence)]
    alone = [(line, BARE.fullmatch(line)) for line in (line.strip("*_ \t") for line in text.splitlines())]
    if alone and alone[0][1]:
        read += [(line, match) for line, match in alone if match]
    found = []
    for sentence, match in read:
        if not (match and _is_score(match, low, high)) and sentence.rstrip(" .!;").lower() in quotable:
            continue
        if match is None:
            raise _unusable(text, "more than one score, a range, or a score with a condition")
        found.append(match)
    return found


def mean_score(reply: str, axes: Sequence[str], low: float, high: float, judged: str) -> list[float | None]:
    """The mean of the scores of `axes`, as [score]; [None] where one lies outside low..high.

    Each has a line of its own, such as `Style Score (1-5): 3.5`. `judged` as for `one_score`: a text that holds a score of an axis in
    these words has no value, whatever the judge says.

    Raises UnusableReplyError where an axis has no such line, or two, and for words not believed.
    """
    text = without_thoughts(reply)
    names = "|".join(axes)
    line = re.compile(rf"({names}) score(?: {low:g} ?[-–] ?{high:g})? ?: ?(.*)", re.I)
    pairs = [(match[1].lower(), match[2]) for match in map(line.match, map(_plain, text.splitlines())) if match]
    if sorted(axis for axis, _ in pairs) != sorted(axis.lower() for axis in axes):
        raise _unusable(text, f"one line with a score is needed for each of {', '.join(axes)}")
    if not all(re.fullmatch(NUMBER, number) for _, number in pairs):
        raise _unusable(text, "a score is not a number")
    said = re.compile(rf"\b(?:{names}) score{NAMED}{NUMBERED}", re.I)
    if _scores(said, judged, low, high):
        raise _unusable(text, "the text under judgement announces a score in the same words")
    found = [_number(number) for _, number in pairs]
    return [None if any(_in_range(value, low, high) is None for value in found) else sum(found) / len(found)]


def _plain(line: str) -> str:
    """Without marks of lists, headings and emphasis; words one space apart."""
    return MARKS.sub(" ", line).strip().removeprefix("- ").strip()


def _sentences(text: str) -> list[str]:
    return [sentence for line in text.splitlines() for sentence in SENTENCE_END.split(_plain(line))]


def _scores(pattern: re.Pattern[str], judged: str, low: float, high: float) -> list[re.Match[str]]:
    """What a text says on this scale, in one sentence or across the ends of lines: a judge may quote either way."""
    parts = [_plain(judged), *_sentences(judged)]
    return [match for part in parts for match in pattern.finditer(part) if _is_score(match, low, high)]


def _words(match: re.Match[str]) -> str:
    """Of a verdict, before its number: "score", "final rating", ..., "I give", or "alone". A quotation may leave out the first of them."""
    groups = match.groupdict()
    if "name" not in groups:
        return "alone"
    return re.sub(r"\b(?:the|my) ", "", groups["name"].lower()) if groups["name"] else "I give"


def _number(text: str) -> float:
    return float(text.replace(",", "."))


def _points(match: re.Match[str]) -> float:
    return _number(match["points"])


def _on_scale(match: re.Match[str], high: float) -> bool:
    return (not match["out_of"] or _number(match["out_of"]) == high) and (not match["percent"] or high == 100)


def _is_score(match: re.Match[str], low: float, high: float) -> bool:
    return _on_scale(match, high) and low <= _points(match) <= high


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
    if THOUGHT.search(tail):
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
