"""GenEval: 553 captions, four pictures each, checked by an object detector. Tells whether text-to-image has stayed.

Source: arXiv:2310.11513; the scorer is github.com/djghosh13/geneval at commit af4902f. Its overall score is the mean of the six tags'
accuracies over pictures, not the mean over pictures. Prompts are asked as they stand: rewriting them raises the score a lot. A picture is
begun at once (form `image`), as the releases' own code does it, in the family's own prompt for drawing.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diptych.data.problems import Problems
from diptych.data.readers import json_lines, read_rows
from diptych.document import Document, Text
from diptych.evaluation.benchmark import Benchmark, Cells, Headline, Item, Score, Scoring
from diptych.evaluation.official import REPEATED, STRANGER, UNUSABLE, nothing_usable
from diptych.evaluation.sheets import figure, macro_average, units
from diptych.forms import AnswerForm

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
FILE = "evaluation_metadata.jsonl"
COMMIT = "af4902f24d3ca90ebbb446dd9891a59e0f82725f"
NO_PICTURE = "no picture drawn"


def _by_tag(scores: Sequence[Score]) -> Cells:
    return {scores[0].category: [score.values["correct"] for score in scores]}


class GenEval(Benchmark):
    """An item's id is the number of its line, which is also the name of its folder. The first picture of an answer counts."""

    name = "geneval"
    aspects = ("correct",)
    scale = (0.0, 1.0)
    form = AnswerForm.IMAGE
    scored_by = ("official",)
    headlines = (Headline("overall", ("overall",), _by_tag, stratum=lambda score: score.category, decimals=3),)

    def read(self, folder: Path, problems: Problems) -> list[Item]:
        file = next((path for path in (folder / FILE, folder / "prompts" / FILE) if path.is_file()), None)
        if file is None:
            raise ValueError(f"{folder} has no {FILE}; give a copy of github.com/djghosh13/geneval, or its folder prompts")
        items: list[Item] = []
        with file.open("rb") as stream:
            for row in json_lines(stream, file.name, file.parent, problems):
                number = int(row.where.rsplit(":", 1)[1]) - 1
                prompt, tag = row.value.get("prompt"), row.value.get("tag")
                if not isinstance(prompt, str) or not prompt or tag not in TAGS:
                    problems.report(row.where, "broken record", f"prompt is {prompt!r}, tag is {tag!r}", f"{number:05d}")
                    continue
                items.append(Item(f"{number:05d}", Document((Text(prompt),)), tag, row.value, max_images=1, num_answers=4))
        return items

    def submit(self, items: Sequence[Item], answers: Sequence[Sequence[Document]], folder: Path, model: str) -> None:
        for item, given in zip(items, answers, strict=True):
            place = folder / item.id
            (place / "samples").mkdir(parents=True)
            (place / "metadata.jsonl").write_text(json.dumps(item.record) + "\n")
            for number, answer in enumerate(given):
                if answer.images:
                    pixels = answer.images[0].pixels
                    assert pixels is not None
                    pixels.save(place / "samples" / f"{number:04d}.png")

    def how_to_score(self, data: Path, submission: Path) -> str:
        where = shlex.quote(str(submission.resolve()))
        return (
            "GenEval is scored by a Mask2Former of mmdet 2.x and by CLIP, in an environment of their own and on a GPU:\n"
            f"  git clone https://github.com/djghosh13/geneval && cd geneval && git checkout {COMMIT[:7]}\n"
            "  conda env create -f environment.yml && conda activate geneval && ./evaluation/download_models.sh detector/\n"
            "  git clone https://github.com/open-mmlab/mmdetection && (cd mmdetection && git checkout 2.x && pip install -v -e .)\n"
            f"  python evaluation/evaluate_images.py {where} --outfile results.jsonl --model-path detector/\n"
            "Then run the same `diptych evaluate geneval` command with --official results.jsonl."
        )

    def score(self, items: Sequence[Item], answers: Sequence[Sequence[Document]], scoring: Scoring) -> list[Score] | None:
        if scoring.official is None:
            return None
        official = _read_official(scoring.official, items, scoring.problems)
        scores = []
        for item, given in zip(items, answers, strict=True):
            for number, answer in enumerate(given):
                where, correct = official.get((item.id, number), ("", None))
                if not answer.images and correct is not None:
                    raise ValueError(f"{where} judges picture {number} of {item.id}, which was not drawn: another submission's")
                cause = "" if correct is not None else "not in the official file" if answer.images else NO_PICTURE
                facts = {"pictures": float(len(answer.images))}
                scores.append(Score(item.id, item.category, {"correct": correct}, number, cause, facts))
        return scores

    def table(self, scores: Sequence[Score]) -> dict[str, Any]:
        """Accuracy of each tag over pictures; `overall` is their unweighted mean, None unless all six are there.

        `prompts_any`: the share of prompts with at least one right picture. Intervals draw prompts.
        """
        groups = {tag: units(scores, "correct", tag) for tag in TAGS if any(score.category == tag for score in scores)}
        found: dict[str, Any] = {tag: figure({tag: group}, 0.0) for tag, group in groups.items()}
        found["overall"] = figure({tag: groups.get(tag, []) for tag in TAGS}, 0.0, macro_average)
        best = [[max((v for v in unit if v is not None), default=None)] for unit in units(scores, "correct")]
        found["prompts_any"] = figure({"all": best}, 0.0)
        found["no_picture"] = sum(score.cause == NO_PICTURE for score in scores)
        return found


def _read_official(path: Path, items: Sequence[Item], problems: Problems) -> dict[tuple[str, int], tuple[str, float]]:
    """Place in the file, and right (1) or not (0), by item and number of the picture, both from the file name that the scorer notes.

    Raises ValueError where no line is of this submission.
    """
    prompts = {item.id: item.record["prompt"] for item in items}
    found: dict[tuple[str, int], tuple[str, float]] = {}
    for row in read_rows(path, problems):
        name, correct, prompt = (row.value.get(key) for key in ("filename", "correct", "prompt"))
        match = re.search(r"(\d+)/samples/(\d+)\.png$", name) if isinstance(name, str) else None
        if match is None or not isinstance(correct, bool):
            problems.report(row.where, UNUSABLE, f"filename is {name!r}, correct is {correct!r}")
            continue
        key = match[1], int(match[2])
        if prompts.get(key[0]) != prompt or not 0 <= key[1] < 4:
            problems.report(row.where, STRANGER, f"{name} with prompt {prompt!r}")
        elif key in found:
            problems.report(row.where, REPEATED, f"{name}; the first one stays")
        else:
            found[key] = row.where, float(correct)
    if not found:
        raise nothing_usable(path, problems)
    return found
