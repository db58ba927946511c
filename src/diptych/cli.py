"""The `diptych` command: parse, call, print."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from diptych.config import DemoConfig, EvaluateConfig, GRPOConfig, ImageSampling, SamplingParams, TextSampling, WarmupConfig, load_config

app = typer.Typer(
    help="Post-train unified vision-language models until they write illustrated documents.",
    no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False,
)  # fmt: skip
console = Console(width=None if sys.stdout.isatty() else 120)  # a log has no width
INTERRUPTED = 130
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
Recipe = Annotated[str, typer.Argument(help="a YAML file, or the name of a packaged recipe")]


@app.command(context_settings=PASS_ON, epilog="Example: diptych demo --output_dir runs/demo --seed 1")
def demo(context: typer.Context, recipe: Recipe = "demo") -> None:
    """The whole method on the packaged model: warm-up, GRPO, evaluation, report. Resumes where it stopped."""
    from diptych.demo import run_demo

    overrides = context.args
    if recipe.startswith("--"):  # no recipe was named; click then takes the first override for it
        recipe, overrides = "demo", [recipe, *overrides]
    run_demo(load_config(DemoConfig, recipe, overrides), console)


@app.command(context_settings=PASS_ON, epilog="Example: diptych warmup warmup --output_dir runs/warmup --optim.lr 1e-4")
def warmup(context: typer.Context, recipe: Recipe = "warmup") -> None:
    """Stage 1: supervised fine-tuning on a hybrid mixture. Resumes where it stopped."""
    from diptych.warmup import checkpoint_of
    from diptych.warmup import warmup as run

    config = load_config(WarmupConfig, recipe, context.args)
    with Progress(console=console) as bars:
        run(config, _bar(bars, "warm-up", config.max_steps))
    console.print(f"saved: {checkpoint_of(config)}")


@app.command(context_settings=PASS_ON, epilog="Example: diptych grpo grpo --model runs/warmup/checkpoints/step_60/model")
def grpo(context: typer.Context, recipe: Recipe = "grpo") -> None:
    """Stage 2: unified GRPO over text and image codes. Resumes where it stopped."""
    from diptych.grpo import checkpoint_of
    from diptych.grpo import grpo as run

    config = load_config(GRPOConfig, recipe, context.args)
    with Progress(console=console) as bars:
        run(config, _bar(bars, "GRPO", config.max_steps))
    console.print(f"saved: {checkpoint_of(config)}")


@app.command(
    epilog='Example: diptych generate "tell the story . on the left a small red ball , at night . first the ball grows ." --out a.html'
)
def generate(
    prompt: Annotated[str, typer.Argument(help="the prompt's text")],
    model: Annotated[str, typer.Option(help="packaged model or checkpoint folder")] = "storyboard",
    image: Annotated[list[Path] | None, typer.Option(help="a picture before the text; may be repeated")] = None,
    out: Annotated[Path, typer.Option(help="an .html page, or a .json file of message blocks")] = Path("document.html"),
    temperature: Annotated[float, typer.Option(min=0)] = 0.0,
    guidance: Annotated[float, typer.Option(min=0, help="classifier-free guidance; 1: off")] = 1.5,
    seed: int = 0,
) -> None:
    """Writes one illustrated document."""
    from diptych.document import Document, Image, Text, open_image, to_json_blocks
    from diptych.models import load_model
    from diptych.report.pages import answer_html, blocks_html, page
    from diptych.runs import atomic_text
    from diptych.runtime import generator
    from diptych.sampling.engine import sample

    if out.suffix not in (".html", ".json"):
        raise ValueError(f"--out is {str(out)!r}; allowed endings are .html and .json")
    loaded = load_model(model)
    asked = Document((*(Image(open_image(path)) for path in image or []), Text(prompt)))
    params = SamplingParams(
        text=TextSampling(temperature=temperature), image=ImageSampling(temperature=temperature, guidance_scale=guidance)
    )
    answer = sample(loaded, [loaded.encode_prompt(asked)], params, generator=generator(seed))[0].document
    blocks = to_json_blocks(answer)
    if out.suffix == ".json":
        atomic_text(out, json.dumps(blocks) + "\n")
    else:
        shown = answer_html({"answer": blocks, "steps": [{} for _ in blocks]})
        asked_html = f'<div class="prompt">{blocks_html(to_json_blocks(asked))}</div>'
        atomic_text(out, page("Document", f'<div class="task card">{asked_html}{shown}</div>'))
    console.print(f"{len(answer)} segments, {len(answer.images)} pictures: {out}")


@app.command(
    context_settings=PASS_ON, epilog="Example: diptych evaluate --model runs/demo/grpo/checkpoints/step_90/model --num_prompts 100"
)
def evaluate(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="packaged model or checkpoint folder")] = "storyboard",
    out: Annotated[Path | None, typer.Option(help="also write the numbers to this .json file")] = None,
    guidance: Annotated[float, typer.Option(min=0)] = 1.5,
) -> None:
    """Storyboard's benchmark: held-out documents and retention of old skills, judged by the oracle."""
    from diptych.evaluation.storyboard import evaluate_documents, evaluate_retention, held_out_tasks, rates
    from diptych.models import load_model
    from diptych.runs import atomic_text

    config = load_config(EvaluateConfig, None, context.args)
    loaded, tasks = load_model(model), held_out_tasks(config)
    params = SamplingParams(image=ImageSampling(guidance_scale=guidance))
    found: dict[str, Any] = {
        "greedy": rates(evaluate_documents(loaded, tasks, params.greedy(), config)),
        "sampled": rates(evaluate_documents(loaded, tasks, params, config)),
        "retention": evaluate_retention(loaded, params, config),
    }
    console.print_json(json.dumps(found))
    if out:
        atomic_text(out, json.dumps(found, indent=1) + "\n")


@app.command(epilog="Example: diptych view runs/demo/grpo")
def view(run: Annotated[Path, typer.Argument(help="the output_dir of a warmup or grpo run")]) -> None:
    """Writes `report.html` into a run folder: curves, and every saved document with its rewards."""
    from diptych.report import run_page
    from diptych.runs import atomic_text

    atomic_text(run / "report.html", run_page(run))
    console.print(f"open {run / 'report.html'}")


@app.command(epilog="Example: diptych pretrain --output-dir runs/pretrain")
def pretrain(
    output_dir: Path = Path("runs/pretrain"),
    seed: int = 0,
    num_threads: Annotated[int, typer.Option(min=1)] = 2,
    scale: Annotated[float, typer.Option(min=0, help="multiplies the number of steps of every part")] = 1.0,
    part: Annotated[list[str] | None, typer.Option(help="train this part only (may be repeated)")] = None,
    init_from: Annotated[Path | None, typer.Option(help="a base model to go on from, image tokenizer included")] = None,
) -> None:
    """Trains what is packaged: image tokenizer, base model, learned rewards. Resumes where it stopped."""
    from diptych.pretrain import PARTS
    from diptych.pretrain import pretrain as run
    from diptych.runtime import set_threads

    set_threads(num_threads)
    parts = tuple(part or PARTS)
    run(
        output_dir,
        seed=seed,
        scale=scale,
        parts=parts,
        init_from=init_from,
        log=lambda line: console.print(line, highlight=False, soft_wrap=True),
    )


def _bar(bars: Progress, title: str, total: int) -> Any:
    task = bars.add_task(title, total=total)

    def update(step: int, _: int, metrics: dict[str, float]) -> None:
        bars.update(task, completed=step)
        if step % 10 == 0 or step == total:
            shown = "  ".join(
                f"{k} {v:.3g}" for k, v in metrics.items() if k.startswith(("loss", "rewards/", "eval/")) and not k.endswith("/std")
            )
            bars.console.print(f"{title} {step}/{total}  {shown}", highlight=False)

    return update


def main() -> None:
    """Runs the command; what a user can mend is printed in a line or two, without a traceback."""
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # typer makes an exit code of Ctrl-C
            console.print("\nStopped. Everything up to the last checkpoint is saved: run the same command again to resume.")
        sys.exit(code if isinstance(code, int) else 0)
    except (ValueError, FloatingPointError, RuntimeError, OSError) as error:
        Console(stderr=True).print(f"[bold red]error:[/] {_plain(error)}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except Exception as error:  # typer's own usage errors know how to show themselves
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            error.show()
            sys.exit(error.exit_code)
        raise


def _plain(error: BaseException) -> str:
    return str(error).replace("[", r"\[")
