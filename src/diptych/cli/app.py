"""What all commands share: the application, the console, options, and how an error is shown."""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from diptych.config import SamplingParams
from diptych.forms import AnswerForm
from diptych.runtime import SaidByAll, end_process
from diptych.training.preemption import EXIT_CODE, Preempted

app = typer.Typer(
    help="Post-train unified vision-language models until they write illustrated documents.",
    no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False,
)  # fmt: skip
# What is printed is text, never markup: paths and prompts may hold brackets and colons. A log has no width.
PLAIN: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
NUMBER = os.environ.get("RANK", "0") if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""  # of one of several processes
console = Console(width=None if sys.stdout.isatty() else 120, quiet=NUMBER not in ("", "0"), **PLAIN)
INTERRUPTED = 130
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
Recipe = Annotated[str, typer.Argument(help="a YAML file, or the name of a packaged recipe")]
Model = Annotated[str, typer.Option(help="packaged name, checkpoint or adapter folder, or hub id")]
Guidance = Annotated[float | None, typer.Option(min=0, help="classifier-free guidance; 1: off; left out: the family's own")]
Form = Annotated[
    AnswerForm | None,
    typer.Option(help="free: texts and pictures, as the model chooses; image: a picture; text; text_image: a text, then its picture"),
]
Decoder = Annotated[str | None, typer.Option(help="package.module:name that turns codes into pixels; left out: the family's own")]
Dtype = Annotated[str, typer.Option(help="auto, float32 or bfloat16")]
FourBit = Annotated[bool, typer.Option("--load-in-4bit", help="the language model in NF4")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]


def say(line: str) -> None:
    console.print(line, soft_wrap=True)


def sampling(release: SamplingParams, temperature: float | None, guidance: float | None) -> SamplingParams:
    """The release's settings with what the user asked for."""
    changes: dict[str, Any] = {} if temperature is None else {"temperature": temperature}
    image = changes if guidance is None else {**changes, "guidance_scale": guidance}
    return release.model_copy(update={"text": release.text.model_copy(update=changes), "image": release.image.model_copy(update=image)})


def main() -> None:
    """Runs the command; what a user can mend is printed in a line or two, without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that is no text can still be printed
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # typer makes an exit code of Ctrl-C
            say("\nStopped. Everything up to the last checkpoint is saved: run the same command again to resume.")
            exec("")  # CPython, `-m`: without it the process may die of the signal that was handled here (SIGINT inside an exec)
        end_process(code if isinstance(code, int) else 0)
    except Preempted as error:
        say(f"\nStopped by {error}.")
        end_process(EXIT_CODE)
    except (ValueError, FloatingPointError, RuntimeError, OSError) as error:
        where = f" (process {NUMBER})" if NUMBER else ""
        if not (isinstance(error, SaidByAll) and console.quiet):
            Console(stderr=True, **PLAIN).print(Text.assemble((f"error{where}:", "bold red"), f" {error}"), soft_wrap=True)
        end_process(1)
    except Exception as error:  # typer's own usage errors know how to show themselves
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            error.show()
            end_process(error.exit_code)
        raise
