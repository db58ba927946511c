"""What a reward function is given. It is what TRL gives, so that TRL's own functions run unchanged: messages, the data set's
columns, and the keywords `completion_ids`, `trainer_state`, `log_extra` and `log_metric` for functions that take them. One keyword is ours:
`completion_documents`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

from diptych.document import Document, Text, to_message

IMAGE_MARK = "<image>"  # stands for a picture where a function sees text alone
OWN_METRICS = ("mean", "std", "missing")  # of every reward
Message = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a training stands, under the names of TRL's `trainer_state`: steps that are done, and all of them."""

    global_step: int
    max_steps: int


@dataclasses.dataclass(frozen=True)
class Context:
    """What a training knows of B sampled documents beside their content.

    `completion_ids`: for each, the positions that the policy chose: ids of text tokens, and -1 for each position of a picture.
    """

    progress: Progress
    completion_ids: list[list[int]]


@dataclasses.dataclass
class Notes:
    """What one call of a function logged about B documents."""

    num_documents: int
    metrics: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    extras: dict[str, list[Any]] = dataclasses.field(default_factory=dict)

    def log_metric(self, name: str, value: float) -> None:
        """A number of this step; the mean where it is given several times. Raises ValueError for names that every reward has."""
        if name in OWN_METRICS:
            raise ValueError(f"log_metric({name!r}): every reward logs {', '.join(OWN_METRICS)} itself; choose another name")
        self.metrics.setdefault(name, []).append(float(value))

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """A value for each document, kept with the saved samples. Raises ValueError for another number of values."""
        values = list(values)
        if len(values) != self.num_documents:
            raise ValueError(f"log_extra({column!r}) got {len(values)} values for {self.num_documents} documents")
        self.extras[column] = values


def conversation(role: Literal["user", "assistant"], document: Document, content: Literal["blocks", "text"]) -> list[Message]:
    """A document as one message: text and image blocks, or (what TRL's functions read) one string with a mark for each picture."""
    if content == "blocks":
        return [to_message(role, document)]
    words = [segment.text if isinstance(segment, Text) else IMAGE_MARK for segment in document]
    return [{"role": role, "content": " ".join(words)}]


def keywords(function: Callable[..., Any], context: Context | None, notes: Notes, completions: Sequence[Document]) -> dict[str, Any]:
    """TRL's keywords that the function takes; outside a training there are no ids and no state. And, for a function that names it,
    `completion_documents`: the answers as documents, whose pictures have the codes that were sampled beside their pixels."""
    offered: dict[str, Any] = {"log_extra": notes.log_extra, "log_metric": notes.log_metric}
    if context is not None:
        offered |= {"completion_ids": context.completion_ids, "trainer_state": context.progress}
    parameters = inspect.signature(function).parameters.values()
    named = {parameter.name for parameter in parameters}
    documents = {"completion_documents": list(completions)} if "completion_documents" in named else {}
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return offered | documents
    return {name: value for name, value in offered.items() if name in named} | documents
