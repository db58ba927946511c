"""From a name, a folder or a hub id to a model; and from a run's settings to the policy that is trained."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from diptych.config import RunConfig
from diptych.models.base import UnifiedModel
from diptych.models.codes import CodeCache
from diptych.models.emu3_5.config import is_first_generation
from diptych.models.image_decoder import set_image_decoder
from diptych.models.lora import DESCRIPTION, attach_lora, load_lora, read_description

PACKAGED = ("storyboard", "storyboard_terse")
FAMILIES: dict[str, str] = {  # model_type in config.json -> module:class; imported when it is needed
    "diptych_storyboard": "diptych.models.storyboard.model:StoryboardModel",
    "janus": "diptych.models.janus:JanusModel",
    "multi_modality": "diptych.models.janus:JanusModel",  # DeepSeek's own layout
    "vila_u_llama": "diptych.models.vila_u.model:VilaUModel",
    "emu3": "diptych.models.emu3:Emu3Model",
    "Emu3": "diptych.models.emu3_5.model:Emu35Model",  # BAAI's name in its own layout; the first generation has it too
    "chameleon": "diptych.models.chameleon:ChameleonModel",
}
# Folders in another layout than transformers', by what their config.json says
OTHER_LAYOUTS = {
    "Emu3": "this is BAAI's own layout of Emu3; use the conversion for transformers, e.g. Emu3-community/Emu3-Chat-hf",
}
TORCH_WEIGHTS = ("pytorch_model.bin", "pytorch_model-*.bin")
logger = logging.getLogger(__name__)
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def packaged_folder(name: str) -> Path:
    """The folder of something that ships inside the package, e.g. "storyboard" or "image_text"."""
    return Path(str(resources.files("diptych") / "assets" / name))


def model_folder(source: str | Path) -> Path:
    """A packaged model's name, a local folder, or a Hugging Face hub id such as `deepseek-community/Janus-Pro-1B`.

    Raises ValueError where there is nothing.
    """
    name = str(source)
    if name in PACKAGED:
        return packaged_folder(name)
    folder = Path(name)
    if folder.is_dir():
        return folder
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and folder.parts[0] != "runs":
        return _from_hub(name)
    raise ValueError(
        f"no model at {name!r}: {folder / 'config.json'} does not exist. Give a checkpoint folder, a hub id such as org/name, or one of: "
        f"{', '.join(PACKAGED)}"
    )


def _from_hub(name: str) -> Path:
    """Weights in safetensors or, where the repository has none, those that torch saved."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, ignore_patterns=["*.bin", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf"]))
        if (folder / "config.json").is_file() and not any(folder.rglob("*.safetensors")):
            commit = folder.name if folder.parent.name == "snapshots" else None  # of the files that are there now
            folder = Path(snapshot_download(name, revision=commit, allow_patterns=[*TORCH_WEIGHTS, f"{TORCH_WEIGHTS[0]}.index.json"]))
        return folder
    except Exception as error:
        raise ValueError(f"no folder {name!r}, and the hub did not give a model of that name: {str(error)[:200]}") from error


def is_adapter(folder: Path) -> bool:
    return (folder / DESCRIPTION).is_file()


def family_of(folder: Path) -> type[UnifiedModel]:
    """The adapter class for a checkpoint folder, by `model_type` in its config.json. Raises ValueError for an unknown family."""
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(f"no model at {str(folder)!r}: {config} does not exist. Give a checkpoint folder or one of: {', '.join(PACKAGED)}")
    try:
        raw = json.loads(config.read_text())
        kind = raw.get("model_type")
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"{config} cannot be read as JSON, or is not valid JSON: {error}") from error
    if kind not in FAMILIES or (kind in OTHER_LAYOUTS and is_first_generation(folder, raw)):
        hint = f" ({OTHER_LAYOUTS[kind]})" if kind in OTHER_LAYOUTS else ""
        raise ValueError(f"{config} has model_type {kind!r}{hint}; known families are {', '.join(FAMILIES)}")
    module, name = FAMILIES[kind].split(":")
    return getattr(importlib.import_module(module), name)


def load_model(source: str | Path, *, dtype: str = "auto", load_in_4bit: bool | None = None, image_size: int | None = None) -> UnifiedModel:
    """A model in eval mode on the CPU (4-bit weights on the GPU where there is one).

    Args:
        source: packaged name, checkpoint folder, adapter folder (its base is loaded with it), or hub id.
        dtype: "auto" (the checkpoint's own), "float32" or "bfloat16".
        load_in_4bit: None keeps what an adapter was trained with; False for everything else.
        image_size: pixels a side of drawn pictures, for families that can choose.
    Raises:
        ValueError for a missing folder, an unknown family, or a damaged checkpoint.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed are {', '.join(DTYPES)}")
    folder = model_folder(source)
    if is_adapter(folder):
        asked = {"load_in_4bit": load_in_4bit, "dtype": None if dtype == "auto" else dtype, "image_size": image_size}
        base = {**read_description(folder)["base"], **{key: value for key, value in asked.items() if value is not None}}
        options = {key: value for key, value in base.items() if key != "source"}
        try:
            model = load_model(base["source"], **options)
        except ValueError as error:
            raise ValueError(f"the base model of the adapter in {folder} cannot be loaded: {error}") from error
        return load_lora(model, folder, base)
    transformers_logging.set_verbosity_error()  # what it would warn of is an error here
    transformers_logging.disable_progress_bar()
    family = family_of(folder)
    return family.load(folder, dtype=DTYPES[dtype], load_in_4bit=bool(load_in_4bit), image_size=image_size).eval()


def open_policy(config: RunConfig, checkpoint: Path | None = None) -> UnifiedModel:
    """The model that a run trains, on the CPU: that of its last checkpoint, or `config.model` with the adapters that the settings ask for.

    Raises ValueError where 4-bit weights would have to be trained themselves.
    """
    options: dict[str, Any] = {
        "dtype": config.dtype, "load_in_4bit": config.load_in_4bit or None, "image_size": config.image_size,
    }  # fmt: skip
    model = load_to_train(checkpoint or config.model, **options)  # load_in_4bit None: as an adapter was trained
    if config.load_in_4bit and config.lora is None and model.adapter is None:
        raise ValueError("load_in_4bit=true with full training: 4-bit weights cannot be trained. Add adapters: --lora.r 16")
    if config.lora is not None and model.adapter is None:
        source = str(Path(config.model).resolve()) if Path(config.model).is_dir() else config.model
        if config.dtype == "auto" and model.dtype == torch.float32:
            options["dtype"] = "float32"  # also where the checkpoint is float16
        attach_lora(model, config.lora, {"source": source, **options})
    elif config.lora is not None and model.adapter.settings() != {"r": config.lora.r, "alpha": config.lora.alpha}:
        raise ValueError(
            f"the adapter in {config.model} has {model.adapter.settings()}, but lora.r={config.lora.r} and lora.alpha={config.lora.alpha} "
            "were asked for. Give the adapter's own to train it on, or `diptych merge` it first"
        )
    if config.gradient_checkpointing:
        enable_checkpointing(model)
    warn_of_rounding(model, config)
    return model


def equip(model: UnifiedModel, config: RunConfig) -> UnifiedModel:
    """The same model, on its device, with the picture decoder and the cache of codes that the settings ask for."""
    set_image_decoder(model, config.image_decoder)
    if config.code_cache is not None:
        model.code_cache = CodeCache(Path(config.code_cache), model)
    return model


def load_to_train(source: str | Path, *, dtype: str, load_in_4bit: bool | None, image_size: int | None) -> UnifiedModel:
    """`load_model`, but what would be float16 under `dtype: auto` is float32: gradients and sums leave float16's range (65504)."""
    model = load_model(source, dtype=dtype, load_in_4bit=load_in_4bit, image_size=image_size)
    if dtype == "auto" and any(tensor.dtype == torch.float16 for tensor in model.parameters()):
        return load_model(source, dtype="float32", load_in_4bit=load_in_4bit, image_size=image_size)
    return model


def warn_of_rounding(model: UnifiedModel, config: RunConfig) -> None:
    """Weights of 8 bits of precision stand still where an update is less than about 1/512 of them. Sharded ones are kept in float32."""
    if config.parallel.sharded(trains_half=True):
        return
    trained = [p for p in model.parameters() if p.requires_grad]
    half = sum(p.numel() for p in trained if p.dtype in (torch.bfloat16, torch.float16))
    if half > 0.01 * sum(p.numel() for p in trained):
        logger.warning(
            "%.1f million weights are trained in %s, where most updates round to nothing. Leave parallel.mode at auto (weights in float32, "
            "computing in bfloat16), or train adapters (--lora.r 16), whose weights are float32", half / 1e6, trained[0].dtype,
        )  # fmt: skip


def enable_checkpointing(model: UnifiedModel) -> None:
    """Decoder layers keep their inputs only and are computed again in the backward pass."""
    decoder: Any = model.language_model
    if hasattr(decoder, "activation_checkpointing_enable"):  # its name in later versions of transformers 5
        decoder.activation_checkpointing_enable()
    else:
        decoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


class Reference:
    """The frozen model that the KL term refers to, that from which the run started: the policy with its adapter off, with the
    adapter that it started from, or a copy of its own."""

    def __init__(self, policy: UnifiedModel, config: RunConfig, device: torch.device, *, offload: bool = False) -> None:
        """`offload`: a copy waits in the host's memory, where it is made. Raises ValueError where there is no copy."""
        self.policy, self.copy, self.device = policy, None, device
        self.waits_on = torch.device("cpu") if offload else device
        folder = model_folder(config.model)
        self.started_from_adapter = is_adapter(folder)
        if policy.adapter is None or policy.adapter.train_in_full:
            four = config.load_in_4bit or None
            copy = load_to_train(folder, dtype=config.dtype, load_in_4bit=four, image_size=config.image_size)
            self.copy = copy.eval().requires_grad_(False)
        elif self.started_from_adapter:
            policy.adapter.add_reference(folder)
        if offload and self.copy is None:
            raise ValueError("offload: reference: adapters need no copy of the model, so there is nothing to offload; leave it out")

    @contextlib.contextmanager
    def active(self) -> Iterator[UnifiedModel]:
        if self.copy is not None:
            yield self.copy.to(self.device)
            self.copy.to(self.waits_on)
            return
        adapter = self.policy.adapter
        with adapter.as_reference() if self.started_from_adapter else adapter.off():
            yield self.policy
