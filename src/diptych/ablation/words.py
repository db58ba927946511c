"""Plain sentences of a suite's record: what the numbers say, and what to know before believing them."""

from __future__ import annotations

import functools
from typing import Any

from diptych.ablation.measures import MEASURES
from diptych.statistics import SURE, p_text

Record = dict[str, Any]


def findings(record: Record) -> list[str]:
    """What the numbers say, a sentence for each variant, from the record alone."""
    measure = MEASURES[record["measures"][0]]
    labels = {variant["name"]: variant["label"] for variant in record["variants"]}
    rows = {row["variant"]: row for row in record["table"]}
    said = []
    for name in [record["reference"], *(n for n in labels if n != record["reference"])]:
        row = rows[name]
        final = row["final"].get(measure.name)
        if final is None:
            said.append(f"{labels[name]}: not finished.")
            continue
        sentence = f"{labels[name]}: {measure.label} {interval_text(measure.name, final)}"
        if row["difference"].get(measure.name):
            sentence += f"; {_compared(measure.name, row, labels[record['reference']])}"
        said.append(sentence + "." + _reached(row, name == record["reference"], labels[record["reference"]]))
    return said


def _compared(measure: str, row: dict[str, Any], reference: str) -> str:
    difference, p = row["difference"][measure], row["p_holm"]
    words = f"{MEASURES[measure].show(difference['mean'], signed=True)} against {reference}"
    if difference["n"] == 1:
        return f"{words} (one seed: this may be chance)"
    words += f" ({interval_only(measure, difference, signed=True)}"
    if p is None:
        return f"{words}; the same in all seeds, so there is nothing to test with)"
    verdict = "a difference" if p < SURE else "no difference that these seeds can show"
    return f"{words}; p = {p_text(p)}: {verdict})"


def _reached(row: dict[str, Any], is_reference: bool, reference: str) -> str:
    found = row["reaches"]
    if is_reference or found is None:
        return ""
    if found["step"] is None:
        return f" It does not reach the final value of {reference}."
    share = f" ({100 * found['step'] / found['of']:.0f} % of its {found['of']} steps)"
    return f" It reaches the final value of {reference} by step {found['step']}{share}."


def interval_text(measure: str, found: dict[str, Any]) -> str:
    shown = MEASURES[measure].show(found["mean"])
    return f"{shown} (one seed, no interval)" if found["n"] == 1 else f"{shown} ({interval_only(measure, found)})"


def interval_only(measure: str, found: dict[str, Any], *, signed: bool = False) -> str:
    show = functools.partial(MEASURES[measure].show, signed=signed)
    return f"{show(found['low'])} to {show(found['high'])}"


def caveats(record: Record) -> list[str]:
    """What a reader must know before believing the table."""
    said = []
    if len(record["seeds"]) == 1:
        said.append("One seed: no interval and no test. Differences may be chance.")
    for variant in record["variants"]:
        missing = [seed for seed in record["seeds"] if seed not in variant["seeds"]]
        if missing:
            said.append(f"{variant['label']}: not finished, or failed, for seed {', '.join(map(str, missing))}.")
    for name in sorted({name for made in record["made_with"] for name in made}):
        values = sorted({str(made.get(name, "none")) for made in record["made_with"]})
        if len(values) > 1:
            said.append(f"Cells were made with different versions of {name}: {', '.join(values)}. Differences may come from that.")
    return said


def cost(record: Record) -> str:
    """What the finished cells took, on one thread each, without the warm-ups that they share."""
    cells = {key: s for variant in record["variants"] for key, s in zip(variant["cells"], variant["seconds"], strict=True)}
    seconds = list(cells.values())
    whole = f"{sum(seconds) / 3600:.1f} hours" if sum(seconds) >= 3600 else f"{sum(seconds) / 60:.0f} minutes"
    return f"{len(seconds)} cells, {whole} on one thread each, up to {max(seconds) / 60:.0f} minutes a cell."
