"""A look into records: what is in it, what is wrong with it, how long its examples are for a model."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from diptych.data.conversation import NotARecord, Record
from diptych.data.convert.messages import id_of, messages_of
from diptych.data.convert.pictures import MissingPicture
from diptych.data.problems import Problems
from diptych.data.readers import Row, json_lines, read_rows
from diptych.data.records import has_records, open_source, record_files
from diptych.data.rows import make_row_record, row_answers
from diptych.document import Document, Image
from diptych.pictures import open_image
from diptych.runtime import rng as make_rng

if TYPE_CHECKING:
    from diptych.models import UnifiedModel

ENDLESS = 1000  # records of a source without end


@dataclasses.dataclass(frozen=True)
class Sample:
    """A record that is shown; `num_tokens`: None without a model, or where the record is too long for it."""

    where: str
    record: Record
    num_tokens: int | None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Inspection:
    """Counts over all records of a file. `num_images`, `num_words`, `num_tokens`: one number per record."""

    name: str
    num_lines: int
    num_records: int
    num_prompts: int
    sources: dict[str, int]
    licenses: dict[str, int]
    sizes: dict[str, int]
    num_images: list[int]
    num_words: list[int]
    num_tokens: list[int]
    max_positions: int | None
    samples: list[Sample]
    problems: Problems


def inspect_records(
    name: str | Path,
    model: UnifiedModel | None = None,
    *,
    num_samples: int = 12,
    seed: int = 0,
    max_lines: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Inspection:
    """Reads what `open_source` reads, and the compressed files that it refuses, and opens every picture (of the first `max_lines` rows).

    Broken rows are reported, not raised. Of a `storyboard:` source, which has no end, 1,000 records are read where `max_lines` says
    nothing. Raises ValueError where there is no such file, or nothing in it.
    """
    problems = Problems()
    sources, licenses, sizes = Counter[str](), Counter[str](), Counter[str]()
    images, words, tokens = list[int](), list[int](), list[int]()
    ids: dict[str, str] = {}
    kept: list[Sample] = []
    rng = make_rng(seed, 11)
    num_lines = num_records = num_prompts = 0
    rows = _rows(str(name), problems, ids, max_lines or ENDLESS)
    for where, records in itertools.islice(rows, max_lines):
        num_lines += 1
        progress(num_lines)
        for record in records:
            num_records += 1
            num_prompts += record.answer is None
            sources[record.source] += 1
            licenses[record.license or "not given"] += 1
            shown = [*record.prompt.images, *record.given.images, *(record.answer.images if record.answer else [])]
            sizes.update(f"{p.pixels.width} x {p.pixels.height}" for p in shown if p.pixels)
            images.append(len(shown))
            texts = (record.prompt, record.given, *([record.answer] if record.answer else []))
            words.append(sum(len(document.text.split()) for document in texts))
            length, note = _num_tokens(model, record) if model else (None, "")
            if note:
                problems.report(where, "cannot be encoded", note, record.id)
            if length is not None:
                tokens.append(length)
            sample = Sample(where, record, length, note)
            if len(kept) < num_samples:
                kept.append(sample)
            elif (place := int(rng.integers(num_records))) < num_samples:  # every record is shown with the same probability
                kept[place] = sample
    if not num_lines and not problems.found:
        raise ValueError(f"{name} is empty; at least one record is needed")
    return Inspection(
        str(name), num_lines, num_records, num_prompts, _sorted(sources), _sorted(licenses), _sorted(sizes), images, words, tokens,
        model.max_positions if model else None, kept, problems,
    )  # fmt: skip


def summary(found: Inspection) -> dict[str, Any]:
    """The numbers of an inspection, for JSON."""
    return {
        "file": found.name, "lines": found.num_lines, "records": found.num_records, "prompts_without_answer": found.num_prompts,
        "sources": found.sources, "licenses": found.licenses, "images_per_record": spread(found.num_images),
        "words_per_record": spread(found.num_words), "tokens_per_record": spread(found.num_tokens), "context": found.max_positions,
        "picture_sizes": dict(list(found.sizes.items())[:8]), "problems": found.problems.by_cause(),
    }  # fmt: skip


def spread(values: Sequence[int]) -> dict[str, float] | None:
    """Least, median, most and sum; None of nothing."""
    return {"min": min(values), "median": median(values), "max": max(values), "total": sum(values)} if values else None


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(counts.most_common())


def _rows(name: str, problems: Problems, ids: dict[str, str], endless: int) -> Iterator[tuple[str, list[Record]]]:
    """Place and records of each row."""
    if name.startswith("storyboard:"):
        source = open_source(name, endless)
        yield from ((f"{name}:{index + 1}", [source[index]]) for index in range(endless))
        return
    for path in (paths := record_files(name)):
        if len(paths) == 1 and has_records(path):
            with path.open("rb") as stream:
                for row in json_lines(stream, str(path), path.parent, problems):
                    yield row.where, _records(row, str(path), problems, ids)
        else:
            for row in read_rows(path, problems):
                yield row.where, _records(row, name, problems, ids)


def _records(row: Row, source: str, problems: Problems, ids: dict[str, str]) -> list[Record]:
    """Of a row of a data set, as training reads it."""
    id = id_of(row)
    if id in ids:
        problems.report(row.where, "duplicate id", f"{id} stood in {ids[id]}", id)
    ids.setdefault(id, row.where)
    try:
        answers = row_answers(row)
        messages_of(row)
        return [make_row_record(row, place, source) for place in answers]
    except MissingPicture as error:
        problems.report(row.where, "missing picture", error, id)
    except NotARecord as error:
        problems.report(row.where, error.cause, error, id)
    except ValueError as error:
        problems.report(row.where, "unreadable picture", error, id)
    return []


def _num_tokens(model: UnifiedModel, record: Record) -> tuple[int | None, str]:
    """Positions of an example, pictures included, which are prepared; the image tokenizer is not run, as a picture's length is known."""
    import torch

    spec = model.image_spec
    codes = torch.zeros(spec.num_positions, spec.depth, dtype=torch.long)

    def stand_in(document: Document) -> Document:
        return Document(tuple(Image(s.pixels, codes) if isinstance(s, Image) else s for s in document))

    try:
        for image in record.prompt.images:
            model.prompt_pixels(open_image(image.pixels))
        for image in (*record.given.images, *(record.answer.images if record.answer else ())):
            model.target_pixels(open_image(image.pixels))
        prompt, given = stand_in(record.prompt), stand_in(record.given)
        if record.answer is None:
            return len(model.encode_prompt(prompt, record.form, given)), ""
        return len(model.encode_example(prompt, stand_in(record.answer), form=record.form, given=given)), ""
    except ValueError as error:
        return None, str(error)


def render_lines(found: Inspection) -> list[str]:
    """What a terminal shows."""
    lines = [f"{found.name}: {found.num_lines} lines, {found.num_records} records, {sum(found.num_images)} pictures"]
    for title, counts in (("source", found.sources), ("license", found.licenses)):
        lines += [f"  {title} {json.dumps(name, ensure_ascii=False)}: {count}" for name, count in counts.items()]
    for title, values in (("pictures", found.num_images), ("words", found.num_words), ("tokens", found.num_tokens)):
        if values:
            lines.append(f"  {title} a record: {min(values)} to {max(values)}, median {median(values):g}")
    lines += [f"  problem: {cause}: {count}" for cause, count in found.problems.by_cause().items()] or ["  no problems found"]
    return lines
