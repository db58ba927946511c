"""`diptych serve`: an OpenAI-compatible server for documents of text and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diptych.cli.app import Decoder, Device, Dtype, FourBit, app, say


@app.command(epilog="Example: diptych serve; diptych serve --model base=storyboard --model trained=runs/grpo/checkpoints/step_120/model")
def serve(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="a model as for `generate`, or NAME=MODEL, under which requests ask for it; may be repeated; left out: storyboard"
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="the address to listen at; 0.0.0.0: for other machines too")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one")] = 8000,
    api_keys: Annotated[Path | None, typer.Option(help="a file with a key a line; keys may also stand in DIPTYCH_API_KEYS")] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="documents that are written at the same time")] = 32,
    max_waiting: Annotated[int, typer.Option(min=0, help="documents that may wait for their turn; more are refused with 429")] = 64,
    max_choices: Annotated[int | None, typer.Option(min=1, help="the most that `n` may ask for; left out: 8, or --max-batch")] = None,
    timeout: Annotated[float, typer.Option(min=1, help="seconds that a request may take, waiting included")] = 600,
    max_body_mb: Annotated[int, typer.Option(min=1, help="the largest request, in MiB")] = 32,
    max_pictures: Annotated[int, typer.Option(min=0, help="pictures that a request may bring")] = 16,
    max_megapixels: Annotated[int, typer.Option(min=1, help="that these may have together")] = 32,
    fetch_pictures: Annotated[bool, typer.Option("--fetch-pictures", help="read pictures at public http(s) addresses")] = False,
    allow_origin: Annotated[list[str] | None, typer.Option(help="a web page's origin that may call (CORS); may be repeated")] = None,
    grace: Annotated[int, typer.Option(min=0, help="seconds that what is being written has to end when the server is stopped")] = 60,
    dtype: Dtype = "auto",
    load_in_4bit: FourBit = False,
    image_size: Annotated[int | None, typer.Option(min=1, help="pixels a side of drawn pictures (Emu3)")] = None,
    image_decoder: Decoder = None,
    device: Device = "auto",
) -> None:
    """Serves models: /v1/chat/completions with text and pictures, /v1/images/generations, and a page at / to try them."""
    sources = _named(model or ["storyboard"])
    from diptych.listening import listen

    try:
        from diptych.serving.server import serve as serve_models
        from diptych.serving.settings import Settings, own_hosts, read_keys
    except ModuleNotFoundError as error:
        raise ValueError(f"`diptych serve` needs {error.name}, which is not installed: pip install 'diptych[serve]'") from error
    settings = Settings(
        max_batch=max_batch, max_waiting=max_waiting, max_choices=max_choices or min(8, max_batch), timeout_seconds=timeout,
        max_body=max_body_mb * 2**20, max_pictures=max_pictures, max_pixels=max_megapixels * 10**6, fetch_pictures=fetch_pictures,
        keys=read_keys(api_keys), hosts=own_hosts(host), origins=tuple(allow_origin or ()),
    )  # fmt: skip
    bound = listen(host, port)  # before the models are loaded: a port in use need not wait for them
    from diptych.models import load_model
    from diptych.models.image_decoder import set_image_decoder
    from diptych.runtime import pick_device

    models = {}
    for name, source in sources.items():
        loaded = load_model(source, dtype=dtype, load_in_4bit=load_in_4bit or None, image_size=image_size).to(pick_device(device))
        set_image_decoder(loaded, image_decoder)
        models[name] = loaded
    if settings.hosts is None and not settings.keys:
        say(f"warning: whoever reaches {host} may use this server; --api-keys FILE lets in only who has a key")
    address = f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}"
    say(f"serving {', '.join(models)} at {address} (page: {address}/, API: {address}/v1); Ctrl-C stops it")
    serve_models(models, settings, bound, grace_seconds=grace)
    say("stopped")


def _named(given: list[str]) -> dict[str, str]:
    """Sources by name. Raises ValueError for a name that is given twice, or is none."""
    found: dict[str, str] = {}
    for one in given:
        name, equals, source = one.partition("=")
        if not equals or Path(one).exists():
            name, source = one, one
        if not name or not source or not name.isprintable() or len(name) > 200:
            raise ValueError(f"--model is {one!r}; give a model, or NAME=MODEL with a name of at most 200 printable characters")
        if name in found:
            raise ValueError(f"--model {name!r} is given twice; tell them apart by names: --model NAME={source}")
        found[name] = source
    return found
