"""`diptych.json` beside the weights: what a family lets its user choose."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

OPTIONS_FILE = "diptych.json"
OptionsT = TypeVar("OptionsT", bound=BaseModel)


def parse_options(kind: type[OptionsT], content: bytes | None, source: Path) -> OptionsT:
    """None: there is no such file. Raises ValueError naming it where it holds anything else than the family knows."""
    try:
        return kind() if content is None else kind.model_validate_json(content)
    except ValidationError as error:
        said = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError(f"{source} may hold {', '.join(kind.model_fields)} only: {said}") from error
