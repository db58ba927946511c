"""The demo's report: what each training did to the same held-out prompts, in numbers, by picture, and document by document."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diptych.report.pages import GRPO_CURVES, WARMUP_CURVES, answer_html, blocks_html, curves, page

NUM_FIRST, NUM_CHANGED = 6, 6  # documents on the page
MEANING = {
    "format": "text and pictures alternate, with exactly the pictures asked for",
    "text": "texts exactly right",
    "image": "pictures that show exactly the true scene",
    "given": "pictures that are right given their own text and the picture before, so that an error is charged once",
    "order": "events in the right order",
    "score": "the mean of format, text, image and order",
    "document": "right in every respect",
}


def demo_page(results: Mapping[str, Any], examples: Sequence[dict[str, Any]], folder: Path) -> str:
    """`results` as in `results.json`. `examples`: {"family", "prompt" blocks, "answers": {checkpoint: answer}}."""
    labels, parity, seconds = results["labels"], results["parity"], results["seconds"]
    against = "control" if "control" in labels else "warmup"
    changed = [example for example in examples[NUM_FIRST:] if _right(example, against) != _right(example, "grpo")][:NUM_CHANGED]
    given = "their text and the picture before" if results["telling"] == "terse" else "the task"
    meaning = " ".join(f"{name}: {MEANING[name]}." for name in results["rates"])
    body = f"""
<h1>A model learns to write illustrated documents</h1>
<p class="lead">{html.escape(sentences(results))}</p>
<h2>Results on held-out prompts</h2>
<div class="card">{results_table(results, "greedy")}<br>{results_table(results, "sampled")}
<p class="note">Per cent, with 95 % bootstrap intervals over {results["num_prompts"]} prompts whose combinations of things were never seen in training.
{meaning}</p>
{kinds_table(results["greedy_by_kind"], labels)}</div>
<h2>Picture by picture</h2>
<div class="card">{pictures_table(results["greedy_by_picture"], labels)}
<p class="note">Of the first, second, ... picture of a document, greedy: the share that is right given its text and the picture before, by the oracle,
which no training has seen; and the mean of the rewards that judge pictures, on the same answers.</p></div>
<h2>Retention</h2>
<div class="card">{retention_table(results["retention"], labels)}</div>
<h2>The same prompts, before and after</h2>
<p class="note">Greedy answers. Numbers: what the rewards say. Green and red: the oracle's verdict, of pictures given {given}.</p>
{"".join(example_html(example, labels) for example in examples[:NUM_FIRST])}"""
    if changed:
        body += f"""
<h2>Where the verdict changed</h2>
<p class="note">The first {len(changed)} prompts after those above whose document is right after {html.escape(labels["grpo"])} and was wrong after
{html.escape(labels[against])}, or the other way round.</p>
{"".join(example_html(example, labels) for example in changed)}"""
    body += "\n<h2>Learning curves</h2>\n"
    for name in (name for name in ("grpo", "control") if name in labels):
        body += f"<h3>{html.escape(labels[name])}</h3>{curves(folder / name, GRPO_CURVES)}\n"
    body += f"""<details><summary>Warm-up</summary>{curves(folder / "warmup", WARMUP_CURVES)}</details>
<p class="note">Sampled and replayed log-probabilities differed by at most {parity["text_max"]:.1e} (text) and {parity["image_max"]:.1e} (image codes);
the ratio of the first update of a batch differed from 1 by at most {parity["first_ratio_gap"]:.1e}.</p>"""
    spent = ", ".join(f"{labels.get(name, name)} {value:.0f} s" for name, value in seconds.items())
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    return page("Diptych demo", body, html.escape(f"{spent}. {versions}"))


def sentences(results: Mapping[str, Any]) -> str:
    """What happened, in three or four sentences, from the numbers."""
    c = {name: value["greedy"] for name, value in results["checkpoints"].items()}
    terse = results["telling"] == "terse"
    rate, what = ("given", "pictures right given the one before") if terse else ("image", "pictures right")
    told = [
        f"The base model can describe pictures and draw captions, but {_per_cent(c['base']['format'])} of its answers to "
        f"{results['num_prompts']} held-out prompts are well-formed illustrated documents.",
        f"Warm-up taught it the form ({_per_cent(c['warmup']['format'])} well-formed), with {_per_cent(c['warmup']['text'])} of the texts "
        f"and {_per_cent(c['warmup'][rate])} of the {what}.",
    ]
    if "control" in c:
        told.append(f"{results['labels']['control']} leaves {_per_cent(c['control'][rate])} of the {what}.")
    told.append(
        f"Unified GRPO, rewarded only by models and a rule of form, ends at {_per_cent(c['grpo'][rate])}, and at "
        f"{_per_cent(c['grpo']['document'])} of whole documents right ({_per_cent(c['warmup']['document'])} after warm-up), "
        "as judged by an oracle that was never a reward."
    )
    return " ".join(told)


# --- tables --------------------------------------------------------------------------------------------------------------


def results_table(results: Mapping[str, Any], mode: str) -> str:
    rows = []
    for key, found in results["checkpoints"].items():
        cells = "".join(f"<td>{_with_interval(found[mode][r], found[mode][r + '_ci'])}</td>" for r in results["rates"])
        rows.append(f'<tr class="{key}"><td>{html.escape(results["labels"][key])}</td>{cells}</tr>')
    return _table((mode, *results["rates"]), rows)


def kinds_table(counted: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """Whole documents right, for each kind of prompt. `counted`: {checkpoint: {kind: rates}}."""
    rows = [
        f"<tr><td>{html.escape(kind)}</td><td>{row['prompts']}</td>"
        + "".join(f"<td>{100 * counted[key][kind]['document']:.1f}</td>" for key in labels)
        + "</tr>"
        for kind, row in counted["base"].items()
    ]
    return _table(("greedy, whole documents", "prompts", *labels.values()), rows)


def pictures_table(counted: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """`counted`: {checkpoint: [of the first picture, of the second, ...]}."""
    rewards = list(dict.fromkeys(name for row in counted["grpo"] for name in row["rewards"]))
    rows = []
    for number, row in enumerate(counted["base"]):
        cells = [f"<td>{_share(counted[key][number]['given'])}</td>" for key in labels]
        rows.append(f"<tr><td>picture {number + 1}, right</td><td>{row['pictures']}</td>{''.join(cells)}</tr>")
        for name in rewards:
            cells = [f"<td>{_mean(counted[key][number]['rewards'].get(name))}</td>" for key in labels]
            rows.append(f'<tr class="soft"><td>{html.escape(name)}</td><td></td>{"".join(cells)}</tr>')
    return _table(("", "asked for", *labels.values()), rows)


def retention_table(retention: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    rows = []
    for key, label in labels.items():
        cells = (f"<td>{_with_interval(found[key]['accuracy'], found[key]['accuracy_ci'])}</td>" for found in retention.values())
        rows.append(f"<tr><td>{html.escape(label)}</td>{''.join(cells)}</tr>")
    return _table(("greedy", *(skill.replace("_", " ") for skill in retention)), rows)


def _table(heads: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _with_interval(value: float, ends: Sequence[float]) -> str:
    return f'{100 * value:.1f}<span class="ci">{100 * ends[0]:.1f} to {100 * ends[1]:.1f}</span>'


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _mean(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _per_cent(value: float) -> str:
    return f"{100 * value:.1f} %"


# --- documents ------------------------------------------------------------------------------------------------------------


def _right(example: Mapping[str, Any], checkpoint: str) -> bool:
    return bool(example["answers"][checkpoint]["document"].get("oracle/whole document"))


def example_html(example: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """A prompt, and what each checkpoint answers."""
    answers = "".join(
        f'<div class="{key}"><h3>{html.escape(label)}</h3>{answer_html(example["answers"][key])}</div>' for key, label in labels.items()
    )
    return (
        f'<div class="task card"><div class="prompt"><span class="kind">{html.escape(example["family"])}</span>{blocks_html(example["prompt"])}</div>'
        f'<div class="answers" style="--columns: {len(labels)}">{answers}</div></div>'
    )
