"""One record of a suite: the numbers of its finished trials, and what statistics say of them.

The record is `results.json`, and what is committed in docs/results. The table, the page and the document read nothing else.
`values[measure]` of a variant has a row for each of its `seeds`, and in a row a number (or null) for each of its `steps`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.ablation.measures import MEASURES
from diptych.ablation.suite import Suite
from diptych.statistics import Estimate, estimate, holm, paired

if TYPE_CHECKING:
    from diptych.ablation.runner import Entry

Record = dict[str, Any]
DIGITS = 6
SAID = {"title", "question", "paper", "base", "reference", "measures", "claims", "overlays"}  # by the suite itself


def collect(name: str, suite: Suite, entries: Sequence[Entry], root: Path, overrides: Sequence[str] = ()) -> Record:
    """The record of what is finished; `overrides` are those that the suite was loaded with. Raises ValueError where nothing is."""
    variants, made_with = [], list[dict[str, Any]]()
    for variant in suite.variants:
        mine = [entry for entry in entries if entry.variant.name == variant.name]
        found = [(entry, summary) for entry in mine if (summary := entry.trial.summary(root)) is not None]
        runs = [(_points(entry, summary, root), summary) for entry, summary in found]
        steps = sorted({step for points, _ in runs for step in points})
        values = {m: [[points.get(step, {}).get(m) for step in steps] for points, _ in runs] for m in MEASURES}
        variants.append(
            {
                "name": variant.name, "label": variant.label, "stage": variant.stage, "changes": variant.changes,
                "seeds": [entry.seed for entry, _ in found], "steps": steps, "cells": [summary["cell"] for _, summary in runs],
                "seconds": [round(sum(summary["seconds"].values())) for _, summary in runs],
                "values": {m: rows for m, rows in values.items() if any(v is not None for row in rows for v in row)},
            }
        )  # fmt: skip
        made_with += [summary["versions"] for _, summary in runs]
    if not made_with:
        raise ValueError(f"no trial of suite {name!r} is finished yet; run diptych ablate {name}")
    unique = {json.dumps(made, sort_keys=True): made for made in made_with}
    record = {
        "suite": name, **suite.model_dump(mode="json", include=SAID),
        "overrides": list(overrides), "seeds": sorted({entry.seed for entry in entries}), "made_with": list(unique.values()),
        "variants": variants,
    }  # fmt: skip
    return {**record, "table": table(record)}


def _points(entry: Entry, summary: dict[str, Any], root: Path) -> dict[int, dict[str, float]]:
    """step -> measures of a trial; step 0 of a GRPO trial is its warm-up, and parity stands at the last step."""
    points: dict[int, dict[str, float]] = {int(step): values for step, values in summary["points"].items()}
    if entry.trial.stage == "grpo":
        from diptych.ablation.trials import warmup_trial

        before = warmup_trial(entry.trial).summary(root)
        points |= {0: before["points"]["0"]} if before else {}
        points[max(points)] |= {f"parity/{name}": value for name, value in summary["parity"].items()}
    return points


# --- statistics ----------------------------------------------------------------------------------------------------------


def by_seed(variant: dict[str, Any], measure: str, step: int | None = None) -> dict[int, float]:
    """seed -> value at a step (None: the last one), of the seeds that have one."""
    if measure not in variant["values"]:
        return {}
    column = -1 if step is None else variant["steps"].index(step)
    rows = zip(variant["seeds"], variant["values"][measure], strict=True)
    return {seed: row[column] for seed, row in rows if row[column] is not None}


def curve(variant: dict[str, Any], measure: str) -> list[tuple[int, Estimate]]:
    """(step, mean over seeds with its interval) of each step that has values."""
    columns = [(step, list(by_seed(variant, measure, step).values())) for step in variant["steps"]]
    return [(step, _mean(values, measure)) for step, values in columns if values]


def _mean(values: Sequence[float], measure: str) -> Estimate:
    """The interval of a share is cut at 0 and 1, beyond which its mean cannot lie."""
    found = estimate(values)
    if not MEASURES[measure].per_cent or found.low is None or found.high is None:
        return found
    return dataclasses.replace(found, low=max(0.0, found.low), high=min(1.0, found.high))


def table(record: Record) -> list[dict[str, Any]]:
    """For each variant: `final` estimates, `difference` from the reference (same seeds), and `reaches`, by measure.

    Only the primary measure is tested; `p_holm` is its p value, corrected for the number of variants that are compared.
    """
    reference = next(v for v in record["variants"] if v["name"] == record["reference"])
    primary = record["measures"][0]
    rows = []
    for variant in record["variants"]:
        final = {m: _mean(list(values.values()), m) for m in record["measures"] if (values := by_seed(variant, m))}
        differences = {} if variant is reference else {m: d for m in record["measures"] if (d := difference(variant, reference, m))}
        rows.append(
            {"variant": variant["name"], "final": final, "difference": differences, "reaches": reaches(variant, reference, primary)}
        )
    tested = [row["difference"].get(primary) for row in rows]
    for row, p in zip(rows, holm([d.p if d else None for d in tested]), strict=True):
        row["p_holm"] = None if p is None else _round(p)
        row["final"] = {m: _plain(e) for m, e in row["final"].items()}
        row["difference"] = {m: _plain(e, with_p=m == primary) for m, e in row["difference"].items()}
    return rows


def difference(variant: dict[str, Any], reference: dict[str, Any], measure: str, step: int | None = None) -> Estimate | None:
    """variant - reference at a step, or at their last ones, over the seeds that both have; None where they have none."""
    ours, theirs = by_seed(variant, measure, step), by_seed(reference, measure, step)
    seeds = [seed for seed in ours if seed in theirs]
    return paired([ours[s] for s in seeds], [theirs[s] for s in seeds]) if seeds else None


def gain(variant: dict[str, Any], measure: str) -> tuple[Estimate, Estimate] | None:
    """What GRPO started from (step 0, its warm-up), and what it added to that by its last step, over the seeds that have both."""
    if variant["stage"] != "grpo" or 0 not in variant["steps"]:
        return None
    before, after = by_seed(variant, measure, 0), by_seed(variant, measure)
    seeds = [seed for seed in after if seed in before]
    if not seeds:
        return None
    return _mean([before[s] for s in seeds], measure), paired([after[s] for s in seeds], [before[s] for s in seeds])


def reaches(variant: dict[str, Any], reference: dict[str, Any], measure: str) -> dict[str, Any] | None:
    """The first evaluated step at which the mean of a variant is at least the final mean of the reference (`step`; None: at
    none), over the seeds that both have. None where this has no meaning: no curves, no common seeds, a measure that should not rise."""
    seeds = [seed for seed in variant["seeds"] if seed in reference["seeds"]]
    target = [v for seed, v in by_seed(reference, measure).items() if seed in seeds]
    if not MEASURES[measure].rises or not target or variant["stage"] != "grpo" or reference["stage"] != "grpo":
        return None
    goal = estimate(target).mean
    for step in variant["steps"]:
        values = [v for seed, v in by_seed(variant, measure, step).items() if seed in seeds]
        if values and estimate(values).mean >= goal - 1e-12:
            return {"step": step, "of": reference["steps"][-1]}
    return {"step": None, "of": reference["steps"][-1]}


def _plain(found: Estimate, *, with_p: bool = False) -> dict[str, Any]:
    values = dataclasses.asdict(found)
    if not with_p:
        values.pop("p")
    return {name: _round(value) for name, value in values.items()}


def _round(value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


# --- files ---------------------------------------------------------------------------------------------------------------


def dump(record: Record) -> str:
    """JSON with a line for each top-level entry, variant and measure: short, and readable as a difference of two versions."""
    lines = []
    for key, value in record.items():
        if key == "variants":
            shown = ",\n  ".join(_variant_json(variant) for variant in value)
            lines.append(f'"variants": [\n  {shown}\n ]')
        elif key == "table":
            lines.append('"table": [\n  ' + ",\n  ".join(json.dumps(row) for row in value) + "\n ]")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return "{\n " + ",\n ".join(lines) + "\n}\n"


def _variant_json(variant: dict[str, Any]) -> str:
    head = {key: value for key, value in variant.items() if key != "values"}
    rows = ",\n   ".join(f"{json.dumps(m)}: {json.dumps(rows)}" for m, rows in variant["values"].items())
    return json.dumps(head)[:-1] + ', "values": {\n   ' + rows + "\n  }}"
