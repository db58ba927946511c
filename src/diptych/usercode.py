"""Code of a user's own, by its dotted path."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any


def load_named(path: str) -> Any:
    """What `package.module:name` names. The working directory is importable. Raises ValueError where there is nothing."""
    module, colon, name = path.partition(":")
    if not colon:
        raise ValueError(f"{path!r} names no code; give package.module:name")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot load {path!r}: {error}") from error
