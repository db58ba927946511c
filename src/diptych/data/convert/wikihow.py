"""`wikihow`: wikiHow with its pictures, in two published layouts. A goal, then its steps with their pictures.

VisualHow, `wikiHow_data.json`: one JSON object keyed by problem, `{"033313_0": {"article_id", "category", "url", "article_title",
"problem_title", "problem_idx", "image_url": [...], "step_list": [...]}}`, one address for each step. --media: the downloaded pictures, each
under the last two parts of its address, which is where the authors' loaders look: `https://host/a/b/c.jpg` is `b/c.jpg`.

VGSI, `WikihowText_data.json`: in spite of its name one line for each article, `{"file_id", "goal", "goal_description",
"category_hierarchy", "methods": [{"name", "steps": [{"headline", "description", "img", "img_license", "step_id"}]}]}`. --media: the
unpacked `wiki_images.zip`, `STEP_ID.png`, in the folder itself or in its `train` and `test`. A method is a record; of a step its headline.

Which of the two a file is, is seen from its first lines. MMIE and InterleavedBench are made of wikiHow: --exclude both.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from diptych.data.convert.raw_record import Block, Options, RawRecord, document
from diptych.data.problems import NONSENSE, Problems
from diptych.data.readers import json_lines, read_json

PROMPT = "Explain step by step, with pictures: {title}"
UNPACKED = ("", "train", "test")  # where VGSI's pictures stand below --media
PROBED_LINES = 20
EXPECTED = "VisualHow's wikiHow_data.json or VGSI's WikihowText_data.json"


@dataclasses.dataclass(frozen=True)
class Step:
    """`places`: where below --media its picture may stand; none: the step has no picture."""

    text: str
    places: tuple[str, ...] = ()
    license: str = ""


@dataclasses.dataclass(frozen=True)
class Guide:
    """A record to be. `article`: its article's id."""

    id: str
    where: str
    article: str
    title: str
    category: str
    steps: tuple[Step, ...]
    columns: dict[str, str] = dataclasses.field(default_factory=dict)

    def source_ids(self) -> tuple[str, ...]:
        """The article's, with and without zeros before it (VisualHow fills up to six digits), and each picture's path, name and stem."""
        plain = self.article.lstrip("0") or "0"
        pictures = [PurePosixPath(step.places[0]) for step in self.steps if step.places]
        names = [name for picture in pictures for name in (str(picture), picture.name, picture.stem)]
        return (self.article, plain, plain.zfill(6), *names)


def read(options: Options, problems: Problems) -> Iterator[RawRecord]:
    folder = options.media_folder("the downloaded pictures")
    found, missing = False, ""
    for guide in _guides(options.input, problems):
        steps = _first_steps(guide.steps, options.cut_at)
        num_pictures = sum(bool(step.places) for step in steps)
        if num_pictures < (options.min_images or 1):
            problems.report(guide.where, "too few pictures", f"{num_pictures}", guide.id)
            continue
        answer: list[Block] = []
        gone = ""
        for step in steps:
            path = next((folder / place for place in step.places if (folder / place).is_file()), None)
            answer += [step.text, *([(path,)] if path is not None else [])]
            if step.places and path is None:
                gone = gone or step.places[0]
        found = found or any(isinstance(block, tuple) for block in answer)
        if gone:
            missing = missing or gone
            problems.report(guide.where, "missing picture", f"{gone} is not in {folder}", guide.id)
            continue
        asked = options.instruction(PROMPT, title=guide.title)
        columns = {"article_id": guide.article, "category": guide.category, **guide.columns}
        if licenses := sorted({step.license for step in steps if step.license}):
            columns["picture_license"] = "; ".join(licenses)
        yield RawRecord(guide.id, guide.where, document((asked,), tuple(answer)), guide.source_ids(), columns=columns)
    if missing and not found:
        raise ValueError(
            f"--media {str(folder)!r} holds none of the pictures of {options.input}. The first one would be {folder / missing}; "
            f"found there: {_listing(folder)}. Give the folder that file names are relative to (docs/how-to/data.md, wikihow)"
        )


def _guides(path: Path, problems: Problems) -> Iterator[Guide]:
    """Of either layout. Raises ValueError, naming what was found, for anything else."""
    if not path.is_file():
        raise ValueError(f"{path} is a folder; give {EXPECTED}. Found there: {_listing(path)}")
    with path.open("rb") as stream:
        start = io.BytesIO(b"".join(itertools.islice(stream, PROBED_LINES)))
    lines = [row.value for row in json_lines(start, str(path), path.parent, Problems())]
    if any("methods" in line for line in lines):
        yield from _articles(path, problems)
        return
    if len(lines) > 1:
        raise ValueError(f"{path} is not {EXPECTED}; found: JSON lines with {_keys(lines[0])}")
    value = read_json(path)
    if not isinstance(value, dict) or not any(isinstance(entry, dict) and "step_list" in entry for entry in value.values()):
        first = value if isinstance(value, dict) else value[0] if isinstance(value, list) and value else None
        raise ValueError(f"{path} is not {EXPECTED}; found: a {type(value).__name__} with {_keys(first)}")
    for id, entry in value.items():
        where = f"{path}:{id}"
        try:
            guide = _problem(id, where, entry)
        except NONSENSE as error:
            problems.report(where, "not a record", f"{type(error).__name__}: {error}", id)
            continue
        yield guide


def _problem(id: str, where: str, entry: dict[str, Any]) -> Guide:
    """VisualHow's."""
    texts, urls = entry["step_list"], entry["image_url"]
    if not isinstance(texts, list) or not isinstance(urls, list) or len(texts) != len(urls):
        raise ValueError(f"{len(urls)} pictures and {len(texts)} steps; two lists of one length are needed")
    steps = tuple(Step(_words(text, "step"), (_place(url),)) for text, url in zip(texts, urls, strict=True))
    title = _title(entry["article_title"], entry["problem_title"])
    columns = {"url": str(entry["url"])} if entry.get("url") else {}
    return Guide(id, where, _words(entry["article_id"], "article_id"), title, _category(entry.get("category")), steps, columns)


def _place(url: str) -> str:
    parts = url.split("/")[-2:]
    if len(parts) < 2 or not all(part.strip(".") for part in parts):
        raise ValueError(f"a picture is {url!r:.120}; the last two parts of its address are needed")
    return "/".join(parts)


def _articles(path: Path, problems: Problems) -> Iterator[Guide]:
    """VGSI's: each method of each article."""
    with path.open("rb") as stream:
        for row in json_lines(stream, str(path), path.parent, problems):
            article = " ".join(str(row.value.get("file_id") or "").split())
            methods = row.value.get("methods")
            if not article or not isinstance(methods, list) or not methods:
                problems.report(row.where, "not a record", f"no file_id, or no methods; it has {_keys(row.value)}", article)
                continue
            for number, method in enumerate(methods):
                id, where = f"{article}_{number}", f"{row.where}:method {number}"
                try:
                    title, category = _title(row.value["goal"], method["name"]), _category(row.value.get("category_hierarchy"))
                    guide = Guide(id, where, article, title, category, tuple(_step(step) for step in method["steps"]))
                except NONSENSE as error:
                    problems.report(where, "not a record", f"{type(error).__name__}: {error}", id)
                    continue
                yield guide


def _step(step: dict[str, Any]) -> Step:
    text = _words(step["headline"], "headline")
    if not step.get("img"):
        return Step(text)
    name = f"{step['step_id']}.png"
    if "/" in name:
        raise ValueError(f"step_id is {step['step_id']!r}, which is no file name")
    return Step(text, tuple(str(PurePosixPath(folder) / name) for folder in UNPACKED), str(step.get("img_license") or ""))


def _first_steps(steps: tuple[Step, ...], most: int) -> list[Step]:
    """Whole steps, as long as at most `most` pictures are shown."""
    shown = itertools.accumulate(bool(step.places) for step in steps)
    return [step for step, count in zip(steps, shown, strict=True) if count <= most]


def _title(goal: object, part: object) -> str:
    """The article's title and the method's, where that says something else."""
    goal = _words(goal, "title")
    part = " ".join(str(part or "").split())
    return goal if part in ("", goal) else f"{goal}: {part}"


def _category(value: object) -> str:
    return " > ".join(map(str, value)) if isinstance(value, list) else str(value or "")


def _words(value: object, what: str) -> str:
    words = " ".join(value.split()) if isinstance(value, str) else ""
    if not words:
        raise ValueError(f"a {what} is {value!r:.120}; words are needed")
    return words


def _keys(value: object) -> str:
    return f"the keys {', '.join(map(str, list(value)[:8]))}" if isinstance(value, dict) and value else "no keys"


def _listing(folder: Path) -> str:
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "nothing"
