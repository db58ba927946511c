"""A fixed share of a data set, chosen by id: the same ids on every machine, in any order, in as many runs as it takes."""

from __future__ import annotations

import hashlib


def is_sampled(id: str, share: float, seed: int) -> bool:
    """Whether `id` belongs to the share. A larger share of the same seed holds all of a smaller one."""
    if share >= 1:
        return True
    digest = hashlib.blake2b(f"{seed}:{id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64
