"""Records what the published code of ImageReward and HPSv2 computes, at toy size, for tests/test_image_scorers.py.

Run in an environment of its own, because these packages need an old transformers:

    pip install torch torchvision "numpy<2" "pillow>=11"
    pip install --no-deps image-reward==1.5 hpsv2==1.2.0 transformers==4.30.2 tokenizers==0.13.3 huggingface_hub==0.25.2 timm==0.6.13
    pip install regex requests tqdm pyyaml filelock packaging ftfy
    python tests/data/make_image_reward_fixture.py

The network, the tokenizer and the preprocessing are the packages' own; only sizes are replaced. Weights, pictures and words come from
`weights`, `picture` and WORDS below, which the test imports, so nothing large is stored. NumPy's RandomState never changes its stream.
Written: image_reward_recorded.json (values, token ids, names and shapes of the weights at toy and at full size) and
image_reward_pixels.npz (preprocessed pictures).
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
import types
import zlib
from pathlib import Path

import numpy as np
import PIL.Image

HERE = Path(__file__).parent
SIDE = 32
SIZES = [(32, 32), (72, 45), (40, 101), (20, 20), (61, 67)]  # (width, height); 72 x 45 becomes 51 x 32, so that the crop is off by half
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "ball", "blue", "box", "on", "the", "of", "left", "##s", "##ing",
         "stand", "cafe", ",", ".", "!", "'", "green", "tree", "sky", "猫", "2", "b", "##a", "##l"]  # fmt: skip
CAPTIONS = [
    "a red ball on the left of the blue box",
    "Red balls, standing!",
    "café 猫 2 zebra",
    "[ENC] a ball [DEC] [SEP] box",
    " ".join(["the green tree"] * 20),  # longer than 35 tokens
    "ball",
]
MED = {"attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 48, "intermediate_size": 96,
       "layer_norm_eps": 1e-12, "max_position_embeddings": 40, "model_type": "bert", "num_attention_heads": 3, "num_hidden_layers": 2,
       "pad_token_id": 0, "type_vocab_size": 2, "vocab_size": len(WORDS) + 2, "encoder_width": 768,
       "add_cross_attention": True}  # fmt: skip
FULL_MED = MED | {"hidden_size": 768, "intermediate_size": 3072, "max_position_embeddings": 512, "num_attention_heads": 12,
                  "num_hidden_layers": 12, "vocab_size": 30524}  # fmt: skip
CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 40, "head_width": 20, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2},
}
FULL_CLIP = {
    "embed_dim": 1024,
    "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
}  # hpsv2/src/open_clip/model_configs/ViT-H-14.json
CLIP_CAPTIONS = ["fjd", "lmnopqrstuvw"]  # with a letter a token, those that end a word 24 higher
CLIP_IDS = [[48, 5, 9, 27, 49, 0, 0, 0, 0, 0, 0, 0], [48, *range(11, 21), 49]]  # start, letters, end, padding as open_clip pads


def weights(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The toy weight of that name, float32. Embeddings are small, so that the epsilon of a layer norm matters."""
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)  # this stream is frozen
    if len(shape) == 1 and name.endswith("weight"):
        return np.asarray(1 + 0.2 * values, dtype=np.float32)  # of a layer norm
    if name.startswith("mlp."):
        return np.asarray(values / np.sqrt(shape[-1]), dtype=np.float32)
    scale = 0.005 if "embed" in name or "token" in name or "conv1" in name else 0.2
    return np.asarray(scale * values, dtype=np.float32)


def picture(number: int) -> PIL.Image.Image:
    width, height = SIZES[number]
    pixels = np.random.RandomState(number).randint(0, 256, (height, width, 3))
    return PIL.Image.fromarray(pixels.astype(np.uint8))


def _namespace(name: str, folder: Path) -> None:
    """Lets submodules of a package be imported without its __init__, which imports what is not needed here."""
    module = types.ModuleType(name)
    module.__path__ = [str(folder)]
    sys.modules[name] = module


def _shapes(module) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in module.state_dict().items()}


def _fill(module) -> None:
    import torch

    state = module.state_dict()
    for name, value in state.items():
        if value.is_floating_point():
            value.copy_(torch.from_numpy(weights(name, tuple(value.shape))))


def record_image_reward(pixels: dict[str, np.ndarray]) -> dict:
    import torch

    for name in ("fairscale", "fairscale.nn", "fairscale.nn.checkpoint", "fairscale.nn.checkpoint.checkpoint_activations"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules["fairscale.nn.checkpoint.checkpoint_activations"].checkpoint_wrapper = None  # used only for gradient checkpointing
    folder = next(Path(entry) / "ImageReward" for entry in sys.path if (Path(entry) / "ImageReward" / "ImageReward.py").is_file())
    _namespace("ImageReward", folder)
    _namespace("ImageReward.models", folder / "models")
    from ImageReward import ImageReward as package
    from ImageReward.models.BLIP import blip, blip_pretrain
    from ImageReward.models.BLIP.vit import VisionTransformer
    from transformers import BertTokenizer

    with tempfile.TemporaryDirectory() as temporary:
        (Path(temporary) / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
        for name, med in (("toy.json", MED), ("full.json", FULL_MED)):
            (Path(temporary) / name).write_text(json.dumps(med))
        original = BertTokenizer.from_pretrained
        blip.BertTokenizer = types.SimpleNamespace(from_pretrained=lambda _: original(temporary))
        full = _shapes(package.ImageReward(str(Path(temporary) / "full.json")))
        blip_pretrain.create_vit = lambda *_: (
            VisionTransformer(img_size=SIDE, patch_size=16, embed_dim=128, depth=2, num_heads=2, drop_path_rate=0.1),
            128,
        )
        model = package.ImageReward(str(Path(temporary) / "toy.json"))
    model.mlp = package.MLP(MED["hidden_size"])
    model.preprocess = package._transform(SIDE)
    model.eval()
    _fill(model)
    for number in range(len(SIZES)):
        pixels[f"image_reward_{number}"] = model.preprocess(picture(number)).numpy()
    with torch.no_grad():
        scores = [[model.score(caption, picture(number)) for number in range(len(SIZES))] for caption in CAPTIONS]
        _, ranked = model.inference_rank(CAPTIONS[0], [picture(number) for number in range(len(SIZES))])
    ids = [model.blip.tokenizer(caption, padding="max_length", truncation=True, max_length=35)["input_ids"] for caption in CAPTIONS]
    return {"scores": scores, "ranked": ranked, "ids": ids, "shapes": _shapes(model), "full_shapes": full}


def record_open_clip(pixels: dict[str, np.ndarray]) -> dict:
    import torch

    folder = Path(next(iter(importlib.util.find_spec("hpsv2").submodule_search_locations)))
    for name in ("hpsv2", "hpsv2.src", "hpsv2.src.open_clip"):
        _namespace(name, folder.joinpath(*name.split(".")[1:]))
    from hpsv2.src.open_clip.model import CLIP as Model
    from hpsv2.src.open_clip.transform import image_transform

    with torch.device("meta"):
        full = _shapes(Model(**FULL_CLIP, output_dict=True))
    model = Model(**CLIP, output_dict=True).eval()
    _fill(model)
    preprocess = image_transform(SIDE, is_train=False, resize_longest_max=True)  # what hpsv2/img_score.py uses
    inputs = torch.stack([preprocess(picture(number)) for number in range(len(SIZES))])
    for number in range(len(SIZES)):
        pixels[f"hps_{number}"] = inputs[number].numpy()
    with torch.no_grad():
        outputs = model(inputs, torch.tensor(CLIP_IDS))
        cosines = outputs["text_features"] @ outputs["image_features"].T
    return {"cosines": cosines.tolist(), "shapes": _shapes(model), "full_shapes": full}


def main() -> None:
    import torch
    import torchvision
    import transformers

    torch.set_num_threads(1)
    pixels: dict[str, np.ndarray] = {}
    recorded = {
        "versions": {"torch": torch.__version__, "torchvision": torchvision.__version__, "transformers": transformers.__version__,
                     "pillow": PIL.__version__, "image-reward": "1.5", "hpsv2": "1.2.0"},
        "image_reward": record_image_reward(pixels),
        "open_clip": record_open_clip(pixels),
    }  # fmt: skip
    (HERE / "image_reward_recorded.json").write_text(json.dumps(recorded, indent=None, separators=(",", ":")) + "\n")
    np.savez_compressed(HERE / "image_reward_pixels.npz", **pixels)


if __name__ == "__main__":
    main()
