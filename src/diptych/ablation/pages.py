"""The page of a suite, and its table for the terminal; both from the record alone."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from diptych.ablation.measures import MEASURES
from diptych.ablation.sentences import caveats, changes_text, cost, findings, interval_only, verdicts
from diptych.ablation.suite import Suite
from diptych.ablation.summary import Record, curve, dump
from diptych.report.intervals import COLOURS, Line, Point, Row, dot_chart, interval_chart, legend
from diptych.report.pages import page
from diptych.runs import atomic_text
from diptych.statistics import Estimate, p_text

TERMINAL_MEASURES = 4


def suite_page(record: Record) -> str:
    """One self-contained file: the question, the answer, the numbers, the curves, the settings, the cost."""
    said = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in findings(record))
    said += "".join(f"<li>{html.escape(verdict.sentence)}</li>" for verdict in verdicts(record))
    warnings = "".join(f'<p class="note"><b>{html.escape(sentence)}</b></p>' for sentence in caveats(record))
    primary = MEASURES[record["measures"][0]].label
    body = f"""
<h1>{html.escape(record["title"])}</h1>
<p class="lead">{html.escape(record["question"])}</p>
<div class="card"><h3>What the paper reports</h3><p>{html.escape(record["paper"])}</p></div>
<h2>What these runs show</h2>
{warnings}<ul>{said}</ul>
<h2>At the end of training</h2>
<div class="card">{_final_table(record)}
<p class="note">Means over seeds with 95 % t intervals; held-out prompts, judged by the oracle. Per cent, but for training and parity.
The last lines of a cell are the difference from the reference on the same seeds. Only {html.escape(primary)} is tested: p of the
paired t test, after Holm's correction for the number of variants. Intervals of the other measures are not corrected.</p></div>
<br>{_difference_chart(record)}
<h2>Learning curves</h2>
{_curves(record)}
{_overlays(record)}
<h2>Settings</h2>
<div class="card">{_settings(record)}</div>"""
    made = "; ".join(", ".join(f"{k} {v}" for k, v in made.items()) for made in record["made_with"])
    return page(f"Ablation: {record['title']}", body, html.escape(f"{cost(record)} {made}"))


def write(record: Record, folder: Path) -> Path:
    """Writes `results.json` and `report.html`; returns the page."""
    atomic_text(folder / "results.json", dump(record))
    atomic_text(folder / "report.html", suite_page(record))
    return folder / "report.html"


def colours(record: Record) -> dict[str, str]:
    return {v["name"]: COLOURS[i % len(COLOURS)] for i, v in enumerate(record["variants"])}


def _final_table(record: Record) -> str:
    head = "".join(f"<th>{html.escape(MEASURES[m].label)}</th>" for m in record["measures"])
    rows = []
    for variant, row in zip(record["variants"], record["table"], strict=True):
        cells = "".join(f'<td style="white-space:nowrap">{_final_cell(m, row)}</td>' for m in record["measures"])
        mark = ' <span class="ci">reference</span>' if variant["name"] == record["reference"] else ""
        label = f'<td style="min-width:9em">{html.escape(variant["label"])}{mark}</td>'
        rows.append(f"<tr>{label}<td>{len(variant['seeds'])}</td>{cells}<td>{_p(row)}</td><td>{_reached(row)}</td></tr>")
    return (f'<div class="scroll"><table><tr><th>variant</th><th>seeds</th>{head}<th>p</th><th>reaches reference at step</th></tr>'
            f"{''.join(rows)}</table></div>")  # fmt: skip


def _final_cell(measure: str, row: dict[str, Any]) -> str:
    final, difference = row["final"].get(measure), row["difference"].get(measure)
    if final is None:
        return "–"
    show = MEASURES[measure].show
    interval = f'<span class="ci">{interval_only(measure, final)}</span>' if final["n"] > 1 else ""
    if difference is None:
        return f"{show(final['mean'])}{interval}"
    lines = [show(difference["mean"], signed=True)]
    if difference["n"] > 1:
        lines.append(f"({interval_only(measure, difference, signed=True)})")
    return show(final["mean"]) + interval + "".join(f'<span class="ci">{line}</span>' for line in lines)


def _p(row: dict[str, Any]) -> str:
    return "–" if row["p_holm"] is None else p_text(row["p_holm"])


def _reached(row: dict[str, Any]) -> str:
    found = row["reaches"]
    return "–" if found is None else "never" if found["step"] is None else str(found["step"])


def _scaled(measure: str, x: float, found: Estimate | dict[str, Any]) -> Point:
    values = (found["mean"], found["low"], found["high"]) if isinstance(found, dict) else (found.mean, found.low, found.high)
    factor = 100 if MEASURES[measure].per_cent else 1
    mean, low, high = (None if value is None else factor * value for value in values)
    assert mean is not None
    return Point(x, mean, low, high)


def _difference_chart(record: Record) -> str:
    measure, palette = record["measures"][0], colours(record)
    rows = []
    for variant, row in zip(record["variants"], record["table"], strict=True):
        difference = row["difference"].get(measure)
        if difference is not None:
            shown = MEASURES[measure].show(difference["mean"], signed=True)
            shown += f" ({interval_only(measure, difference, signed=True)})" if difference["n"] > 1 else " (one seed)"
            rows.append(Row(variant["label"], palette[variant["name"]], _scaled(measure, 0, difference), shown))
    reference = next(v["label"] for v in record["variants"] if v["name"] == record["reference"])
    return dot_chart(f"{MEASURES[measure].label}: difference from {reference}", rows)


def _bounds(measure: str) -> tuple[float, float] | None:
    return (0.0, 100.0) if MEASURES[measure].per_cent else None


def _curves(record: Record) -> str:
    """A chart for each measure with a line for each variant that has a curve; those that do not train are dashed, all the way."""
    palette = colours(record)
    ends = [step for v in record["variants"] for step in v["steps"]]
    shown, charts = [], []
    for measure in record["measures"]:
        lines = []
        for variant in record["variants"]:
            points = [_scaled(measure, step, found) for step, found in curve(variant, measure)]
            flat = variant["stage"] != "grpo" and points
            if flat:
                points = [Point(x, points[0].mean) for x in (min(ends), max(ends))]
            if len(points) > 1:
                lines.append(Line(variant["label"], palette[variant["name"]], points, dashed=bool(flat)))
                shown.append((variant["label"], palette[variant["name"]]))
        charts.append(interval_chart(MEASURES[measure].label, lines, "GRPO step", _bounds(measure)))
    return legend(list(dict.fromkeys(shown))) + f'<div class="charts">{"".join(charts)}</div>'


def _overlays(record: Record) -> str:
    """Several measures of one variant in one chart, e.g. a reward and the truth that it stands for."""
    charts = []
    for measures in record["overlays"]:
        for variant in record["variants"]:
            lines = [
                Line(MEASURES[m].label, COLOURS[i % len(COLOURS)], points, dashed=i > 0)
                for i, m in enumerate(measures)
                if len(points := [_scaled(m, step, found) for step, found in curve(variant, m)]) > 1
            ]
            chart = interval_chart(variant["label"], lines, "GRPO step", _bounds(measures[0]))
            charts.append(chart.replace("</svg></div>", f"</svg>{legend([(line.label, line.colour) for line in lines])}</div>"))
    return f'<h2>Side by side</h2><div class="charts">{"".join(charts)}</div>' if any(charts) else ""


def _settings(record: Record) -> str:
    """Each variant as what it changes of the base, and the base as what it changes of its recipe."""
    base = record["base"]
    common = changes_text(base["changes"]) or "nothing changed"
    rows = "".join(
        f"<tr><td>{html.escape(v['label'])}</td><td style='text-align:left'><code>{html.escape(_changes(v))}</code></td>"
        f"<td><code>{' '.join(v['cells'])}</code></td></tr>"
        for v in record["variants"]
    )
    return (
        f"<p>All: recipe <code>{html.escape(base['recipe'])}</code> ({html.escape(common)}), one thread in each training.</p>"
        f'<div class="scroll"><table><tr><th>variant</th><th style="text-align:left">changes</th><th>trials</th></tr>{rows}</table></div>'
    )


def _changes(variant: dict[str, Any]) -> str:
    if variant["stage"] != "grpo":
        return {"base": "nothing is trained", "warmup": "no GRPO"}[variant["stage"]]
    return changes_text(variant["changes"]) or "as the base"


# --- terminal ------------------------------------------------------------------------------------------------------------


def show(record: Record, console: Console) -> None:
    """The table, and what it says."""
    console.print(rich_table(record))
    for sentence in (*caveats(record), *findings(record), *(verdict.sentence for verdict in verdicts(record)), cost(record)):
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)


def list_table(suites: dict[str, Suite]) -> Table:
    found = Table(title="suites of `diptych ablate`")
    for column in ("name", "question", "variants", "seeds"):
        found.add_column(column, justify="left" if column in ("name", "question") else "right")
    for name, suite in suites.items():
        found.add_row(name, Text(suite.question), str(len(suite.variants)), str(suite.seeds))
    return found


def rich_table(record: Record) -> Table:
    """The primary measure with its interval, difference and test, and as many other measures as a terminal is wide."""
    primary, *others = record["measures"][:TERMINAL_MEASURES]
    found = Table(title=Text(f"{record['title']}: means over seeds at the end of training"))
    found.add_column("variant")
    for column in ("seeds", MEASURES[primary].label, "difference", "p", "reaches\nit at", *(m.replace("/", "\n", 1) for m in others)):
        found.add_column(column, justify="right")
    for variant, row in zip(record["variants"], record["table"], strict=True):
        show, final, difference = MEASURES[primary].show, row["final"].get(primary), row["difference"].get(primary)
        interval = f"\n{interval_only(primary, final)}" if final and final["n"] > 1 else ""
        against = f"\n{interval_only(primary, difference, signed=True)}" if difference and difference["n"] > 1 else ""
        means = [MEASURES[m].show(row["final"].get(m, {}).get("mean")) for m in others]
        found.add_row(
            Text(variant["label"] + ("\n(reference)" if variant["name"] == record["reference"] else "")), str(len(variant["seeds"])),
            show(final and final["mean"]) + interval, show(difference and difference["mean"], signed=True) + against,
            _p(row), _reached(row), *means,
        )  # fmt: skip
    return found
