"""The recipe of everything that is packaged: image tokenizer, base model, learned rewards."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from diptych.models.storyboard.codec import PatchCodec
from diptych.models.storyboard.model import StoryboardModel
from diptych.pretrain.base_model import measure_answers, new_model, pretrain_base
from diptych.pretrain.codec import all_strips, distinct_patches, measure_codec, train_codec
from diptych.pretrain.reward_models import Redrawer, measure_critic, measure_image_text, train_image_text, train_text_critic
from diptych.runs import atomic_folder

__all__ = ["PARTS", "PretrainSteps", "pretrain"]


class PretrainSteps:
    """Optimizer steps of each part, with which the packaged weights were made."""

    codec = 4000
    base = 4500
    image_text = 1500
    text_critic = 2000


PARTS = ("storyboard", "image_text", "text_critic")


def pretrain(
    output_dir: Path, *, seed: int, scale: float, log: Callable[[str], None],
    parts: Sequence[str] = PARTS, init_from: Path | None = None,
) -> None:  # fmt: skip
    """Trains all parts into `output_dir/{storyboard,image_text,text_critic}`. Finished parts are kept, so it resumes.

    `scale` multiplies the steps (tests use a small one). `parts` allows to train them in processes of their own, once
    the image tokenizer is there. `init_from`: a checkpoint whose image tokenizer is kept and whose weights the base model
    starts from. Raises ValueError for a part that does not exist.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise ValueError(f"there is no part {unknown[0]!r} to pretrain; the parts are {', '.join(PARTS)}")
    work = output_dir / "work"
    work.mkdir(parents=True, exist_ok=True)

    def steps(name: str) -> int:
        return max(4, int(scale * getattr(PretrainSteps, name)))

    torch.manual_seed(seed)
    codec, saved = PatchCodec(), work / "codec.safetensors"
    if init_from is not None:
        codec.load_state_dict(StoryboardModel.load(init_from).codec.state_dict())
    elif saved.is_file():
        codec.load_state_dict(load_file(saved))
    else:
        train_codec(codec, steps("codec"), 2e-3, 128, seed, log)
        save_file(codec.state_dict(), saved.with_suffix(".part"))
        saved.with_suffix(".part").replace(saved)
    codec.eval()
    measures = {"codec": measure_codec(codec, distinct_patches(all_strips(), codec.patch))}
    if "storyboard" in parts and not (output_dir / "storyboard").is_dir():
        model = new_model(codec, seed) if init_from is None else StoryboardModel.load(init_from)
        pretrain_base(model, work, steps("base"), seed, log, from_scratch=init_from is None)
        with atomic_folder(output_dir / "storyboard") as folder:
            model.save_pretrained(folder)
            found = {**measures, "answers": measure_answers(model, max(4, int(scale * 240)))}
            (folder / "measures.json").write_text(json.dumps(found, indent=1) + "\n")
    if "image_text" in parts and not (output_dir / "image_text").is_dir():
        encoder = train_image_text(codec, work, steps("image_text"), seed, log)
        with atomic_folder(output_dir / "image_text") as folder:
            encoder.save(folder, measure_image_text(encoder, Redrawer(codec)))
    if "text_critic" in parts and not (output_dir / "text_critic").is_dir():
        critic = train_text_critic(work, steps("text_critic"), seed, log)
        with atomic_folder(output_dir / "text_critic") as folder:
            critic.save(folder, measure_critic(critic))
