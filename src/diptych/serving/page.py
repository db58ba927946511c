"""The page at `/`: one HTML document made of three files, without anything from outside."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

from diptych.models.base import UnifiedModel

EXAMPLES = {  # prompts in the words that the packaged models know
    "storyboard": [
        "tell the story . in the middle a big red ball , in the meadow . first snow falls , then the ball turns purple .",
        "how do we build this ? on the left a small blue flower , in the middle a small blue house , at night .",
        "draw this . on the right a big orange tree , at the beach .",
    ]
}


class Page:
    """`html`: bytes. `headers`: nothing is loaded, run or styled but what the page itself holds, by the hashes of its parts."""

    def __init__(self, models: Mapping[str, UnifiedModel]) -> None:
        parts = {name: _read(name) for name in ("page.css", "page.js", "page.html")}
        style = resources.files("diptych.report").joinpath("style.css").read_text() + parts["page.css"]
        facts = json.dumps({"models": [_facts(name, model) for name, model in models.items()]})
        holes = {"style": style, "facts": facts.replace("<", "\\u003c"), "script": parts["page.js"]}  # no name ends its element
        self.html = re.sub(r"/\* (style|facts|script) \*/", lambda hole: holes[hole[1]], parts["page.html"]).encode()
        self.headers = {
            "Content-Security-Policy": (
                f"default-src 'none'; script-src '{_hash(parts['page.js'])}'; style-src '{_hash(style)}'; img-src data: blob:; "
                "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
            ),
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        }


def _read(name: str) -> str:
    return resources.files("diptych.serving").joinpath("assets", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _facts(name: str, model: UnifiedModel) -> dict[str, Any]:
    image, text = model.default_sampling.image, model.default_sampling.text
    return {
        "name": name, "examples": EXAMPLES.get(model.family, []), "guidance": image.guidance_scale, "temperature": text.temperature,
        "max_images": model.default_sampling.max_images, "size": model.image_spec.pixel_size,
    }  # fmt: skip
