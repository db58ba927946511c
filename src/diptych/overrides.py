"""Settings from a command line: `--optim.lr 1e-4`, `--rewards.0.options.model=org/name`, and `key=value` of an option.

What is written is read as the type that the setting has, and nothing of it is ever dropped:

| the setting's type | what is read |
|---|---|
| a string, or one of several words | the text as it stands; quotes around the whole of it are taken off |
| a number, true or false | a number, true or false |
| any of these or null | `null` too |
| a list, a mapping, a group of settings | YAML such as `[0.8, 0.9]` or `{r: 8}`, its parts by their own types |
| not said (a reward's options in a recipe, columns) | a JSON number, `true`, `false`, `null`, list or object; otherwise the text |
"""

from __future__ import annotations

import json
import math
import re
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from diptych.userfiles import TextLoader


def parse_overrides(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Key and text of each `--key text` or `--key=text`. Raises ValueError for anything else."""
    found: list[tuple[str, str]] = []
    rest = list(arguments)
    while rest:
        item = rest.pop(0)
        if not item.startswith("--"):
            raise ValueError(f"cannot read {item!r}; overrides look like --optim.lr 1e-4 or --seed=1")
        key, equals, value = item[2:].partition("=")
        if not equals:
            if not rest:
                raise ValueError(f"--{key} needs a value")
            value = rest.pop(0)
        found.append((key, value))
    return found


def parse_pairs(name: str, items: Sequence[str], kind: Callable[[str], Any] = lambda _: Any) -> dict[str, Any]:
    """What a command's `--NAME key=value` gives, each value by the type that `kind` says the key has.

    Raises ValueError where there is no `=`, and for a key that is given twice.
    """
    found: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise ValueError(f"--{name} {item!r} is no key=value; it looks like --{name} model=org/name")
        if key in found:
            raise ValueError(f"--{name} gives {key!r} twice; give it once")
        found[key] = read_value(text, kind(key), f"--{name} {key}")
    return found


def set_leaf(data: dict[str, Any], model: type[BaseModel], key: str, value: Any, *, written: bool) -> None:
    """Puts a value at a dotted key of a model's data; `written`: it is text to be read by the leaf's type.

    Raises ValueError for a place that does not exist.
    """
    *parents, leaf = key.split(".")
    node: Any = data
    kind: Any = model
    for depth, part in enumerate([*parents, leaf]):
        if isinstance(node, list | tuple):
            if not (part.isascii() and part.isdigit()) or int(part) >= len(node):
                raise ValueError(f"--{key}: {part!r} is no index of a list of {len(node)}; allowed are 0 to {len(node) - 1}")
            place: Any = int(part)
        elif isinstance(node, dict):
            place = _named(kind, part)
        else:
            raise ValueError(f"--{key}: {parents[depth - 1]!r} is no group of settings")
        kind = _inside(kind, part)
        if depth < len(parents):
            if isinstance(node, dict) and node.get(place) is None:
                node[place] = {}
            node = node[place]
        else:
            node[place] = read_value(value, kind, f"--{key}") if written else value


def read_value(text: str, kind: Any, name: str) -> Any:
    """A text as a value of a type. What does not fit the type is left as text: whoever checks the settings says what is wrong with it.

    Raises ValueError where a list or mapping cannot be read, or a part of it would be lost.
    """
    kinds = list(_alternatives(kind))
    if text == "null" and type(None) in kinds:
        return None
    if any(one is str or _is_words(one) for one in kinds):
        return _unquoted(text)
    if any(one is Any or one is object for one in kinds):
        return _guess(text, name)
    if any(_is_compound(one) for one in kinds):
        return _typed(_read_yaml(text, name), kind)
    try:
        return TypeAdapter(kind).validate_python(text)
    except ValidationError:
        return text


def _guess(text: str, name: str) -> Any:
    """JSON where it is a list and the like, true, false or null, or a number that is written back as it stands; otherwise the text.

    So 3, 0.5 and 1e-4 are numbers; 0123, 1.10 and 1e10 may be a code, a version and a commit, and stay as they are written. Whoever asks
    for a number reads one out of these too.
    """
    try:
        value = json.loads(
            {"True": "true", "False": "false", "None": "null"}.get(text, text), parse_constant=_no_constant, parse_float=_number,
            object_pairs_hook=_no_duplicates,
        )  # fmt: skip
    except Twice as error:
        raise ValueError(f"{name} {text!r}: {error}") from None
    except (ValueError, RecursionError):
        return _unquoted(text)
    return _unquoted(text) if isinstance(value, str) and text[:1] == '"' else value


def _number(text: str) -> float | str:
    """A number that is written back as it stands, or in scientific notation with a sign; otherwise the text."""
    value = float(text)
    exact = json.dumps(value) == text or (re.search("[eE][-+]", text) is not None and math.isfinite(value) and value != 0)
    return value if exact else text


class Twice(ValueError):
    """A key stands twice: one of its values would be lost."""


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for key, count in Counter(key for key, _ in pairs).items():
        if count > 1:
            raise Twice(f"the key {key!r} stands twice")
    return dict(pairs)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _unquoted(text: str) -> str:
    """Quotes around the whole, as one writes them in YAML, are no part of the text."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            return text
        if isinstance(value, str):
            return value
    return text


def _read_yaml(text: str, name: str) -> Any:
    """Lists, mappings and texts. Raises ValueError where something is no part of what was read, such as a comment."""
    try:
        covered = [False] * len(text)
        for token in yaml.scan(text, Loader=yaml.BaseLoader):
            span = slice(token.start_mark.index, token.end_mark.index)
            covered[span] = [True] * len(covered[span])
        lost = "".join(c for c, is_read in zip(text, covered, strict=True) if not is_read).strip()
        if lost:
            raise ValueError(f"{name} {text!r}: {lost!r} would be lost; put quotes around a text that holds #")
        return yaml.load(text, Loader=TextLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{name}: cannot read the value {text!r}: {error}") from error


def _typed(value: Any, kind: Any) -> Any:
    """A value whose scalars are still text, each by the type that stands at its place."""
    kinds = list(_alternatives(kind))
    if isinstance(value, str):
        return value if any(_is_compound(one) for one in kinds) and value != "null" else read_value(value, kind, "")
    if isinstance(value, list):
        return [_typed(item, _inside(kind, str(index))) for index, item in enumerate(value)]
    if isinstance(value, dict):
        return {key: _typed(item, _inside(kind, key)) for key, item in value.items()}
    return value


# --- types ---------------------------------------------------------------------------------------------------------------


def _alternatives(kind: Any) -> Iterator[Any]:
    """The members of a union, `Annotated` taken off."""
    if get_origin(kind) is Annotated:
        yield from _alternatives(get_args(kind)[0])
    elif get_origin(kind) in (Union, types.UnionType):
        for one in get_args(kind):
            yield from _alternatives(one)
    else:
        yield kind


def _is_words(kind: Any) -> bool:
    return get_origin(kind) is Literal and any(isinstance(word, str) for word in get_args(kind))


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _is_compound(kind: Any) -> bool:
    origin = get_origin(kind) or kind
    return _is_model(kind) or origin in (list, tuple, dict, set, frozenset)


def kind_of(model: type[BaseModel], key: str) -> Any:
    """The type of the setting at a dotted key; Any where there is none."""
    kind: Any = model
    for part in key.split("."):
        kind = _inside(kind, part)
    return kind


def _inside(kind: Any, part: str) -> Any:
    """The type of a field, an item or a value; Any where nothing is known of it."""
    for one in _alternatives(kind):
        origin, arguments = get_origin(one) or one, get_args(one)
        if _is_model(one):
            return _field(one, part)
        if origin is dict and len(arguments) == 2:
            return arguments[1]
        if origin in (tuple, list, set, frozenset) and arguments:
            fixed = origin is tuple and (len(arguments) != 2 or arguments[1] is not Ellipsis)
            item = arguments[min(int(part), len(arguments) - 1)] if fixed and part.isdigit() else arguments[0]
            return item if part.isdigit() else _inside(item, part)  # one item in the place of a list
    return Any


def _field(model: type[BaseModel], name: str) -> Any:
    field = model.model_fields.get(_named(model, name))
    return Any if field is None else field.annotation


def _named(kind: Any, part: str) -> str:
    """`--num-generations` is the setting `num_generations`; keys of a mapping of the user's own stand as they are."""
    underscored = part.replace("-", "_")
    return underscored if any(underscored in model.model_fields for model in _models(kind)) else part


def _models(kind: Any) -> Iterator[type[BaseModel]]:
    """The models that a setting, or an item of its list, may be."""
    for one in _alternatives(kind):
        if _is_model(one):
            yield one
        elif get_origin(one) in (tuple, list):
            for item in get_args(one):
                yield from _models(item)
