"""Data sets of the Hugging Face hub, `hf://datasets/ORG/NAME@COMMIT/PATTERN`: fetched into the hub's own cache, then read from there."""

from __future__ import annotations

import re
from pathlib import Path

PREFIX = "hf://"
FORM = "hf://datasets/ORG/NAME@COMMIT/PATTERN"
_ADDRESS = re.compile(r"hf://datasets/(?P<repository>[\w-][\w.-]*/[\w.-]+)@(?P<commit>[0-9a-f]{40})/(?P<pattern>[^/].*)")


def fetch(address: str) -> list[Path]:
    """Where the files and folders are now that the address names (a path, or a pattern such as `data/train-*.parquet`), by name.

    The commit is asked for because a branch may move between the start of a training and its resumption. What is in the cache is not
    fetched again, and without a network (HF_HUB_OFFLINE=1) the cache is all there is. Raises ValueError for another form of address, for
    what the hub does not give, and where nothing matches.
    """
    found = _ADDRESS.fullmatch(address)
    if found is None:
        raise ValueError(
            f"data set {address!r}: the form is {FORM}, COMMIT being the 40 digits that the repository's history shows, "
            "for instance hf://datasets/org/name@0123456789abcdef0123456789abcdef01234567/data/train-*.parquet"
        )
    from huggingface_hub import snapshot_download

    pattern = found["pattern"].rstrip("/")
    try:
        folder = snapshot_download(
            found["repository"], repo_type="dataset", revision=found["commit"], allow_patterns=[pattern, f"{pattern}/*"]
        )
    except Exception as error:
        raise ValueError(f"the hub did not give {address!r}: {str(error)[:200]}") from error
    matched = sorted(Path(folder).glob(pattern))
    if not matched:
        raise ValueError(f"data set {address!r}: no file of the repository matches {pattern!r}")
    return matched
