"""The page of two evaluations: what the record says, its tables, and documents side by side."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diptych.evaluation.compare import Comparison, Job, Key
from diptych.pictures import open_image
from diptych.report.compare import Record, ahead, headline_cells, label, number_format, p_cell
from diptych.report.pages import answer_html, blocks_html, page, thumbnail

FOLDED_ROWS = 30
BAR_WIDTH, BAR_HEIGHT = 150, 18
STYLE = """<style>
.answers.two { grid-template-columns: repeat(2, minmax(0, 1fr)); }
@media (max-width: 860px) { .answers.two { grid-template-columns: 1fr; } main { padding: 24px 14px 60px; } .card { padding: 14px; } }
.answers > .a { border-color: var(--warmup); } .answers > .b { border-color: var(--grpo); }
.prompt span, .step .words { white-space: pre-line; }
.prompt { overflow-wrap: anywhere; }
svg.bar { width: 150px; height: 18px; display: inline-block; vertical-align: middle; }
td.left, th.left { text-align: left; }
td.name { min-width: 9em; overflow-wrap: anywhere; } table.numbers td:not(.name) { white-space: nowrap; }
table.settings td { overflow-wrap: anywhere; min-width: 4em; }
.task > .chips { margin: 0 0 10px; }
.answers.two .step img { height: auto; } .prompt img { width: auto; max-width: 100%; }
@media (max-width: 700px) {
  table.numbers, table.numbers tbody { display: block; } table.numbers tr:first-child { display: none; }
  table.numbers tr { display: grid; grid-template-columns: repeat(3, auto); padding: 10px 0; border-bottom: 1px solid var(--line); }
  table.numbers td { border: 0; padding: 2px 8px 2px 0; text-align: left; }
  table.numbers td.name, table.numbers td.bars { grid-column: 1 / -1; } table.numbers td.name { font-weight: 600; }
  table.numbers td[data-label]::before { content: attr(data-label); display: block; color: var(--soft); font-size: 12px; }
}
p.lead { margin: 8px 0; } ul.notes { color: var(--soft); font-size: 14px; max-width: 85ch; padding-left: 20px; }
.sides { display: grid; gap: 4px; margin: 14px 0 18px; font-size: 14px; overflow-wrap: anywhere; }
.sides b { display: inline-block; min-width: 1.4em; } .sides .a b { color: var(--warmup); } .sides .b b { color: var(--grpo); }
</style>"""


def comparison_page(
    found: Comparison, record: Record, shown: dict[str, list[tuple[Key, float | None]]], answers: Sequence[dict[Key, dict[str, Any]]]
) -> str:
    """One self-contained file. `shown`: the pairs of `evaluation.compare.examples`; `answers`: the lines of A and of B for them."""
    lead = "".join(f'<p class="lead">{html.escape(sentence).replace(" %", "&nbsp;%")}</p>' for sentence in record["findings"])
    warnings = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in record["notes"])
    sides = "".join(
        f'<div class="{side}"><b>{side.upper()}</b> {html.escape(record[side]["model"])} '
        f'<span class="note">{html.escape(record[side]["folder"])}, {record[side]["answers"]:,} answers</span></div>'
        for side in ("a", "b")
    )
    body = f"""{STYLE}
<h1>{html.escape(found.a.benchmark)}: B against A</h1>
<div class="sides">{sides}</div>
{lead}
<ul class="notes">{warnings}</ul>
{_headline_section(record)}
<h2>{record["pairs"]:,} answers to {record["items"]:,} items that both have</h2>
<div class="card">{_aspect_table(record)}
<p class="note">{html.escape(_legend(found.scale))}</p></div>
{_category_table(record)}
{_settings_table(record)}
{"".join(_section(title, found, shown[kind], answers) for kind, title in TITLES.items())}"""
    return page(f"{found.a.benchmark}: B against A", body)


def _headline_section(record: Record) -> str:
    if not record["headlines"]:
        return ""
    names = ("", "A", "B", "B − A", "95 % interval", "p", "B − A, missing as lowest")
    head = "".join(f"<th>{name}</th>" for name in names)
    rows = ""
    for name, figure in record["headlines"].items():
        cells = zip(names[1:], headline_cells(figure), strict=True)
        shown = "".join(f'<td data-label="{column}">{cell}</td>' for column, cell in cells)
        rows += f'<tr><td class="name">{html.escape(name)}</td>{shown}</tr>'
    return f"""<h2>The figures of the benchmark's own table</h2>
<div class="card"><div class="scroll"><table class="numbers"><tr>{head}</tr>{rows}</table></div>
<p class="note">Each side as its own table has it, over the items that both have: what is missing is left out on its side only.
Interval: paired bootstrap over items. p: paired permutation test, after Holm's correction for the number of these figures.</p></div>"""


def _legend(scale: tuple[float, float]) -> str:
    return (
        f"Raw scores, {scale[0]:g} to {scale[1]:g}; more is better. Bars: B − A with its 95 % interval (paired bootstrap over items); "
        "right of the line B is ahead. p: two-sided sign-flip test over items, after Holm's correction for the number of aspects. "
        f"Last column: the difference, and under it the means of A and B, when a missing value counts as {scale[0]:g}."
    )


TITLES = {"b": "Where B is furthest ahead", "a": "Where A is furthest ahead", "random": "Drawn at random"}


def _aspect_table(record: Record) -> str:
    reach = _reach(list(record["aspects"].values()))
    rows = "".join(
        _row(label(name), aspect, reach, record, p_cell(aspect), ahead(aspect["scored"], aspect["p_holm"]) if aspect["scored"] else "")
        for name, aspect in record["aspects"].items()
    )
    return _table("aspect", rows, record, tested=True)


def _category_table(record: Record) -> str:
    parts = [(category, name, aspect) for category, aspects in record["categories"].items() for name, aspect in aspects.items()]
    if not parts:
        return ""
    reach, several = _reach([aspect for _, _, aspect in parts]), len(record["aspects"]) > 1
    rows = "".join(_row(f"{c}: {label(name)}" if several else c, aspect, reach, record) for c, name, aspect in parts)
    opened = " open" if len(parts) <= FOLDED_ROWS else ""
    return f"""<h2>By category</h2><div class="card"><details{opened}><summary>{len(record["categories"])} categories</summary>
{_table("category", rows, record, tested=False)}</details>
<p class="note">Intervals are not corrected for their number: of twenty, one misses by chance.</p></div>"""


def _table(first: str, rows: str, record: Record, tested: bool) -> str:
    missing = f"missing as {record['scale'][0]:g}"
    names = [first, "A", "B", "B − A", *(["p"] if tested else []), "A wins, ties, B wins", "pairs", "left out", missing]
    head = "".join(f"<th{' class=left' if name == 'B − A' else ''}>{name}</th>" for name in names)
    return f'<div class="scroll"><table class="numbers"><tr>{head}</tr>{rows}</table></div>'


def _row(name: str, aspect: dict[str, Any], reach: float, record: Record, p: str | None = None, better: str = "") -> str:
    plain, signed = number_format(record, signed=False), number_format(record)
    scored, lowest = aspect["scored"], aspect["lowest"]
    bars, means, wins, pairs = "no pair has both values", ("–", "–"), "–", 0
    if scored is not None:
        interval = f'<span class="ci">{signed(scored["low"])} to {signed(scored["high"])}</span>' if scored["low"] is not None else ""
        bars = f"{_bar(scored, reach, better)} <b>{signed(scored['mean'])}</b>{interval}"
        means, pairs = (plain(scored["mean_a"]), plain(scored["mean_b"])), scored["pairs"]
        wins = f"{scored['wins_a']:,} · {scored['ties']:,} · {scored['wins_b']:,}"
    missing = f'{signed(lowest["mean"])}<span class="ci">{plain(lowest["mean_a"])}, {plain(lowest["mean_b"])}</span>'
    cells = [("A", means[0]), ("B", means[1]), ("", bars), *([] if p is None else [("p", p)]), ("A wins · ties · B wins", wins)]
    cells += [("pairs", f"{pairs:,}"), ("left out", f"{aspect['left_out']:,}"), (f"missing as {record['scale'][0]:g}", missing)]
    shown = "".join(f'<td data-label="{head}">{cell}</td>' if head else f'<td class="bars left">{cell}</td>' for head, cell in cells)
    return f'<tr><td class="name">{html.escape(name)}</td>{shown}</tr>'


def _reach(aspects: Sequence[dict[str, Any]]) -> float:
    """The largest distance from 0 that a bar must show."""
    ends = [abs(end) for aspect in aspects if aspect["scored"] for end in (aspect["scored"][k] for k in ("mean", "low", "high")) if end]
    return max(ends, default=1.0)


def _bar(scored: dict[str, Any], reach: float, better: str) -> str:
    """The difference as a dot around a line at zero, with its interval."""

    def x(value: float) -> float:
        return BAR_WIDTH / 2 + (BAR_WIDTH / 2 - 5) * value / reach

    middle, colour = BAR_HEIGHT / 2, {"a": "var(--warmup)", "b": "var(--grpo)", "": "var(--soft)"}[better]
    whisker = ""
    if scored["low"] is not None:
        ends = f'x1="{x(scored["low"]):.1f}" x2="{x(scored["high"]):.1f}" y1="{middle}" y2="{middle}"'
        whisker = f'<line {ends} stroke="{colour}" stroke-width="2"/>'
    return (
        f'<svg class="bar" viewBox="0 0 {BAR_WIDTH} {BAR_HEIGHT}" role="img" aria-label="B − A">'
        f'<line x1="{BAR_WIDTH / 2}" x2="{BAR_WIDTH / 2}" y1="0" y2="{BAR_HEIGHT}" stroke="var(--soft)" stroke-opacity="0.5"/>{whisker}'
        f'<circle cx="{x(scored["mean"]):.1f}" cy="{middle}" r="4" fill="{colour}"/></svg>'
    )


def _settings_table(record: Record) -> str:
    rows = "".join(
        f'<tr><td>{html.escape(name)}</td><td class="left">{_setting(a)}</td><td class="left">{_setting(b)}</td></tr>'
        for name, (a, b) in record["changed_settings"].items()
        if name not in ("model", "fingerprint.hash")  # the model stands at the top
    )
    if not rows:
        return ""
    head = '<tr><th>setting</th><th class="left">A</th><th class="left">B</th></tr>'
    return f'<h2>Settings that differ</h2><div class="card"><table class="settings">{head}{rows}</table></div>'


def _setting(value: Any) -> str:
    return "–" if value is None else html.escape(str(value))


# --- documents -----------------------------------------------------------------------------------------------------------


def _section(
    title: str, found: Comparison, shown: Sequence[tuple[Key, float | None]], answers: Sequence[dict[Key, dict[str, Any]]]
) -> str:  # fmt: skip
    if not shown:
        return ""
    cards = "".join(_card(found, key, gap, answers) for key, gap in shown)
    return f"<h2>{title}</h2>{cards}"


def _card(found: Comparison, key: Key, gap: float | None, answers: Sequence[dict[Key, dict[str, Any]]]) -> str:
    id, number = key
    prompt = ""
    for job, lines in ((found.b, answers[1]), (found.a, answers[0])):  # the same question: that of A where both have it
        if isinstance(asked := lines.get(key, {}).get("prompt"), list):
            prompt = f'<div class="prompt">{blocks_html(_blocks(asked, job.folder / "answers"))}</div>'
    kinds = [found.a.scores[key].category, id, *([f"answer {number + 1}"] if number else [])]
    marks = "".join(f'<span class="chip">{html.escape(kind)}</span>' for kind in kinds if kind)
    mark = f'<span class="chip">mean B − A {gap:+.2f}</span>' if gap is not None else ""
    columns = "".join(
        f'<div class="{side}"><h3>{side.upper()}</h3>{_answer(job, key, lines.get(key))}</div>'
        for side, job, lines in (("a", found.a, answers[0]), ("b", found.b, answers[1]))
    )
    return f'<div class="task card"><div class="chips">{marks}{mark}</div>{prompt}<div class="answers two">{columns}</div></div>'


def _answer(job: Job, key: Key, line: dict[str, Any] | None) -> str:
    score = job.scores[key]
    cause = f'<p class="note">missing because: {html.escape(score.cause)}</p>' if score.cause else ""
    if line is None or not isinstance(line.get("blocks"), list):
        blocks: list[dict[str, Any]] = [{"type": "text", "text": f"(this answer is not in {job.folder / 'answers'})"}]
    else:
        blocks = _blocks(line["blocks"], job.folder / "answers") or [{"type": "text", "text": "(an empty answer)"}]
    values = {label(name): value for name, value in score.values.items()}
    return answer_html({"answer": blocks, "steps": [{} for _ in blocks], "document": values}) + cause


def _blocks(blocks: Sequence[Any], folder: Path) -> list[dict[str, Any]]:
    """Message blocks with small pictures inside; what is broken or cannot be opened is said in its place."""
    found: list[dict[str, Any]] = []
    for block in blocks:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "image" and isinstance(block.get("image"), str):
            source = block["image"] if block["image"].startswith("data:") else str(folder / block["image"])
            try:
                found.append({"type": "image", "image": thumbnail(open_image(source))})
            except ValueError:
                found.append({"type": "text", "text": f"(the picture {block['image'][:80]} cannot be opened)"})
        elif kind == "text" and isinstance(block.get("text"), str):
            found.append({"type": "text", "text": block["text"]})
        else:
            found.append({"type": "text", "text": f"(broken block {str(block)[:80]})"})
    return found
