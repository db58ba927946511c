"""The recipe of everything that is packaged: image tokenizer, base model, learned rewards."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from diptych.models.storyboard.codec import PatchCodec
from diptych.models.storyboard.model import StoryboardModel
from diptych.pretrain.base_model import measure_answers, new_model, pretrain_base
from diptych.pretrain.codec import MEASURED, measure_codec, measure_reading, patches_of, train_codec
from diptych.pretrain.next_picture import measure_next_picture, train_next_picture
from diptych.pretrain.reward_models import Redrawer, measure_critic, measure_image_text, train_image_text, train_text_critic
from diptych.pretrain.settings import PARTS, SETTINGS, setting_named
from diptych.runs import atomic_folder

__all__ = ["PARTS", "SETTINGS", "pretrain"]


def pretrain(
    output_dir: Path, *, seed: int, scale: float, log: Callable[[str], None],
    parts: Sequence[str] | None = None, init_from: Path | None = None, setting: str = "standard",
) -> None:  # fmt: skip
    """Trains all parts of a setting, each into a folder of its name in `output_dir`. Finished parts are kept, so it resumes.

    `scale` multiplies the steps (tests use a small one). `parts` allows to train them in processes of their own, once
    the image tokenizer is there; None: all that the setting has. `init_from`: a checkpoint whose image tokenizer is kept and whose weights
    the base model starts from. Raises ValueError for a setting or a part that does not exist, and a checkpoint of another setting.
    """
    chosen = setting_named(setting)
    parts = chosen.parts if parts is None else parts
    unknown = [part for part in parts if part not in chosen.parts]
    if unknown:
        of = "" if setting == "standard" else f" with the setting {setting!r}"
        raise ValueError(f"there is no part {unknown[0]!r} to pretrain{of}; the parts are {', '.join(chosen.parts)}")
    config, world = chosen.config(), chosen.told
    old = None if init_from is None else StoryboardModel.load(init_from)
    if old is not None and old.config != config:
        differs = [name for name, value in dataclasses.asdict(config).items() if getattr(old.config, name) != value]
        raise ValueError(f"{init_from} was made with another setting than {setting!r}: it differs in {', '.join(differs)}")
    work = output_dir / "work"
    work.mkdir(parents=True, exist_ok=True)

    def steps(number: int) -> int:
        return max(4, int(scale * number))

    torch.manual_seed(seed)
    codec = PatchCodec(config.grid, config.patch, config.depth, config.levels, config.codec_width)
    patches, saved = patches_of(world, config.patch), work / "codec.safetensors"
    if old is not None:
        codec.load_state_dict(old.codec.state_dict())
    elif saved.is_file():
        codec.load_state_dict(load_file(saved))
    else:
        train_codec(codec, patches, steps(chosen.codec_steps), 2e-3, 128, seed, log)
        save_file(codec.state_dict(), saved.with_suffix(".part"))
        saved.with_suffix(".part").replace(saved)
    codec.eval()
    rewards = dict(chosen.reward_steps)
    if "storyboard" in parts and not (output_dir / "storyboard").is_dir():
        model = new_model(codec, seed, chosen) if old is None else old
        pretrain_base(model, work, steps(chosen.base_steps), seed, log, from_scratch=old is None, setting=chosen)
        with atomic_folder(output_dir / "storyboard") as folder:
            model.save_pretrained(folder)
            some = patches[:: max(1, len(patches) // MEASURED)]
            found = {"codec": measure_codec(codec, some), "answers": measure_answers(model, max(4, int(min(scale, 1) * 240)), world)}
            if world.rows > 1:
                found["codec"]["pictures_read"] = measure_reading(codec, world)
            (folder / "measures.json").write_text(json.dumps(found, indent=1) + "\n")
    if "image_text" in parts and not (output_dir / "image_text").is_dir():
        encoder = train_image_text(codec, work, steps(rewards["image_text"]), seed, log)
        with atomic_folder(output_dir / "image_text") as folder:
            encoder.save(folder, measure_image_text(encoder, Redrawer(codec)))
    if "text_critic" in parts and not (output_dir / "text_critic").is_dir():
        critic = train_text_critic(work, steps(rewards["text_critic"]), seed, log)
        with atomic_folder(output_dir / "text_critic") as folder:
            critic.save(folder, measure_critic(critic))
    if "next_picture" in parts and not (output_dir / "next_picture").is_dir():
        judge = train_next_picture(codec, work, steps(rewards["next_picture"]), seed, log)
        with atomic_folder(output_dir / "next_picture") as folder:
            judge.save(folder, measure_next_picture(judge, Redrawer(codec)))
