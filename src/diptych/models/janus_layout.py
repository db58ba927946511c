"""Janus in DeepSeek's own layout (`model_type: multi_modality`): its names, configs and files, to those of transformers' class and back.

Source: https://github.com/deepseek-ai/Janus at 1daa72f. What stands in its code and not in its checkpoints is in SIGLIP, VQ and the
defaults below; a config.json may also give these sizes as `params`.
"""

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
from tokenizers import AddedToken
from torch import Tensor
from transformers import GenerationConfig, JanusConfig
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil
from transformers.models.janus.processing_janus import DEFAULT_SYSTEM_PROMPT

MODEL_TYPE = "multi_modality"
SINGLE, BIN = "model.safetensors", "pytorch_model.bin"  # each may be in shards, which `{name}.index.json` names
MAX_SHARD_SIZE = "5GB"
EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
UNUSED = r"^vision_model\.vision_tower\.attn_pool\.|^gen_vision_model\.quantize\.codebook_used$"  # no forward pass reads them
COMPUTED = r"rotary_emb\.inv_freq$"  # in old files
ROLES = {"deepseek": ("<|User|>", "<|Assistant|>"), "deepseek_old": ("User", "Assistant")}  # by sft_format
TAGS = {  # where processor_config.json names no others
    "image_start_tag": "<begin_of_image>", "image_end_tag": "<end_of_image>", "image_tag": "<image_placeholder>",
    "pad_tag": "<｜▁pad▁｜>",
}  # fmt: skip
SIGLIP: dict[str, dict[str, float]] = {
    "siglip_large_patch16_384": {"width": 1024, "layers": 24, "heads": 16, "patch_size": 16, "mlp_ratio": 4},
    "siglip_so400m_patch14_384": {"width": 1152, "layers": 27, "heads": 16, "patch_size": 14, "mlp_ratio": 3.7362},
    "siglip_so400m_patch14_224": {"width": 1152, "layers": 27, "heads": 16, "patch_size": 14, "mlp_ratio": 3.7362},
}
VQ: dict[str, Any] = {"ch": 128, "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2, "z_channels": 256}
_CLASSES = {  # sections of config.json, and the one class that can be loaded for each
    "vision_config": "CLIPVisionTower", "aligner_config": "MlpProjector", "gen_vision_config": "VQ-16",
    "gen_aligner_config": "MlpProjector", "gen_head_config": "vision_head",
}  # fmt: skip
_CLIP_MEAN, _CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
_COPY = "copy the whole checkpoint again"


def is_deepseek(folder: Path) -> bool:
    try:
        return json.loads((folder / "config.json").read_text()).get("model_type") == MODEL_TYPE
    except (OSError, ValueError, AttributeError):
        return False


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


# --- configs -------------------------------------------------------------------------------------------------------------


def stock_config(folder: Path) -> JanusConfig:
    """Raises ValueError naming what config.json or processor_config.json lacks, or has otherwise than transformers' class can do it."""
    path = folder / "config.json"
    fields = _json(path)
    _check_kind(path, fields)
    vision, aligner, vq, gen_aligner, head = (_Section(path, name, fields[name]) for name in _CLASSES)
    text = {key: value for key, value in fields["language_config"].items() if key != "torch_dtype" and not key.startswith("_")}
    if (kind := text.get("model_type", "llama")) != "llama":
        raise ValueError(f"language_config in {path} has model_type {kind!r}; only 'llama' can be loaded")
    tied = bool(text.get("tie_word_embeddings", False))
    tower, grid = _tower(vision)
    sizes = {key: vq.number(key, default) for key, default in VQ.items() if key != "ch_mult"}
    levels = vq.params.get("ch_mult", VQ["ch_mult"])
    if not isinstance(levels, list) or not levels or not all(isinstance(level, int) and level > 0 for level in levels):
        raise ValueError(f"gen_vision_config.params.ch_mult in {path} is {levels!r}; it must be a list of whole numbers")
    drawn = vision.number("image_size", 336) // 2 ** (len(levels) - 1)
    if drawn != grid:
        raise ValueError(
            f"vision_config.params in {path} give a grid of {grid} x {grid} positions for pictures that are read and {drawn} x {drawn} for "
            "drawn ones; only equal ones can be loaded"
        )
    number = processor_settings(folder).get("num_image_tokens", 576)
    if number != grid**2:
        raise ValueError(
            f"num_image_tokens in {folder / 'processor_config.json'} is {number!r}, but the pictures of {path} have {grid} x {grid} "
            "positions; take both from one release"
        )
    try:
        config: Any = JanusConfig(
            text_config={"model_type": "llama", **text},
            vision_config={**tower, "num_image_tokens": grid**2, "depth": aligner.number("depth", 1)},
            vq_config={
                "num_embeddings": vq.number("image_token_size"), "embed_dim": vq.number("n_embed"),
                "latent_channels": sizes["z_channels"], "base_channels": sizes["ch"], "channel_multiplier": levels,
                "num_res_blocks": sizes["num_res_blocks"], "num_patches": grid, "num_hidden_layers": gen_aligner.number("depth", 1),
            },
            tie_word_embeddings=tied,
        )  # fmt: skip
    except Exception as error:  # a config.json may hold any nonsense, on which transformers fails in any way
        raise ValueError(f"{path} cannot be used: {' '.join(str(error).split())[:300]}. Take it from the release again") from error
    hidden = config.text_config.hidden_size
    config.vision_config.projection_dim = config.vq_config.projection_dim = config.vq_config.image_token_embed_dim = hidden
    wanted = [
        (aligner, "input_dim", tower["hidden_size"]), (aligner, "n_embed", hidden), (gen_aligner, "input_dim", vq.number("n_embed")),
        (gen_aligner, "n_embed", hidden), (head, "n_embed", hidden), (head, "image_token_embed", hidden),
        (head, "image_token_size", vq.number("image_token_size")),
    ]  # fmt: skip
    for section, key, value in wanted:
        if section.number(key) != value:
            raise ValueError(
                f"{section.name}.params.{key} in {path} is {section.number(key)}, where {value} follows from the other sections; only that "
                "can be loaded"
            )
    for section in (aligner, gen_aligner):
        section.only("projector_type", "mlp_gelu")
    return config


def _check_kind(path: Path, fields: dict[str, Any]) -> None:
    """Two other models have the same model_type."""
    if any(name in fields for name in ("vision_und_enc_config", "vision_gen_enc_config", "vision_gen_dec_config")):
        raise ValueError(f"{path} is JanusFlow's, which draws by rectified flow and has no codes; Janus and Janus-Pro can be loaded")
    lacking = [name for name in (*_CLASSES, "language_config") if not isinstance(fields.get(name), dict)]
    if lacking and not any(name in fields for name in _CLASSES if name.startswith("gen_")):
        raise ValueError(
            f"{path} has no section {', '.join(lacking)}: without any for drawing it is DeepSeek-VL's or another model's that only reads "
            "pictures; Janus and Janus-Pro can be loaded"
        )
    if lacking:
        raise ValueError(f"{path} has no section {', '.join(lacking)}, which DeepSeek's own layout of Janus needs; {_COPY}")
    for name, kind in _CLASSES.items():
        if (found := fields[name].get("cls")) != kind:
            raise ValueError(f"{name}.cls in {path} is {found!r}; only {kind!r} can be loaded")


@dataclasses.dataclass
class _Section:
    path: Path
    name: str
    fields: dict[str, Any]

    @property
    def params(self) -> dict[str, Any]:
        found = self.fields.get("params") or {}
        return found if isinstance(found, dict) else {}

    def number(self, key: str, default: Any = None, kind: type | tuple[type, ...] = int) -> Any:
        """A positive number. Raises ValueError where it is none, or missing and without a default."""
        found = self.params.get(key, default)
        if not isinstance(found, kind) or isinstance(found, bool) or found <= 0:  # type: ignore[operator]
            raise ValueError(f"{self.name}.params.{key} in {self.path} is {found!r}; it must be a positive number. {_COPY.capitalize()}")
        return found

    def only(self, key: str, value: str) -> None:
        if (found := self.params.get(key)) != value:
            raise ValueError(f"{self.name}.params.{key} in {self.path} is {found!r}; only {value!r} can be loaded")


def _tower(vision: _Section) -> tuple[dict[str, Any], int]:
    """SigLIP for transformers' config, and its grid: the sizes of the config, those of its name otherwise."""
    name = vision.params.get("model_name", "siglip_large_patch16_384")
    known = SIGLIP.get(str(name), {})
    lacking = [key for key in SIGLIP["siglip_large_patch16_384"] if key not in {**known, **vision.params}]
    if lacking:
        raise ValueError(
            f"vision_config.params.model_name in {vision.path} is {name!r}, whose sizes are not known; known are {', '.join(SIGLIP)}. For "
            f"another one give {', '.join(lacking)} in vision_config.params"
        )
    vision.only("select_feature", "same")
    if vision.params.get("pixel_mean") is not None and vision.params.get("pixel_std") is not None:
        raise ValueError(f"vision_config.params in {vision.path} have pixel_mean and pixel_std, which cannot be loaded; leave them out")
    layers, select = vision.number("layers", known.get("layers")), vision.params.get("select_layer", -2)
    kept = select if isinstance(select, int) and select > 0 else layers + select + 1 if isinstance(select, int) else 0
    if not 0 < kept <= layers:
        raise ValueError(f"vision_config.params.select_layer in {vision.path} is {select!r}, but the tower has {layers} layers")
    size, patch = vision.number("image_size", 336), vision.number("patch_size", known.get("patch_size"))
    tower = {
        "image_size": size, "patch_size": patch, "hidden_size": vision.number("width", known.get("width")), "num_hidden_layers": kept,
        "num_attention_heads": vision.number("heads", known.get("heads")),
        "mlp_ratio": vision.number("mlp_ratio", known.get("mlp_ratio"), (int, float)),
    }  # fmt: skip
    return tower, size // patch


def processor_settings(folder: Path) -> dict[str, Any]:
    """processor_config.json, or nothing where it is not there: DeepSeek's code has defaults for all of it."""
    path = folder / "processor_config.json"
    found = _json(path) if path.is_file() else {}
    if found.get("add_special_token"):
        raise ValueError(f"add_special_token in {path} is true, for which DeepSeek's own code writes broken prompts; set it to false")
    if (kind := found.get("sft_format", "deepseek")) not in ROLES:
        raise ValueError(f"sft_format in {path} is {kind!r}; known are {', '.join(ROLES)}")
    return found


def tags(folder: Path) -> dict[str, str]:
    found = processor_settings(folder)
    return {name: found.get(name) or default for name, default in TAGS.items()}


def add_image_tag(tokenizer: Any, folder: Path) -> None:
    """DeepSeek's code adds a placeholder that the tokenizer lacks, as a special token. Its embedding is never looked up."""
    tag = tags(folder)["image_tag"]
    if tag not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(tag, special=True, normalized=False)])


def image_processor(folder: Path) -> JanusImageProcessorPil:
    """preprocessor_config.json; what it leaves out is as in DeepSeek's code. A background that it names is not used there either.

    Raises ValueError where the file is missing or broken.
    """
    path = folder / "preprocessor_config.json"
    settings = _json(path)
    if not isinstance(size := settings.get("image_size"), int):
        raise ValueError(f"image_size in {path} is {size!r}; it must be a whole number. {_COPY.capitalize()}")
    read = _json(folder / "config.json").get("vision_config", {}).get("params", {}).get("image_size", 336)
    if size != read:
        raise ValueError(
            f"image_size in {path} is {size}, but vision_config.params.image_size in config.json is {read}; take both from one release"
        )
    mean, std = settings.get("image_mean", _CLIP_MEAN), settings.get("image_std", _CLIP_STD)
    normalize = settings.get("do_normalize", True)
    if normalize and (mean is None or std is None):
        raise ValueError(f"image_mean or image_std in {path} is null, but do_normalize is true; set it to false, or give both")
    found = JanusImageProcessorPil(
        size={"height": size, "width": size}, min_size=settings.get("min_size", 14), image_mean=mean or _CLIP_MEAN,
        image_std=std or _CLIP_STD, rescale_factor=settings.get("rescale_factor", 1 / 255), do_normalize=normalize,
    )  # fmt: skip
    if mean is None:
        found.background_color = (127, 127, 127)
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read, or is not valid JSON: {error}. {_COPY.capitalize()}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not a JSON object; {_COPY}")
    return found


# --- weights -------------------------------------------------------------------------------------------------------------


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
            files = _json(index).get("weight_map")
            if not isinstance(files, dict) or not files:
                raise ValueError(f"{index} has no weight_map; {_COPY}")
            paths = [folder / str(file) for file in sorted(set(files.values()))]
            if missing := [path.name for path in paths if not path.is_file()]:
                raise ValueError(f"{folder} lacks {', '.join(missing)}, which {index.name} names; copy every shard of the checkpoint")
            return paths
    raise ValueError(f"{folder} has no weights: neither {SINGLE} nor {BIN}, nor shards of one with their index; {_COPY}")


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


def generation_config(tokenizer: Any, pad_id: int | None) -> GenerationConfig:
    """For transformers' own `generate`: the release has none, and the ids of its configs are another tokenizer's."""
    return GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=pad_id, guidance_scale=5)
