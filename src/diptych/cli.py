"""The `diptych` command: parse, call, print."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from diptych.config import DemoConfig, EvaluateConfig, GRPOConfig, ImageSampling, SamplingParams, WarmupConfig, load_config

app = typer.Typer(
    help="Post-train unified vision-language models until they write illustrated documents.",
    no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False,
)  # fmt: skip
rewards_app = typer.Typer(help="The built-in rewards: what there is, and what one says of a document.", no_args_is_help=True)
app.add_typer(rewards_app, name="rewards")
console = Console(width=None if sys.stdout.isatty() else 120)  # a log has no width
INTERRUPTED = 130
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
Recipe = Annotated[str, typer.Argument(help="a YAML file, or the name of a packaged recipe")]
Model = Annotated[str, typer.Option(help="packaged name, checkpoint or adapter folder, or hub id")]
Guidance = Annotated[float | None, typer.Option(min=0, help="classifier-free guidance; 1: off; left out: the family's own")]
Dtype = Annotated[str, typer.Option(help="auto, float32 or bfloat16")]
FourBit = Annotated[bool, typer.Option("--load-in-4bit", help="the language model in NF4")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]


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
    model: Model = "storyboard",
    image: Annotated[list[Path] | None, typer.Option(help="a picture before the text; may be repeated")] = None,
    out: Annotated[Path, typer.Option(help="an .html page, or a .json file of message blocks")] = Path("document.html"),
    temperature: Annotated[float | None, typer.Option(min=0, help="0: greedy; left out: as the family's release samples")] = None,
    guidance: Guidance = None,
    max_images: Annotated[int | None, typer.Option(min=0, help="left out: 4, or as many as fit the context")] = None,
    max_text_tokens: Annotated[int, typer.Option(min=1, help="per text segment")] = 64,
    seed: int = 0,
    dtype: Dtype = "auto",
    load_in_4bit: FourBit = False,
    image_size: Annotated[int | None, typer.Option(min=1, help="pixels a side of drawn pictures (Emu3)")] = None,
    device: Device = "auto",
) -> None:
    """Writes one illustrated document."""
    from diptych.document import Document, Image, Text, open_image, to_json_blocks
    from diptych.models import load_model
    from diptych.report.pages import answer_html, blocks_html, page
    from diptych.runs import atomic_text
    from diptych.runtime import generator, pick_device
    from diptych.sampling.engine import fit_to_context, sample

    if out.suffix not in (".html", ".json"):
        raise ValueError(f"--out is {str(out)!r}; allowed endings are .html and .json")
    asked = Document((*(Image(open_image(path)) for path in image or []), Text(prompt)))
    loaded = load_model(model, dtype=dtype, load_in_4bit=load_in_4bit or None, image_size=image_size).to(pick_device(device))
    row = loaded.encode_prompt(asked)
    params = _sampling(loaded.default_sampling, temperature, guidance).model_copy(update={"max_text_tokens": max_text_tokens})
    params = params.model_copy(update={"max_images": max_images}) if max_images is not None else fit_to_context(loaded, row, params)
    answer = sample(loaded, [row], params, generator=generator(seed))[0].document
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


@app.command(epilog="Example: diptych merge runs/grpo/checkpoints/step_80/model --out merged")
def merge(
    adapter: Annotated[Path, typer.Argument(help="an adapter folder, as a run with `lora` saves it")],
    out: Annotated[Path, typer.Option(help="a new folder for the whole model, in its family's own layout")],
    dtype: Dtype = "auto",
) -> None:
    """Adds a LoRA adapter to its base model's weights."""
    from diptych.models import load_model
    from diptych.runs import atomic_folder

    if out.exists():
        raise ValueError(f"--out {str(out)!r} exists; choose a new folder")
    loaded = load_model(adapter, dtype=dtype, load_in_4bit=False)
    if loaded.adapter is None:
        raise ValueError(f"{adapter} holds no adapter, so there is nothing to merge; give the model folder of a run with `lora`")
    loaded.adapter.merge()
    with atomic_folder(out) as folder:
        loaded.save_pretrained(folder)
    console.print(f"saved: {out}")


@app.command(epilog="Example: diptych doctor --model deepseek-community/Janus-Pro-7B")
def doctor(
    model: Annotated[str | None, typer.Option(help="packaged name, checkpoint or adapter folder; left out: this machine")] = None,
    num_images: Annotated[int, typer.Option(min=0, help="pictures of one document")] = 3,
    num_generations: Annotated[int, typer.Option(min=1, help="G, the documents of one prompt")] = 8,
    text_tokens: Annotated[int, typer.Option(min=1, help="text tokens of one document")] = 256,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """What a checkpoint is, the memory it needs, and what is wrong with its folder. Weights are not read. Exits with 1 on problems."""
    import dataclasses

    from diptych.doctor import DocumentSize, examine, machine, render, render_machine

    sizes = {"num_images": num_images, "num_generations": num_generations, "text_tokens": text_tokens}
    if model is None:
        found = machine(DocumentSize(**sizes))
        console.print_json(json.dumps(found)) if as_json else console.print(render_machine(found))
        return
    diagnosis = examine(model, **sizes)
    console.print_json(json.dumps(dataclasses.asdict(diagnosis), default=str)) if as_json else console.print(render(diagnosis))
    if any(not problem.startswith("warning: ") for problem in diagnosis.problems):
        raise typer.Exit(1)


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


@app.command(
    context_settings=PASS_ON,
    epilog="Example: diptych ablate credit --seeds 3 --grpo.max_steps 60   (any setting of the demo can be changed for all variants)",
)
def ablate(
    context: typer.Context,
    suite: Annotated[str | None, typer.Argument(help="a packaged suite (see --list), or a YAML file")] = None,
    output_dir: Path = Path("runs/ablations"),
    seeds: Annotated[int | None, typer.Option(min=1, help="seeds 0 to N - 1; left out: as many as the suite says")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="cells at the same time, one thread each; left out: one a CPU")] = None,
    list_suites: Annotated[bool, typer.Option("--list", help="what suites there are")] = False,
    report: Annotated[bool, typer.Option("--report", help="run nothing; report what is finished")] = False,
    docs: Annotated[Path | None, typer.Option(help="a folder of records: add the suite's, and write the document FOLDER.md of all")] = None,
) -> None:
    """A table of the paper's ablations, or one of your own, over several seeds. Resumes where it stopped. Exits with 1 if a cell failed."""
    from diptych.ablation import documents, pages, runner, summary
    from diptych.ablation.suite import load_suite, packaged_suites

    failures: dict[str, str] = {}
    if list_suites:
        console.print(pages.list_table({name: load_suite(name)[1] for name in packaged_suites()}))
    elif suite is not None:
        name, loaded = load_suite(suite, context.args)
        entries = runner.grid(loaded, range(seeds or loaded.seeds))
        if not report:
            failures = runner.run_grid(name, loaded, entries, output_dir, jobs or runner.default_jobs(), console)
            for title, lines in failures.items():
                console.print(f"failed: {title}\n{lines}", style="red", highlight=False, markup=False, soft_wrap=True)
        record = summary.collect(name, loaded, entries, output_dir, context.args)
        pages.show(record, console)
        console.print(f"open {pages.write(record, output_dir / name)}")
        if docs is not None:
            documents.publish(record, docs)
    elif docs is None:
        raise ValueError("name a suite, or ask for --list")
    if docs is not None:
        console.print(f"written: {documents.write_docs(docs)}")
    if failures:
        raise typer.Exit(1)


@rewards_app.command("list", epilog="Example: diptych rewards list")
def list_rewards() -> None:
    """Every built-in reward: what it judges, the values it gives, what it needs."""
    from rich.table import Table

    from diptych.rewards.base import ABOUT

    table = Table("name", "judges", "values", "needs", caption="Your own: package.module:function. See docs/rewards.md")
    for name, about in ABOUT.items():
        table.add_row(name, *about)
    console.print(table)


@rewards_app.command(
    "try",
    epilog="Example: diptych rewards try document_judge --document answer.json --prompt 'Tell the story' "
    "--option base_url=http://localhost:8000/v1 --option model=Qwen/Qwen3-VL-8B-Instruct",
)
def try_reward(
    name: Annotated[str, typer.Argument(help="a built-in reward (see `diptych rewards list`) or package.module:function")],
    document: Annotated[Path, typer.Option(help="a JSON file of message blocks, as `diptych generate --out answer.json` writes it")],
    prompt: Annotated[str, typer.Option(help="the text of the request; unused where the file holds whole messages")] = "",
    option: Annotated[list[str] | None, typer.Option(help="key=value of the reward's options; may be repeated")] = None,
    column: Annotated[list[str] | None, typer.Option(help="key=value of a data set column, such as num_images=3; may be repeated")] = None,
) -> None:
    """What a reward says of one document: what was sent, what came back, the value of each step. Exits with 1 if a value is missing."""
    from diptych.config import RewardConfig, build, parse_overrides
    from diptych.document import Text
    from diptych.rewards import call_rewards, load_reward
    from diptych.rewards.base import configured
    from diptych.rewards.judges import Judge, transcript

    asked, answer = transcript.read_document(document, prompt)
    options, columns = (dict(parse_overrides([f"--{item}" for item in items or []])) for items in (option, column))
    config = build(RewardConfig, {"name": name, "options": options})
    reward = configured(config, load_reward(name))
    if isinstance(reward, Judge):
        reward.listen = lambda question, reply: console.print(
            f"--- sent ---\n{transcript.sent(question)}\n--- said ---\n{transcript.said(reply)}\n",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    found = call_rewards([(config, load_reward(name))], [asked], [answer], {key: [value] for key, value in columns.items()})
    for j, segment in enumerate(answer):
        kind = "text" if isinstance(segment, Text) else "picture"
        value = f"{float(found.steps[0, 0, j]):.4f}".replace("nan", "missing") if found.applies[0, 0, j] else "-"
        console.print(f"step {j + 1} ({kind}): {value}", highlight=False)
    if found.documents_apply[0, 0]:
        console.print(f"document: {float(found.documents[0, 0]):.4f}".replace("nan", "missing"), highlight=False)
    if found.missing[name]:
        raise ValueError(f"{found.missing[name]:.0%} of the values are missing: {found.errors.get(name, 'not finite')}")


# --- data ---
data_app = typer.Typer(help="Training data: convert published data sets to records, and look into files of records.", no_args_is_help=True)
app.add_typer(data_app, name="data")


@data_app.command("kinds", epilog="Example: diptych data kinds")
def data_kinds() -> None:
    """What `diptych data convert` can read."""
    from diptych.data.convert import KINDS

    for name, kind in KINDS.items():
        console.print(f"{name:12} {kind.summary}. License: {kind.license}", highlight=False)


@data_app.command(epilog="Example: diptych data convert activitynet train.json --media videos --out data/activitynet --exclude MMIE")
def convert(
    kind: Annotated[str, typer.Argument(help="see `diptych data kinds`")],
    input: Annotated[Path, typer.Argument(help="the data set's file or folder, as it was published")],
    out: Annotated[Path, typer.Option(help="a new folder: records.jsonl, images/, report.json")],
    media: Annotated[Path | None, typer.Option(help="the folder of videos or pictures that annotations point to")] = None,
    exclude: Annotated[list[Path] | None, typer.Option(help="a benchmark's pictures or ids, file or folder; may be repeated")] = None,
    prompt: Annotated[str | None, typer.Option(help="the request's text, with fields such as {title}; left out: the kind's own")] = None,
    image_size: Annotated[int | None, typer.Option(min=8, help="cut pictures square, so many pixels a side; left out: as they are")] = None,
    min_images: Annotated[int | None, typer.Option(min=1, help="leave out documents with fewer; left out: the kind's own")] = None,
    max_images: Annotated[int, typer.Option(min=1, help="pictures of one document (video, story and how-to kinds)")] = 6,
    share: Annotated[float, typer.Option(min=0, max=1, help="a fixed random share of the records")] = 1.0,
    seed: Annotated[int, typer.Option(help="of the share")] = 0,
    max_records: Annotated[int | None, typer.Option(min=1, help="stop after so many")] = None,
    license: Annotated[str | None, typer.Option(help="for records that name none; left out: the kind's own")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="stop at the first problem instead of skipping and counting it")] = False,
) -> None:
    """Makes records of a published data set. Can be killed at any moment: the same command goes on where it stopped."""
    from diptych.data.convert import KINDS, Options, run

    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; allowed are {', '.join(KINDS)} (see `diptych data kinds`)")
    options = Options(input, media, prompt, min_images, max_images, license, image_size, share, seed, max_records)
    report = run(kind, KINDS[kind], options, out, exclude=exclude or [], strict=strict, log=_say)
    for cause, number in report["skipped"].items():
        _say(f"skipped: {cause}: {number}")
    _say(f"{report['kept']} records, {report['images']} pictures: {out / 'records.jsonl'} (every skipped item: {out / 'report.json'})")


@data_app.command(epilog="Example: diptych data inspect data/activitynet/records.jsonl --model storyboard --out page.html")
def inspect(
    file: Annotated[Path, typer.Argument(help="a .jsonl file of records")],
    model: Annotated[str | None, typer.Option(help="count tokens for this model: packaged name, checkpoint folder or hub id")] = None,
    out: Annotated[Path | None, typer.Option(help="also write a page with a sample of the records to this .html file")] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="records on the page")] = 12,
    max_lines: Annotated[int | None, typer.Option(min=1, help="read only the first so many lines")] = None,
    seed: int = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """What is in a file of records and what is wrong with it; every picture is opened. Exits with 1 on problems."""
    from diptych.data.inspect import inspect_records, render_lines, summary
    from diptych.models import load_model
    from diptych.report.records import records_page
    from diptych.runs import atomic_text

    if out is not None and out.suffix != ".html":
        raise ValueError(f"--out is {str(out)!r}; the allowed ending is .html")
    loaded = load_model(model) if model else None
    found = inspect_records(file, loaded, num_samples=num_samples, seed=seed, max_lines=max_lines)
    if as_json:
        console.print_json(json.dumps(summary(found)))
    else:
        for line in render_lines(found):
            _say(line)
    if out is not None:
        atomic_text(out, records_page(found))
        if not as_json:
            _say(f"open {out}")
    if found.problems.found:
        raise typer.Exit(1)


def _say(line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _sampling(release: SamplingParams, temperature: float | None, guidance: float | None) -> SamplingParams:
    """The release's settings with what the user asked for."""
    changes: dict[str, Any] = {} if temperature is None else {"temperature": temperature}
    image = changes if guidance is None else {**changes, "guidance_scale": guidance}
    return release.model_copy(update={"text": release.text.model_copy(update=changes), "image": release.image.model_copy(update=image)})


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
