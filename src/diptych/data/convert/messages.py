"""`messages`: the ecosystem's own form, in JSONL, JSON, parquet or WebDataset tar shards.

A row has `messages` (a list of {"role", "content"}), or TRL's `prompt` and `completion`, which are joined. Content is a string or a
list of blocks: {"type": "text", "text"}, {"type": "image", "image": path, data address or {"bytes", "path"}},
{"type": "image_url", "image_url": {"url": data address}}, and {"type": "image"} without a picture, which takes the next of the row's
`images` (or `image`) column. In a tar shard the row is the sample's `.json`, and a path may name another member of the sample.
`id`, `source`, `license` and other columns are kept; `loss` at an answer says whether it is trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diptych.data.convert.draft import Block, Draft, Message, Options
from diptych.data.convert.pictures import resolve
from diptych.data.problems import Problems
from diptych.data.readers import Row, read_rows

USED = ("messages", "prompt", "completion", "images", "image", "id", "license")


def read(options: Options, problems: Problems) -> Iterator[Draft]:
    for row in read_rows(options.input, problems):
        id = id_of(row)
        try:
            messages = messages_of(row)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            text = f"{type(error).__name__} {error}" if isinstance(error, KeyError) else str(error)
            problems.report(row.where, "not a record", text, id)
            continue
        license = row.value.get("license")
        yield Draft(id, row.where, messages, license=str(license) if license else None, columns=columns_of(row))


def id_of(row: Row) -> str:
    """Its own, or the sample's key, or its place."""
    given = next((row.value[key] for key in ("id", "__key__") if row.value.get(key) not in (None, "")), None)
    return str(given) if given is not None else row.where.rsplit("/", 1)[-1]


def columns_of(row: Row) -> dict[str, Any]:
    """What reaches the rewards: columns that JSON can hold."""
    return {key: value for key, value in row.value.items() if key not in USED and _is_plain(value)}


def given_messages(value: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation of a row, before its pictures are put in their places. Raises ValueError where there is none."""
    if "messages" in value:
        return value["messages"]
    if "prompt" in value:
        return [*_turns(value["prompt"], "user"), *_turns(value.get("completion") or [], "assistant")]
    raise ValueError(f"columns are {', '.join(value)}; `messages`, or `prompt` and `completion`, are needed")


def messages_of(row: Row) -> tuple[Message, ...]:
    """Raises ValueError for blocks that are none, and pictures without a place."""
    value = row.value
    columns = value.get("images") or ([value["image"]] if value.get("image") is not None else [])
    waiting = list(columns)
    messages = tuple(
        Message(message["role"], tuple(_blocks(message["content"], row, waiting)), is_trained(message.get("loss")))
        for message in given_messages(value)
    )
    if waiting and len(waiting) != len(columns):
        raise ValueError(f"{len(columns)} pictures are given and {len(columns) - len(waiting)} places for them")
    if waiting:
        raise ValueError(f"{len(columns)} pictures are given and no block says where they stand")
    return messages


def _turns(value: Any, role: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def is_trained(value: Any) -> bool:
    """What `loss` at a message says."""
    if value is None or isinstance(value, bool):
        return value is not False
    raise ValueError(f"`loss` is {value!r}; it is true or false")


def _blocks(content: Any, row: Row, waiting: list[Any]) -> Iterator[Block]:
    if isinstance(content, str):
        yield content
        return
    for index, block in enumerate(content):
        kind = block.get("type")
        if kind == "text" and isinstance(block.get("text"), str):
            yield block["text"]
        elif kind == "image_url":
            yield (resolve(block["image_url"]["url"], row.root, row.files),)
        elif kind == "image":
            picture = block.get("image")
            if picture is None and not waiting:
                raise ValueError(f"block {index} is a picture, and the `images` column has no more")
            yield (resolve(waiting.pop(0) if picture is None else picture, row.root, row.files),)
        else:
            raise ValueError(f"block {index} is {block!r:.120}; allowed are text, image and image_url blocks")


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(inner) for key, inner in value.items())
    if isinstance(value, list):
        return all(_is_plain(inner) for inner in value)
    return value is None or isinstance(value, str | int | float | bool)
