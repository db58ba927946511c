"""Diptych: post-train unified vision-language models until they write illustrated documents."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diptych.document import Document, Image, Text
    from diptych.models import UnifiedModel, load_model

__version__ = "0.1.0"
__all__ = ["Document", "Image", "Text", "UnifiedModel", "__version__", "load_model"]

# Imported when they are asked for: what needs no model, such as `diptych --help`, does not wait for torch.
_PLACES = {
    "Document": "diptych.document", "Image": "diptych.document", "Text": "diptych.document",
    "UnifiedModel": "diptych.models", "load_model": "diptych.models",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
