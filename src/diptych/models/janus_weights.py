"""Janus in DeepSeek's own layout: the names of its weights and those of transformers' class, and its files, read and written.
Source: https://github.com/deepseek-ai/Janus at 1daa72f."""

from __future__ import annotations

import dataclasses
import json
import re
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.janus.processing_janus import DEFAULT_SYSTEM_PROMPT

from diptych.models.janus_config import COPY, ROLES, is_deepseek, processor_settings, read_json, tags

SINGLE, BIN = "model.safetensors", "pytorch_model.bin"  # each may be in shards, which `{name}.index.json` names
MAX_SHARD_SIZE = "5GB"
EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
UNUSED = r"^vision_model\.vision_tower\.attn_pool\.|^gen_vision_model\.quantize\.codebook_used$"  # no forward pass reads them
COMPUTED = r"rotary_emb\.inv_freq$"  # in old files

# --- names ---------------------------------------------------------------------------------------------------------------

_TOWER, _VISION = "vision_model.vision_tower", "model.vision_model"
_NAMES = [  # DeepSeek's, transformers'; # is a number, * the rest of the name. The first that fits counts.
    ("language_model.lm_head.*", "lm_head.*"),
    ("language_model.model.*", "model.language_model.*"),
    (f"{_TOWER}.pos_embed", f"{_VISION}.embeddings.position_embedding.weight"),
    (f"{_TOWER}.patch_embed.proj.*", f"{_VISION}.embeddings.patch_embedding.*"),
    (f"{_TOWER}.blocks.#.norm#.*", f"{_VISION}.encoder.layers.#.layer_norm#.*"),
    (f"{_TOWER}.blocks.#.attn.proj.*", f"{_VISION}.encoder.layers.#.self_attn.projection_layer.*"),
    (f"{_TOWER}.blocks.#.attn.qkv.*", f"{_VISION}.encoder.layers.#.self_attn.qkv.*"),
    (f"{_TOWER}.blocks.#.mlp.*", f"{_VISION}.encoder.layers.#.mlp.*"),
    (f"{_TOWER}.norm.*", f"{_VISION}.post_layernorm.*"),
    *[
        (f"{theirs}.layers.{2 * layer}.*", f"model.{ours}.{f'hidden_layers.{layer - 1}' if layer else 'fc1'}.*")
        for theirs, ours in (("aligner", "aligner"), ("gen_aligner", "generation_aligner"))
        for layer in range(16)
    ],
    ("gen_head.output_mlp_projector.*", "model.generation_head.proj_out.*"),
    ("gen_head.vision_head.*", "model.generation_head.vision_head.*"),
    ("gen_embed.*", "model.generation_embeddings.*"),
    *[
        (f"gen_vision_model.{part}.{theirs}.*", f"model.vqmodel.{part}.{ours}.*")
        for part, level in (("encoder", "down"), ("decoder", "up"))
        for theirs, ours in (
            ("conv_blocks.#.res.#", f"{level}.#.block.#"), ("conv_blocks.#", f"{level}.#"), ("mid.0", "mid.block_1"),
            ("mid.1", "mid.attn_1"), ("mid.2", "mid.block_2"),
        )
    ],
    ("gen_vision_model.*", "model.vqmodel.*"),
]  # fmt: skip
_QKV = re.compile(rf"^({re.escape(_VISION)}\..*\.self_attn\.)([qkv])_proj\.")


def _rule(source: str, target: str) -> tuple[re.Pattern[str], str]:
    pattern = re.escape(source).replace(r"\#", r"(\d+)").replace("#", r"(\d+)").replace(r"\*", "(.+)")
    counted = iter(range(1, 10))
    return re.compile(f"^{pattern}$"), re.sub(r"[#*]", lambda _: rf"\g<{next(counted)}>", target)


_TO_STOCK = [_rule(theirs, ours) for theirs, ours in _NAMES]
_TO_DEEPSEEK = [_rule(ours, theirs) for theirs, ours in _NAMES]


def _renamed(name: str, rules: list[tuple[re.Pattern[str], str]]) -> str | None:
    return next((match.expand(new) for pattern, new in rules if (match := pattern.match(name))), None)


def stock_names(name: str) -> list[str]:
    """transformers' names for one of DeepSeek's: three for a fused matrix of queries, keys and values, none where it has no counterpart."""
    found = None if re.search(UNUSED, name) else _renamed(name, _TO_STOCK)
    if found is None:
        return []
    return [found.replace(".qkv.", f".{part}_proj.") for part in "qkv"] if ".self_attn.qkv." in found else [found]


def deepseek_name(name: str) -> str:
    """DeepSeek's name for one of transformers': the same for queries, keys and values of a SigLIP layer. Other names stay as they are."""
    return _renamed(_QKV.sub(r"\1qkv.", name), _TO_DEEPSEEK) or name


def deepseek_shapes(hf: Any) -> dict[str, tuple[int, ...]]:
    """DeepSeek's names and shapes of the weights of a stock model, on any device."""
    return {name: tuple(_joined(name, [part.to("meta") for part in parts]).shape) for name, parts in _parts(hf).items()}


def _parts(hf: Any) -> dict[str, list[Tensor]]:
    """DeepSeek's name -> what is fused under it, in order. A tied head is not written twice."""
    found: dict[str, dict[str, Tensor]] = {}
    tied = hf.lm_head.weight is hf.get_input_embeddings().weight
    for name, tensor in hf.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            found.setdefault(deepseek_name(name), {})[name] = tensor
    return {name: [parts[part] for part in stock_names(name)] for name, parts in found.items()}


def _joined(name: str, parts: list[Tensor]) -> Tensor:
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    return whole[None] if name == f"{_TOWER}.pos_embed" else whole


# --- files ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, which is read when transformers' loader asks for it (`tensor[...]`), into memory of its own."""

    read: Callable[[], Tensor]
    dtype: torch.dtype

    def __getitem__(self, where: Any) -> Tensor:
        return self.read()[where].clone(memory_format=torch.contiguous_format)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, safetensors before `.bin`. Raises ValueError where one is missing."""
    for name in (SINGLE, BIN):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            files = read_json(index).get("weight_map")
            if not isinstance(files, dict) or not files:
                raise ValueError(f"{index} has no weight_map; {COPY}")
            paths = [folder / str(file) for file in sorted(set(files.values()))]
            if missing := [path.name for path in paths if not path.is_file()]:
                raise ValueError(f"{folder} lacks {', '.join(missing)}, which {index.name} names; copy every shard of the checkpoint")
            return paths
    raise ValueError(f"{folder} has no weights: neither {SINGLE} nor {BIN}, nor shards of one with their index; {COPY}")


def bin_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """What torch saved, mapped into memory and not read; on "meta" shapes alone. Raises ValueError where it is no plain state dict."""
    try:
        found = torch.load(path, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(path))  # torch < 1.6 saved none
    except Exception as error:  # pickle, zip and torch fail in many ways
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {said}); copy it again") from error
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path} holds more than tensors by name; copy the release's weights")
    return dict(found)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder, under DeepSeek's names. Raises ValueError naming a file that is missing or broken."""
    found: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        if path.suffix == ".bin":
            found |= {name: StoredTensor(partial(_same, value), value.dtype) for name, value in bin_tensors(path).items()}
            continue
        try:
            file = safe_open(path, framework="pt")
            for name in file.keys():  # noqa: SIM118 - it is no dict
                dtype = file.get_slice(name)[:0].dtype if file.get_slice(name).get_shape() else file.get_tensor(name).dtype
                found[name] = StoredTensor(partial(file.get_tensor, name), dtype)
        except Exception as error:
            raise ValueError(f"{path} cannot be loaded ({str(error)[:200]}); copy it again") from error
    return found


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _third(stored: StoredTensor, part: int) -> Tensor:
    return stored.read().chunk(3)[part]


def _without_batch(stored: StoredTensor) -> Tensor:
    return stored.read()[0]


def in_stock_names(stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """As transformers' loader takes them, still unread. What has no name there keeps its own, for the loader to complain of."""
    found = {}
    for name, tensor in stored.items():
        if re.search(UNUSED, name) or re.search(COMPUTED, name):
            continue
        names = stock_names(name) or [name]
        for part, new in enumerate(names):
            if len(names) > 1:
                found[new] = dataclasses.replace(tensor, read=partial(_third, tensor, part))
            elif name == f"{_TOWER}.pos_embed":
                found[new] = dataclasses.replace(tensor, read=partial(_without_batch, tensor))
            else:
                found[new] = tensor
    return found


# --- a checkpoint --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class DeepSeekFiles:
    """What a checkpoint in DeepSeek's layout says beside its weights, and how it is written again.

    config: config.json as it was. unused: weights that no forward pass reads and that its code has a place for.
    """

    config: bytes
    tags: dict[str, str]
    roles: tuple[str, str]
    system_prompt: str
    unused: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> DeepSeekFiles | None:
        """None for a folder in another layout."""
        if not is_deepseek(folder):
            return None
        settings = processor_settings(folder)
        system = settings.get("system_prompt")
        return cls(
            (folder / "config.json").read_bytes(),
            tags(folder),
            ROLES[settings.get("sft_format", "deepseek")],
            DEFAULT_SYSTEM_PROMPT if system is None else f"{system}\n\n".lstrip(),
        )

    def read_unused(self, folder: Path) -> None:
        self.unused = {name: tensor[...] for name, tensor in stored_tensors(folder).items() if re.search(UNUSED, name)}

    def save(self, hf: Any, folder: Path) -> None:
        """config.json as it was, but for the weights' type where that is another now, and weights under DeepSeek's names, one shard in
        memory at a time. Raises ValueError for quantised weights."""
        if getattr(hf, "is_quantized", False):
            raise ValueError("4-bit weights cannot be written in DeepSeek's layout; load the model without load_in_4bit to save it")
        parts = {**_parts(hf), **{name: [tensor] for name, tensor in self.unused.items()}}
        sizes = {name: _joined(name, [part.to("meta") for part in tensors]) for name, tensors in parts.items()}
        split = split_torch_state_dict_into_shards(sizes, filename_pattern="model{suffix}.safetensors", max_shard_size=MAX_SHARD_SIZE)
        for file, names in split.filename_to_tensors.items():
            shard = {name: _joined(name, [part.detach().cpu() for part in parts[name]]).contiguous() for name in names}
            save_file(shard, folder / file, metadata={"format": "pt"})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
            (folder / f"{SINGLE}.index.json").write_text(json.dumps(index, indent=2) + "\n")
        fields, dtype = json.loads(self.config), str(hf.dtype).removeprefix("torch.")
        if fields.get("torch_dtype", dtype) == dtype:
            (folder / "config.json").write_bytes(self.config)
        else:
            (folder / "config.json").write_text(json.dumps({**fields, "torch_dtype": dtype}, indent=2, ensure_ascii=False) + "\n")
