"""The demo's report and the page of a training run."""

from __future__ import annotations

import html
import io
import itertools
from base64 import b64encode
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import PIL.Image
import yaml

from diptych.report.charts import line_chart
from diptych.runs import read_jsonl

NAMES = {"base": "Base model", "warmup": "After warm-up", "grpo": "After GRPO"}
RATES = ("format", "text", "image", "order", "score", "document")

NUM_FIRST, NUM_CHANGED = 6, 6  # documents on the demo's page
Line = tuple[str, str, str]  # label, colour, metric
THUMBNAIL = 208  # pixels of height


def page(title: str, body: str, footer: str = "") -> str:
    style = resources.files("diptych.report").joinpath("style.css").read_text()
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{style}</style></head><body><main>{body}<footer>{footer}</footer></main></body></html>\n"
    )


# --- pieces --------------------------------------------------------------------------------------------------------------


def blocks_html(blocks: Sequence[dict[str, Any]]) -> str:
    """Text and pictures in a row (prompts)."""
    return "".join(
        f'<img src="{block["image"]}" alt="prompt picture">' if block["type"] == "image" else f"<span>{html.escape(block['text'])}</span>"
        for block in blocks
    )


def chips_html(values: dict[str, Any]) -> str:
    """Numbers as plain chips, verdicts (bool; `oracle/NAME`, which no reward can be called) as green or red ones."""
    chips = []
    for name, value in values.items():
        if isinstance(value, bool):
            chips.append(
                f'<span class="chip {"good" if value else "bad"}">{html.escape(name.removeprefix("oracle/"))} {"right" if value else "wrong"}</span>'
            )
        elif value is None or value != value:
            chips.append(f'<span class="chip bad">{html.escape(name)} missing</span>')
        else:
            chips.append(f'<span class="chip">{html.escape(name)} {value:.2f}</span>')
    return f'<div class="chips">{"".join(chips)}</div>' if chips else ""


def answer_html(answer: dict[str, Any]) -> str:
    """A document: `answer` blocks, `steps` values per block, `document` values."""
    rows: list[str] = []
    texts: list[str] = []
    for block, values in zip(answer["answer"], answer["steps"], strict=True):
        if block["type"] == "text":
            if texts:
                rows.append(f'<div class="step"><div class="words">{"".join(texts)}</div></div>')
            texts = [html.escape(block["text"] or "(nothing)"), chips_html(values)]
        else:
            words = "".join(texts) + chips_html(values)
            rows.append(f'<div class="step"><img src="{block["image"]}" alt="drawn picture"><div class="words">{words}</div></div>')
            texts = []
    if texts:
        rows.append(f'<div class="step"><div class="words">{"".join(texts)}</div></div>')
    return "".join(rows) + chips_html(answer.get("document", {}))


def results_table(checkpoints: dict[str, Any], mode: str) -> str:
    head = "".join(f"<th>{name}</th>" for name in RATES)
    rows = []
    for key, label in NAMES.items():
        row = checkpoints[key][mode]
        cells = "".join(
            f'<td>{100 * row[r]:.1f}<span class="ci">{100 * row[r + "_ci"][0]:.1f} to {100 * row[r + "_ci"][1]:.1f}</span></td>'
            for r in RATES
        )
        rows.append(f'<tr class="{key}"><td>{label}</td>{cells}</tr>')
    return f'<div class="scroll"><table><tr><th>{mode}</th>{head}</tr>{"".join(rows)}</table></div>'


def kinds_table(counted: dict[str, Any]) -> str:
    """Whole documents right, for each kind of prompt. `counted`: {checkpoint: {kind: rates}}."""
    head = "".join(f"<th>{label}</th>" for label in NAMES.values())
    rows = "".join(
        f"<tr><td>{html.escape(kind)}</td><td>{row['prompts']}</td>"
        + "".join(f"<td>{100 * counted[key][kind]['document']:.1f}</td>" for key in NAMES)
        + "</tr>"
        for kind, row in counted["base"].items()
    )
    return f'<div class="scroll"><table><tr><th>greedy, whole documents</th><th>prompts</th>{head}</tr>{rows}</table></div>'


def curves(run: Path, which: Sequence[tuple[str, Sequence[Line] | str]]) -> str:
    """Charts of a run's metrics: (title, lines); or the beginning of names, for one line for each reward that was logged under it."""
    metrics = read_jsonl(run / "metrics.jsonl")
    charts = []
    for title, given in which:
        lines = _reward_lines(run, metrics, given) if isinstance(given, str) else given
        series = [(label, colour, [(m["step"], m[name]) for m in metrics if name in m]) for label, colour, name in lines]
        charts.append(line_chart(title, [s for s in series if s[2]]))
    return f'<div class="charts">{"".join(charts)}</div>'


def _reward_lines(run: Path, metrics: Sequence[dict[str, Any]], prefix: str) -> list[Line]:
    logged = dict.fromkeys(name for line in metrics for name in line if name.startswith(prefix) and name.endswith("/missing"))
    keys = [name.removeprefix(prefix).removesuffix("/missing") for name in logged]
    settings = yaml.safe_load((run / "config.yaml").read_text())["config"] if keys else {}
    watching = {reward.get("label") or reward["name"] for reward in settings.get("rewards", ()) if not reward["weight"]}
    colours = itertools.cycle(("warmup", "good", "grpo", "bad", "soft"))
    return [
        (f"{key} (watches)" if key in watching else key, f"var(--{colour})", f"{prefix}{key}/mean")
        for key, colour in zip(keys, colours, strict=False)
    ]


GRPO_CURVES: tuple[tuple[str, tuple[Line, ...] | str], ...] = (
    ("Rewards of sampled documents", "rewards/"),
    ("Rewards of held-out prompts, greedy", "eval/rewards/"),
    ("Groups without spread", (("share of groups", "var(--grpo)", "frac_reward_zero_std"),)),
    ("Entropy per choice (nats)", (("text", "var(--good)", "entropy/text"), ("image", "var(--grpo)", "entropy/image"))),
    ("KL to the reference per choice", (("text", "var(--good)", "kl/text"), ("image", "var(--grpo)", "kl/image"))),
    ("Largest |replayed - sampled| log-probability", (("text", "var(--good)", "parity/text_max"), ("image", "var(--grpo)", "parity/image_max"))),
)  # fmt: skip
WARMUP_CURVES = (
    ("Warm-up: held-out loss (nats per choice)", (("text", "var(--good)", "eval/loss/text"), ("image", "var(--grpo)", "eval/loss/image"))),
    ("Warm-up: training loss", (("text", "var(--good)", "loss/text"), ("image", "var(--grpo)", "loss/image"))),
)


# --- pages ---------------------------------------------------------------------------------------------------------------


def sentences(results: dict[str, Any]) -> str:
    """What happened, in three sentences, from the numbers."""
    c = {name: value["greedy"] for name, value in results["checkpoints"].items()}
    first = (
        f"The base model can describe pictures and draw captions, but {_per_cent(c['base']['format'])} of its answers to "
        f"{results['num_prompts']} held-out prompts are well-formed illustrated documents."
    )
    second = (
        f"Warm-up taught it the form ({_per_cent(c['warmup']['format'])} well-formed), with {_per_cent(c['warmup']['image'])} of the "
        f"pictures and {_per_cent(c['warmup']['text'])} of the texts right."
    )
    gain = 100 * (c["grpo"]["image"] - c["warmup"]["image"])
    third = (
        f"Unified GRPO, rewarded only by models and a rule of form, moved pictures by {gain:+.1f} points to "
        f"{_per_cent(c['grpo']['image'])} and whole documents from {_per_cent(c['warmup']['document'])} to {_per_cent(c['grpo']['document'])} right, "
        "as judged by an oracle that was never a reward."
    )
    return f"{first} {second} {third}"


def _per_cent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _right(example: dict[str, Any], checkpoint: str) -> bool:
    return bool(example["answers"][checkpoint]["document"].get("oracle/whole document"))


def example_html(example: dict[str, Any]) -> str:
    """A prompt, and what each checkpoint answers."""
    answers = "".join(f'<div class="{key}"><h3>{label}</h3>{answer_html(example["answers"][key])}</div>' for key, label in NAMES.items())
    return (
        f'<div class="task card"><div class="prompt"><span class="kind">{html.escape(example["family"])}</span>{blocks_html(example["prompt"])}</div>'
        f'<div class="answers">{answers}</div></div>'
    )


def demo_page(results: dict[str, Any], examples: list[dict[str, Any]], folder: Path) -> str:
    """The demo's report. `examples`: {"family", "prompt" blocks, "answers": {checkpoint: answer}}."""
    retention = results["retention"]
    rows = "".join(
        f"<tr><td>{label}</td>"
        + "".join(f'<td>{100 * retention[skill][key]["accuracy"]:.1f}<span class="ci">{100 * retention[skill][key]["accuracy_ci"][0]:.1f} to '
                  f'{100 * retention[skill][key]["accuracy_ci"][1]:.1f}</span></td>' for skill in ("text_to_image", "understanding"))
        + "</tr>"
        for key, label in NAMES.items()
    )  # fmt: skip
    changed = [example for example in examples[NUM_FIRST:] if _right(example, "warmup") != _right(example, "grpo")][:NUM_CHANGED]
    parity = results["parity"]
    seconds = results["seconds"]
    body = f"""
<h1>A model learns to write illustrated documents</h1>
<p class="lead">{html.escape(sentences(results))}</p>
<h2>Results on held-out prompts</h2>
<div class="card">{results_table(results["checkpoints"], "greedy")}<br>{results_table(results["checkpoints"], "sampled")}
<p class="note">Per cent, with 95 % bootstrap intervals over {results["num_prompts"]} prompts whose combinations of things were never seen in training.
format: text and pictures alternate, with exactly the pictures asked for. text: texts exactly right. image: pictures that show exactly the true scene.
order: events in the right order. score: the mean of these four. document: right in every respect.</p>
{kinds_table(results["greedy_by_kind"])}</div>
<h2>Old skills</h2>
<div class="card"><div class="scroll"><table><tr><th>greedy</th><th>text to image</th><th>understanding</th></tr>{rows}</table></div></div>
<h2>Learning curves</h2>
{curves(folder / "grpo", GRPO_CURVES)}
<details><summary>Warm-up curves</summary>{curves(folder / "warmup", WARMUP_CURVES)}</details>
<p class="note">Sampled and replayed log-probabilities differed by at most {parity["text_max"]:.1e} (text) and {parity["image_max"]:.1e} (image codes, guidance on);
the ratio of the first update of a batch differed from 1 by at most {parity["first_ratio_gap"]:.1e}.</p>
<h2>The same prompts, before and after</h2>
<p class="note">Greedy answers. Numbers: what the rewards say. Green and red: the oracle's verdict, never seen in training.</p>
{"".join(example_html(example) for example in examples[:NUM_FIRST])}"""
    if changed:
        body += f"""
<h2>Where GRPO changed the verdict</h2>
<p class="note">The first {len(changed)} prompts after those above whose document was right before GRPO and is not any more, or the other way round.</p>
{"".join(example_html(example) for example in changed)}"""
    footer = f"Warm-up {seconds['warmup']:.0f} s, GRPO {seconds['grpo']:.0f} s, evaluation {seconds['evaluation']:.0f} s. " + html.escape(
        ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    )
    return page("Diptych demo", body, footer)


def run_page(folder: Path) -> str:
    """The page of one training run: curves, and every saved document with its rewards, newest first.

    Raises ValueError where the folder holds no run.
    """
    if not (folder / "metrics.jsonl").is_file():
        raise ValueError(f"{folder} holds no run (no metrics.jsonl); give the output_dir of a warmup or grpo run")
    samples = sorted((folder / "samples").glob("step_*.jsonl"), key=lambda p: -int(p.stem.split("_")[1]))
    parts = []
    for index, path in enumerate(samples):
        cards = []
        for record in read_jsonl(path):
            answer = {
                "answer": record["answer"],
                "steps": record.get("steps") or [{}] * len(record["answer"]),
                "document": record.get("document", {}),
            }
            cards.append(f'<div class="task card"><div class="prompt">{blocks_html(record["prompt"])}</div>{answer_html(answer)}</div>')
        parts.append(f"<details{' open' if index == 0 else ''}><summary>Step {path.stem.split('_')[1]}</summary>{''.join(cards)}</details>")
    chart = curves(folder, GRPO_CURVES + WARMUP_CURVES)
    return page(f"Diptych run {folder.name}", f"<h1>{html.escape(str(folder))}</h1>{chart}<h2>Documents</h2>{''.join(parts)}")


def thumbnail(picture: PIL.Image.Image) -> str:
    """A small JPEG as a data address, twice as large as it is shown, for sharp screens."""
    small = picture.copy()
    small.thumbnail((4 * THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + b64encode(buffer.getvalue()).decode()
