"""`diptych evaluate compare`: two evaluations of the same benchmark, answer by answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from diptych.cli.app import console, say
from diptych.cli.evaluate import evaluate_app


@evaluate_app.command(epilog="Example: diptych evaluate compare runs/mmie_warmup runs/mmie_grpo --out compare.html")
def compare(
    a: Annotated[Path, typer.Argument(help="the --out of an evaluation: what is compared with, such as the model before")],
    b: Annotated[Path, typer.Argument(help="the --out of another one of the same benchmark")],
    out: Annotated[Path | None, typer.Option(help="also write a page with documents side by side to this .html file")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="also write all numbers to this .json file")] = None,
    num_examples: Annotated[int, typer.Option(min=0, help="documents of each kind on the page: B ahead, A ahead, drawn at random")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="of the documents drawn at random, and of the sign flips")] = 0,
    strict: Annotated[bool, typer.Option("--strict", help="refuse gaps (broken lines, answers of one side, missing values)")] = False,
) -> None:
    """Which of two models is better in what, and what is chance: paired differences with intervals and tests."""
    from diptych.data.problems import Problems
    from diptych.evaluation.compare import compare as run
    from diptych.evaluation.compare import examples, read_answers, read_job, scale_of
    from diptych.report.compare import headline_table, rich_table, summary
    from diptych.report.compare_page import comparison_page
    from diptych.runs import atomic_text

    for path, ending in ((out, ".html"), (as_json, ".json")):
        if path is not None and path.suffix != ending:
            raise ValueError(f"{str(path)!r} is to be written; the allowed ending is {ending}")
    problems = Problems(strict)
    jobs = read_job(a, problems), read_job(b, problems)
    found = run(*jobs, problems, scale_of(jobs[0].benchmark), seed)
    record = summary(found) | {"seed": seed}
    if record["headlines"]:
        console.print(headline_table(record))
    console.print(rich_table(record))
    for sentence in (*record["findings"], *record["notes"]):
        say(sentence)
    if as_json is not None:
        atomic_text(as_json, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    if out is not None:
        shown = examples(found, num_examples if all(job.folder.is_dir() for job in jobs) else 0, seed)  # storyboard keeps no documents
        keys = [key for pairs in shown.values() for key, _ in pairs]
        atomic_text(out, comparison_page(found, record, shown, [read_answers(job, keys) for job in jobs]))
        say(f"open {out}")
