"""Codes of pictures on disk, so that a picture that is used many times is encoded once: FOLDER/TOKENIZER/ab/ab12....npy

A code file is found by what decides about its content: a hash of the prepared pixels, below a hash of the image tokenizer. So a folder
can serve several models and trainings at once, and nothing in it is ever wrong, only unused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diptych.document import Document
from diptych.models.base import UnifiedModel
from diptych.runs import is_disk_full
from diptych.tokens import TokenRow


class CodeCache:
    def __init__(self, folder: Path, model: UnifiedModel) -> None:
        """`model` on the device on which it will encode."""
        spec = model.image_spec
        self.shape = (spec.num_positions, spec.depth)
        self.folder = folder / tokenizer_hash(model)

    def __call__(self, pixels: Tensor, encode: Callable[[], Tensor]) -> Tensor:
        """(num_positions, D) int64 of a picture as `encode_images` takes it, (3, S, S); `encode` is asked where they are not known yet."""
        path = self._path(pixels)
        found = self._read(path)
        if found is None:
            found = encode()
            self._write(path, found.numpy().astype(np.int32))
        return found

    def known(self, pixels: Tensor) -> Tensor | None:
        """The codes, where they are known."""
        return self._read(self._path(pixels))

    def _path(self, pixels: Tensor) -> Path:
        name = _hash(pixels)
        return self.folder / name[:2] / f"{name}.npy"

    def _read(self, path: Path) -> Tensor | None:
        with contextlib.suppress(OSError, ValueError, EOFError):  # not there, or cut off when the machine stopped: encoded again
            found = np.load(path, allow_pickle=False)
            if found.shape == self.shape:
                return torch.from_numpy(found.astype(np.int64))
        return None

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


class RecentCodes:
    """Stands in the place of a model's `code_cache`: the codes of the last `size` pictures, in memory. For models that are shown the same
    few pictures many times in a row."""

    def __init__(self, size: int = 256) -> None:
        self.size = size
        self._codes: dict[str, Tensor] = {}  # the newest last

    def __call__(self, pixels: Tensor, encode: Callable[[], Tensor]) -> Tensor:
        name = _hash(pixels)
        codes = self._codes.pop(name) if name in self._codes else encode()
        self._codes[name] = codes
        if len(self._codes) > self.size:
            del self._codes[next(iter(self._codes))]
        return codes


# --- in other threads ----------------------------------------------------------------------------------------------------

_thread = threading.local()  # `noted`: pictures whose codes this thread leaves out


class Deferred:
    """Stands in the place of a model's `code_cache`, so that rows can be made in threads that leave the device alone (`in_two_parts`)."""

    def __init__(self, cache: CodeCache | None, shape: tuple[int, int]) -> None:
        self.cache, self.shape = cache, shape

    def __call__(self, pixels: Tensor, encode: Callable[[], Tensor]) -> Tensor:
        """The codes; where they are not known, in a thread that notes pictures, -1, -2, ... at their positions."""
        noted: list[Tensor] | None = getattr(_thread, "noted", None)
        if noted is None:
            return encode() if self.cache is None else self.cache(pixels, encode)
        found = None if self.cache is None else self.cache.known(pixels)
        if found is None:
            count, depth = self.shape
            found = (-1 - len(noted) * count - torch.arange(count))[:, None].expand(count, depth)  # (num_positions, D)
            noted.append(pixels)
        return found


def defer_codes(model: UnifiedModel) -> None:
    """Lets `in_two_parts` leave codes out, from now on."""
    if not isinstance(model.code_cache, Deferred):
        assert model.code_cache is None or isinstance(model.code_cache, CodeCache)
        model.code_cache = Deferred(model.code_cache, (model.image_spec.num_positions, model.image_spec.depth))


def in_two_parts(model: UnifiedModel, prompt: Document, make: Callable[[], TokenRow]) -> Callable[[], TokenRow]:
    """What `make` gives, in two parts: all that needs no device now, and the codes of pictures in the function that is given back.

    `prompt`: of the record that `make` encodes. All of it is done in the second part for families that find codes of a prompt's pictures
    in a way of their own, and in the first where nobody called `defer_codes`.
    """
    if not isinstance(model.code_cache, Deferred):
        row = make()
        return lambda: row
    own_way = type(model).prompt_image_row is not UnifiedModel.prompt_image_row
    if own_way and type(model).prompt_image_embeds is UnifiedModel.prompt_image_embeds and prompt.images:
        return make
    _thread.noted = noted = list[Tensor]()
    try:
        row = make()
    finally:
        del _thread.noted
    return lambda: _with_codes(model, row, noted)


def _with_codes(model: UnifiedModel, row: TokenRow, noted: list[Tensor]) -> TokenRow:
    if not noted:
        return row
    known = torch.cat([model.codes_of(pixels) for pixels in noted])  # (P * num_positions, D)
    missing, codes = row.codes[:, 0] < 0, row.codes.clone()
    codes[missing] = known[-1 - codes[missing, 0]]
    return dataclasses.replace(row, codes=codes)


# --- names of folders ----------------------------------------------------------------------------------------------------


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
