"""MME: 2,374 questions with yes or no about 1,187 pictures, two each. Tells whether understanding has stayed. Scored here.

Source: arXiv:2306.13394; prompt, parser and score as in lmms-eval's task `mme`. A subtask's score is the per cent of right answers
plus the per cent of pictures with both right, at most 200; MME-P is the sum of ten, MME-C of four. Picture tokens and thoughts
of a model trained on documents are taken out before an answer is read, and no picture can be drawn.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diptych.data.problems import Problems
from diptych.data.readers import read_rows
from diptych.document import Document, Text
from diptych.evaluation.benchmark import Benchmark, Cells, Headline, Item, Score, Scoring, StoredImage
from diptych.evaluation.sheets import figure, total
from diptych.forms import AnswerForm

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
REPLACED = " Please answer yes or no."
SUFFIX = "\nAnswer the question using a single word or phrase."


def _pair(id: str) -> str:
    return id.rsplit("#", 1)[0]


def _pair_score(pair: Sequence[float | None]) -> float | None:
    """0, 50 or 200: per cent of right answers plus 100 where both are; None where one is missing."""
    known = [value for value in pair if value is not None]
    return 50 * sum(known) + 100 * (sum(known) == 2) if len(known) == 2 else None


def _sum(name: str, subtasks: Sequence[str]) -> Headline:
    def cells(pair: Sequence[Score]) -> Cells:
        whole = len(pair) == 2 and pair[0].category in subtasks
        return {pair[0].category: [_pair_score([score.values["correct"] for score in pair])]} if whole else {}

    return Headline(name, (name,), cells, unit=lambda score: _pair(score.id), stratum=lambda score: score.category, total=True)


class MME(Benchmark):
    """An item's id is subtask/question_id#0 or #1: the two questions of one picture."""

    name = "mme"
    aspects = ("correct",)
    scale = (0.0, 1.0)
    form = AnswerForm.TEXT
    defaults = {"temperature": 0.0, "max_text_tokens": 16}  # noqa: RUF012
    scored_by = ()
    headlines = (_sum("MME-P", PERCEPTION), _sum("MME-C", COGNITION))

    def read(self, folder: Path, problems: Problems) -> list[Item]:
        data = folder / "data" if (folder / "data").is_dir() else folder
        pairs: dict[tuple[str, str], list[Item]] = defaultdict(list)
        pictures: dict[bytes, StoredImage] = {}
        order: list[tuple[str, str]] = []
        for row in read_rows(data, problems):
            found: dict[str, Any] = {name: row.value.get(name) for name in ("question_id", "question", "answer", "category")}
            image = row.value.get("image")
            raw = image.get("bytes") if isinstance(image, dict) else None
            right = str(found["answer"]).lower().strip().replace(".", "")
            if not all(isinstance(value, str) for value in found.values()) or right not in ("yes", "no") or not isinstance(raw, bytes):
                problems.report(row.where, "broken record", f"{found}, picture of {type(raw).__name__}", str(found["question_id"]))
                continue
            if found["category"] not in PERCEPTION + COGNITION:
                problems.report(row.where, "unknown category", found["category"], str(found["question_id"]))
                continue
            key = found["category"], found["question_id"]
            question = found["question"].strip().replace(REPLACED, "") + SUFFIX
            picture = pictures.setdefault(raw, StoredImage(raw))  # two questions share it
            id = f"{key[0]}/{key[1].removeprefix(key[0] + '/')}#{len(pairs[key])}"
            pairs[key].append(Item(id, Document((picture, Text(question))), key[0], {**found, "answer": right}, max_images=0))
            order.append(key)
        wrong = {key for key, pair in pairs.items() if len(pair) != 2}
        for category, question_id in sorted(wrong):
            number = len(pairs[category, question_id])
            problems.report(str(data), "no pair", f"{number} questions of {category}; 2 are needed", question_id)
        waiting = {key: iter(pair) for key, pair in pairs.items()}
        return [next(waiting[key]) for key in order if key not in wrong]

    def submit(self, items: Sequence[Item], answers: Sequence[Sequence[Document]], folder: Path, model: str) -> None:
        """The layout of MME's own evaluation tool: one file a subtask, one line an answer, the two of a picture together."""
        lines: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for item, (answer,) in zip(items, answers, strict=True):
            columns = (item.record["question_id"], item.record["question"], item.record["answer"].capitalize(), spoken(answer))
            lines[item.category].append((_pair(item.id), "\t".join(" ".join(column.split()) for column in columns)))
        for category, found in lines.items():
            (folder / f"{category}.txt").write_text("".join(line + "\n" for _, line in sorted(found, key=lambda pair: pair[0])))

    def how_to_score(self, data: Path, submission: Path) -> str:
        return "MME is scored from the answers alone."

    def score(self, items: Sequence[Item], answers: Sequence[Sequence[Document]], scoring: Scoring) -> list[Score]:
        scores = []
        for item, (answer,) in zip(items, answers, strict=True):
            said = parse(spoken(answer))
            value = float(said == item.record["answer"])
            scores.append(Score(item.id, item.category, {"correct": value}, facts={} if said else {"unparsed": 1.0}))
        return scores

    def table(self, scores: Sequence[Score]) -> dict[str, Any]:
        """Scores of subtasks and the two sums. A sum is None unless all its subtasks are there; `half_pairs` are in no score."""
        pairs: dict[str, dict[str, list[float | None]]] = defaultdict(lambda: defaultdict(list))
        for score in scores:
            pairs[score.category][_pair(score.id)].append(score.values["correct"])
        groups = {c: [[_pair_score(pair)] for pair in pairs[c].values() if len(pair) == 2] for c in PERCEPTION + COGNITION}
        unparsed = Counter(score.category for score in scores if "unparsed" in score.facts)
        found: dict[str, Any] = {}
        for name, members in (("MME-P", PERCEPTION), ("MME-C", COGNITION)):
            found[name] = figure({c: groups[c] for c in members}, 0.0, total, digits=2)
        for category, group in groups.items():
            if pairs[category]:
                known = [v for pair in pairs[category].values() for v in pair if v is not None]
                accuracy = round(100 * sum(known) / len(known), 2) if known else None
                found[category] = {**figure({category: group}, 0.0, digits=2), "accuracy": accuracy, "unparsed": unparsed[category]}
        found["unparsed"] = unparsed.total()
        found["half_pairs"] = sum(len(pair) != 2 for category in pairs.values() for pair in category.values())
        return found


def spoken(answer: Document) -> str:
    """The words of an answer without thoughts; without the marks of thoughts alone where nothing else was said."""
    text = answer.text
    rest = re.sub(r"<think>.*?(</think>|$)", " ", text, flags=re.DOTALL)
    rest = rest if _bare(rest) else text
    return _bare(rest)


def _bare(text: str) -> str:
    return re.sub(r"</?\w+>", " ", text).strip()


def parse(text: str) -> str:
    """ "yes", "no", or "" where it is neither, read as lmms-eval does: the whole, a single letter, or the first four characters."""
    text = text.lower().strip().replace(".", "")
    if text in ("y", "n"):
        return "yes" if text == "y" else "no"
    return next((word for word in ("yes", "no") if word in text[:4]), "")
