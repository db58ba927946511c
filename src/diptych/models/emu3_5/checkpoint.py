"""The two hub repositories of an Emu3.5: the folder of the language model, and that of the vision tokenizer, read and written."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3ForCausalLM

from diptych.models.emu3_5.config import (
    VISION_JSON,
    VISION_YAML,
    WEIGHTS,
    LanguageConfig,
    check_names,
    read_vision_config,
    stock_config,
    weight_names,
)
from diptych.models.emu3_5.vision import VisionTokenizer
from diptych.models.hf import load_weights, nf4, read_side_files
from diptych.models.options_file import OPTIONS_FILE

VISION_FOLDER, VISION_HUB = "Emu3.5-VisionTokenizer", "BAAI/Emu3.5-VisionTokenizer"
TORCH_WEIGHTS = "model.ckpt"  # what the official code reads from a local folder; the same tensors as `model.safetensors`
MAX_SHARD_SIZE = "5GB"  # as in the release


# --- the language model --------------------------------------------------------------------------------------------------


def load_language_model(folder: Path, config: LanguageConfig, dtype: torch.dtype | None, load_in_4bit: bool) -> Any:
    """transformers' Qwen3 on the CPU, or quantised; without `dtype` in the weights' own type, whatever `config.json` says.

    Raises ValueError where files are missing, truncated or do not fit.
    """
    check_names(weight_names(folder), folder)
    options: dict[str, Any] = {"dtype": dtype or "auto"}
    if load_in_4bit:
        options["quantization_config"] = nf4(dtype, ["lm_head"])
    return load_weights(Qwen3ForCausalLM, folder, config=stock_config(config), **options)


def save_language_model(hf: Any, config: bytes, files: Mapping[str, bytes], folder: Path, max_shard_size: str = MAX_SHARD_SIZE) -> None:
    """The release's names of files and weights, in its shards; `config.json` as it was, but for the weights' type where that is another
    now. Raises ValueError for quantised weights."""
    if getattr(hf, "is_quantized", False):
        raise ValueError("4-bit weights cannot be written in Emu3.5's layout; load the model without load_in_4bit to save it")
    folder.mkdir(parents=True, exist_ok=True)
    hf.save_pretrained(folder, max_shard_size=max_shard_size)
    fields, dtype = json.loads(config), str(hf.dtype).removeprefix("torch.")
    if fields.get("torch_dtype", dtype) != dtype:
        config = (json.dumps({**fields, "torch_dtype": dtype}, indent=2, ensure_ascii=False) + "\n").encode()
    if "generation_config.json" not in files:
        (folder / "generation_config.json").unlink(missing_ok=True)
    for name, content in {**files, "config.json": config}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


# --- the vision tokenizer ------------------------------------------------------------------------------------------------


def find_vision_folder(folder: Path, stated: str | None, fetch: bool = True) -> Path:
    """Inside the language model's folder, beside it, where `diptych.json` says, or the hub's. Without `fetch` nothing is downloaded.

    Raises ValueError naming every place where it was looked for.
    """
    near = [folder / VISION_FOLDER, folder.resolve().parent / VISION_FOLDER]
    for place in near:
        if place.is_dir():
            return place
    source = stated or VISION_HUB
    named = (folder / Path(source).expanduser()).resolve()
    if stated is not None and named.is_dir():
        return named
    looked = f"neither in {near[0].name}/ inside {folder} nor beside it"
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ValueError(
            f"{named}, which {folder / OPTIONS_FILE} names (vision_tokenizer), is no folder, and it is {looked}; mend the path"
        )
    try:
        return _from_hub(source, fetch)
    except Exception as error:  # the hub may fail in any way
        said = "was not downloaded yet" if not fetch else f"cannot be had from the hub ({str(error)[:200]})"
        raise ValueError(
            f"{folder} lacks its vision tokenizer, and {source} {said}: hf download {source} --local-dir {near[1]}. It is {looked}"
        ) from error


def _from_hub(name: str, fetch: bool) -> Path:
    """Weights in safetensors or, where the repository has none, those that torch saved; never code."""
    from huggingface_hub import snapshot_download

    configs = [VISION_JSON, VISION_YAML]
    found = Path(snapshot_download(name, allow_patterns=[*configs, WEIGHTS], local_files_only=not fetch))
    if not (found / WEIGHTS).is_file():
        commit = found.name if found.parent.name == "snapshots" else None  # of the files that are there now
        patterns = [*configs, TORCH_WEIGHTS]
        found = Path(snapshot_download(name, revision=commit, allow_patterns=patterns, local_files_only=not fetch))
    return found


def vision_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """File and tensors, mapped into memory; nothing that was pickled is run. Raises ValueError naming what is missing or damaged."""
    path = next((folder / name for name in (WEIGHTS, TORCH_WEIGHTS) if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(f"{folder} has no weights: neither {WEIGHTS} nor {TORCH_WEIGHTS}; copy the whole vision tokenizer again")
    try:
        if path.name == WEIGHTS:
            return path, load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} cannot be read ({' '.join(str(error).split())[:200]}); copy it again") from error
    found = found.get("state_dict", found) if isinstance(found, Mapping) else found
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path} holds more than tensors by name; copy the release's weights")
    return path, dict(found)


def load_vision(folder: Path) -> VisionTokenizer:
    """In float32. Raises ValueError naming the file that is missing, damaged or of another tokenizer."""
    config = read_vision_config(folder)
    path, tensors = vision_weights(folder)
    with torch.device("meta"):
        vision = VisionTokenizer(config)
    wanted = vision.state_dict()
    lost, left = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    shaped = [name for name in sorted(wanted.keys() & tensors.keys()) if wanted[name].shape != tensors[name].shape]
    for names, what in ((lost, "lacks"), (left, "has no place by its config for"), (shaped, "has in another shape than its config says")):
        if names:
            raise ValueError(
                f"{path} {what} {len(names)} weights of the IBQ tokenizer (first: {names[0]}); take config and weights from one release"
            )
    vision.load_state_dict({name: tensors[name].float() for name in wanted}, assign=True)
    return vision.eval()


def vision_files(folder: Path) -> dict[str, bytes]:
    """What lies beside its weights: configs, and the remote code of the hub's layout."""
    files = read_side_files(folder)
    return {**files, VISION_JSON: (folder / VISION_JSON).read_bytes()} if (folder / VISION_JSON).is_file() else files


def save_vision(vision: VisionTokenizer, files: Mapping[str, bytes], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in vision.state_dict().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
