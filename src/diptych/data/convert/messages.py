"""`messages`: the ecosystem's own form, in JSONL, JSON, parquet or WebDataset tar shards.

A row has `messages` (a list of {"role", "content"}), or TRL's `prompt` and `completion`, which are joined. Content is a string or a
list of blocks: {"type": "text", "text"}, {"type": "image", "image": path, data address or {"bytes", "path"}},
{"type": "image_url", "image_url": {"url": data address}}, and {"type": "image"} without a picture, which takes the next of the row's
`images` (or `image`) column. In a tar shard the row is the sample's `.json`, and a path may name another member of the sample.
`id`, `source`, `license` and other columns are kept; `loss` at an answer says whether it is trained.
"""

from __future__ import annotations

import datetime
import decimal
from collections.abc import Iterator
from typing import Any

from diptych.data.conversation import BLOCKS, NotARecord, answer_places, given_messages, kind_of, shown
from diptych.data.convert.pictures import resolve
from diptych.data.convert.raw_record import Block, Message, Options, RawRecord
from diptych.data.problems import Problems
from diptych.data.readers import Row, read_rows

USED = ("messages", "prompt", "completion", "images", "image", "id", "license")


def read(options: Options, problems: Problems) -> Iterator[RawRecord]:
    for row in read_rows(options.input, problems):
        id = id_of(row)
        try:
            if row.fault is not None:
                raise row.fault
            answer_places(given_messages(row.value))  # as it was given: a raw record has no words for what it refuses
            messages = messages_of(row)
        except ValueError as error:
            problems.report(row.where, getattr(error, "cause", "not a record"), error, id)
            continue
        license = row.value.get("license")
        yield RawRecord(id, row.where, messages, license=str(license) if license else None, columns=columns_of(row))


def id_of(row: Row) -> str:
    """Its own, or the sample's key, or its place."""
    given = next((row.value[key] for key in ("id", "__key__") if row.value.get(key) not in (None, "")), None)
    place = row.where.rsplit("/", 1)[-1].encode(errors="backslashreplace").decode()  # a file's name need not be text
    return str(given) if given is not None else place


def columns_of(row: Row) -> dict[str, Any]:
    """What reaches the rewards: columns that JSON can hold."""
    found = {key: plain(value) for key, value in row.value.items() if key not in USED}
    return {key: value for key, value in found.items() if value is not UNKNOWN}


def messages_of(row: Row) -> tuple[Message, ...]:
    """Raises ValueError for what is no conversation, blocks that are none, and pictures without a place."""
    value = row.value
    given = given_messages(value)
    columns = value.get("images") if value.get("images") is not None else ([value["image"]] if value.get("image") is not None else [])
    if not isinstance(columns, list):
        raise NotARecord(f"`images` is {kind_of(columns)}; a list of pictures is needed")
    waiting = list(columns)
    messages = tuple(
        Message(
            message["role"], tuple(_blocks(message["content"], row, waiting)), message.get("loss") is not False, bool(message.get("prefix"))
        )
        for message in given
    )  # fmt: skip
    if waiting and len(waiting) != len(columns):
        raise NotARecord(f"{len(columns)} pictures are given and {len(columns) - len(waiting)} places for them")
    if waiting:
        raise NotARecord(f"{len(columns)} pictures are given and no block says where they stand")
    return messages


def _blocks(content: Any, row: Row, waiting: list[Any]) -> Iterator[Block]:
    if isinstance(content, str):
        yield content
        return
    for index, block in enumerate(content):
        kind = block["type"]
        if kind == "text":
            yield block["text"]
        elif kind == "image_url":
            address = block.get("image_url")
            url = address.get("url") if isinstance(address, dict) else address
            if not isinstance(url, str):
                raise NotARecord(f'block {index} has no address; {{"type": "image_url", "image_url": {{"url": "data:image/..."}}}} has one')
            yield (resolve(url, row.root, row.files),)
        elif kind == "image":
            picture = block.get("image")
            if picture is None and not waiting:
                raise NotARecord(f"block {index} is a picture without `image`, and the `images` column has no more")
            yield (resolve(waiting.pop(0) if picture is None else picture, row.root, row.files),)
        else:
            raise NotARecord(f"block {index} is {shown(block)}; allowed are {BLOCKS}")


UNKNOWN = object()  # of a value that JSON has no words for, such as bytes


def plain(value: Any) -> Any:
    """A value as JSON has it: decimals as numbers, dates as text, maps as lists of pairs; UNKNOWN for what is none."""
    if isinstance(value, dict):
        inner = {key: plain(one) for key, one in value.items()}
        return UNKNOWN if any(one is UNKNOWN or not isinstance(key, str) for key, one in inner.items()) else inner
    if isinstance(value, list | tuple):
        items = [plain(one) for one in value]
        return UNKNOWN if any(one is UNKNOWN for one in items) else items
    if isinstance(value, decimal.Decimal):
        return int(value) if value.is_finite() and value == value.to_integral_value() else float(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return value if value is None or isinstance(value, str | int | float | bool) else UNKNOWN
