"""Documents in OpenAI's form: a chat completion, its stream, and generated images.

OpenAI's form has no place for a picture in an assistant's message, so (docs/how-to/serving.md):
- a whole answer's `message.content` is a list of parts, the same that a user's message has; under the form `text` it is a string;
- in a stream `delta.content` is always a string, and a picture comes as a chunk whose `delta.images` holds one `image_url` part
  with its number (`index`), by which clients that add chunks up know it from the one before.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import time
from collections.abc import Iterable
from typing import Any

import PIL.Image

from diptych.document import Document, Text
from diptych.forms import AnswerForm
from diptych.pictures import image_data_address
from diptych.serving.jobs import Finished, Job


@dataclasses.dataclass
class Usage:
    """Positions: of the prompt (once), and of the answers' texts and pictures."""

    prompt: int = 0
    texts: int = 0
    images: int = 0

    def add(self, finished: Finished) -> None:
        self.texts += finished.text_tokens
        self.images += finished.image_tokens

    def chat(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt, "completion_tokens": self.texts + self.images,
            "total_tokens": self.prompt + self.texts + self.images,
            "completion_tokens_details": {"text_tokens": self.texts, "image_tokens": self.images},
        }  # fmt: skip

    def pictures(self) -> dict[str, Any]:
        details = {"text_tokens": self.prompt, "image_tokens": 0}
        return {
            "input_tokens": self.prompt, "output_tokens": self.images, "total_tokens": self.prompt + self.images,
            "input_tokens_details": details,
        }  # fmt: skip


def picture_part(pixels: PIL.Image.Image) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": image_data_address(pixels)}}


def content_of(document: Document, form: AnswerForm | None) -> str | list[dict[str, Any]]:
    if form is AnswerForm.TEXT:
        return " ".join(segment.text for segment in document if isinstance(segment, Text))
    parts: list[dict[str, Any]] = []
    for segment in document:
        if isinstance(segment, Text):
            parts += [{"type": "text", "text": segment.text}] if segment.text else []
        else:
            assert segment.pixels is not None
            parts.append(picture_part(segment.pixels))
    return parts


def reason(finished: Finished) -> str:
    return "length" if finished.truncated else "stop"


class Completion:
    """What the parts of one answer have in common."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.id, self.created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())

    def whole(self, finished: Iterable[Finished], usage: Usage) -> dict[str, Any]:
        choices = [
            {
                "index": one.choice,
                "message": {"role": "assistant", "content": content_of(one.document, self.job.form), "refusal": None},
                "logprobs": None,
                "finish_reason": reason(one),
            }
            for one in sorted(finished, key=lambda one: one.choice)
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": usage.chat()}

    def chunk(self, choice: int, delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
        choices = [{"index": choice, "delta": delta, "logprobs": None, "finish_reason": finish_reason}]
        return event({**self._head("chat.completion.chunk"), "choices": choices})

    def usage_chunk(self, usage: Usage) -> bytes:
        return event({**self._head("chat.completion.chunk"), "choices": [], "usage": usage.chat()})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.job.model, "diptych": {"seed": self.job.seed}}


def images(job: Job, finished: Iterable[Finished], usage: Usage) -> dict[str, Any]:
    pictures = [one.document.images[0].pixels for one in sorted(finished, key=lambda one: one.choice)]
    assert all(pictures)
    sizes = {f"{pixels.width}x{pixels.height}" for pixels in pictures if pixels is not None}
    return {
        "created": int(time.time()),
        "data": [{"b64_json": image_data_address(pixels).partition(",")[2]} for pixels in pictures if pixels is not None],
        "output_format": "png", "size": sizes.pop(), "usage": usage.pictures(), "diptych": {"seed": job.seed},
    }  # fmt: skip


def packed(data: dict[str, Any]) -> bytes:
    """As JSON in ASCII, which holds no line end of any kind."""
    return json.dumps(data, separators=(",", ":")).encode()


def event(data: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + packed(data) + b"\n\n"


DONE = b"data: [DONE]\n\n"
