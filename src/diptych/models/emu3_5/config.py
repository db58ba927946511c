"""What an Emu3.5 checkpoint says of itself: `config.json` of the language model, that of its vision tokenizer, and `diptych.json`.

Field names are those of the files. Unknown keys are ignored when read and written back when saved.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError, model_validator

from diptych.models.options_file import OPTIONS_FILE, parse_options
from diptych.models.vila_u.config import DecoderConfig, read_json
from diptych.userfiles import load_yaml

VISION_JSON, VISION_YAML = "config.json", "config.yaml"
FIRST_GENERATION = 184_622  # rows of the vocabulary of Emu3, and what a config without `vocab_size` means
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
RELEASED_VISION: dict[str, Any] = {  # what the published checkpoint has; read from its own files where they are
    "ch": 256, "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 4, "attn_resolutions": [16], "resolution": 256, "z_channels": 256,
    "embed_dim": 256, "codebook_size": 131_072,
}  # fmt: skip
LONGEST_HEADER = 100_000_000  # bytes of a safetensors file, the format's own limit
Task = Literal["story", "howto", "explore", "vla", "t2i", "x2i"]
PartT = TypeVar("PartT", bound=BaseModel)


class Options(BaseModel):
    """What `diptych.json` beside the weights may hold.

    image_size: pixels a side of drawn pictures; or `grid`: their height and width in codes. task: what the prompt says the answer is.
    prompt_area: pixels to which pictures of prompts are scaled; None: the config's `image_area`.
    vision_tokenizer: a folder, from the weights' own if relative, or a hub id; for where it lies neither inside nor beside it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_size: PositiveInt = 720
    grid: tuple[PositiveInt, PositiveInt] | None = None
    task: Task = "story"
    prompt_area: PositiveInt | None = None
    vision_tokenizer: str | None = None


class LanguageConfig(BaseModel):
    """The language model's `config.json`, with the defaults of the release's code. Its `attention_dropout` is not read: the official
    model drops in training, a policy that is scored must not."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    vocab_size: PositiveInt = FIRST_GENERATION
    hidden_size: PositiveInt = 4096
    intermediate_size: PositiveInt = 14336
    num_hidden_layers: PositiveInt = 32
    num_attention_heads: PositiveInt = 32
    num_key_value_heads: PositiveInt = 8
    head_dim: PositiveInt = 128
    hidden_act: Literal["silu"] = "silu"
    max_position_embeddings: PositiveInt = 9216
    rms_norm_eps: PositiveFloat = 1e-5
    rope_theta: PositiveFloat = 1e6
    rope_scaling: None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    pad_token_id: int | None = 151_643
    bos_token_id: int | None = 151_849
    eos_token_id: int | None = 151_850
    image_area: PositiveInt = 518_400


class VisionConfig(DecoderConfig):
    """The vision tokenizer's; encoder and decoder have the same sizes."""

    codebook_size: PositiveInt
    embed_dim: PositiveInt
    in_channels: Literal[3] = 3
    out_ch: Literal[3] = 3
    double_z: Literal[False] = False
    cosine_similarity: Literal[False] = False

    @model_validator(mode="after")
    def _check(self) -> VisionConfig:
        if any(self.ch * factor % 32 for factor in self.ch_mult):
            raise ValueError("ch times ch_mult must be multiples of 32, the groups of the norms")
        return self

    @property
    def factor(self) -> int:
        """Pixels a side of one code."""
        return 2 ** (len(self.ch_mult) - 1)


def parsed(kind: type[PartT], raw: Any, source: Path, what: str) -> PartT:
    """Raises ValueError naming the file and its keys."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}, given {str(e['input'])[:80]}" for e in error.errors())
        raise ValueError(f"{source} {what}: {problems}. Compare it with the released file") from error


def read_options(folder: Path) -> Options:
    """Raises ValueError naming the file where it cannot be read, or holds anything else."""
    source = folder / OPTIONS_FILE
    try:
        content = source.read_bytes() if source.is_file() else None
    except OSError as error:
        raise ValueError(f"{source} cannot be read: {error}") from error
    return parse_options(Options, content, source)


def read_language_config(folder: Path) -> LanguageConfig:
    """Raises ValueError naming what the decoder here does not do."""
    return parsed(LanguageConfig, read_json(folder / "config.json"), folder / "config.json", "describes no Emu3.5 that can be loaded")


def stock_config(language: LanguageConfig) -> Any:
    """As transformers' class takes it: the decoder is Qwen3's in names and arithmetic."""
    from transformers import Qwen3Config

    fields = language.model_dump(exclude={"rope_theta", "rope_scaling", "image_area"})
    rope = {"rope_type": "default", "rope_theta": language.rope_theta}
    return Qwen3Config(**fields, rope_parameters=rope, attention_dropout=0.0, attention_bias=False)


def read_vision_config(folder: Path) -> VisionConfig:
    """From `config.json` of the hub's layout, else from `config.yaml`. Raises ValueError naming the file."""
    source = folder / VISION_JSON
    if source.is_file() or not (folder / VISION_YAML).is_file():
        raw = read_json(source)
    else:
        source = folder / VISION_YAML
        try:
            found = load_yaml(source.read_text(), str(source))
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{source} cannot be read ({error}); copy it again") from error
        inner = found.get("ddconfig") if isinstance(found, dict) else None
        if not isinstance(found, dict) or not isinstance(inner, dict):
            raise ValueError(f"{source} has no ddconfig; take config.yaml from BAAI/Emu3.5-VisionTokenizer")
        raw = {**found, **inner, "codebook_size": found.get("n_embed")}
    if (kind := raw.get("model_type", "Emu3p5VisionVQ")) != "Emu3p5VisionVQ":
        raise ValueError(f"{source} has model_type {kind!r}, not 'Emu3p5VisionVQ'; use BAAI/Emu3.5-VisionTokenizer")
    return parsed(VisionConfig, raw, source, "describes no IBQ tokenizer that can be loaded")


def weight_names(folder: Path) -> set[str]:
    """Of the language model, from the header or the index; empty where there is none to be read."""
    try:
        if not (folder / WEIGHTS).is_file():
            return set(json.loads((folder / INDEX).read_text())["weight_map"])
        with (folder / WEIGHTS).open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            return set(json.loads(file.read(min(length, LONGEST_HEADER)))) - {"__metadata__"}
    except (OSError, struct.error, ValueError, KeyError, TypeError):
        return set()


def check_names(names: Iterable[str], folder: Path) -> None:
    """Raises ValueError for a fine-tune with biases, for which neither the official code nor transformers' class here has a place."""
    biased = sorted(name for name in names if name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias", "o_proj.bias")))
    if biased:
        raise ValueError(
            f"{folder} holds {len(biased)} biases of attention (first: {biased[0]}), and Emu3.5 has none: it is another architecture "
            "under the same model_type (qkv_bias in its config.json) and cannot be loaded"
        )


def is_first_generation(folder: Path, raw: dict[str, Any]) -> bool:
    """Whether a folder with `model_type` "Emu3" is BAAI's own layout of Emu3, which Emu3.5 shares: by the size of the vocabulary, and by
    the norms of queries that only Emu3.5 has."""
    names = weight_names(folder)
    normed = any(name.endswith(".self_attn.q_norm.weight") for name in names)
    return raw.get("vocab_size", FIRST_GENERATION) == FIRST_GENERATION or bool(names and not normed)
