"""Saved documents as trackers can show them: a page, rows of a table, a table in markdown, one image of all pictures of a group."""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Sequence
from typing import Any

import PIL.Image

from diptych.pictures import open_image

GAP = 4  # pixels between the pictures of a grid
PICTURE = re.compile(r"data:image/(png|jpeg|webp|gif);base64,[A-Za-z0-9+/=]+")
STYLE = """body { font: 14px/1.5 system-ui, sans-serif; margin: 12px; color-scheme: light dark; }
table { border-collapse: collapse; } td { vertical-align: top; padding: 8px; border-top: 1px solid #8886; }
.step { display: inline-block; width: 11em; margin: 0 8px 8px 0; padding-left: 6px; border-left: 4px solid #8886; vertical-align: top;
  overflow-wrap: anywhere; white-space: pre-wrap; }
.up { border-color: #1f8a4c; } .down { border-color: #d9731a; } img { display: block; max-width: 100%; }
small { display: block; opacity: .7; }"""
Record = dict[str, Any]


def groups_of(records: Sequence[Record]) -> list[list[Record]]:
    """Neighbours of one group. Records without groups, such as a warm-up's, are one."""
    return [list(group) for _, group in itertools.groupby(records, key=lambda record: record.get("group", 0))]


def reward_names(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(name for r in records for values in (*r.get("steps", ()), r.get("document", {})) for name in values))


def mean_reward(record: Record, name: str) -> float | None:
    """What a reward says of a document: its document value, or the mean over its steps; None where it says nothing, NaN where missing."""
    if name in record.get("document", {}):
        return float(record["document"][name])
    values = [float(step[name]) for step in record.get("steps", ()) if name in step]
    return sum(values) / len(values) if values else None


def plain(blocks: Sequence[Record]) -> str:
    """Texts, and `[picture N]` where a picture stands."""
    number = itertools.count(1)
    return " ".join(block["text"] if block["type"] == "text" else f"[picture {next(number)}]" for block in blocks)


def pictures(blocks: Sequence[Record]) -> list[PIL.Image.Image]:
    return [open_image(block["image"]) for block in blocks if block["type"] == "image"]


def document_rows(records: Sequence[Record]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows: group, member, prompt, document, the weighted reward and each reward, and the pictures (PIL; None where a document
    has fewer)."""
    names = reward_names(records)
    drawn = [pictures(record["answer"]) for record in records]
    most = max(map(len, drawn), default=0)
    columns = ["group", "member", "prompt", "document", "reward", *names, *(f"picture {n + 1}" for n in range(most))]
    rows: list[list[Any]] = []
    for number, group in enumerate(groups_of(records), 1):
        for member, record in enumerate(group, 1):
            found = drawn[len(rows)]
            rows.append([
                number, member, plain(record["prompt"]), plain(record["answer"]), record.get("reward"),
                *(mean_reward(record, name) for name in names), *found, *[None] * (most - len(found)),
            ])  # fmt: skip
    return columns, rows


def markdown_table(group: Sequence[Record]) -> str:
    """One group: a row for each document, with its rewards and the advantage of each step."""
    names = reward_names(group)
    lines = [f"**{_cell(plain(group[0]['prompt']))}**", ""]
    lines.append("| " + " | ".join(["", "document", "advantage of each step", "reward", *map(_cell, names)]) + " |")
    lines.append("|---" * (4 + len(names)) + "|")
    for member, record in enumerate(group, 1):
        advantages = ", ".join("–" if value is None else f"{value:+.2f}" for value in record.get("advantages", ()))
        values = [_number(record.get("reward")), *(_number(mean_reward(record, name)) for name in names)]
        lines.append("| " + " | ".join([str(member), _cell(plain(record["answer"])), advantages, *values]) + " |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Text of a model as text: no HTML, no markdown, no end of the cell or row."""
    return re.sub(r"([\\`*_{}\[\]()#+!|~-])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _number(value: float | None) -> str:
    return "–" if value is None else "missing" if value != value else f"{value:.3f}"


def picture_grid(group: Sequence[Record]) -> PIL.Image.Image | None:
    """The pictures of a group as one: a row for each document, in the order of the table. None where there is none."""
    rows = [pictures(record["answer"]) for record in group]
    drawn = [picture for row in rows for picture in row]
    if not drawn:
        return None
    width, height = max(p.width for p in drawn) + GAP, max(p.height for p in drawn) + GAP
    grid = PIL.Image.new("RGB", (max(map(len, rows)) * width - GAP, len(rows) * height - GAP), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            grid.paste(picture, (x * width, y * height))
    return grid


def html_page(step: int, records: Sequence[Record]) -> str:
    """A self-contained page, group by group; the edge of a step says whether its advantage is above (green) or below 0 (orange)."""
    parts = [f'<!doctype html><meta charset="utf-8"><title>Step {step}</title><style>{STYLE}</style>']
    for number, group in enumerate(groups_of(records), 1):
        parts.append(f"<h3>Step {step}, group {number}: {html.escape(plain(group[0]['prompt']))}</h3>")
        shown = "".join(_image(block) for block in group[0]["prompt"] if block["type"] == "image")
        parts.append(f"{shown}<table>")
        for member, record in enumerate(group, 1):
            steps = record.get("steps") or [{}] * len(record["answer"])
            advantages = record.get("advantages") or [None] * len(record["answer"])
            cells = "".join(_step(*each) for each in zip(record["answer"], steps, advantages, strict=True))
            whole = _values({"reward": record["reward"]} if record.get("reward") is not None else {}, record.get("document", {}))
            parts.append(f"<tr><td>{member}</td><td>{cells}</td><td>{whole}</td></tr>")
        parts.append("</table>")
    return "".join(parts) + "\n"


def _step(block: Record, values: Record, advantage: float | None) -> str:
    content = html.escape(block["text"]) if block["type"] == "text" else _image(block)
    kind = "" if not advantage else " up" if advantage > 0 else " down"
    return f'<div class="step{kind}">{content}{_values({} if advantage is None else {"advantage": advantage}, values)}</div>'


def _image(block: Record) -> str:
    return f'<img alt="" src="{block["image"]}">' if PICTURE.fullmatch(block["image"]) else ""


def _values(*values: Record) -> str:
    return "".join(f"<small>{html.escape(name)} {_number(value)}</small>" for part in values for name, value in part.items())
