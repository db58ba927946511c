"""`diptych evaluate`: benchmarks."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from diptych.cli.app import PASS_ON, Decoder, Device, Dtype, Form, FourBit, Guidance, Model, app, console, sampling, say
from diptych.config import EvaluateConfig, ImageSampling, SamplingParams, build, load_config
from diptych.evaluation.registry import BENCHMARKS
from diptych.overrides import kind_of, parse_pairs
from diptych.userfiles import read_entries

evaluate_app = typer.Typer(help="Benchmarks: generate, write what is submitted, score, compare.", no_args_is_help=True)
app.add_typer(evaluate_app, name="evaluate")


@evaluate_app.command(
    context_settings=PASS_ON,
    epilog="Example: diptych evaluate storyboard --model runs/demo/grpo/checkpoints/step_120/model --num_prompts 100",
)
def storyboard(
    context: typer.Context,
    model: Model = "storyboard",
    out: Annotated[Path | None, typer.Option(help="also write the numbers, and those of each prompt, to this .json file")] = None,
    guidance: Guidance = None,
    dtype: Dtype = "auto",
    load_in_4bit: FourBit = False,
    device: Device = "auto",
) -> None:
    """Storyboard's benchmark: held-out documents and retention of skills, judged by the oracle."""
    config = load_config(EvaluateConfig, None, context.args)
    from diptych.cli.figures import show_storyboard
    from diptych.evaluation.storyboard import (
        evaluate_documents,
        held_out_tasks,
        rates,
        rates_by_kind,
        retained_skills,
        retention_rates,
        sheet,
    )
    from diptych.models import load_model
    from diptych.models.fingerprint import of_model
    from diptych.runs import atomic_text
    from diptych.runtime import pick_device

    known = of_model(model, fetch=True)
    loaded = load_model(model, dtype=dtype, load_in_4bit=load_in_4bit or None).to(pick_device(device))
    tasks = held_out_tasks(config)
    image = ImageSampling(guidance_scale=guidance)
    params = SamplingParams(image=image, max_images=config.max_images, max_text_tokens=config.max_text_tokens)
    greedy, sampled = (evaluate_documents(loaded, tasks, p, config) for p in (params.greedy(), params))
    skills = retained_skills(loaded, params, config)
    found: dict[str, Any] = {
        "greedy": rates(greedy), "sampled": rates(sampled), "greedy_by_kind": rates_by_kind(greedy), "retention": retention_rates(skills),
    }  # fmt: skip
    show_storyboard(console, found, config.telling)
    if out:
        settings = {
            "benchmark": "storyboard", "model": model, "fingerprint": known and {"hash": known["hash"]}, "guidance": guidance,
            "dtype": dtype, "load_in_4bit": load_in_4bit, "evaluate": config.model_dump(mode="json"),
        }  # fmt: skip
        prompts = [{"id": s.id, "category": s.category, "values": s.values} for s in sheet(greedy, sampled, skills, config)]
        atomic_text(out, json.dumps({"settings": settings, **found, "prompts": prompts}, indent=1) + "\n")


def benchmark(
    context: typer.Context,
    data: Annotated[Path, typer.Argument(help="the folder of the benchmark's files, as they were published")],
    out: Annotated[Path, typer.Option(help="the folder of this evaluation; the same command resumes it")],
    model: Model = "storyboard",
    shard: Annotated[str | None, typer.Option(help="I/N: answer the I-th of N shares (from 0) here, the others elsewhere")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="answers sampled together")] = 16,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    temperature: Annotated[float | None, typer.Option(min=0, help="0: greedy; left out: as the family's release samples")] = None,
    guidance: Guidance = None,
    form: Form = None,
    max_images: Annotated[int | None, typer.Option(min=0, help="of an answer, where the benchmark does not say; left out: 4")] = None,
    max_text_tokens: Annotated[int | None, typer.Option(min=1, help="per text segment; left out: the family's own")] = None,
    prefix: Annotated[str, typer.Option(help="text directly before each prompt")] = "",
    suffix: Annotated[str, typer.Option(help="text directly behind each prompt")] = "",
    image_size: Annotated[int | None, typer.Option(min=8, help="side of saved pictures; left out: as drawn, at most 512 for MMIE")] = None,
    image_decoder: Decoder = None,
    limit: Annotated[int | None, typer.Option(min=1, help="only the first so many items")] = None,
    ids: Annotated[Path | None, typer.Option(help="only the items whose ids stand in this file, one a line")] = None,
    judge: Annotated[list[str] | None, typer.Option(help="key=value of the judge's server, as of a reward's; may be repeated")] = None,
    official: Annotated[Path | None, typer.Option(help="what the official scorer wrote for this evaluation's submission")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="stop at the first problem instead of counting it")] = False,
    dtype: Dtype = "auto",
    load_in_4bit: FourBit = False,
    device: Device = "auto",
) -> None:
    """Answers a published benchmark, writes what its scorer reads, and makes the table. See docs/how-to/evaluation.md."""
    from diptych.cli.figures import show_benchmark
    from diptych.document import valid_text
    from diptych.evaluation.jobs import Job, Settings, nothing_scored
    from diptych.models import UnifiedModel, load_model
    from diptych.models.image_decoder import set_image_decoder
    from diptych.rewards.judges.options import JudgeOptions
    from diptych.runtime import pick_device

    for text in (prefix, suffix):
        valid_text(text)
    chosen = BENCHMARKS[str(context.info_name)]()
    asked = {"temperature": temperature, "guidance": guidance, "max_images": max_images, "max_text_tokens": max_text_tokens}
    asked = {name: chosen.defaults.get(name) if value is None else value for name, value in asked.items()}
    settings = build(
        Settings,
        {
            "benchmark": chosen.name, "model": model, "batch_size": batch_size, "seed": seed, **asked, "form": form,
            "prefix": prefix, "suffix": suffix, "image_size": image_size, "limit": limit,
            "ids": None if ids is None else _lines(ids), "dtype": dtype, "load_in_4bit": load_in_4bit, "image_decoder": image_decoder,
        },
    )  # fmt: skip

    def open_model() -> tuple[UnifiedModel, SamplingParams]:
        loaded = load_model(model, dtype=dtype, load_in_4bit=load_in_4bit or None).to(pick_device(device))
        set_image_decoder(loaded, image_decoder)
        lengths = {name: asked[name] for name in ("max_images", "max_text_tokens") if asked[name] is not None}
        return loaded, sampling(loaded.default_sampling, asked["temperature"], asked["guidance"]).model_copy(update=lengths)

    words = TextColumn("{task.description}", markup=False)
    with Progress(words, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bars:
        bar = bars.add_task("answers", total=None, visible=False)
        asked_judge = parse_pairs("judge", judge, partial(kind_of, JudgeOptions)) if judge else None
        job = Job(
            chosen, data, out, settings, _shard(shard), official, asked_judge,
            strict, say, lambda done, total: bars.update(bar, completed=done, total=total, visible=True),
        )  # fmt: skip
        result = job.run(open_model)
    if result is not None:
        show_benchmark(console, chosen.name, result)
        say(f"each answer: {out / 'scores.jsonl'}; each aspect with intervals: {out / 'result.json'}")
        if why := nothing_scored(result, out):
            raise ValueError(
                f"nothing could be scored ({why}); no figure above says anything of the model. Mend the cause and run this again"
            )


for _name in BENCHMARKS:
    evaluate_app.command(
        _name, epilog=f"Example: diptych evaluate {_name} data/{_name} --model runs/grpo/checkpoints/step_120/model --out out"
    )(benchmark)


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    parts = text.split("/")
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        raise ValueError(f"--shard is {text!r}; it looks like 0/4, the first of four shares")
    return int(parts[0]), int(parts[1])


def _lines(path: Path) -> list[str]:
    try:
        found = read_entries(path)
    except OSError as error:
        raise ValueError(f"cannot read --ids {str(path)!r}: {error}") from error
    if not found:
        raise ValueError(f"--ids {str(path)!r} holds no id; give one a line")
    return found
