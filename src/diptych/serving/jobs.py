"""A request between the loop that talks to its client and the thread that writes its documents."""

from __future__ import annotations

import asyncio
import dataclasses
import time

import PIL.Image

from diptych.config import SamplingParams
from diptych.document import Document
from diptych.forms import AnswerForm
from diptych.serving.errors import APIError


@dataclasses.dataclass(frozen=True)
class Accepted:
    """Writing begins. `prompt_tokens`: positions of the prompt."""

    prompt_tokens: int


@dataclasses.dataclass(frozen=True)
class Words:
    """The next characters of a text."""

    choice: int
    text: str


@dataclasses.dataclass(frozen=True)
class Picture:
    choice: int
    pixels: PIL.Image.Image


@dataclasses.dataclass(frozen=True)
class Finished:
    """A document is written. `truncated`: a text of it was cut. Tokens are positions of the answer: of texts, and of pictures."""

    choice: int
    document: Document
    truncated: bool
    text_tokens: int
    image_tokens: int


@dataclasses.dataclass(frozen=True)
class Failed:
    error: APIError


@dataclasses.dataclass(frozen=True)
class Gone:
    """The client left."""


Event = Accepted | Words | Picture | Finished | Failed | Gone


@dataclasses.dataclass(eq=False)
class Job:
    """One request. Events reach `events` in the loop that it was made in; the last is `Failed`, or the `Finished` of the last choice.

    params: with the sampling settings of the request, and the model's own where it names none. max_images: None: as many as fit.
    max_tokens: text tokens of a document. streams: whether words are wanted as they come.
    """

    model: str
    prompt: Document
    form: AnswerForm | None
    params: SamplingParams
    max_images: int | None
    max_tokens: int | None
    count: int
    seed: int
    streams: bool
    events: asyncio.Queue[Event] = dataclasses.field(default_factory=asyncio.Queue)
    loop: asyncio.AbstractEventLoop = dataclasses.field(default_factory=asyncio.get_running_loop)
    arrived: float = dataclasses.field(default_factory=time.monotonic)
    gone: bool = False  # its client left: nothing is written for it any more
    first_text: float | None = None  # seconds from arrival
    first_picture: float | None = None
