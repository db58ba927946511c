"""What the image scorers share: options, captions, batches, memory, rescaling, and checkpoints that fail early.

A value is (raw - low) / (high - low). It is not clipped unless `clip` says so, so it may leave 0..1.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import math
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import PIL.Image
import torch
from pydantic import Field, model_validator
from torch import Tensor
from transformers.utils import logging as transformers_logging

from diptych.config import Config, build
from diptych.document import Image
from diptych.rewards.captions import AGAINST, Against, compared, no_values
from diptych.runtime import pick_device

logger = logging.getLogger(__name__)
Pair = tuple[str, PIL.Image.Image]  # a caption and its picture
Item = TypeVar("Item")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of OpenAI's CLIP, RGB in 0..1
WEIGHTS_AND_CONFIG = ("*.json", "*.txt", "*.safetensors")


class ScorerOptions(Config):
    """What a recipe may say about a scorer. Each scorer has its own defaults for the model and the range."""

    may_change: ClassVar[frozenset[str]] = frozenset({"device", "batch_size", "cache_size"})

    model: str = Field(min_length=1, description="a folder, or a hub id")
    revision: str | None = Field(None, description="of a hub id: branch, tag or commit")
    device: str = Field("auto", description="auto: the GPU where there is one")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="of the weights; the CPU takes float32 only")
    batch_size: int = Field(32, ge=1, description="pictures in one forward pass")
    cache_size: int = Field(4096, ge=0, description="results kept in memory")
    low: float = Field(0.0, description="the raw score that becomes 0")
    high: float = Field(1.0, description="the raw score that becomes 1")
    clip: bool = Field(False, description="values outside 0..1 become 0 or 1")

    @model_validator(mode="after")
    def _check(self) -> ScorerOptions:
        if not self.low < self.high:
            raise ValueError(f"low={self.low:g} must be below high={self.high:g}")
        if self.revision is not None and Path(self.model).exists():
            raise ValueError(f"revision={self.revision!r} has no effect on the local model {self.model!r}; leave it out")
        return self


@dataclasses.dataclass(frozen=True)
class Judged:
    """What the model said of one picture, for people. `against`: what it was compared with."""

    step: int
    raw: float
    against: str


class ImageScorer(ABC):
    """A scorer that is made once for a recipe's entry. Safe to call from several threads: one runs, the others wait.

    The model is loaded, and asked about one grey picture, when the scorer is made: what cannot work fails before anything is sampled.
    `listen`, if set, is called with every picture that was judged.
    """

    name: ClassVar[str]
    raw_range: ClassVar[str]  # what a raw score is, and its range
    options_class: ClassVar[type[ScorerOptions]]

    def __init__(self, **options: Any) -> None:
        """Raises ValueError for wrong options, and for a checkpoint that is missing, damaged or of another architecture."""
        self.options = build(self.options_class, options)
        self.device = pick_device(self.options.device)
        self.dtype = DTYPES[self.options.dtype]
        if self.device.type == "cpu" and self.dtype != torch.float32:
            raise ValueError(
                f"reward {self.name!r}: dtype={self.options.dtype} needs a GPU; on the CPU only float32 is exact enough to rank"
            )
        self.listen: Callable[[Judged], None] | None = None
        self.revision = self.options.revision  # of a hub id; the commit, once it is known
        self.num_truncated = 0  # captions that were cut to the model's length
        self._memory: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._not_finite = 0
        transformers_logging.set_verbosity_error()  # what it would warn of is an error here
        transformers_logging.disable_progress_bar()
        self.load()
        self._try()
        logger.info(self.about())

    def about(self) -> str:
        """One line: the model and its revision, where it runs, and what a raw score becomes."""
        given = self.options
        revision = f" at revision {self.revision}" if self.revision else ""
        clipped = ", clipped to 0..1" if given.clip else ""
        return (
            f"{self.name}: {given.model}{revision}, {given.dtype} on {self.device}; raw {self.raw_range}; "
            f"value (raw - {given.low:g}) / {given.high - given.low:g}{clipped}"
        )

    def checkpoint(self, patterns: Sequence[str] = WEIGHTS_AND_CONFIG) -> Path:
        """The folder of the model in the options. Of a hub id, the commit becomes the revision."""
        folder = checkpoint_folder(self.options.model, self.options.revision, patterns)
        if folder.parent.name == "snapshots":  # the hub's cache: models--org--name/snapshots/COMMIT
            self.revision = folder.name
        return folder

    @abstractmethod
    def load(self) -> None:
        """Loads the model onto `device`, in eval mode and without gradients."""

    @abstractmethod
    def probe(self, picture: PIL.Image.Image) -> Tensor:
        """Anything that the model computes from a picture."""

    @abstractmethod
    def __call__(self, prompts: list[list[dict[str, Any]]], completions: list[list[dict[str, Any]]], **_: Any) -> list[list[float | None]]:
        """One value for each picture that the scorer judges, NaN where the model gave none; None for every other step."""

    def take_faults(self) -> tuple[dict[str, int], str]:
        """Missing values by cause since the last time this was called, and what happened last."""
        with self._lock:
            count, self._not_finite = self._not_finite, 0
        return ({"not_finite": count}, "the model gave NaN or infinity") if count else ({}, "")

    def rescaled(self, raw: float) -> float:
        """(raw - low) / (high - low), clipped to 0..1 with `clip`; NaN, which is counted, where `raw` is not finite."""
        if not math.isfinite(raw):
            with self._lock:
                self._not_finite += 1
            return math.nan
        value = (raw - self.options.low) / (self.options.high - self.options.low)
        return min(max(value, 0.0), 1.0) if self.options.clip else value

    def remembered(self, keys: Sequence[Hashable], items: Sequence[Item], compute: Callable[[list[Item]], Tensor]) -> list[Tensor]:
        """`compute` of each item, (N, ...) -> N tensors on the CPU. Equal keys, now or lately, are computed once; at most
        `batch_size` items are computed together. What is not finite is not kept."""
        with self._lock, torch.no_grad():
            found = {key: self._memory[key] for key in keys if key in self._memory}
            new = {key: item for key, item in zip(keys, items, strict=True) if key not in found}
            for start in range(0, len(new), self.options.batch_size):
                some = list(itertools.islice(new.items(), start, start + self.options.batch_size))
                results = compute([item for _, item in some]).float().cpu()  # (N, ...)
                found.update({key: result.clone() for (key, _), result in zip(some, results, strict=True)})  # no view keeps the batch
            for key, result in found.items():
                if result.isfinite().all():
                    self._memory[key] = result
                    self._memory.move_to_end(key)
            while len(self._memory) > self.options.cache_size:
                self._memory.popitem(last=False)
            return [found[key] for key in keys]

    def token_ids(self, tokenizer: Any, captions: Sequence[str], limit: int) -> tuple[Tensor, Tensor]:
        """Ids and mask (N, T) on the device, T at most `limit`; longer captions are cut and counted, and the first time is logged."""
        lengths = [len(ids) for ids in tokenizer(list(captions))["input_ids"]]
        cut = sum(length > limit for length in lengths)
        if cut and not self.num_truncated:
            logger.warning(
                "reward %s: %d of %d captions are longer than its %d tokens (the longest has %d); what is beyond is not seen. "
                "This is logged once", self.name, cut, len(lengths), limit, max(lengths),
            )  # fmt: skip
        self.num_truncated += cut
        tokens = tokenizer(list(captions), padding=True, truncation=True, max_length=limit, return_tensors="pt")
        return tokens["input_ids"].to(self.device), tokens["attention_mask"].to(self.device)

    def _try(self) -> None:
        try:
            with torch.no_grad():
                result = self.probe(PIL.Image.new("RGB", (16, 16), "grey"))
        except Exception as error:
            raise ValueError(f"the checkpoint {self.options.model!r} does not work as {self.name}: {str(error)[:300]}") from error
        if not result.isfinite().all():
            raise ValueError(f"the checkpoint {self.options.model!r} gives NaN or infinity for a grey picture; its weights are damaged")


class CaptionOptions(ScorerOptions):
    against: Against = Field("text", description=AGAINST)


class CaptionScorer(ImageScorer):
    """A scorer of a picture against its caption (`rewards/captions.py`). None for texts, and for pictures without one.

    `load` sets `tokenizer` and `max_tokens`, those of a caption that are read.
    """

    options: CaptionOptions
    options_class: ClassVar[type[CaptionOptions]]
    tokenizer: Any
    max_tokens: int

    @abstractmethod
    def scores(self, pairs: list[Pair]) -> Tensor:
        """(N,) raw scores."""

    def probe(self, picture: PIL.Image.Image) -> Tensor:
        return self.scores([("a", picture)])

    def raw(self, pairs: Sequence[Pair]) -> list[float]:
        """The raw score of each pair, from memory where it is known."""
        keys = [(caption, picture_key(picture)) for caption, picture in pairs]
        return [float(score) for score in self.remembered(keys, pairs, self.scores)]

    def __call__(
        self, prompts: list[list[dict[str, Any]]], completions: list[list[dict[str, Any]]], **columns: Any
    ) -> list[list[float | None]]:
        pairs: list[Pair] = []
        at: list[tuple[int, int]] = []
        values = no_values(completions)
        for row, found in enumerate(compared(prompts, completions, self.options.against, **columns)):
            for step, caption, image in found:
                pairs.append((caption.strip(), pixels_of(image)))
                at.append((row, step))
        for (row, step), (caption, _picture), raw in zip(at, pairs, self.raw(pairs), strict=True):
            values[row][step] = self.rescaled(raw)
            if self.listen:
                self.listen(Judged(step, raw, self.caption_as_read(caption)))
        return values

    def caption_as_read(self, caption: str) -> str:
        """The caption in quotation marks, and how much of it the model reads."""
        count = len(self.tokenizer(caption)["input_ids"])
        read = f"cut: {self.max_tokens} of its {count} tokens are read" if count > self.max_tokens else f"all {count} tokens are read"
        return f"the caption {caption!r} ({read})"


def pixels_of(image: Image) -> PIL.Image.Image:
    assert image.pixels is not None  # messages hold pixels
    return image.pixels


def picture_key(picture: PIL.Image.Image) -> bytes:
    """SHA-256 of a picture's size and pixels."""
    return hashlib.sha256(f"{picture.mode} {picture.size} ".encode() + picture.tobytes()).digest()


def checkpoint_folder(source: str, revision: str | None = None, patterns: Sequence[str] = WEIGHTS_AND_CONFIG) -> Path:
    """A local folder, or the files of a hub id that match `patterns`. Raises ValueError where there is nothing."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ValueError(f"no checkpoint at {source!r}: there is no such folder. Give a folder, or a hub id such as org/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:
        raise ValueError(f"no folder {source!r}, and the hub did not give a model of that name: {str(error)[:200]}") from error


def load_exactly(cls: type[Any], folder: Path) -> Any:
    """A transformers model in float32, eval mode and without gradients. Raises ValueError unless every weight is there, fits, is used."""
    try:
        model, found = cls.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, local_files_only=True)
    except Exception as error:
        raise ValueError(f"cannot load {cls.__name__} from {folder}: {str(error)[:300]}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found.get(what):
            names = sorted(str(name) for name in found[what])
            raise ValueError(
                f"{folder} is not a checkpoint of {cls.__name__}: {len(names)} {what.replace('_', ' ')}, the first is {names[0]}"
            )
    return model.eval().requires_grad_(False)
