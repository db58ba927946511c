"""HPSv2's published files, which are open_clip checkpoints of a ViT-H/14, to a folder of transformers' CLIPModel.

python -m diptych.rewards.scorers.open_clip HPS_v2.1_compressed.pt FOLDER --version v2.1
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from diptych.rewards.scorers.base import checkpoint_folder
from diptych.rewards.scorers.clip import load_words
from diptych.runs import atomic_folder

PUBLISHED = {"HPS_v2_compressed.pt": "v2.0", "HPS_v2.1_compressed.pt": "v2.1"}
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
WHOLE = {
    "logit_scale": "logit_scale",
    "text_projection": "text_projection.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "visual.proj": "visual_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
}
NORMS = {
    "ln_final.": "text_model.final_layer_norm.",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.ln_post.": "vision_model.post_layernorm.",
}
TRANSPOSED = ("text_projection", "visual.proj")  # open_clip multiplies by them from the right
IN_BLOCK = {
    "ln_1.": "layer_norm1.", "ln_2.": "layer_norm2.", "attn.out_proj.": "self_attn.out_proj.", "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}  # fmt: skip
BLOCK = re.compile(r"^(visual\.)?transformer\.resblocks\.(\d+)\.(.*)$")


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's names and layouts to transformers'. Raises ValueError for a name that is not of a plain CLIP with two transformers."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        norm = next((old for old in NORMS if name.startswith(old)), None)
        block = BLOCK.match(name)
        if name == "attn_mask":
            continue  # a buffer of older open_clip
        if name in WHOLE:
            found[WHOLE[name]] = value.T.contiguous() if name in TRANSPOSED else value
        elif norm:
            found[NORMS[norm] + name.removeprefix(norm)] = value
        elif block:
            prefix = f"{'vision_model' if block[1] else 'text_model'}.encoder.layers.{block[2]}."
            part = next((old for old in IN_BLOCK if block[3].startswith(old)), None)
            if part:
                found[prefix + IN_BLOCK[part] + block[3].removeprefix(part)] = value
            elif block[3] in ("attn.in_proj_weight", "attn.in_proj_bias"):
                for which, third in zip("qkv", value.chunk(3), strict=True):
                    found[f"{prefix}self_attn.{which}_proj.{block[3].removeprefix('attn.in_proj_')}"] = third.contiguous()
            else:
                raise ValueError(f"unknown weight {name!r}")
        else:
            raise ValueError(f"unknown weight {name!r}; a plain open_clip CLIP with a vision and a text transformer is needed")
    return found


def config_of(state: dict[str, Tensor], vision_head_width: int, text_head_width: int) -> CLIPConfig:
    """Sizes from the shapes of open_clip's weights. The width of a head is not in them. GELU is exact, as in open_clip's own models."""
    positions, width = state["visual.positional_embedding"].shape
    patch = state["visual.conv1.weight"].shape[-1]
    words, text_width = state["token_embedding.weight"].shape
    embed = state["text_projection"].shape[1]

    def layers(prefix: str) -> int:
        return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})

    vision: dict[str, Any] = {
        "hidden_size": width, "intermediate_size": state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0], "hidden_act": "gelu",
        "num_hidden_layers": layers("visual.transformer.resblocks."), "num_attention_heads": width // vision_head_width,
        "image_size": round((positions - 1) ** 0.5) * patch, "patch_size": patch, "projection_dim": embed,
    }  # fmt: skip
    text: dict[str, Any] = {
        "hidden_size": text_width, "intermediate_size": state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0], "hidden_act": "gelu",
        "num_hidden_layers": layers("transformer.resblocks."), "num_attention_heads": text_width // text_head_width, "vocab_size": words,
        "max_position_embeddings": state["positional_embedding"].shape[0], "projection_dim": embed,
        "bos_token_id": words - 2, "eos_token_id": words - 1, "pad_token_id": words - 1,
    }  # fmt: skip
    return CLIPConfig(vision_config=vision, text_config=text, projection_dim=embed)


def to_clip(state: dict[str, Tensor], vision_head_width: int = 80, text_head_width: int = 64) -> CLIPModel:
    """A CLIPModel in float32 with open_clip's weights; the widths are those of ViT-H/14.

    Raises ValueError for any weight that is missing, unknown or of another shape.
    """
    try:
        model = CLIPModel(config_of(state, vision_head_width, text_head_width))
        model.load_state_dict({name: value.float() for name, value in renamed(state).items()})
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"not the weights of a plain open_clip CLIP: {type(error).__name__}: {str(error)[:600]}") from error
    return model.eval()


def convert(checkpoint: Path, folder: Path, version: str, tokenizer: str = TOKENIZER, **head_widths: int) -> Path:
    """Writes `folder`: the model, its tokenizer, and the version in config.json. `folder` must not exist, or be empty.

    Raises ValueError for a file that cannot be read, whose published name says another version, or whose weights do not fit.
    """
    named = PUBLISHED.get(checkpoint.name, version)
    if version not in PUBLISHED.values() or named != version:
        raise ValueError(
            f"{checkpoint.name} is HPS {named}, but version {version!r} was given; allowed are {', '.join(PUBLISHED.values())}"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; give another folder")
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    except Exception as error:
        raise ValueError(f"cannot read {checkpoint} as an HPS checkpoint with a state_dict: {str(error)[:200]}") from error
    model = to_clip(state, **head_widths)
    words = load_words(checkpoint_folder(tokenizer, patterns=("*.json", "*.txt")), state["token_embedding.weight"].shape[0])
    model.config.hps_version = version
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        words.save_pretrained(temporary)
    return folder


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m diptych.rewards.scorers.open_clip", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="HPS_v2_compressed.pt or HPS_v2.1_compressed.pt")
    parser.add_argument("folder", type=Path, help="where the converted model goes")
    parser.add_argument("--version", required=True, choices=sorted(PUBLISHED.values()))
    parser.add_argument("--tokenizer", default=TOKENIZER, help="folder or hub id of CLIP's tokenizer")
    given = parser.parse_args(arguments)
    try:
        print(convert(given.checkpoint, given.folder, given.version, given.tokenizer))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
