"""What a record is, and the one rule of what its messages may look like: conversion, inspection and training all ask here."""

from __future__ import annotations

import dataclasses
import decimal
import json
from collections.abc import Iterator
from typing import Any

from diptych.document import NOTHING, Document, valid_text
from diptych.forms import AnswerForm

FORMS = '{"role": "user" or "assistant", "content": a string or a list of blocks}'
BLOCKS = 'text, image and image_url blocks such as {"type": "text", "text": "..."}'


class NotARecord(ValueError):
    """`cause`: a few fixed words that can be counted."""

    def __init__(self, detail: str, cause: str = "not a record") -> None:
        super().__init__(detail)
        self.cause = cause


@dataclasses.dataclass(frozen=True)
class Record:
    """`columns` reach the rewards; `source` says which data set the record came from, `license` under what terms, `where` file and line.

    `answer` is what comes behind the `given` beginning of an answer; `form`: of that answer, None where nothing is said of it.
    """

    prompt: Document
    answer: Document | None
    source: str
    columns: dict[str, Any]
    id: str = ""
    license: str = ""
    where: str = ""
    form: AnswerForm | None = None
    given: Document = NOTHING

    @property
    def is_drawing(self) -> bool:
        """Whether the answer is one bare picture, so that caption dropout makes sense."""
        return self.answer is not None and len(self.answer) == len(self.answer.images) == 1 and not len(self.given)

    @property
    def name(self) -> str:
        """For people: its place and its id."""
        own = self.id if self.id and not self.where.endswith(self.id) else ""
        return f"{self.where or self.source}{f' (id {own})' if own else ''}"


def given_messages(value: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation of a row, before its pictures are put in their places: `messages`, or TRL's `prompt` and `completion`.

    Each message is an object with a role and a content (a string, or a list of objects that each have a type); a column that is null is
    one that is not there. Raises NotARecord saying what was expected and what was found.
    """
    if value.get("messages") is not None:
        return _checked(value["messages"], "`messages`")
    if value.get("prompt") is not None:
        answer = [] if value.get("completion") is None else _turns(value["completion"], "assistant", "`completion`")
        return [*_turns(value["prompt"], "user", "`prompt`"), *answer]
    hint = (
        " (`conversations` with from and value is another form: name them messages, role and content)" if "conversations" in value else ""
    )
    has = ", ".join(f"{key!r:.40}" for key, one in value.items() if one is not None) or "nothing"
    raise NotARecord(f"it has {has}; `messages`, or `prompt` and `completion`, are needed{hint}")


def _turns(value: Any, role: str, name: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": value}] if isinstance(value, str) else _checked(value, name)


def _checked(messages: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(messages, list):
        hint = "; it looks like JSON that was written as a string" if isinstance(messages, str) and messages[:1] in "[{" else ""
        raise NotARecord(f"{name} is {kind_of(messages)}; a list of messages is needed, each {FORMS}{hint}")
    if not messages:
        raise NotARecord(f"{name} is an empty list; at least one message is needed, each {FORMS}")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise NotARecord(f"message {number} of {name} is {kind_of(message)}; each is {FORMS}")
        if not isinstance(message.get("role"), str):
            raise NotARecord(f"the role of message {number} is {kind_of(message.get('role'))}; it is user, assistant or system")
        content = message.get("content")
        if not isinstance(content, str | list):
            raise NotARecord(f"the content of message {number} is {kind_of(content)}; it is a string or a list of blocks")
        for index, block in enumerate(content if isinstance(content, list) else ()):
            if not isinstance(block, dict) or not isinstance(block.get("type"), str):
                raise NotARecord(f"block {index} of message {number} is {shown(block)}; allowed are {BLOCKS}")
            if block["type"] == "text" and not isinstance(block.get("text"), str):
                raise NotARecord(f"block {index} of message {number} has a text that is {kind_of(block.get('text'))}; it is a string")
    return messages


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "missing, or null"
    if isinstance(value, bool):
        return "true" if value else "false"
    words = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return f"{words.get(type(value), type(value).__name__)} ({shown(value)})"


def shown(value: Any) -> str:
    """The beginning of a JSON value."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def answer_places(messages: list[dict[str, Any]]) -> list[int]:
    """Where the answers stand that are trained; for a prompt without answer, where one would stand. What says `prefix` before it is its
    beginning, which is given.

    Raises NotARecord where the messages are no conversation, or one of them is empty: one of a user or an assistant holds a picture or a
    text of more than spaces, and in an answer with pictures every text does. (An empty system message is as none.)
    """
    _check_prefixes(messages)
    roles = [message["role"] for message in messages if not message.get("prefix")]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(turns)):
        raise NotARecord(
            f"roles are {roles}; allowed are ['user'], ['user', 'assistant'], and more turns of the two, with 'system' before them"
        )
    for number, message in enumerate(messages, start=1):
        if not is_loss(message.get("loss")) or (message.get("loss") is not None and message["role"] != "assistant"):
            raise NotARecord(f"`loss` is {message['loss']!r} at a {message['role']} message; it is true or false, and at answers only")
        _refuse_empty(message, number)
    if roles[-1] == "user":
        return [len(messages)]
    spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant" and not message.get("prefix")]
    places = [i for i in spoken if messages[i].get("loss") is not False]
    if not places:
        raise NotARecord("no answer is trained: each says `loss`: false; leave out the last answer to make it a prompt")
    return places


def _check_prefixes(messages: list[dict[str, Any]]) -> None:
    for place, message in enumerate(messages):
        given, after = message.get("prefix"), messages[place + 1 : place + 2]
        if given is None or given is False:
            continue
        before = messages[place - 1]["role"] if place else "nothing"
        if given is not True or message["role"] != "assistant" or message.get("loss") is not None:
            raise NotARecord(f"`prefix` is {given!r} at a {message['role']} message; it is true or false, at answers, and beside no `loss`")
        if before != "user" or any(next["role"] != "assistant" or next.get("prefix") for next in after):
            raise NotARecord(
                f"message {place + 1} is the beginning of an answer (`prefix`) behind {before}; it stands behind a user message, and "
                "before the assistant message that goes on, or last"
            )


def is_loss(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _refuse_empty(message: dict[str, Any], number: int) -> None:
    content, role = message["content"], message["role"]
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    is_text = [block["type"] == "text" for block in blocks]
    empty = [textual and not block["text"].strip() for textual, block in zip(is_text, blocks, strict=True)]
    if all(empty) and role != "system":
        raise NotARecord(f"message {number} ({role}) is empty; a picture, or a text of more than spaces, is needed", "empty message")
    if role == "assistant" and not all(is_text) and any(empty):
        raise NotARecord(f"block {empty.index(True)} of message {number} is an empty text beside pictures; leave it out", "empty step")


def check_known_columns(value: dict[str, Any]) -> dict[str, Any]:
    """`num_images` as a whole number, `ends_with_text` as true or false and `answer_form` as one of the forms, of those that are there;
    NaN is how pandas writes null.

    Raises NotARecord for anything else.
    """
    found: dict[str, Any] = {}
    for name in ("num_images", "ends_with_text", "answer_form"):
        given = value.get(name)
        if given is None or given != given:
            found |= {name: None} if name in value else {}
            continue
        is_number = isinstance(given, int | float | decimal.Decimal) and not isinstance(given, bool)
        if name == "num_images" and is_number and given >= 0 and given == given // 1:
            found[name] = int(given)
        elif name == "ends_with_text" and isinstance(given, bool):
            found[name] = given
        elif name == "answer_form" and given in list(AnswerForm):
            found[name] = AnswerForm(given)
        else:
            forms = f"one of {', '.join(AnswerForm)}"
            wanted = {"num_images": "a whole number from 0", "ends_with_text": "true or false", "answer_form": forms}
            raise NotARecord(f"`{name}` is {kind_of(given)}; it is {wanted[name]}, or null")
    return found


def refuse_surrogates(value: Any) -> None:
    """Raises NotARecord where a text at any depth of a JSON value, or a key, is no valid Unicode."""
    for text in _texts(value):
        try:
            valid_text(text)
        except ValueError as error:
            raise NotARecord(str(error), "broken text") from None


def _texts(value: Any) -> Iterator[str]:
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict):
            waiting += [*one.keys(), *one.values()]
        elif isinstance(one, list):
            waiting += one
