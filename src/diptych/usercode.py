"""Code of a user's own, by its dotted path."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any


def load_named(path: str, what: str = "") -> Any:
    """What `package.module:name` names; `what` it is, for people. The working directory is importable.

    Raises ValueError where there is nothing.
    """
    module, _, name = path.partition(":")
    if not module or module.startswith(".") or not name:
        raise ValueError(f"{path!r} names no code; give package.module:name")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # the module runs while it is imported, and may fail in any way
        reason = str(error) if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"cannot load {what}{' ' if what else ''}{path!r}: {reason}") from error
