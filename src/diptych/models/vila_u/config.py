"""What a VILA-U checkpoint says about its vision side: `vision_tower/config.json` and the SigLIP architecture that it names.

Field names are those of the files. Unknown keys are ignored when read and written back when saved.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

VISION_FOLDER = "vision_tower"
SIGLIP_FOLDER = "siglip_config"

# A checkpoint names its SigLIP but does not describe it.
_KNOWN_SIGLIP: dict[str, dict[str, int]] = {
    "google/siglip-large-patch16-256": {
        "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
        "patch_size": 16, "image_size": 256,
    },
    "google/siglip-so400m-patch14-384": {
        "hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16, "intermediate_size": 4304,
        "patch_size": 14, "image_size": 384,
    },
}  # fmt: skip


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class DecoderConfig(_Part):
    """`ddconfig`: level i of the decoder has `ch * ch_mult[i]` channels; `resolution` is that of level 0."""

    ch: PositiveInt
    ch_mult: tuple[PositiveInt, ...] = Field(min_length=1)
    num_res_blocks: PositiveInt
    attn_resolutions: tuple[PositiveInt, ...]
    resolution: PositiveInt
    z_channels: PositiveInt
    out_ch: PositiveInt = 3


class CodecConfig(_Part):
    """`rqvaesiglip`: `embed_dim` C, `n_embed` K, `code_shape` (height, width, D)."""

    embed_dim: PositiveInt
    n_embed: PositiveInt
    latent_shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    code_shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    shared_codebook: bool
    ddconfig: DecoderConfig
    decoder_latent_shape: tuple[PositiveInt, PositiveInt] | None = None
    pretrained_model: str = "google/siglip-large-patch16-256"


class DepthBlockConfig(_Part):
    n_head: PositiveInt = 40  # the official default, for files that leave it out


class DepthHeadConfig(_Part):
    n_layer: PositiveInt
    block: DepthBlockConfig = DepthBlockConfig()


class DepthConfig(_Part):
    """`rqtransformer`: reads code vectors (`input_embed_dim_1`) and LLM states (`input_embed_dim_2`), `embed_dim` wide inside."""

    block_size: tuple[PositiveInt, PositiveInt, PositiveInt]
    input_embed_dim_1: PositiveInt
    input_embed_dim_2: PositiveInt
    embed_dim: PositiveInt
    vocab_size: PositiveInt
    head: DepthHeadConfig


class SiglipConfig(_Part):
    """The vision half of a SigLIP config. Hub files leave out what equals the defaults of transformers, repeated here."""

    hidden_size: PositiveInt = 768
    intermediate_size: PositiveInt = 3072
    num_hidden_layers: int = Field(default=12, ge=2)  # the last one is never run
    num_attention_heads: PositiveInt = 12
    num_channels: Literal[3] = 3
    image_size: PositiveInt = 224
    patch_size: PositiveInt = 16
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6


class _VisionFile(_Part):
    rqvaesiglip: CodecConfig
    rqtransformer: DepthConfig


PartT = TypeVar("PartT", bound=_Part)


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError naming the file that is missing or no JSON object."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; copy the whole checkpoint folder")
    try:
        raw = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}); check its permissions") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); copy it again") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a {type(raw).__name__}, not a JSON object; copy it again")
    return raw


def _parse(kind: type[PartT], raw: Any, source: str) -> PartT:
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}, given {str(e['input'])[:80]}" for e in error.errors())
        raise ValueError(f"{source} does not describe a VILA-U vision tower: {problems}. Compare it with the released file") from error


def _known_siglip(name: str, source: str) -> dict[str, int]:
    for known, fields in _KNOWN_SIGLIP.items():
        if name.rstrip("/").rpartition("/")[2] == known.rpartition("/")[2]:  # training machines often had a local copy
            return fields
    raise ValueError(
        f"{source}: rqvaesiglip.pretrained_model is {name!r}, whose architecture is not built in; known are {', '.join(_KNOWN_SIGLIP)}. "
        f"Put that SigLIP's config.json at {SIGLIP_FOLDER}/config.json beside {VISION_FOLDER}/"
    )


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower's parts; `raw` and `raw_siglip` are the files as found (`raw_siglip` None: the built-in table)."""

    codec: CodecConfig
    depth: DepthConfig
    siglip: SiglipConfig
    raw: dict[str, Any]
    raw_siglip: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        codec, depth, siglip = self.codec, self.depth, self.siglip
        side = siglip.image_size // siglip.patch_size
        pairs = [
            ("rqvaesiglip.latent_shape", codec.latent_shape, "SigLIP's grid and hidden_size", (side, side, siglip.hidden_size)),
            ("rqvaesiglip.code_shape[:2]", codec.code_shape[:2], "rqvaesiglip.latent_shape[:2]", codec.latent_shape[:2]),
            ("rqvaesiglip.embed_dim", codec.embed_dim, "SigLIP's hidden_size", siglip.hidden_size),
            ("rqtransformer.block_size", depth.block_size, "rqvaesiglip.code_shape", codec.code_shape),
            ("rqtransformer.vocab_size", depth.vocab_size, "rqvaesiglip.n_embed", codec.n_embed),
            ("rqtransformer.input_embed_dim_1", depth.input_embed_dim_1, "rqvaesiglip.embed_dim", codec.embed_dim),
            ("rqtransformer.embed_dim modulo n_head", depth.embed_dim % depth.head.block.n_head, "", 0),
            ("SigLIP's hidden_size modulo num_attention_heads", siglip.hidden_size % siglip.num_attention_heads, "", 0),
        ]
        for name, value, other, wanted in pairs:
            if value != wanted:
                raise ValueError(
                    f"the vision tower's config contradicts itself: {name} is {value} but must be {wanted}"
                    f"{f' like {other}' if other else ''}. Compare {VISION_FOLDER}/config.json with the released file"
                )

    @classmethod
    def from_dicts(cls, raw: dict[str, Any], siglip: dict[str, Any] | None = None, source: str = "config.json") -> VisionConfig:
        """From the contents of `vision_tower/config.json` and, optionally, of a SigLIP config (whole, or its vision half)."""
        parsed = _parse(_VisionFile, raw, source)
        fields = _known_siglip(parsed.rqvaesiglip.pretrained_model, source) if siglip is None else siglip.get("vision_config", siglip)
        return cls(parsed.rqvaesiglip, parsed.rqtransformer, _parse(SiglipConfig, fields, "the SigLIP config"), raw, siglip)

    @classmethod
    def load(cls, folder: Path, siglip: dict[str, Any] | None = None) -> VisionConfig:
        """Of a checkpoint folder. SigLIP: the argument, else `siglip_config/config.json`, else the built-in table.

        Raises ValueError naming the file and key that is missing or does not fit.
        """
        path, siglip_path = folder / VISION_FOLDER / "config.json", folder / SIGLIP_FOLDER / "config.json"
        raw = read_json(path)
        if siglip is None and siglip_path.is_file():
            siglip = read_json(siglip_path)
        return cls.from_dicts(raw, siglip, str(path))

    def save(self, folder: Path) -> None:
        """Writes the files as they were found; a SigLIP config given as an argument becomes `siglip_config/config.json`."""
        for name, raw in ((VISION_FOLDER, self.raw), (SIGLIP_FOLDER, self.raw_siglip)):
            if raw is not None:
                (folder / name).mkdir(parents=True, exist_ok=True)
                (folder / name / "config.json").write_text(json.dumps(raw, indent=2) + "\n")

    @property
    def codes_per_position(self) -> int:
        """D."""
        return self.codec.code_shape[2]

    @property
    def num_positions(self) -> int:
        return self.codec.code_shape[0] * self.codec.code_shape[1]

    @property
    def pixel_size(self) -> int:
        """Pixels a side that `encode` takes."""
        return self.siglip.image_size

    @property
    def decoded_size(self) -> int:
        """Pixels a side that `decode` gives."""
        return (self.codec.decoder_latent_shape or self.codec.latent_shape)[0] * 2 ** (len(self.codec.ddconfig.ch_mult) - 1)
