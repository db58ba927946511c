"""The page of `diptych data inspect`: what is in a file of records, a sample of them with their pictures, and every problem."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from diptych.data.inspect import Inspection, Sample, spread
from diptych.document import Document, Text
from diptych.report.pages import page, thumbnail

PROBLEMS_SHOWN = 1000
SEGMENTS_SHOWN = 40  # of one prompt or answer
STYLE = """<style>
.counts { margin-top: 16px; display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 14px; align-items: start; }
.turn { display: flex; flex-wrap: wrap; gap: 12px; align-items: center; margin: 8px 0; padding-left: 12px; }
.turn { border-left: 3px solid var(--line); }
.turn.model { border-color: var(--accent); }
.turn img { height: 104px; width: auto; max-width: 100%; }
.turn p { margin: 0; flex: 1 1 320px; max-width: 75ch; overflow-wrap: anywhere; }
.bar { display: inline-block; height: 9px; border-radius: 3px; background: var(--accent); vertical-align: middle; }
table td:nth-last-child(2):has(.bar) { text-align: left; width: 40%; }
table.problems th, table.problems td { text-align: left; overflow-wrap: anywhere; vertical-align: top; }
td.where, .task > .note { font: 13px ui-monospace, monospace; }
</style>"""


def records_page(found: Inspection) -> str:
    """One self-contained HTML file."""
    lead = (
        f"{found.num_lines:,} lines, {found.num_records:,} records ({found.num_prompts:,} of them prompts without an answer), "
        f"{sum(found.num_images):,} pictures, {len(found.problems.found):,} problems."
    )
    parts = [STYLE, f"<h1>{html.escape(Path(found.name).name)}</h1>", f'<p class="lead">{lead}</p>', _problem_counts(found)]
    parts.append('<div class="counts">')
    parts += [_table("Sources", found.sources), _table("Licences", found.licenses), _table("Picture sizes", found.sizes)]
    parts.append(_histogram("Pictures a record", found.num_images))
    parts.append(_histogram("Words a record", found.num_words))
    if found.max_positions is not None:
        parts.append(_histogram(f"Tokens a record (context: {found.max_positions:,})", found.num_tokens))
    parts.append("</div>")
    parts.append(f"<h2>{len(found.samples)} records, drawn at random</h2>{''.join(_card(sample) for sample in found.samples)}")
    parts.append(_problem_list(found))
    return page(f"Records of {Path(found.name).name}", "".join(parts))


def _table(title: str, counts: dict[str, int], most: int = 10) -> str:
    rows = "".join(f"<tr><td>{html.escape(name)}</td><td>{count:,}</td></tr>" for name, count in list(counts.items())[:most])
    rest = f'<p class="note">and {len(counts) - most} more</p>' if len(counts) > most else ""
    return f'<div class="card"><h3>{html.escape(title)}</h3><table>{rows or "<tr><td>none</td></tr>"}</table>{rest}</div>'


def _histogram(title: str, values: Sequence[int], most: int = 12) -> str:
    found = spread(values)
    if found is None:
        return _table(title, {})
    width = max(1, -(-(int(found["max"]) - int(found["min"]) + 1) // most))
    bins = Counter((value - int(found["min"])) // width for value in values)
    rows = []
    for place in sorted(bins):
        low = int(found["min"]) + place * width
        name = f"{low:,}" if width == 1 else f"{low:,} to {low + width - 1:,}"
        share = round(100 * bins[place] / max(bins.values()))
        rows.append(f'<tr><td>{name}</td><td><i class="bar" style="width:{share}px"></i></td><td>{bins[place]:,}</td></tr>')
    note = f"median {found['median']:g}, {found['total']:,} in all"
    return f'<div class="card"><h3>{html.escape(title)}</h3><table>{"".join(rows)}</table><p class="note">{note}</p></div>'


def _card(sample: Sample) -> str:
    record = sample.record
    tokens = f", {sample.num_tokens:,} tokens" if sample.num_tokens is not None else ""
    title = " · ".join(html.escape(part) for part in (record.id, record.source, record.license) if part)
    answer = _turn(record.answer, "model") if record.answer is not None else '<p class="note">a prompt without an answer</p>'
    if len(record.given):
        answer = f'<p class="note">the given beginning of the answer</p>{_turn(record.given, "model")}<p class="note">and</p>{answer}'
    form = f'<p class="note">form of the answer: {record.form}</p>' if record.form is not None else ""
    note = f'<div class="chips"><span class="chip bad">{html.escape(sample.note)}</span></div>' if sample.note else ""
    head = f'<p class="note">{html.escape(sample.where.rsplit("/", 1)[-1])}{tokens}</p><h3>{title}</h3>'
    return f'<div class="task card">{head}{_turn(record.prompt, "asked")}{form}{answer}{note}</div>'


def _turn(document: Document, name: str) -> str:
    parts: list[str] = []
    words: list[str] = []
    for segment in (*document.segments[:SEGMENTS_SHOWN], None):
        if isinstance(segment, Text):
            words.append(html.escape(segment.text))
            continue
        if words:  # neighbouring texts are one paragraph
            parts.append(f"<p>{'<br>'.join(words)}</p>")
            words = []
        if segment is not None and segment.pixels is not None:
            size = f"{segment.pixels.width} x {segment.pixels.height}"
            parts.append(f'<img src="{thumbnail(segment.pixels)}" alt="picture, {size} pixels" title="{size}">')
    if len(document) > SEGMENTS_SHOWN:
        parts.append(f'<p class="note">and {len(document) - SEGMENTS_SHOWN:,} more texts and pictures</p>')
    return f'<div class="turn {name}">{"".join(parts)}</div>'


def _problem_counts(found: Inspection) -> str:
    counts = found.problems.by_cause()
    if not counts:
        return '<div class="chips"><span class="chip good">no problems found</span></div>'
    return f'<div class="chips">{"".join(f"""<span class="chip bad">{html.escape(c)}: {n:,}</span>""" for c, n in counts.items())}</div>'


def _problem_list(found: Inspection) -> str:
    if not found.problems.found:
        return ""
    rows = "".join(
        f'<tr><td class="where">{html.escape(p.where.rsplit("/", 1)[-1])}</td><td>{html.escape(p.cause)}</td>'
        f"<td>{html.escape(p.id)}</td><td>{html.escape(p.detail)}</td></tr>"
        for p in found.problems.found[:PROBLEMS_SHOWN]
    )
    more = len(found.problems.found) - PROBLEMS_SHOWN
    rest = f'<p class="note">and {more:,} more</p>' if more > 0 else ""
    head = "<tr><th>where</th><th>cause</th><th>id</th><th>detail</th></tr>"
    return f'<h2>Problems</h2><div class="scroll"><table class="problems">{head}{rows}</table></div>{rest}'
