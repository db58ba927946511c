"""Two evaluations side by side: the record for JSON, what it says in plain words, the terminal's table, and the page with documents."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from diptych.document import open_image
from diptych.evaluation.compare import NUM_FLIPS, ONE_SIDED, Comparison, Job, Key
from diptych.evaluation.sheets import NUM_RESAMPLES
from diptych.report.pages import answer_html, blocks_html, page, thumbnail
from diptych.statistics import SURE, holm, p_text

FEW_ITEMS, FOLDED_ROWS = 20, 30
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
Record = dict[str, Any]


# --- the record ----------------------------------------------------------------------------------------------------------


def summary(found: Comparison) -> Record:
    """All numbers, p values after Holm's correction over headlines and over aspects, and what they say; ready for JSON."""
    headlines = _corrected({name: (dataclasses.asdict(figure), figure.p) for name, figure in found.headlines.items()})
    aspects = _corrected({name: (dataclasses.asdict(a), a.scored.p if a.scored else None) for name, a in found.aspects.items()})
    record: Record = {
        "benchmark": found.a.benchmark, "scale": list(found.scale), "a": _side(found.a), "b": _side(found.b),
        "pairs": len(found.keys), "items": len({id for id, _ in found.keys}), "only_a": len(found.only_a), "only_b": len(found.only_b),
        "headlines": headlines, "aspects": aspects,
        "categories": {c: {name: dataclasses.asdict(part) for name, part in parts.items()} for c, parts in found.categories.items()},
        "changed_settings": {name: list(values) for name, values in found.changed.items()},
        "problems": found.problems.by_cause(), "method": {"level": 0.95, "resamples": NUM_RESAMPLES, "flips": NUM_FLIPS},
    }  # fmt: skip
    return record | {"findings": findings(record), "notes": notes(record)}


def _corrected(found: dict[str, tuple[dict[str, Any], float | None]]) -> dict[str, dict[str, Any]]:
    p_values = holm([p for _, p in found.values()])
    return {name: {**record, "p_holm": p} for (name, (record, _)), p in zip(found.items(), p_values, strict=True)}


def _side(job: Job) -> dict[str, Any]:
    return {"folder": str(job.folder), "model": job.model, "answers": len(job.scores)}


# --- words ---------------------------------------------------------------------------------------------------------------


def findings(record: Record) -> list[str]:
    """Which is better in what, and where that cannot be told."""
    said: dict[str, list[str]] = {"a": [], "b": [], "": []}
    for name, aspect in record["aspects"].items():
        scored = aspect["scored"]
        if scored is not None:
            said[_better(scored, aspect["p_holm"])].append(f"{label(name)} ({_told(scored, record)})")
    lines = [_headline_told(name, figure) for name, figure in record["headlines"].items()]
    lines += [f"{side.upper()} is better in {', '.join(said[side])}." for side in ("b", "a") if said[side]]
    if said[""]:
        lines.append(f"No difference can be told in {', '.join(said[''])}.")
    nothing = [label(name) for name, aspect in record["aspects"].items() if aspect["scored"] is None]
    if nothing:
        lines.append(f"Nothing can be said about {', '.join(nothing)}: no pair has both values.")
    return lines


def _headline_told(name: str, figure: dict[str, Any]) -> str:
    if figure["mean"] is None:
        sides = " and ".join(side.upper() for side in ("a", "b") if figure[side] is None)
        return f"{name} cannot be compared: {sides} has no such figure, because something that it is made of has no value."
    plain, signed = _numbers(figure["decimals"], signed=False), _numbers(figure["decimals"])
    none = "one item" if figure["units"] == 1 else "too few values for an interval"
    interval = none if figure["low"] is None else f"95 % interval {signed(figure['low'])} to {signed(figure['high'])}"
    better = _better(figure, figure["p_holm"])
    verdict = f"{better.upper()} is better" if better else "no difference can be told"
    return f"{name}: A {plain(figure['a'])}, B {plain(figure['b'])}; {verdict} ({signed(figure['mean'])}, {interval})."


def notes(record: Record) -> list[str]:
    """What to know before believing the findings."""
    said = []
    for name, aspect in record["aspects"].items():
        if aspect["left_out"]:
            whole = aspect["lowest"]["pairs"]
            said.append(
                f"{label(name)}: {aspect['left_out']:,} of {whole:,} pairs are left out, because a value is missing in {_where(aspect)}."
            )
        scored, lowest = aspect["scored"], aspect["lowest"]
        if scored and aspect["left_out"] and _sign(scored) != _sign(lowest):
            said.append(
                f"{label(name)}: with missing values counted as {record['scale'][0]:g} the difference is {_told(lowest, record)}, "
                "so what is missing decides which looks better."
            )
        if scored and scored["items"] < FEW_ITEMS:
            said.append(f"{label(name)}: only {scored['items']} items, for which an interval is rough.")
    for side, other in (("a", "b"), ("b", "a")):
        if record[f"only_{side}"]:
            counts = f"{record[f'only_{side}']:,} of {record[side]['answers']:,} answers of {side.upper()}"
            said.append(f"{counts} are not compared: {other.upper()} has none to them.")
    changed = record["changed_settings"]
    if scorers := [name for name in changed if name.startswith("scoring.")]:
        said.append(f"The two were scored in different ways ({', '.join(scorers)}): a difference may be the scorer's and not the models'.")
    if data := [name for name in changed if name.startswith("data.") and name != "data.folder"]:
        said.append(f"The two read different data ({', '.join(data)}): an item may not be the same question on both sides.")
    others = [f"{cause}: {number:,}" for cause, number in record["problems"].items() if cause != ONE_SIDED]
    if others:
        said.append(f"Problems: {', '.join(others)}.")
    said.append(
        "Intervals and p values tell how much depends on which items were asked. They say nothing of another seed of training or sampling, "
        "nor of what the scorer gets wrong."
    )
    return said


def _better(scored: dict[str, Any], p: float | None) -> str:
    """ "a", "b", or "" where that cannot be told."""
    return "" if p is None or p >= SURE else _sign(scored)


def _sign(difference: dict[str, Any]) -> str:
    return "b" if difference["mean"] > 0 else "a" if difference["mean"] < 0 else ""


def _told(difference: dict[str, Any], record: Record) -> str:
    show = _format(record)
    if difference["low"] is None:
        return f"{show(difference['mean'])}, one item"
    return f"{show(difference['mean'])}, 95 % interval {show(difference['low'])} to {show(difference['high'])}"


def _where(aspect: dict[str, Any]) -> str:
    parts = []
    for side in ("a", "b"):
        causes = aspect[f"causes_{side}"]
        if causes:
            parts.append(f"{side.upper()} ({', '.join(f'{cause}: {number:,}' for cause, number in causes.items())})")
    return " and ".join(parts)


def _format(record: Record, signed: bool = True) -> Any:
    return _numbers(3 if record["scale"][1] - record["scale"][0] <= 1 else 2, signed)


def _numbers(decimals: int, signed: bool = True) -> Callable[[float], str]:
    return lambda value: f"{value:{'+' if signed else ''}.{decimals}f}".replace("-", "−")


def label(name: str) -> str:
    return name.replace("_", " ")


# --- terminal ------------------------------------------------------------------------------------------------------------


def headline_table(record: Record) -> Table:
    found = Table(title=f"{escape(record['benchmark'])}: the figures of its own table")
    found.add_column("")
    for column in ("A", "B", "B − A", "95 % interval", "p", "B − A, missing\nas lowest"):
        found.add_column(column, justify="right", no_wrap=True)
    for name, figure in record["headlines"].items():
        found.add_row(escape(name), *_headline_cells(figure))
    return found


def _headline_cells(figure: dict[str, Any]) -> list[str]:
    plain, signed = _numbers(figure["decimals"], signed=False), _numbers(figure["decimals"])
    numbers = [show(figure[key]) if figure[key] is not None else "–" for key, show in (("a", plain), ("b", plain), ("mean", signed))]
    interval = "–" if figure["low"] is None else f"{signed(figure['low'])} to {signed(figure['high'])}"
    return [*numbers, interval, _p(figure), "–" if figure["lowest"] is None else signed(figure["lowest"])]


def rich_table(record: Record) -> Table:
    plain, signed = _format(record, signed=False), _format(record)
    found = Table(title=f"{escape(record['benchmark'])}: {record['pairs']:,} answers that both have")
    found.add_column("aspect")
    for column in ("A", "B", "B − A", "p", "A wins, ties,\nB wins", "pairs", "left\nout", "B − A, missing\nas lowest"):
        found.add_column(column, justify="right", no_wrap=True)
    for name, aspect in record["aspects"].items():
        scored, lowest = aspect["scored"], signed(aspect["lowest"]["mean"])
        if scored is None:
            found.add_row(escape(label(name)), *"–––––", "0", str(aspect["left_out"]), lowest)
            continue
        interval = "" if scored["low"] is None else f"\n{signed(scored['low'])} to {signed(scored['high'])}"
        wins = f"{scored['wins_a']}, {scored['ties']}, {scored['wins_b']}"
        found.add_row(
            escape(label(name)), plain(scored["mean_a"]), plain(scored["mean_b"]), signed(scored["mean"]) + interval, _p(aspect), wins,
            str(scored["pairs"]), str(aspect["left_out"]), lowest,
        )  # fmt: skip
    return found


def _p(aspect: dict[str, Any]) -> str:
    return "–" if aspect["p_holm"] is None else p_text(aspect["p_holm"])


# --- page ----------------------------------------------------------------------------------------------------------------


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
        cells = zip(names[1:], _headline_cells(figure), strict=True)
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
        _row(label(name), aspect, reach, record, _p(aspect), _better(aspect["scored"], aspect["p_holm"]) if aspect["scored"] else "")
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
    plain, signed = _format(record, signed=False), _format(record)
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
        if name not in ("model", "fingerprint.hash")  # the model is told at the top
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
