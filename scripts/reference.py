"""The reference, written from the code: commands, settings, and rewards with their options."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from typer.core import TyperArgument, TyperGroup
from typer.main import get_command

from diptych import config
from diptych.cli import app
from diptych.forms import AnswerForm
from diptych.rewards.base import ABOUT, load_reward

MADE = "<!-- Written from the code by scripts/reference.py. -->\n"
END = "...\n"  # that YAML puts behind a single value
COMMANDS = {"demo": config.DemoConfig, "warmup": config.WarmupConfig, "grpo": config.GRPOConfig}  # whose settings are passed on
TRAININGS: Sequence[tuple[type[BaseModel], str]] = [
    (config.WarmupConfig, "Settings of `diptych warmup`."),
    (config.GRPOConfig, "Settings of `diptych grpo`."),
    (config.DemoConfig, "Settings of `diptych demo`: those of its two trainings and of its evaluation, each under its name."),
]


def pages() -> dict[str, str]:
    """Path of a page in docs/ -> its text."""
    return {"reference/commands.md": commands(), "reference/settings.md": settings(), "reference/rewards.md": rewards()}


# --- commands -------------------------------------------------------------------------------------------------------------


def commands() -> str:
    lines = [
        MADE,
        "# Commands",
        "",
        "`diptych COMMAND --help` prints the same. A command that fails exits with 1, one that was stopped with 130.",
        "",
    ]
    root = get_command(app)
    assert isinstance(root, TyperGroup)
    for name, command in root.commands.items():
        lines += _command(f"diptych {name}", command, 2)
    return "\n".join(lines)


def _command(name: str, command: Any, level: int) -> Iterator[str]:
    yield f"{'#' * level} {name}\n\n{escaped(command.help or '')}\n"
    if isinstance(command, TyperGroup):
        for one, inner in command.commands.items():
            yield from _command(f"{name} {one}", inner, level + 1)
        return
    shown = [parameter for parameter in command.params if not getattr(parameter, "hidden", False) and parameter.name != "help"]
    if shown:
        yield table(("", "type", "default", "what it is"), [_parameter(parameter) for parameter in shown])
    if (kind := COMMANDS.get(name.removeprefix("diptych "))) is not None:
        yield f"Any [setting](settings.md#{kind.__name__.lower()}) may follow, by its dotted name: `--optim.lr 1e-4`.\n"
    if command.epilog:
        yield f"```bash\n{command.epilog.removeprefix('Example: ')}\n```\n"


def _parameter(parameter: Any) -> tuple[str, ...]:
    argument = isinstance(parameter, TyperArgument)
    words = f"`{parameter.name.upper()}`" if argument else ", ".join(f"`{name}`" for name in parameter.opts)
    flag = not argument and parameter.is_flag
    kind = "flag" if flag else shown_type(parameter.type_descriptor.annotation)
    default = "required" if parameter.required else "" if flag or parameter.default in (None, (), "") else f"`{parameter.default}`"
    return words, kind, default, escaped(parameter.help or "")


# --- settings -------------------------------------------------------------------------------------------------------------


def settings() -> str:
    lines = [
        MADE, "# Settings", "",
        "Recipes are YAML files of these settings; `diptych grpo recipe.yaml --optim.lr 1e-4` overrides any of them. Unknown names fail. "
        "*Required*: a recipe must give it. A run may be resumed with other values of those that are marked ↻.", "",
    ]  # fmt: skip
    known: list[type[BaseModel]] = [kind for kind, _ in TRAININGS]
    about = dict(TRAININGS)
    for kind in known:  # grows
        text = escaped(inspect.cleandoc(kind.__doc__ or "")) if "__doc__" in vars(kind) and kind.__doc__ else ""
        lines += [f"## {kind.__name__}", "", *([about[kind], ""] if kind in about else []), *([text, ""] if text else [])]
        found = []
        for name, field in kind.model_fields.items():
            for inner in models_in(field.annotation):
                if inner not in known:
                    known.append(inner)
            mark = " ↻" if name in getattr(kind, "may_change", ()) else ""
            found.append((f"`{name}`{mark}", shown_type(field.annotation), shown_default(field), escaped(described(field))))
        lines += [table(("setting", "type", "default", "what it is"), found)]
    return "\n".join(lines)


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from models_in(inner)


def shown_type(annotation: Any) -> str:
    """A type in words of the table: its values, or its name, linked where it has settings of its own."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " \\| ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join("none" if inner is NoneType else shown_type(inner) for inner in arguments)
    if origin is list:
        return f"{shown_type(arguments[0])} (several)"
    if origin is tuple:
        return f"list of {shown_type(arguments[0])}" if arguments[-1] is Ellipsis else f"{len(arguments)} of {shown_type(arguments[0])}"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    if annotation is AnswerForm:
        return " \\| ".join(f"`{form.value}`" for form in AnswerForm)
    names = {str: "text", int: "whole number", float: "number", bool: "true or false", Path: "path", Any: "anything"}
    return names[annotation]


def shown_default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.default if field.default is not PydanticUndefined else field.default_factory()
    if isinstance(value, BaseModel):
        return "its own"
    if value is None:
        return "none"
    return f"`{yaml.safe_dump(plain(value), default_flow_style=True).removesuffix(END).strip()}`"


def plain(value: Any) -> Any:
    """As a recipe writes it."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_defaults=True)
    if isinstance(value, tuple):
        return [plain(one) for one in value]
    return value.value if isinstance(value, AnswerForm) else value


def described(field: Any) -> str:
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    limits = [f"{word} {getattr(rule, key):g}" for rule in field.metadata for key, word in words.items() if hasattr(rule, key)]
    return "; ".join(filter(None, [field.description, ", ".join(limits)]))


# --- rewards --------------------------------------------------------------------------------------------------------------


def rewards() -> str:
    listed = [(f"`{name}`", *map(escaped, about)) for name, about in ABOUT.items()]
    lines = [
        MADE, "# Rewards", "",
        "A recipe names rewards in [`rewards`](settings.md#rewardconfig), with their `options`. "
        "How to choose and try them: [the guide](../how-to/rewards.md).", "",
        table(("name", "judges", "values", "needs"), listed),
    ]  # fmt: skip
    for name in ABOUT:
        reward: Any = load_reward(name)
        lines += [f"## {name}", "", escaped(first_paragraph(reward)), ""]
        options = getattr(reward, "options_class", None)
        if options is not None:
            fields = options.model_fields.items()
            found = [(f"`{key}`", shown_type(field.annotation), shown_default(field), escaped(described(field))) for key, field in fields]
            lines += [table(("option", "type", "default", "what it is"), found)]
    return "\n".join(lines)


def first_paragraph(thing: Any) -> str:
    return re.split(r"\n\s*\n", inspect.getdoc(thing) or "")[0].replace("\n", " ")


# --- Markdown -------------------------------------------------------------------------------------------------------------


def escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(" ".join(cell.split()) for cell in line) + " |" for line in lines) + "\n"
