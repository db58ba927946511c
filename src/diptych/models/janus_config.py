"""Janus in DeepSeek's own layout (`model_type: multi_modality`): its configs, checked and as transformers' class takes them.
Source: https://github.com/deepseek-ai/Janus at 1daa72f."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import GenerationConfig, JanusConfig
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

MODEL_TYPE = "multi_modality"
ROLES = {"deepseek": ("<|User|>", "<|Assistant|>"), "deepseek_old": ("User", "Assistant")}  # by sft_format
TAGS = {  # where processor_config.json names no others
    "image_start_tag": "<begin_of_image>", "image_end_tag": "<end_of_image>", "image_tag": "<image_placeholder>",
    "pad_tag": "<｜▁pad▁｜>",
}  # fmt: skip
# What stands in DeepSeek's code and not in its checkpoints is in SIGLIP, VQ and the defaults below; a config.json may also give these
# sizes as `params`.
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
COPY = "copy the whole checkpoint again"


def is_deepseek(folder: Path) -> bool:
    try:
        return json.loads((folder / "config.json").read_text()).get("model_type") == MODEL_TYPE
    except (OSError, ValueError, AttributeError):
        return False


def stock_config(folder: Path) -> JanusConfig:
    """Raises ValueError naming what config.json or processor_config.json lacks, or has otherwise than transformers' class can do it."""
    path = folder / "config.json"
    fields = read_json(path)
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
        raise ValueError(f"{path} has no section {', '.join(lacking)}, which DeepSeek's own layout of Janus needs; {COPY}")
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
            raise ValueError(f"{self.name}.params.{key} in {self.path} is {found!r}; it must be a positive number. {COPY.capitalize()}")
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
    found = read_json(path) if path.is_file() else {}
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
    settings = read_json(path)
    if not isinstance(size := settings.get("image_size"), int):
        raise ValueError(f"image_size in {path} is {size!r}; it must be a whole number. {COPY.capitalize()}")
    read = read_json(folder / "config.json").get("vision_config", {}).get("params", {}).get("image_size", 336)
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


def generation_config(tokenizer: Any, pad_id: int | None) -> GenerationConfig:
    """For transformers' own `generate`: the release has none, and the ids of its configs are another tokenizer's."""
    return GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=pad_id, guidance_scale=5)


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read, or is not valid JSON: {error}. {COPY.capitalize()}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not a JSON object; {COPY}")
    return found
