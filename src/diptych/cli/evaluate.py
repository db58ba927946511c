"""`diptych evaluate`: benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from diptych.cli.app import PASS_ON, Device, Dtype, FourBit, Guidance, Model, app, console
from diptych.config import EvaluateConfig, ImageSampling, SamplingParams, load_config

evaluate_app = typer.Typer(help="Benchmarks: generate, write what is submitted, score, compare.", no_args_is_help=True)
app.add_typer(evaluate_app, name="evaluate")


@evaluate_app.command(
    context_settings=PASS_ON,
    epilog="Example: diptych evaluate storyboard --model runs/demo/grpo/checkpoints/step_90/model --num_prompts 100",
)
def storyboard(
    context: typer.Context,
    model: Model = "storyboard",
    out: Annotated[Path | None, typer.Option(help="also write the numbers to this .json file")] = None,
    guidance: Guidance = None,
    dtype: Dtype = "auto",
    load_in_4bit: FourBit = False,
    device: Device = "auto",
) -> None:
    """Storyboard's benchmark: held-out documents and retention of old skills, judged by the oracle."""
    from diptych.evaluation.storyboard import evaluate_documents, evaluate_retention, held_out_tasks, rates
    from diptych.models import load_model
    from diptych.runs import atomic_text
    from diptych.runtime import pick_device

    config = load_config(EvaluateConfig, None, context.args)
    loaded = load_model(model, dtype=dtype, load_in_4bit=load_in_4bit or None).to(pick_device(device))
    tasks = held_out_tasks(config)
    image = ImageSampling(guidance_scale=guidance)
    params = SamplingParams(image=image, max_images=config.max_images, max_text_tokens=config.max_text_tokens)
    found: dict[str, Any] = {
        "greedy": rates(evaluate_documents(loaded, tasks, params.greedy(), config)),
        "sampled": rates(evaluate_documents(loaded, tasks, params, config)),
        "retention": evaluate_retention(loaded, params, config),
    }
    console.print_json(json.dumps(found))
    if out:
        atomic_text(out, json.dumps(found, indent=1) + "\n")
