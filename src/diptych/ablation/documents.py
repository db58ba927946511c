"""docs/results.md, from committed records alone."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diptych.ablation.measures import MEASURES
from diptych.ablation.sentences import caveats, changes_text, cost, findings, interval_text, verdicts
from diptych.ablation.summary import Record, curve, dump, table
from diptych.runs import atomic_text
from diptych.statistics import p_text

HEAD = """# Results of the ablations

Written by `diptych ablate --docs docs/results` from the records in [results/](results); do not edit by hand. Each is a suite of
`diptych ablate`: variants of the demo's settings on the packaged Storyboard model, several seeds, held-out prompts, judged by an
oracle that no training has seen. Means over seeds with 95 % t intervals (cut at 0 and 100 %), in per cent but for training and
parity. Differences are from the reference on the same seeds. Only the first measure of a suite is tested (paired t test, p corrected
by Holm for the number of variants). The paper's numbers are of a 7B model on other benchmarks (MMIE average / InterleavedBench
average): compare directions, not sizes. Unless a variant says otherwise, it has three things that the demo has and the paper does not
have, or does not tell of: supervised examples in every update (ptx), rewards of which each trains one modality, and credit for each step
index on its own with discount 0.5.

Suites named `terse_...` are of the recipe `demo`: a text tells only what happens, and pictures must remember the rest. The others are of
the recipe `demo_full`, in which every text tells the whole scene, so that a picture is right where its text is. The text reward of most of
those is `text_critic`, the weaker one (`grpo.rewards.1.name` in the settings below a table): a reward that is wrong somewhere is what is
met in practice.

A *trial* is one variant with one seed. *Reaches the reference's end at step*: the first of the evaluated steps at which the variant's mean
is at least the reference's last mean; it has no interval. *Training*: means over the last five steps. *Parity*: the largest
difference of a replayed from a sampled log-probability.
"""


def publish(record: Record, folder: Path) -> Path:
    """Puts a suite's record where it is committed."""
    path = folder / f"{record['suite']}.json"
    atomic_text(path, dump(record))
    return path


def write_docs(folder: Path) -> Path:
    """Writes the document beside the folder of records, e.g. docs/results.md for docs/results."""
    path = folder.with_suffix(".md")
    atomic_text(path, results_document(folder))
    return path


def results_document(folder: Path) -> str:
    """Behind the suites stand the sections that other scripts wrote (`*.md` among the records).

    Raises ValueError where there are no records, or one whose table is not what its numbers give.
    """
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise ValueError(f"{folder} holds no records (*.json); write one with diptych ablate SUITE --docs {folder}")
    sections, records = [], []
    for path in paths:
        record = json.loads(path.read_text())
        if json.loads(json.dumps(table(record))) != record["table"]:
            raise ValueError(
                f"the table in {path} is not what its numbers give; write it again: diptych ablate {record['suite']} --docs {folder}"
            )
        records.append(record)
        sections.append(suite_section(record))
    others = [path.read_text() for path in sorted(folder.glob("*.md"))]
    return "\n".join([HEAD, *paper_section(records), *sections, *others])


TELLINGS = {
    "demo": "Where pictures must remember (recipe `demo`)",
    "demo_full": "Where every text tells the whole scene (recipe `demo_full`)",
}  # by the recipe of a suite


def paper_section(records: Sequence[Record]) -> list[str]:
    """All orders that the paper reports, over all suites: a table for each telling."""
    lines = []
    for recipe in [*TELLINGS, *dict.fromkeys(r["base"]["recipe"] for r in records if r["base"]["recipe"] not in TELLINGS)]:
        rows = [
            f"| {verdict.better} above {verdict.worse} | {verdict.paper} | {verdict.shown or '–'} | {verdict.order} | {record['title']} |"
            for record in records if record["base"]["recipe"] == recipe
            for verdict in verdicts(record)
        ]  # fmt: skip
        if rows:
            head = "| the paper's order | its numbers (MMIE / InterleavedBench) | difference here | order here | suite |"
            lines += [f"### {TELLINGS.get(recipe, f'Recipe `{recipe}`')}", "", head, "|---" * 5 + "|", *rows, ""]
    if not lines:
        return []
    words = ("`the same`, `the opposite`: the 95 % interval of the paired difference lies on one side of zero. `not shown`: it holds zero. "
             "Not corrected for their number.")  # fmt: skip
    return ["## Against the paper", "", *lines, words, ""]


def suite_section(record: Record) -> str:
    labels = [MEASURES[m].label.replace("|", "\\|") for m in record["measures"]]  # |x| is no border of a column
    lines = [
        f"## {record['title']}", "", record["question"], "", f"**Paper.** {record['paper']}", "",
        "**Here.**", *(f"- {sentence}" for sentence in findings(record)),
        *(f"- {verdict.sentence}" for verdict in verdicts(record)), *(f"- Note: {sentence}" for sentence in caveats(record)), "",
        f"| variant | seeds | {' | '.join(labels)} | p | reaches the reference's end at step |", "|---" * (len(labels) + 4) + "|",
        *(_row(record, variant, row) for variant, row in zip(record["variants"], record["table"], strict=True)), "",
        *_courses(record),
        f"All variants: {_base(record['base'])}, one thread.", "",
        f"`{command(record)}`. {cost(record)} Made with {_made_with(record)}.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _courses(record: Record) -> list[str]:
    """Where a suite draws measures into one chart: their means over seeds at each evaluated step, a table for each variant."""
    measures = list(dict.fromkeys(m for chart in record["overlays"] for m in chart))
    lines = []
    for variant in record["variants"] if measures else ():
        courses = {m: {step: found.mean for step, found in curve(variant, m)} for m in measures}
        head = " | ".join(MEASURES[m].label.replace("|", "\\|") for m in measures)
        count = len(variant["seeds"])
        of = "one seed" if count == 1 else f"means of {count} seeds, without intervals"
        lines += [f"{variant['label']}, at each evaluated step ({of}):", "", f"| step | {head} |", "|---" * (len(measures) + 1) + "|"]
        for step in variant["steps"]:
            lines.append(f"| {step} | {' | '.join(MEASURES[m].show(courses[m].get(step)) for m in measures)} |")
        lines.append("")
    return lines


def _row(record: Record, variant: dict[str, Any], row: dict[str, Any]) -> str:
    cells = [interval_text(m, row["final"][m]) if m in row["final"] else "–" for m in record["measures"]]
    p = "–" if row["p_holm"] is None else p_text(row["p_holm"])
    found = row["reaches"]
    reached = "–" if found is None else "never" if found["step"] is None else str(found["step"])
    label = variant["label"] + (" (reference)" if variant["name"] == record["reference"] else "")
    return f"| {label} | {len(variant['seeds'])} | {' | '.join(cells)} | {p} | {reached} |"


def _base(base: dict[str, Any]) -> str:
    changes = changes_text(base["changes"])
    return f"recipe `{base['recipe']}`" + (f" with `{changes}`" if changes else "")


def command(record: Record) -> str:
    """The command that makes this record again."""
    return shlex.join(["diptych", "ablate", record["suite"], "--seeds", str(len(record["seeds"])), *record["overrides"]])


def _made_with(record: Record) -> str:
    kinds = {
        f"{made.get('cpu')}, torch {made.get('torch')}, Diptych {made.get('diptych')} at {made.get('commit')}"
        for made in record["made_with"]
    }
    return "; ".join(sorted(kinds))
