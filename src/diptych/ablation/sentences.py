"""Plain sentences of a suite's record: what the numbers say, and what to know before believing them."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from diptych.ablation.measures import MEASURES
from diptych.ablation.summary import Record, by_seed, difference, gain
from diptych.statistics import SURE, p_text


def findings(record: Record) -> list[str]:
    """What the numbers say, a sentence for each variant, from the record alone."""
    measure = MEASURES[record["measures"][0]]
    variants = {variant["name"]: variant for variant in record["variants"]}
    labels = {name: variant["label"] for name, variant in variants.items()}
    rows = {row["variant"]: row for row in record["table"]}
    tell_gains = _starts_differ(record)
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
        if tell_gains:
            sentence += _gained(variants[name], measure.name)
        reached = _reached(row, name == record["reference"], labels[record["reference"]])
        said.append(sentence + "." + reached + _beside(row, record["measures"][1:]))
    return said


def changes_text(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}: {json.dumps(value)}" for key, value in changes.items())


def _starts_differ(record: Record) -> bool:
    """Whether GRPO starts from other warm-ups in some variants: then a final value says little without what there was before."""
    found = {
        tuple(sorted(by_seed(v, record["measures"][0], 0).items())) for v in record["variants"] if v["stage"] == "grpo" and 0 in v["steps"]
    }
    return len(found) > 1


def _gained(variant: dict[str, Any], measure: str) -> str:
    found = gain(variant, measure)
    if found is None:
        return ""
    before, added = found
    words = f"; {MEASURES[measure].show(before.mean)} before GRPO, which added {MEASURES[measure].show(added.mean, signed=True)}"
    return words if added.n == 1 else f"{words} ({interval_only(measure, dataclasses.asdict(added), signed=True)})"


def _beside(row: dict[str, Any], measures: Sequence[str]) -> str:
    """The other measures whose difference from the reference has an interval on one side of zero. They are not tested."""
    found = []
    for measure in measures:
        difference = row["difference"].get(measure)
        if difference and difference["n"] > 1 and (difference["low"] > 0 or difference["high"] < 0):
            shown = MEASURES[measure].show(difference["mean"], signed=True)
            found.append(f"{MEASURES[measure].label} {shown} ({interval_only(measure, difference, signed=True)})")
    return f" Not tested, with an interval on one side of zero: {'; '.join(found)}." if found else ""


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


Order = Literal["the same", "not shown", "the opposite", "not run"]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a claim of the paper: `order` is what these seeds show, `shown` the difference of the first measure."""

    better: str
    worse: str
    paper: str
    shown: str
    order: Order

    @property
    def sentence(self) -> str:
        outcome = {
            "the same": "the paper's order",
            "not shown": "these seeds do not show the paper's order, nor the opposite",
            "the opposite": "the opposite order: this differs from the paper",
            "not run": "not finished",
        }
        here = f"Here {self.shown}: " if self.shown else "Here "
        return f"The paper has {self.better} above {self.worse} ({self.paper}). {here}{outcome[self.order]}."


def verdicts(record: Record) -> list[Verdict]:
    """The suite's claims, each with the difference on common seeds. `the same` and `the opposite`: its 95 % interval is on one side
    of zero (claims are stated before anything runs; intervals are not corrected for their number)."""
    variants = {variant["name"]: variant for variant in record["variants"]}
    found = []
    for claim in record.get("claims", []):
        measure = claim.get("measure") or record["measures"][0]
        better, worse = variants[claim["better"]], variants[claim["worse"]]
        gap = difference(better, worse, measure, claim.get("step"))
        words = ""
        order: Order = "not run"
        if gap is not None:
            when = f" at step {claim['step']}" if claim.get("step") else ""
            words = f"{MEASURES[measure].label}{when} {MEASURES[measure].show(gap.mean, signed=True)}"
            order = "not shown"
            if gap.low is None or gap.high is None:
                words += " (one seed, no interval)"
            else:
                words += f" ({interval_only(measure, dataclasses.asdict(gap), signed=True)})"
                order = "the same" if gap.low > 0 else "the opposite" if gap.high < 0 else "not shown"
        found.append(Verdict(better["label"], worse["label"], claim["paper"], words, order))
    return found


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
            said.append(f"Trials were made with different versions of {name}: {', '.join(values)}. Differences may come from that.")
    return said


def cost(record: Record) -> str:
    """What the finished trials took, on one thread each, without the warm-ups that they share."""
    trials = {key: s for variant in record["variants"] for key, s in zip(variant["cells"], variant["seconds"], strict=True)}
    seconds = list(trials.values())
    whole = f"{sum(seconds) / 3600:.1f} hours" if sum(seconds) >= 3600 else f"{sum(seconds) / 60:.0f} minutes"
    return f"{len(seconds)} trials, {whole} on one thread each, up to {max(seconds) / 60:.0f} minutes a trial."
