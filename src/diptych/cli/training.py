"""Commands that train: demo, warmup, grpo, ablate, pretrain; and the page of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from diptych.cli.app import PASS_ON, Recipe, app, console, say
from diptych.config import DemoConfig, GRPOConfig, WarmupConfig, load_config


@app.command(context_settings=PASS_ON, epilog="Example: diptych demo --output_dir runs/demo --seed 1")
def demo(context: typer.Context, recipe: Recipe = "demo") -> None:
    """The whole method on the packaged model: warm-up, GRPO, evaluation, report. Resumes where it stopped."""
    overrides = context.args
    if recipe.startswith("--"):  # no recipe was named; click then takes the first override for it
        recipe, overrides = "demo", [recipe, *overrides]
    config = load_config(DemoConfig, recipe, overrides)
    from diptych.demo import run_demo  # torch, which a mistake in the settings need not wait for

    run_demo(config, console)


@app.command(context_settings=PASS_ON, epilog="Example: diptych warmup warmup --output_dir runs/warmup --optim.lr 1e-4")
def warmup(context: typer.Context, recipe: Recipe = "warmup") -> None:
    """Stage 1: supervised fine-tuning on a hybrid mixture. Resumes where it stopped."""
    config = load_config(WarmupConfig, recipe, context.args)
    from diptych.training.warmup import checkpoint_of
    from diptych.training.warmup import warmup as run

    with Progress(console=console) as bars:
        run(config, _bar(bars, "warm-up", config.max_steps))
    say(f"saved: {checkpoint_of(config)}")


@app.command(context_settings=PASS_ON, epilog="Example: diptych grpo grpo --model runs/warmup/checkpoints/step_240/model")
def grpo(context: typer.Context, recipe: Recipe = "grpo") -> None:
    """Stage 2: unified GRPO over text and image codes. Resumes where it stopped."""
    config = load_config(GRPOConfig, recipe, context.args)
    from diptych.training.grpo import checkpoint_of
    from diptych.training.grpo import grpo as run

    with Progress(console=console) as bars:
        run(config, _bar(bars, "GRPO", config.max_steps))
    say(f"saved: {checkpoint_of(config)}")


@app.command(epilog="Example: diptych view runs/demo/grpo; diptych view runs --serve")
def view(
    runs: Annotated[list[Path], typer.Argument(help="output_dirs of warmup or grpo runs; with --serve also folders that hold runs")],
    serve: Annotated[bool, typer.Option("--serve", help="a page that follows all runs in the folders while they train")] = False,
    host: Annotated[str, typer.Option(help="address to serve at; at 0.0.0.0 all who reach this machine can read the runs")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one")] = 8420,
) -> None:
    """Curves, and every saved document with its rewards: as `report.html` in each run's folder, or served while the runs go on."""
    if serve:
        try:
            from diptych.report.live import address, listen, show
        except ModuleNotFoundError as error:
            raise ValueError(f"--serve needs {error.name}, which is not installed: pip install 'diptych[serve]'") from error

        with listen(host, port) as listening:
            show(runs, listening, host, lambda: say(f"open {address(listening, host)} (Ctrl-C ends it)"))
        return
    from diptych.report import run_page
    from diptych.runs import atomic_text

    for run in runs:
        atomic_text(run / "report.html", run_page(run))
        say(f"open {run / 'report.html'}")


@app.command(epilog="Example: diptych pretrain --output-dir runs/pretrain")
def pretrain(
    output_dir: Path = Path("runs/pretrain"),
    seed: int = 0,
    num_threads: Annotated[int, typer.Option(min=1)] = 2,
    scale: Annotated[float, typer.Option(min=0, help="multiplies the number of steps of every part")] = 1.0,
    part: Annotated[list[str] | None, typer.Option(help="train this part only (may be repeated)")] = None,
    init_from: Annotated[Path | None, typer.Option(help="a base model to go on from, image tokenizer included")] = None,
    setting: Annotated[str, typer.Option(help="standard: what is packaged; large, large_100m: docs/explanation/worlds.md")] = "standard",
) -> None:
    """Trains what is packaged: image tokenizer, base model, learned rewards. Resumes where it stopped."""
    from diptych.pretrain import pretrain as run
    from diptych.runtime import set_threads

    set_threads(num_threads)
    run(
        output_dir,
        seed=seed,
        scale=scale,
        parts=tuple(part) if part else None,
        init_from=init_from,
        setting=setting,
        log=say,
    )


@app.command(
    context_settings=PASS_ON,
    epilog="Example: diptych ablate credit --seeds 3 --grpo.max_steps 60   (any setting of the demo can be changed for all variants)",
)
def ablate(
    context: typer.Context,
    suite: Annotated[str | None, typer.Argument(help="a packaged suite (see --list), or a YAML file")] = None,
    output_dir: Path = Path("runs/ablations"),
    seeds: Annotated[int | None, typer.Option(min=1, help="seeds 0 to N - 1; left out: as many as the suite says")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="trials at the same time, one thread each; left out: one a CPU")] = None,
    list_suites: Annotated[bool, typer.Option("--list", help="what suites there are")] = False,
    report: Annotated[bool, typer.Option("--report", help="run nothing; report what is finished")] = False,
    docs: Annotated[Path | None, typer.Option(help="a folder of records: add the suite's, and write the document FOLDER.md of all")] = None,
) -> None:
    """A table of the paper's ablations, or one of your own, over several seeds. Resumes where it stopped. Exits with 1 if one failed."""
    from diptych.ablation import pages
    from diptych.ablation.suite import load_suite, packaged_suites

    failures: dict[str, str] = {}
    if list_suites:
        console.print(pages.list_table({name: load_suite(name)[1] for name in packaged_suites()}))
    elif suite is not None:
        name, loaded = load_suite(suite, context.args)
        from diptych.ablation import runner, summary

        entries = runner.grid(loaded, range(seeds or loaded.seeds))
        if not report:
            failures = runner.run_grid(name, loaded, entries, output_dir, jobs or runner.default_jobs(), console)
            for title, lines in failures.items():
                console.print(f"failed: {title}\n{lines}", style="red", soft_wrap=True)
        record = summary.collect(name, loaded, entries, output_dir, context.args)
        pages.show(record, console)
        say(f"open {pages.write(record, output_dir / name)}")
        if docs is not None:
            from diptych.ablation import documents

            documents.publish(record, docs)
    elif docs is None:
        raise ValueError("name a suite, or ask for --list")
    if docs is not None:
        from diptych.ablation import documents

        say(f"written: {documents.write_docs(docs)}")
    if failures:
        raise typer.Exit(1)


def _bar(bars: Progress, title: str, total: int) -> Any:
    task = bars.add_task(title, total=total)

    def update(step: int, _: int, metrics: dict[str, float]) -> None:
        bars.update(task, completed=step)
        if step % 10 == 0 or step == total:
            shown = "  ".join(
                f"{k} {v:.3g}" for k, v in metrics.items() if k.startswith(("loss", "rewards/", "eval/")) and not k.endswith("/std")
            )
            bars.console.print(f"{title} {step}/{total}  {shown}")

    return update
