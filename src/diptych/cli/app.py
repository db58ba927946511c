"""What all commands share: the application, the console, options, and how an error is shown."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from diptych.config import SamplingParams

app = typer.Typer(
    help="Post-train unified vision-language models until they write illustrated documents.",
    no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False,
)  # fmt: skip
console = Console(width=None if sys.stdout.isatty() else 120)  # a log has no width
INTERRUPTED = 130
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
Recipe = Annotated[str, typer.Argument(help="a YAML file, or the name of a packaged recipe")]
Model = Annotated[str, typer.Option(help="packaged name, checkpoint or adapter folder, or hub id")]
Guidance = Annotated[float | None, typer.Option(min=0, help="classifier-free guidance; 1: off; left out: the family's own")]
Dtype = Annotated[str, typer.Option(help="auto, float32 or bfloat16")]
FourBit = Annotated[bool, typer.Option("--load-in-4bit", help="the language model in NF4")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]


def say(line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def sampling(release: SamplingParams, temperature: float | None, guidance: float | None) -> SamplingParams:
    """The release's settings with what the user asked for."""
    changes: dict[str, Any] = {} if temperature is None else {"temperature": temperature}
    image = changes if guidance is None else {**changes, "guidance_scale": guidance}
    return release.model_copy(update={"text": release.text.model_copy(update=changes), "image": release.image.model_copy(update=image)})


def main() -> None:
    """Runs the command; what a user can mend is printed in a line or two, without a traceback."""
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # typer makes an exit code of Ctrl-C
            console.print("\nStopped. Everything up to the last checkpoint is saved: run the same command again to resume.")
            exec("")  # CPython, `-m`: without it the process may die of the signal that was handled here (SIGINT inside an exec)
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
