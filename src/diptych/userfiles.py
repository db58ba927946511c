"""Text files that users write: one way to read them all.

UTF-8, with or without a byte order mark. Anything else is refused with the place of the first byte that is none, because text that is
guessed at says less, or other things, than its author wrote.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import yaml

_BOM = codecs.BOM_UTF8
_OTHERS = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip


def decode(raw: bytes, where: str) -> str:
    """The text of bytes that begin a file, or of a line of it. Raises ValueError naming the first byte that is not UTF-8."""
    for mark, name in _OTHERS.items() if raw[:1] in (b"\xff", b"\xfe", b"\0") else ():  # UTF-32's mark begins with that of UTF-16
        if raw.startswith(mark):
            raise ValueError(f"{where} is {name} (byte 1 is 0x{raw[0]:02x}); UTF-8 is needed: save it as UTF-8")
    if b"\0" in raw:
        raise ValueError(f"{where}: byte {raw.index(0) + 1} is 0x00, which no text holds (UTF-16 without its mark?); save it as UTF-8")
    try:
        return raw.removeprefix(_BOM).decode()
    except UnicodeDecodeError as error:
        at = error.start + len(raw) - len(raw.removeprefix(_BOM))
        raise ValueError(f"{where}: byte {at + 1} is 0x{raw[at]:02x}, which is not UTF-8 ({error.reason}); save it as UTF-8") from None


def read_text(path: Path) -> str:
    """Raises ValueError naming the file and the byte where it is not UTF-8, and OSError where it cannot be opened."""
    return decode(path.read_bytes(), str(path))


def read_entries(path: Path) -> list[str]:
    """A list with an entry a line: without spaces around, blank lines left out. Only line ends part lines."""
    lines = re.split(r"\r\n|\n|\r", read_text(path))
    return [line.strip() for line in lines if line.strip()]


def read_json(path: Path) -> Any:
    """Raises ValueError naming the file where it cannot be read as JSON."""
    try:
        return json.loads(read_text(path))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    except RecursionError:
        raise ValueError(f"cannot read {path}: it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"cannot read {path}: it is no valid JSON: {error}") from error
    except ValueError as error:  # other bytes than UTF-8, or an integer of thousands of digits
        raise error if str(path) in str(error) else ValueError(f"cannot read {path}: {error}") from error


def lines_of(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(bytes that stand before it in the file, line) of each line, the mark at the file's beginning left out."""
    offset = 0
    for raw in stream:
        line = raw.removeprefix(_BOM) if offset == 0 else raw
        yield offset + len(raw) - len(line), line
        offset += len(raw)


# --- YAML ----------------------------------------------------------------------------------------------------------------


class _NoKeyTwice:
    """Of a key that stands twice one value would be lost."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[attr-defined]
            if isinstance(key, str | int | float | bool):
                if key in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep=deep)  # type: ignore[misc]


class TextLoader(_NoKeyTwice, yaml.BaseLoader):
    """Lists and mappings of texts."""


class _Loader(_NoKeyTwice, yaml.SafeLoader):
    """YAML 1.2's scalars, which say what people mean: 1e-4 is a number; `no`, 12:30, 2024-05-01 and 0123 are words."""


_Loader.yaml_implicit_resolvers = {}
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value, 0))
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))


def load_yaml(text: str, name: str) -> Any:
    """Raises ValueError with `name` where it is no valid YAML, or a key stands twice."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{name} is no valid YAML: {error}") from error
    except ValueError as error:  # an integer of thousands of digits
        raise ValueError(f"{name} is no valid YAML: {error}") from error


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or 1.2 would read as something else."""


_BOTH = (yaml.SafeDumper.yaml_implicit_resolvers, _Loader.yaml_implicit_resolvers)
_Dumper.yaml_implicit_resolvers = {first: [*_BOTH[0].get(first, []), *_BOTH[1].get(first, [])] for first in {*_BOTH[0], *_BOTH[1]}}


def dump_yaml(value: Any) -> str:
    """Read back by `load_yaml`, and by any other reader of YAML."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
