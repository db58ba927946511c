"""Pieces of pages, and the page of a training run."""

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
