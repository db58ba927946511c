"""`diptych data`: convert published data sets to records, and look into them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from diptych.cli.app import app, console, say

data_app = typer.Typer(help="Training data: convert published data sets to records, and look into files of records.", no_args_is_help=True)
app.add_typer(data_app, name="data")


@data_app.command("kinds", epilog="Example: diptych data kinds")
def data_kinds() -> None:
    """What `diptych data convert` can read."""
    from diptych.data.convert import KINDS

    for name, kind in KINDS.items():
        console.print(f"{name:12} {kind.summary}. License: {kind.license}")


@data_app.command(epilog="Example: diptych data convert activitynet train.json --media videos --out data/activitynet --exclude MMIE")
def convert(
    kind: Annotated[str, typer.Argument(help="see `diptych data kinds`")],
    input: Annotated[Path, typer.Argument(help="the data set's file or folder, as it was published")],
    out: Annotated[Path, typer.Option(help="a new folder: records.jsonl, images/, report.json")],
    media: Annotated[Path | None, typer.Option(help="the folder of videos or pictures that annotations point to")] = None,
    exclude: Annotated[list[Path] | None, typer.Option(help="a benchmark's pictures or ids, file or folder; may be repeated")] = None,
    prompt: Annotated[str | None, typer.Option(help="the request's text, with fields such as {title}; left out: the kind's own")] = None,
    image_size: Annotated[int | None, typer.Option(min=8, help="cut pictures square, so many pixels a side; left out: as they are")] = None,
    min_images: Annotated[int | None, typer.Option(min=1, help="leave out records with fewer; left out: the kind's own")] = None,
    max_images: Annotated[
        int | None, typer.Option(min=1, help="leave out records with more, or end them there (see docs/how-to/data.md); left out: end at 6")
    ] = None,
    share: Annotated[float, typer.Option(min=0, max=1, help="a fixed random share of the records")] = 1.0,
    seed: Annotated[int, typer.Option(help="of the share")] = 0,
    max_records: Annotated[int | None, typer.Option(min=1, help="stop after so many")] = None,
    license: Annotated[str | None, typer.Option(help="for records that name none; left out: the kind's own")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="stop at the first problem instead of skipping and counting it")] = False,
) -> None:
    """Makes records of a published data set. Can be killed at any moment: the same command resumes where it stopped."""
    from diptych.data.convert import KINDS, Options, run

    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; allowed are {', '.join(KINDS)} (see `diptych data kinds`)")
    options = Options(input, media, prompt, min_images, max_images, license, image_size, share, seed, max_records)
    report = run(kind, KINDS[kind], options, out, exclude=exclude or [], strict=strict, log=say)
    for cause, number in report["skipped"].items():
        say(f"skipped: {cause}: {number}")
    say(f"{report['kept']} records, {report['images']} pictures: {out / 'records.jsonl'} (every skipped item: {out / 'report.json'})")


@data_app.command(epilog="Example: diptych data inspect data/activitynet/records.jsonl --model storyboard --out page.html")
def inspect(
    file: Annotated[str, typer.Argument(help="records, as training reads them: a file, folder or pattern, hf://... or storyboard:...")],
    model: Annotated[str | None, typer.Option(help="count tokens for this model: packaged name, checkpoint folder or hub id")] = None,
    out: Annotated[Path | None, typer.Option(help="also write a page with a sample of the records to this .html file")] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="records on the page")] = 12,
    max_lines: Annotated[int | None, typer.Option(min=1, help="read only the first so many lines or rows")] = None,
    seed: int = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """What is in a data set and what is wrong with it; every picture is opened. Exits with 1 on problems."""
    from diptych.data.inspect import inspect_records, render_lines, summary
    from diptych.report.records import records_page
    from diptych.runs import atomic_text

    if out is not None and out.suffix != ".html":
        raise ValueError(f"--out is {str(out)!r}; the allowed ending is .html")
    loaded = None
    if model:
        from diptych.models import load_model

        loaded = load_model(model)
    found = inspect_records(file, loaded, num_samples=num_samples, seed=seed, max_lines=max_lines)
    if as_json:
        console.print_json(json.dumps(summary(found)))
    else:
        for line in render_lines(found):
            say(line)
    if out is not None:
        atomic_text(out, records_page(found))
        if not as_json:
            say(f"open {out}")
    if found.problems.found:
        raise typer.Exit(1)
