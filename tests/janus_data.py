"""What the tests of Janus share: recordings of DeepSeek's own code, and its toy checkpoint in its own layout and in transformers'."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import PIL.Image
import torch
from safetensors.torch import load_file, save_file
from toy_checkpoints import JANUS_TEMPLATE, save
from transformers import AutoTokenizer, JanusConfig, JanusForConditionalGeneration, JanusProcessor
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from diptych.models import UnifiedModel
from diptych.tokens import Modality, TokenRow, collate

DATA = Path(__file__).parent / "data" / "janus_deepseek"
RECORDED = load_file(DATA / "reference_fp32.safetensors")
FACTS = json.loads((DATA / "reference_fp32.json").read_text())
POOL = "vision_model.vision_tower.attn_pool"
LEFT_OUT = {
    "gen_vision_model.quantize.codebook_used": [65_536], f"{POOL}.latent": [1, 1, 48], f"{POOL}.q.weight": [48, 48],
    f"{POOL}.q.bias": [48], f"{POOL}.kv.weight": [96, 48], f"{POOL}.kv.bias": [96], f"{POOL}.proj.weight": [48, 48],
    f"{POOL}.proj.bias": [48], f"{POOL}.norm.weight": [48], f"{POOL}.norm.bias": [48], f"{POOL}.mlp.fc1.weight": [192, 48],
    f"{POOL}.mlp.fc1.bias": [192], f"{POOL}.mlp.fc2.weight": [48, 192], f"{POOL}.mlp.fc2.bias": [48],
}  # fmt: skip

# DeepSeek's names of weights to those of transformers, in this order
RENAMED = [
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^vision_model\.vision_tower\.patch_embed\.proj\.", "model.vision_model.embeddings.patch_embedding."),
    (r"^vision_model\.vision_tower\.pos_embed$", "model.vision_model.embeddings.position_embedding.weight"),
    (r"^vision_model\.vision_tower\.blocks\.(\d+)\.norm(\d)\.", r"model.vision_model.encoder.layers.\1.layer_norm\2."),
    (r"^vision_model\.vision_tower\.blocks\.(\d+)\.attn\.proj\.", r"model.vision_model.encoder.layers.\1.self_attn.projection_layer."),
    (r"^vision_model\.vision_tower\.blocks\.(\d+)\.attn\.", r"model.vision_model.encoder.layers.\1.self_attn."),
    (r"^vision_model\.vision_tower\.blocks\.", "model.vision_model.encoder.layers."),
    (r"^vision_model\.vision_tower\.norm\.", "model.vision_model.post_layernorm."),
    (r"^aligner\.", "model.aligner."),
    (r"^gen_aligner\.", "model.generation_aligner."),
    (r"^gen_head\.output_mlp_projector\.", "model.generation_head.proj_out."),
    (r"^gen_head\.", "model.generation_head."),
    (r"^gen_embed\.", "model.generation_embeddings."),
    (r"^gen_vision_model\.encoder\.conv_blocks\.(\d+)\.res\.", r"model.vqmodel.encoder.down.\1.block."),
    (r"^gen_vision_model\.decoder\.conv_blocks\.(\d+)\.res\.", r"model.vqmodel.decoder.up.\1.block."),
    (r"^gen_vision_model\.encoder\.conv_blocks\.", "model.vqmodel.encoder.down."),
    (r"^gen_vision_model\.decoder\.conv_blocks\.", "model.vqmodel.decoder.up."),
    (r"^gen_vision_model\.", "model.vqmodel."),
    (r"(vqmodel\.\w+\.mid)\.0\.", r"\1.block_1."),
    (r"(vqmodel\.\w+\.mid)\.1\.", r"\1.attn_1."),
    (r"(vqmodel\.\w+\.mid)\.2\.", r"\1.block_2."),
    (r"(aligner)\.layers\.0\.", r"\1.fc1."),
    (r"(aligner)\.layers\.2\.", r"\1.hidden_layers.0."),
]


def renamed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {}
    for name, value in weights.items():
        for pattern, new in RENAMED:
            name = re.sub(pattern, new, name)
        if ".self_attn.qkv." in name:
            for part, third in zip("qkv", value.chunk(3), strict=True):
                found[name.replace("qkv", f"{part}_proj")] = third
        elif "attn_pool" not in name and "codebook_used" not in name:  # transformers' class has no place for them
            found[name] = value[0] if name.endswith("position_embedding.weight") else value
    return found


def convert(source: Path, folder: Path) -> Path:
    """The files that transformers' conversion makes of DeepSeek's."""
    theirs = json.loads((source / "config.json").read_text())
    vision, vq, text = (theirs[f"{name}_config"] for name in ("vision", "gen_vision", "language"))
    vision, vq = vision["params"], vq["params"]
    picture = json.loads((source / "preprocessor_config.json").read_text())
    marks = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = AutoTokenizer.from_pretrained(source, extra_special_tokens=marks)
    grid = vision["image_size"] // vision["patch_size"]
    config = JanusConfig(
        text_config={name: value for name, value in text.items() if name != "torch_dtype"},
        vision_config={
            "image_size": vision["image_size"], "patch_size": vision["patch_size"], "hidden_size": vision["width"],
            "num_hidden_layers": vision["layers"], "num_attention_heads": vision["heads"], "mlp_ratio": vision["mlp_ratio"],
            "num_image_tokens": grid**2, "projection_dim": text["hidden_size"], "depth": theirs["aligner_config"]["params"]["depth"],
        },
        vq_config={
            "num_embeddings": vq["image_token_size"], "embed_dim": vq["n_embed"], "latent_channels": vq["z_channels"],
            "base_channels": vq["ch"], "channel_multiplier": vq["ch_mult"], "num_res_blocks": vq["num_res_blocks"], "num_patches": grid,
            "projection_dim": text["hidden_size"], "image_token_embed_dim": text["hidden_size"],
            "num_hidden_layers": theirs["gen_aligner_config"]["params"]["depth"],
        },
        image_token_id=tokenizer.image_token_id,
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # transformers draws initial weights
        model = JanusForConditionalGeneration(config).eval()
    weights = {name: value for path in source.glob("*.safetensors") for name, value in load_file(path).items()}
    model.load_state_dict(renamed(weights), strict=True)
    size = {"height": picture["image_size"], "width": picture["image_size"]}
    kept = {name: picture[name] for name in ("min_size", "image_mean", "image_std", "rescale_factor", "do_normalize")}
    processor = JanusProcessor(
        JanusImageProcessorPil(size=size, **kept), tokenizer, chat_template=JANUS_TEMPLATE, use_default_system_prompt=True,
        num_image_tokens=grid**2,
    )  # fmt: skip
    generation = {"pad_token_id": tokenizer.convert_tokens_to_ids("<｜▁pad▁｜>"), "guidance_scale": 5}
    return save(folder, model, processor, generation, False, torch.float32)


def with_what_is_left_out(folder: Path) -> Path:
    """The toy with the weights that the repository leaves out, because no forward pass reads them, at random."""
    copied = Path(shutil.copytree(DATA / "toy_checkpoint", folder))
    source = torch.Generator().manual_seed(0)
    left_out = {name: torch.randn(shape, generator=source) for name, shape in LEFT_OUT.items()}
    save_file({**load_file(copied / "model.safetensors"), **left_out}, copied / "model.safetensors", metadata={"format": "pt"})
    return copied


def recorded_picture(name: str) -> PIL.Image.Image:
    return PIL.Image.fromarray(RECORDED[f"preprocess.{name}.uint8_hwc"].numpy())


def with_placeholders(row: TokenRow) -> list[int]:
    return row.text_ids.masked_fill(row.modality == Modality.FEATURE, FACTS["tokens"]["<image_placeholder>"]).tolist()


@torch.no_grad()
def logits_of(janus: UnifiedModel, rows: list[TokenRow]) -> torch.Tensor:
    batch = collate(rows)
    return janus.text_logits(janus.backbone(janus.embed(batch), batch.position_ids, batch.attention_mask))


def close(found: torch.Tensor, expected: torch.Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)
