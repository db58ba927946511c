"""VILA-U's vision tower (SigLIP, quantizer, pixel decoder, depth transformer) and the projector into the LLM, with their files.

A state-dict key of `VisionTower` is the release's key. Tensors of the release that are never used (SigLIP's text tower and
last vision layer, the codebooks' EMA statistics) are kept on the CPU as they were, to be saved again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SiglipVisionConfig, SiglipVisionModel

from diptych.models.vila_u.config import VISION_FOLDER, CodecConfig, SiglipConfig, VisionConfig, read_json
from diptych.models.vila_u.decoder import PixelDecoder
from diptych.models.vila_u.depth import DepthTransformer
from diptych.models.vila_u.quantizer import ResidualQuantizer

PROJECTOR_FOLDER = "mm_projector"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_CODEBOOKS = "rqvaesiglip.quantizer.codebooks."


# --- files -----------------------------------------------------------------------------------------------------------
def read_tensors(folder: Path) -> Iterator[tuple[Path, str, Tensor]]:
    """File, key and CPU tensor of `model.safetensors`, or of the shards that its index names; one file open at a time.

    Raises ValueError naming the file that is missing or damaged.
    """
    paths = [folder / _WEIGHTS]
    if not paths[0].is_file() and (folder / _INDEX).is_file():
        weight_map = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{folder / _INDEX} has no weight_map; copy it again")
        paths = [folder / name for name in sorted(set(weight_map.values()))]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path} is missing; copy the whole checkpoint folder")
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - not a dict
                    yield path, key, file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged or truncated ({error}); copy it again") from error


def write_tensors(tensors: dict[str, Tensor], folder: Path) -> None:
    """`model.safetensors`, in one move: an interrupted save loses nothing, and tensors mapped to the old file stay whole."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{_WEIGHTS}.unfinished"
    save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, unfinished, metadata={"format": "pt"})
    unfinished.replace(folder / _WEIGHTS)


def fill_module(
    module: nn.Module, tensors: Iterable[tuple[Path, str, Tensor]], dtype: torch.dtype, device: torch.device | str
) -> dict[str, Tensor]:
    """Puts tensors in the place of the module's (possibly meta) ones, one by one; returns those it has no place for.

    Codebooks stay float32. Raises ValueError for a tensor that is misshapen or missing.
    """
    wanted = {key: tensor.shape for key, tensor in module.state_dict().items()}
    others: dict[str, Tensor] = {}
    path = Path()
    for path, key, tensor in tensors:
        if key not in wanted:
            others[key] = tensor
            continue
        shape = wanted.pop(key)
        if tensor.shape != shape:
            raise ValueError(f"{path}: {key} has shape {list(tensor.shape)}, the configs ask for {list(shape)}; take both from one release")
        owner_name, _, name = key.rpartition(".")
        owner = module.get_submodule(owner_name)
        value = tensor.to(device=device, dtype=torch.float32 if key.startswith(_CODEBOOKS) else dtype)
        old = getattr(owner, name)
        setattr(owner, name, nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value)
    if wanted:
        raise ValueError(f"{path.parent} lacks {len(wanted)} tensors, {next(iter(wanted))} for one; copy the whole checkpoint folder")
    return others


# --- modules ---------------------------------------------------------------------------------------------------------
class _Siglip(nn.Module):
    """SigLIP without what is not used: its text tower, last vision layer, final norm and pooling head."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        fields = config.model_dump() | {"num_hidden_layers": config.num_hidden_layers - 1, "vision_use_head": False}
        model = SiglipVisionModel(SiglipVisionConfig(**fields, attn_implementation="sdpa"))  # type: ignore[call-arg]
        self.vision_model = getattr(model, "vision_model", model)  # some versions of transformers wrap it once more
        self.vision_model.post_layernorm = nn.Identity()

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, positions, C), what transformers calls `hidden_states[-2]` of the whole tower."""
        return self.vision_model.encoder(inputs_embeds=self.vision_model.embeddings(pixels)).last_hidden_state

    def fill_position_ids(self, device: torch.device | str) -> None:
        """The one tensor that no checkpoint holds."""
        embeddings = self.vision_model.embeddings
        embeddings.position_ids = torch.arange(embeddings.num_positions, device=device)[None]


class _Codec(nn.Module):
    """`rqvaesiglip`: pixels to codes and back, frozen."""

    def __init__(self, config: CodecConfig, siglip: SiglipConfig) -> None:
        super().__init__()
        self.config = config
        self.siglip_model = _Siglip(siglip)
        self.quantizer = ResidualQuantizer(config.n_embed, config.embed_dim, config.code_shape[2], config.shared_codebook)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.ddconfig.z_channels, 1)
        self.decoder = PixelDecoder(config.ddconfig)
        self.requires_grad_(False)

    def latent(self, sums: Tensor) -> Tensor:
        """(N, positions, C) -> (N, z_channels, h, w), what the decoder reads."""
        latent = sums.unflatten(1, self.config.code_shape[:2]).permute(0, 3, 1, 2)
        if self.config.decoder_latent_shape is not None:
            latent = F.interpolate(latent, size=self.config.decoder_latent_shape, mode="bilinear", align_corners=False)
        return self.post_quant_conv(latent)


class VisionTower(nn.Module):
    """Pixels to codes, codes to pixels, and the distribution of a position's codes. C: width of the code vectors."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.rqvaesiglip = _Codec(config.codec, config.siglip)
        self.rqtransformer = DepthTransformer(config.depth)
        self._unused: dict[str, Tensor] = {}  # no buffers: they are to stay on the CPU
        self._codebook_dtype = torch.float32
        self._preprocessor: str | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.rqvaesiglip.post_quant_conv.weight.dtype

    @property
    def quantizer(self) -> ResidualQuantizer:
        return self.rqvaesiglip.quantizer

    # --- tensors ---
    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) in -1..1 -> what is quantized, (N, positions, C)."""
        size = self.config.pixel_size
        if pixels.shape[1:] != (3, size, size):
            raise ValueError(f"pixels have shape {list(pixels.shape)}, but this model reads [N, 3, {size}, {size}]; resize them")
        with torch.autocast(pixels.device.type, enabled=False):  # codes must not depend on where they are computed
            return self.rqvaesiglip.siglip_model(pixels.to(self.dtype))

    def encode(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) in -1..1 -> codes (N, positions, D) int64, positions in raster order."""
        return self.quantizer.encode(self.features(pixels))

    def code_sums(self, codes: Tensor) -> Tensor:
        """(..., D) -> (..., C): what projector and decoder read."""
        return self.quantizer.sums(codes).to(self.dtype)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes (N, positions, D) -> pixels (N, 3, S, S) float32 about -1..1, not clamped."""
        return self.rqvaesiglip.decoder(self.rqvaesiglip.latent(self.code_sums(codes))).float()

    def image_logits(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """Teacher-forced over depth: LLM states (N, H) and codes (N, D) -> (N, D, K)."""
        return self.rqtransformer.logits(hidden, codes, self.quantizer)

    def image_step(self, hidden: Tensor, code_prefix: Tensor) -> Tensor:
        """Logits of the next code: LLM states (N, H) and the codes so far (N, d) with d < D -> (N, K)."""
        return self.rqtransformer.step(hidden, code_prefix, self.quantizer)

    # --- files ---
    @classmethod
    def load(
        cls,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        siglip: dict[str, Any] | None = None,
    ) -> VisionTower:
        """The tower of a checkpoint folder; `siglip` as in `VisionConfig.load`. Codebooks are float32 whatever `dtype` is.

        Raises ValueError naming the file and key that is missing, truncated or does not fit.
        """
        with torch.device("meta"):  # no memory, no random numbers
            tower = cls(VisionConfig.load(folder, siglip))
        tower.fill(read_tensors(folder / VISION_FOLDER), dtype, device)
        preprocessor = folder / VISION_FOLDER / "preprocessor_config.json"
        tower._preprocessor = preprocessor.read_text() if preprocessor.is_file() else None
        return tower.eval()

    def fill(self, tensors: Iterable[tuple[Path, str, Tensor]], dtype: torch.dtype, device: torch.device | str) -> None:
        """Takes over a checkpoint's tensors as (file, key, tensor). A shared codebook may come once or D times.

        Raises ValueError for a tensor that is misshapen or missing, or where the copies of a shared codebook differ.
        """
        first = f"{_CODEBOOKS}0.weight"
        source = Path()

        def noting_dtype() -> Iterator[tuple[Path, str, Tensor]]:
            nonlocal source
            for path, key, tensor in tensors:
                if key == first:
                    source, self._codebook_dtype = path, tensor.dtype
                yield path, key, tensor

        self._unused = fill_module(self, noting_dtype(), dtype, device)
        check_leftovers(self.config, self._unused, source)
        self.rqvaesiglip.siglip_model.fill_position_ids(device)
        if self.quantizer.shared:
            for index in range(1, self.config.codes_per_position):
                key = f"{_CODEBOOKS}{index}.weight"
                copy = self._unused.pop(key, None)
                if copy is not None and not torch.equal(copy.to(device, torch.float32), self.get_buffer(first)):
                    raise ValueError(
                        f"{source}: {key} differs from {first}, but rqvaesiglip.shared_codebook is true; "
                        f"set it to false in {VISION_FOLDER}/config.json or copy the file again"
                    )

    def release_tensors(self) -> dict[str, Tensor]:
        """All tensors under the release's keys, D copies of a shared codebook included; codebooks in the dtype they came in."""
        tensors: dict[str, Tensor] = {**self.state_dict(), **self._unused}
        for index in range(len(self.quantizer.codebooks)):
            tensors[f"{_CODEBOOKS}{index}.weight"] = self.get_buffer(f"{_CODEBOOKS}{index}.weight").to(self._codebook_dtype)
        if self.quantizer.shared:
            for name in ("weight", "embed_ema", "cluster_size_ema"):
                first = tensors.get(f"{_CODEBOOKS}0.{name}")
                for index in range(1, self.config.codes_per_position):
                    if first is not None:
                        tensors.setdefault(f"{_CODEBOOKS}{index}.{name}", first.clone())  # a file may not hold aliases
        return tensors

    def save(self, folder: Path) -> None:
        """Writes `vision_tower/` (and `siglip_config/`, where one was given) of a checkpoint folder."""
        self.config.save(folder)
        write_tensors(self.release_tensors(), folder / VISION_FOLDER)
        if self._preprocessor is not None:
            (folder / VISION_FOLDER / "preprocessor_config.json").write_text(self._preprocessor)


def check_leftovers(config: VisionConfig, keys: Iterable[str], source: Path) -> None:
    """Raises ValueError for tensors that are neither used nor known to be unused: the config is another release's."""
    last = config.siglip.num_hidden_layers - 1
    layers = rf"rqvaesiglip\.siglip_model\.vision_model\.(vision_model\.)?encoder\.layers\.(?!{last}\.)"
    known = r"rqvaesiglip\.(siglip_model\.|logit_|quantizer\.codebooks\.)"
    wrong = sorted(key for key in keys if not re.match(known, key) or re.match(layers, key))
    if wrong:
        raise ValueError(
            f"{source} holds {len(wrong)} tensors that {VISION_FOLDER}/config.json has no place for (first: {wrong[0]}); take both "
            "from one release"
        )


class Projector(nn.Module):
    """`mlp2x_gelu`: code sums (..., C) -> LLM input embeddings (..., H)."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width_in, width_out), nn.GELU(), nn.Linear(width_out, width_out))
        self._raw: dict[str, Any] = {"mm_projector_type": "mlp2x_gelu", "model_type": "v2l_projector"}

    def forward(self, sums: Tensor) -> Tensor:
        return self.layers(sums)

    @classmethod
    def load(
        cls, folder: Path, width_in: int, width_out: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Projector:
        """Of a checkpoint folder. Raises ValueError naming the file and key that is missing, truncated or does not fit."""
        raw = read_json(folder / PROJECTOR_FOLDER / "config.json")
        if raw.get("mm_projector_type") != "mlp2x_gelu":
            raise ValueError(
                f"{folder / PROJECTOR_FOLDER / 'config.json'} has mm_projector_type {raw.get('mm_projector_type')!r}; "
                "only 'mlp2x_gelu' can be loaded. Use a checkpoint with that projector"
            )
        with torch.device("meta"):
            projector = cls(width_in, width_out)
        others = fill_module(projector, read_tensors(folder / PROJECTOR_FOLDER), dtype, device)
        if others:
            raise ValueError(f"{folder / PROJECTOR_FOLDER} holds {next(iter(others))}, which mlp2x_gelu has not; copy the folder again")
        projector._raw = raw
        return projector.eval()

    def save(self, folder: Path) -> None:
        """Writes `mm_projector/` of a checkpoint folder."""
        write_tensors(self.state_dict(), folder / PROJECTOR_FOLDER)
        (folder / PROJECTOR_FOLDER / "config.json").write_text(json.dumps(self._raw, indent=2) + "\n")
