"""One document in, and what was sent to a judge out, for people: pictures as `<picture 512x512>`."""

from __future__ import annotations

from pathlib import Path

from diptych.data.conversation import refuse_surrogates
from diptych.document import Document, Text
from diptych.pictures import open_image
from diptych.rewards.judges.client import Answer, Question
from diptych.userfiles import read_json


def read_document(path: Path, prompt: str = "") -> tuple[Document, Document]:
    """Request and answer. The file holds message blocks of the answer, or messages, the last two of which are both. Paths of pictures are
    relative to the file.

    Raises ValueError naming the file where it holds neither.
    """
    try:
        blocks = read_json(path)
        refuse_surrogates(blocks)
        if isinstance(blocks, list) and len(blocks) > 1 and isinstance(blocks[0], dict) and "role" in blocks[0]:
            asked, answer = (Document.from_blocks(message["content"], path.parent) for message in blocks[-2:])
            return asked, answer
        if not isinstance(blocks, list) or not blocks:
            raise ValueError("a list of blocks is needed, at least one")
        return Document((Text(prompt),)), Document.from_blocks(blocks, path.parent)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--document {str(path)!r}: {error}; give a file as `diptych generate --out answer.json` writes it") from error


def sent(question: Question) -> str:
    """The texts and pictures of a question, one below the other."""
    lines = []
    for message in question.messages:
        for part in message["content"]:
            if part["type"] == "text":
                lines.append(part["text"])
            else:
                width, height = open_image(part["image_url"]["url"]).size
                lines.append(f"<picture {width}x{height}>")
    return "\n".join(lines)


def said(answer: Answer) -> str:
    """The reply, and why it is of no use where it is not."""
    reply = answer.reply if answer.reply is not None else "(nothing)"
    return reply if answer.cause is None else f"{reply}\n[{answer.cause}: {answer.detail}]"
