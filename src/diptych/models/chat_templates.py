"""The chat template that a checkpoint brings: in which file it stands, and whether it does what a template must."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from diptych.models.control_tokens import NO_CHARACTERS

TEMPLATE_FILES, MORE_TEMPLATES = ("chat_template.jinja", "chat_template.json"), "additional_chat_templates"


def decoded(path: Path, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start + 1}: {error.reason}); copy it again") from error


def check_template_files(folder: Path) -> None:
    """Raises ValueError naming the file, which transformers would not, where a template cannot be read."""
    for path in (folder / TEMPLATE_FILES[0], *sorted(folder.glob(f"{MORE_TEMPLATES}/*.jinja"))):
        if path.is_file():
            decoded(path, path.read_bytes())
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        template_in_json(settings, settings.read_bytes())


def template_in_json(path: Path, content: bytes) -> str | dict[str, str] | None:
    """What stands at "chat_template": one template, or several by their names."""
    try:
        found = json.loads(decoded(path, content)).get("chat_template")
        return {entry["name"]: entry["template"] for entry in found} if isinstance(found, list) else found
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the chat template in {path} cannot be read ({type(error).__name__}: {error}); it must be JSON with a string at "
            "'chat_template', or a list of objects with a 'name' and a 'template'"
        ) from error


def chat_template(folder: Path, files: dict[str, bytes], tokenizer: Any) -> str | None:
    """The checkpoint's own template, from whichever place it is kept in; "default" where there are several.

    Raises ValueError naming the file where it is broken, or where none is "default".
    """
    jinja, legacy = TEMPLATE_FILES
    source, found = folder / "tokenizer_config.json", tokenizer.chat_template
    if jinja in files:
        source, found = folder / jinja, decoded(folder / jinja, files[jinja])
    elif legacy in files:
        source, found = folder / legacy, template_in_json(folder / legacy, files[legacy])
        if found is None:
            raise ValueError(f"{source} has no 'chat_template'; copy it again, or delete it")
    if isinstance(found, dict):
        if "default" not in found:
            raise ValueError(
                f"the tokenizer files in {folder} hold the chat templates {', '.join(sorted(found))}, and none is 'default'; give the one "
                f"to be used that name, or put it into {jinja}"
            )
        found = found["default"]
    if found is None:
        return None
    known = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token, **getattr(tokenizer, "special_tokens_map", {})}
    text = chr(NO_CHARACTERS[0])  # written in any other way than as itself, it is lost
    message = {"role": "user", "content": [{"type": "text", "text": text}]}
    try:
        rendered: Any = render_jinja_template(conversations=[[message]], chat_template=found, add_generation_prompt=True, **known)
    except Exception as error:  # a template is a program of the checkpoint's: it may fail in any way
        raise ValueError(
            f"the chat template in {source} fails for a message of one text block ({type(error).__name__}: {error}); copy it again"
        ) from error
    if text not in rendered[0][0]:
        raise ValueError(
            f"the chat template in {source} does not write the text of a message of blocks, {message['content']}; a template must do so"
        )
    return found
