"""Commands about one checkpoint: generate, merge, doctor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diptych.cli.app import Decoder, Device, Dtype, Form, FourBit, Guidance, Model, app, console, sampling, say

if TYPE_CHECKING:
    from diptych.document import Document


@app.command(
    epilog='Example: diptych generate "tell the story . on the left a small red ball , at night . first the ball grows ." --out a.html'
)
def generate(
    prompt: Annotated[str, typer.Argument(help="the prompt's text")],
    model: Model = "storyboard",
    image: Annotated[list[Path] | None, typer.Option(help="a picture before the text; may be repeated")] = None,
    form: Form = None,
    begin: Annotated[
        str | None, typer.Option(help="how the answer begins: a text, or a .json file of message blocks as --out writes it")
    ] = None,
    out: Annotated[Path, typer.Option(help="an .html page, or a .json file of message blocks")] = Path("document.html"),
    temperature: Annotated[float | None, typer.Option(min=0, help="0: greedy; left out: as the family's release samples")] = None,
    guidance: Guidance = None,
    max_images: Annotated[int | None, typer.Option(min=0, help="left out: 4, or as many as fit the context")] = None,
    max_text_tokens: Annotated[int, typer.Option(min=1, help="per text segment")] = 64,
    seed: int = 0,
    dtype: Dtype = "auto",
    load_in_4bit: FourBit = False,
    image_size: Annotated[int | None, typer.Option(min=1, help="pixels a side of drawn pictures (Emu3)")] = None,
    image_decoder: Decoder = None,
    device: Device = "auto",
) -> None:
    """Writes one illustrated document, or what else `--form` asks for."""
    from diptych.document import Document, Image, Text, to_json_blocks
    from diptych.forms import AnswerForm
    from diptych.pictures import open_image

    if out.suffix not in (".html", ".json"):
        raise ValueError(f"--out is {str(out)!r}; allowed endings are .html and .json")
    asked = Document((*(Image(open_image(path)) for path in image or []), Text(prompt)))
    from diptych.models import load_model  # torch, which a mistake in the arguments need not wait for
    from diptych.models.image_decoder import set_image_decoder
    from diptych.report.pages import answer_html, blocks_html, page
    from diptych.runs import atomic_text
    from diptych.runtime import generator, pick_device
    from diptych.sampling.engine import fit_to_context, sample

    loaded = load_model(model, dtype=dtype, load_in_4bit=load_in_4bit or None, image_size=image_size).to(pick_device(device))
    set_image_decoder(loaded, image_decoder)
    given = _beginning(begin)
    row = loaded.encode_prompt(asked, form, given)
    params = sampling(loaded.default_sampling, temperature, guidance).model_copy(update={"max_text_tokens": max_text_tokens})
    params = params.model_copy(update={"max_images": max_images}) if max_images is not None else fit_to_context(loaded, row, params)
    answer = sample(loaded, [row], params, generator=generator(seed))[0].document
    blocks = to_json_blocks(answer)
    if out.suffix == ".json":
        atomic_text(out, json.dumps(blocks) + "\n")
    else:
        shown = answer_html({"answer": blocks, "steps": [{} for _ in blocks]})
        asked_html = f'<div class="prompt">{blocks_html(to_json_blocks(asked))}</div>'
        atomic_text(out, page("Document", f'<div class="task card">{asked_html}{shown}</div>'))
    say(f"{len(answer)} segments, {len(answer.images)} pictures: {out}")
    if not answer.images and params.max_images and form in (None, AnswerForm.FREE):
        say(
            "The model chose to draw nothing. One that was not trained on documents of texts and pictures never does: ask for a picture "
            "with --form image, or for a text and its picture with --form text_image."
        )


def _beginning(given: str | None) -> Document:
    """Raises ValueError for a file that holds no message blocks, and a beginning without anything in it."""
    from diptych.document import NOTHING, Document, Text
    from diptych.userfiles import read_json

    if given is None:
        return NOTHING
    path = Path(given)
    blocks = read_json(path) if path.suffix == ".json" else given
    if not isinstance(blocks, str | list):
        raise ValueError(f"--begin {given!r} holds {type(blocks).__name__}; it must hold a list of message blocks, as --out writes it")
    found = Document.from_blocks(blocks, path.parent)
    if not len(found) or any(isinstance(segment, Text) and not segment.text.strip() for segment in found):
        raise ValueError(f"--begin {given!r} has an empty text, or nothing at all; give a text of more than spaces, or leave it out")
    return found


@app.command(epilog="Example: diptych merge runs/grpo/checkpoints/step_120/model --out merged")
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
    say(f"saved: {out}")


@app.command(epilog="Example: diptych doctor deepseek-community/Janus-Pro-7B; diptych doctor Janus-Pro-7B --gpus 8 --gpu-memory 80")
def doctor(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="packaged name, checkpoint or adapter folder, or hub id; with --gpus also a released size such as Janus-Pro-7B; "
            "left out: this machine, or all released sizes",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="the same as MODEL")] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs of a machine that train it together: memory and traffic of each")] = None,
    gpu_memory: Annotated[float | None, typer.Option(help="GiB of one of these GPUs; left out: of this machine's")] = None,
    nodes: Annotated[int | None, typer.Option(help="machines with so many GPUs; left out: 1")] = None,
    shard_size: Annotated[int | None, typer.Option(help="parallel.shard_size; left out: the GPUs of one machine")] = None,
    adamw_8bit: Annotated[bool, typer.Option("--adamw-8bit", help="with --gpus: optim.name adamw_8bit, moments of 8 bits")] = False,
    kl: Annotated[bool, typer.Option("--kl", help="with a KL term (beta not 0): full training then keeps a frozen copy")] = False,
    num_images: Annotated[int, typer.Option(min=0, help="pictures of one document")] = 3,
    num_generations: Annotated[int, typer.Option(min=1, help="G, the documents of one prompt")] = 8,
    text_tokens: Annotated[int, typer.Option(min=1, help="text tokens of one document")] = 256,
    num_prompts: Annotated[int, typer.Option(min=1, help="prompts of one GPU, sampled together")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """What a checkpoint is, the memory it needs, and what is wrong with its folder. Weights are not read. Exits with 1 on problems."""
    import dataclasses

    from diptych.doctor import DocumentSize, examine, fleet, machine, plans, released, render, render_machine, render_plans

    if name is not None and model is not None:
        raise ValueError(f"the model is given twice, as {name!r} and as --model {model!r}; leave one out")
    model, asked = model or name, fleet(gpus, gpu_memory, nodes, shard_size)
    if adamw_8bit and asked is None:
        raise ValueError("--adamw-8bit is about several GPUs, or one: say how many each machine has: --gpus 8")
    document = DocumentSize(num_images, num_generations, text_tokens, num_prompts)
    size = None if model is None or Path(model).is_dir() else released(model)

    def show(found: Any, rendered: Any) -> None:
        console.print_json(json.dumps(found, default=str)) if as_json else console.print(rendered, markup=True)

    if asked is not None and (model is None or size is not None):
        found = plans(asked, document, kl=kl, adamw_8bit=adamw_8bit, only=size)
        show({name: dataclasses.asdict(plan) for name, plan in found.items()}, render_plans(found))
        return
    if model is None:
        here = machine(document)
        show(here, render_machine(here))
        return
    if size is not None:
        raise ValueError(f"there is no folder {model}; the released size of that name is known with --gpus, e.g. --gpus 1 --gpu-memory 80")
    diagnosis = examine(model, **dataclasses.asdict(document), fleet=asked, kl=kl, adamw_8bit=adamw_8bit)
    show(dataclasses.asdict(diagnosis), render(diagnosis))
    if any(not problem.startswith("warning: ") for problem in diagnosis.problems):
        raise typer.Exit(1)
