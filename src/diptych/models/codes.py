"""Codes of pictures on disk, so that a picture that is used many times is encoded once: FOLDER/TOKENIZER/ab/ab12....npy

A code file is found by what decides about its content: a hash of the prepared pixels, below a hash of the image tokenizer. So a folder
can serve several models and trainings at once, and nothing in it is ever wrong, only unused.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diptych.models.base import UnifiedModel
from diptych.runs import is_disk_full


class CodeCache:
    def __init__(self, folder: Path, model: UnifiedModel) -> None:
        """`model` on the device on which it will encode."""
        spec = model.image_spec
        self.shape = (spec.num_positions, spec.depth)
        self.folder = folder / tokenizer_hash(model)

    def __call__(self, pixels: Tensor, encode: Callable[[], Tensor]) -> Tensor:
        """(num_positions, D) int64 of a picture as `encode_images` takes it, (3, S, S); `encode` is asked where they are not known yet."""
        name = _hash(pixels)
        path = self.folder / name[:2] / f"{name}.npy"
        with contextlib.suppress(OSError, ValueError, EOFError):  # not there, or cut off when the machine stopped: encoded again
            found = np.load(path, allow_pickle=False)
            if found.shape == self.shape:
                return torch.from_numpy(found.astype(np.int64))
        made = encode()
        self._write(path, made.numpy().astype(np.int32))
        return made

    def _write(self, path: Path, codes: np.ndarray) -> None:
        """By a rename, so that other processes see all of a file or nothing."""
        temporary = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".tmp-", delete=False) as stream:
                temporary = stream.name
                np.save(stream, codes)
            os.replace(temporary, path)
        except OSError as error:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)
            hint = "no space left" if is_disk_full(error) else str(error)
            raise ValueError(f"cannot write to code_cache {self.folder}: {hint}. Give another folder, or leave code_cache out") from error


def tokenizer_hash(model: UnifiedModel) -> str:
    """Of all that decides what codes a picture gets: the frozen weights, their type, the device's type, and the layout of the codes.

    Raises ValueError for a model without a frozen image tokenizer, whose codes would change as it is trained.
    """
    modules = model.frozen_modules()
    if not modules:
        raise ValueError(f"code_cache is given, and the image tokenizer of {model.family} is not frozen; leave code_cache out")
    spec = model.image_spec
    layout = (type(model).__name__, spec.num_positions, spec.depth, spec.pixel_size, model.device.type)
    digest = hashlib.blake2b(repr(layout).encode(), digest_size=16)
    for number, module in enumerate(modules):
        for name, tensor in module.state_dict().items():
            digest.update(f"{number}.{name}:{_hash(tensor)}\n".encode())
    return digest.hexdigest()


def _hash(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(flat.numpy().tobytes(), digest_size=16, person=_kind(tensor)).hexdigest()


def _kind(tensor: Tensor) -> bytes:
    """Type and shape, which the bytes do not tell, in 16 bytes."""
    return hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=16).digest()
