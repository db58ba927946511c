"""Low-rank adapters (PEFT) on the language model of a unified model: attach, switch off, save, load, merge.

A saved adapter folder is PEFT's own (`adapter_config.json`, `adapter_model.safetensors`), so that `PeftModel.from_pretrained`
loads it onto the family's stock class. Beside it lie `diptych_adapter.json` (which base model, loaded how) and, where modules
were trained in full, `trained_in_full.safetensors`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from diptych.config import LoraConfig
from diptych.models.base import UnifiedModel

DESCRIPTION, FULL, REFERENCE = "diptych_adapter.json", "trained_in_full.safetensors", "reference"


class LoraAdapter:
    """What was attached to a model. `base`: what `load_model` needs to load the model without it."""

    def __init__(self, model: UnifiedModel, peft: Any, base: dict[str, Any], train_in_full: tuple[str, ...]) -> None:
        self.model, self.peft, self.base, self.train_in_full = model, peft, base, train_in_full

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """The model without its adapter: the frozen reference of a run that started without one, at no cost in memory."""
        with self.peft.disable_adapter():
            yield

    def add_reference(self, folder: Path) -> None:
        """Loads the adapter from which a run started beside the one that is trained; only the adapter in use requires gradients."""
        self.peft.load_adapter(folder, REFERENCE, is_trainable=False)
        self.peft.set_adapter("default")

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[None]:
        """The model with the adapter of `add_reference` in the place of its own."""
        self.peft.set_adapter(REFERENCE)
        try:
            yield
        finally:
            self.peft.set_adapter("default")

    def settings(self) -> dict[str, Any]:
        """Rank and scale of the adapter."""
        config = self.peft.peft_config["default"]
        return {"r": config.r, "alpha": config.lora_alpha}

    def save(self, folder: Path) -> None:
        self.peft.save_pretrained(folder, selected_adapters=["default"])
        description = {"base": self.base, "train_in_full": list(self.train_in_full)}
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
        full = {name: p.detach().cpu().contiguous() for name, p in full_parameters(self.model, self.train_in_full)}
        if full:
            save_file(full, folder / FULL)

    def merge(self) -> UnifiedModel:
        """Adds the adapter to the weights. Raises ValueError where they are quantised: rounding would spoil the result."""
        if self.base.get("load_in_4bit"):
            raise ValueError("the base model is loaded in 4 bits; load the adapter with load_in_4bit=False to merge it")
        self.peft.merge_and_unload()
        self.model.adapter = None
        return self.model


def attach_lora(model: UnifiedModel, config: LoraConfig, base: dict[str, Any]) -> UnifiedModel:
    """Freezes the model and adds adapters to the matrices of its decoder layers.

    Raises ValueError where a name of the settings matches nothing, or what no training touches.
    """
    peft = _peft()
    root, language_model = model.lora_root, model.language_model
    prefix = next(name for name, module in root.named_modules() if module is language_model)
    wanted = rf"{re.escape(prefix + '.' if prefix else '')}layers\.\d+\..*\.({'|'.join(map(re.escape, config.target_modules))})"
    if not any(re.fullmatch(wanted, name) for name, _ in root.named_modules()):
        raise ValueError(f"lora.target_modules {list(config.target_modules)} match nothing in the decoder layers of {model.family}")
    frozen = {id(p) for module in model.frozen_modules() for p in module.parameters()}
    if touched := [name for name, p in full_parameters(model, config.train_in_full) if id(p) in frozen]:
        raise ValueError(
            f"lora.train_in_full matches {len(touched)} weights of the image tokenizer or the vision encoder ({touched[0]}, ...), which no "
            "training touches; write names that match others only"
        )
    settings = peft.LoraConfig(r=config.r, lora_alpha=config.alpha, lora_dropout=0.0, target_modules=wanted, bias="none")
    model.requires_grad_(False)
    wrapped = peft.get_peft_model(root, settings)
    wrapped.peft_config["default"].base_model_name_or_path = base["source"]
    _train_in_full(model, config.train_in_full)
    model.adapter = LoraAdapter(model, wrapped, base, config.train_in_full)
    return model


def read_description(folder: Path) -> dict[str, Any]:
    """Raises ValueError naming the file where it is damaged."""
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_text())
        if not isinstance(description["base"]["source"], str) or not isinstance(description["train_in_full"], list):
            raise TypeError("base.source and train_in_full are of other types")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); copy the adapter folder again") from error
    return description


def load_lora(model: UnifiedModel, folder: Path, base: dict[str, Any]) -> UnifiedModel:
    """Puts a saved adapter onto its base model, trainable. Raises ValueError for a damaged folder."""
    peft = _peft()
    try:
        description = read_description(folder)
        model.requires_grad_(False)
        wrapped = peft.PeftModel.from_pretrained(model.lora_root, folder, is_trainable=True)
        names = tuple(description["train_in_full"])
        if (folder / FULL).is_file():
            model.load_state_dict(load_file(folder / FULL), strict=False)
    except Exception as error:
        raise ValueError(f"the adapter in {folder} is damaged or does not fit {base['source']}: {str(error)[:300]}") from error
    _train_in_full(model, names)
    model.adapter = LoraAdapter(model, wrapped, base, names)
    return model.eval()


def full_parameters(model: UnifiedModel, patterns: tuple[str, ...]) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if "lora_" not in name and any(re.search(r, name) for r in patterns)]


def _train_in_full(model: UnifiedModel, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        found = full_parameters(model, (pattern,))
        if not found:
            names = ", ".join(sorted({".".join(name.split(".")[:3]) for name, _ in model.named_parameters()})[:12])
            raise ValueError(f"lora.train_in_full {pattern!r} matches no parameter of {model.family}; it has {names}, ...")
        for _, parameter in found:
            parameter.requires_grad_(True)


def _peft() -> Any:
    """The library, imported when it is needed: it is slow to, and brings bitsandbytes with its warnings."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return importlib.import_module("peft")
