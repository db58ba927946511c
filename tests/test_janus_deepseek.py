"""Janus' adapter against recordings of DeepSeek's own code, on its toy checkpoint in its own layout and converted to transformers';
and the files of DeepSeek's layout, read and written."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from family_data import drawn_first, prompts, write_records
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from test_family_training import grpo_config, warmup_config
from toy_checkpoints import JANUS_TEMPLATE, edit_json, save
from transformers import AutoTokenizer, JanusConfig, JanusForConditionalGeneration, JanusProcessor
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from diptych.config import ImageSampling, LoraConfig, SamplingParams
from diptych.doctor import examine
from diptych.document import Document, Image, Text
from diptych.grpo import grpo
from diptych.logprobs import score
from diptych.models import UnifiedModel, janus_layout, load_model
from diptych.models.codes import tokenizer_hash
from diptych.models.fingerprint import of_model
from diptych.models.lora import attach_lora
from diptych.sampling.guidance import branch_prefixes
from diptych.tokens import Modality, TokenRow, collate
from diptych.warmup import warmup

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
PICTURES = ("land", "port", "sq", "big", "thin")

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


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    return convert(DATA / "toy_checkpoint", tmp_path_factory.mktemp("janus") / "converted")


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory) -> Path:
    """The toy with the weights that the repository leaves out, because no forward pass reads them, at random."""
    copied = shutil.copytree(DATA / "toy_checkpoint", tmp_path_factory.mktemp("janus") / "deepseek")
    source = torch.Generator().manual_seed(0)
    left_out = {name: torch.randn(shape, generator=source) for name, shape in LEFT_OUT.items()}
    save_file({**load_file(copied / "model.safetensors"), **left_out}, copied / "model.safetensors", metadata={"format": "pt"})
    return copied


@pytest.fixture(scope="module", params=["converted", "deepseek"])
def folder(request) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def janus(folder) -> UnifiedModel:
    return load_model(folder)


@pytest.fixture(scope="module")
def bare(folder, tmp_path_factory) -> UnifiedModel:
    """Without the conversion's chat template: the family's own."""
    copied = shutil.copytree(folder, tmp_path_factory.mktemp("janus") / "bare")
    (copied / "chat_template.jinja").unlink(missing_ok=True)
    return load_model(copied)


def recorded_picture(name: str) -> PIL.Image.Image:
    return PIL.Image.fromarray(RECORDED[f"preprocess.{name}.uint8_hwc"].numpy())


def row_of(janus: UnifiedModel, ids: list[int], pixels: list[torch.Tensor]) -> TokenRow:
    """Recorded ids, with a picture at each run of placeholders."""
    placeholder, pictures, rows = FACTS["tokens"]["<image_placeholder>"], list(pixels), []
    while placeholder in ids:
        at = ids.index(placeholder)
        rows += [TokenRow.text(ids[:at], 1), TokenRow.feature(pictures.pop(0), janus.num_features, 1)]
        ids = ids[at + janus.num_features :]
    assert not pictures
    return TokenRow.concat([*rows, TokenRow.text(ids, 1)])


def with_placeholders(row: TokenRow) -> list[int]:
    return row.text_ids.masked_fill(row.modality == Modality.FEATURE, FACTS["tokens"]["<image_placeholder>"]).tolist()


@torch.no_grad()
def logits_of(janus: UnifiedModel, rows: list[TokenRow]) -> torch.Tensor:
    batch = collate(rows)
    return janus.text_logits(janus.backbone(janus.embed(batch), batch.position_ids, batch.attention_mask))


def close(found: torch.Tensor, expected: torch.Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


# --- pictures to codes and back ------------------------------------------------------------------------------------------


def test_pictures_become_the_codes_that_deepseek_finds(janus):
    pixels, expected = RECORDED["vq.pixels"], RECORDED["vq.encoded_codes"]
    assert torch.equal(janus.encode_images(pixels), expected[..., None])
    with torch.no_grad():
        stock = janus.hf.model.vqmodel.encode(pixels, return_dict=True).image_tokens.view_as(expected)
    share = (stock == expected).float().mean().item()
    assert share == pytest.approx(FACTS["vq_share_of_codes_equal_without_normalisation"])  # what normalising is for


def test_no_convolution_that_decides_codes_is_in_tf32(janus):
    conv, seen = torch.backends.cudnn.conv, []
    before = conv.fp32_precision
    hook = janus.hf.model.vqmodel.encoder.register_forward_hook(lambda *_: seen.append(conv.fp32_precision))
    janus.encode_images(RECORDED["vq.pixels"])
    hook.remove()
    assert seen == ["ieee"]
    assert conv.fp32_precision == before


def test_of_equal_rows_the_first_is_taken_and_no_weight_is_changed(janus):
    twins = copy.deepcopy(janus)
    codebook = twins.hf.model.vqmodel.quantize.embedding.weight
    with torch.no_grad():
        codebook[128:] = 2 * codebook[:128]  # the same directions, and lengths that round alike
    before = codebook.clone()
    codes = twins.encode_images(RECORDED["vq.pixels"])
    assert codes.max() < 128
    assert torch.equal(codebook, before)


def test_codes_are_found_in_float32_whatever_the_weights_and_the_context(janus, folder):
    pixels = torch.cat([RECORDED["vq.pixels"], RECORDED["siglip.pixel_values"]])
    half = load_model(folder, dtype="bfloat16")
    widened = copy.deepcopy(half).float()
    expected = widened.encode_images(pixels)
    assert torch.equal(half.encode_images(pixels), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(half.encode_images(pixels), expected)
        assert torch.equal(widened.encode_images(pixels), expected)
    vq = half.hf.model.vqmodel
    with torch.no_grad():  # in bfloat16 alone, codes differ: the test can fail
        latents = torch.nn.functional.normalize(vq.quant_conv(vq.encoder(pixels.bfloat16())), dim=1).flatten(2).transpose(1, 2)
        rounded = (latents @ torch.nn.functional.normalize(vq.quantize.embedding.weight, dim=1).T).argmax(-1, keepdim=True)
    assert not torch.equal(rounded, expected)
    assert vq.dtype == torch.bfloat16


def test_kept_codes_of_the_old_way_are_not_found_again(janus, monkeypatch):
    """`code_cache`'s folder once had the name that the modules give in the other order, and codes of another rule in it."""
    now, modules = tokenizer_hash(janus), janus.frozen_modules()
    assert modules == [janus.hf.model.vqmodel, janus.hf.model.vision_model]
    monkeypatch.setattr(type(janus), "frozen_modules", lambda self: modules[::-1])
    assert tokenizer_hash(janus) != now


def test_codes_become_deepseeks_pixels(janus):
    codes = RECORDED["gen.codes"]
    with torch.no_grad():
        close(janus.hf.model.vqmodel.quantize.get_codebook_entry(codes), RECORDED["vq.codebook_entries"])
    pixels = janus.decode_codes(codes[..., None])
    close(pixels, RECORDED["vq.decoded"])


# --- reading pictures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_prepared_as_deepseek_prepares_them(janus, name):
    close(janus.processed(recorded_picture(name)), RECORDED[f"preprocess.{name}.pixel_values"], 1e-6)


def test_settings_come_from_the_checkpoint(janus):
    copied = copy.copy(janus)
    kept = {"size": {"height": 24, "width": 24}, "image_std": [0.5] * 3}
    copied.image_processor = JanusImageProcessorPil(**kept, image_mean=[0.5] * 3, min_size=6, do_normalize=False)
    close(copied.processed(recorded_picture("land")), RECORDED["preprocess.land.pixel_values_do_normalize_false"], 1e-6)
    copied.image_processor = JanusImageProcessorPil(**kept, image_mean=[0.4, 0.5, 0.6], min_size=10)
    prepared = copied.processed(PIL.Image.new("RGB", (24, 1), "white"))
    close(prepared[:, 0, 0], (torch.tensor([102, 127, 153]) / 255 - torch.tensor([0.4, 0.5, 0.6])) / 0.5, 1e-6)  # int(mean * 255)
    assert (prepared[1, :, 0] == 1).sum() == 10  # min_size


@pytest.mark.parametrize("case", FACTS["resize_cases_384"], ids=lambda case: f"{case['width']}x{case['height']}")
def test_sides_at_the_released_size(janus, case):
    copied = copy.copy(janus)
    copied.image_processor = JanusImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3)  # 384 pixels, min_size 14
    white = copied.processed(PIL.Image.new("RGB", (case["width"], case["height"]), "white"))[0] == 1  # on grey
    height, width = case["resized_height"], case["resized_width"]
    top, left = (384 - height) // 2, (384 - width) // 2
    expected = torch.zeros(384, 384, dtype=torch.bool)
    expected[top : top + height, left : left + width] = True
    assert torch.equal(white, expected)


def test_pictures_of_odd_shapes_and_modes(janus):
    grey = janus.processed(PIL.Image.new("L", (1, 1), 255))
    assert torch.equal(grey, torch.ones(3, 24, 24))
    assert torch.equal(janus.processed(PIL.Image.new("RGBA", (7, 7), (0, 0, 0, 0))), torch.ones(3, 24, 24))  # transparent on white
    for width, height in ((400, 1), (1, 400)):
        white = janus.processed(PIL.Image.new("1", (width, height), 1))[0] == 1
        assert white.sum() == 24 * 6  # min_size 6
        assert (white[:, 0].sum(), white[0].sum()) == ((6, 0) if width > height else (0, 6))


def test_features(janus):
    pixels = RECORDED["siglip.pixel_values"]
    with torch.no_grad():
        close(janus.hf.model.vision_model(pixels).last_hidden_state, RECORDED["siglip.features"])
        close(janus.prompt_image_embeds(pixels), RECORDED["siglip.aligner"])


# --- words ---------------------------------------------------------------------------------------------------------------


def test_text_has_deepseeks_ids(janus):
    for case in FACTS["tokenizer_cases"]:
        plain = not any(token in case["text"] for token in FACTS["tokens"])
        if plain:  # what users write makes no special tokens
            assert janus.encode_text(case["text"]) == case["ids_without_bos"]
        assert [janus.bos_id, *janus.tokenizer.encode(case["text"], add_special_tokens=False)] == case["ids"]
    assert {name: janus.token_id(name) for name in FACTS["tokens"]} == FACTS["tokens"]


@pytest.mark.parametrize("template", ["janus", "bare"])
def test_prompts_have_deepseeks_ids(janus, bare, template):
    model = {"janus": janus, "bare": bare}[template]
    (case,) = (c for c in FACTS["prompts"] if c["name"] == "one_image" and c["system_prompt"])
    row = model.encode_prompt(Document((Image(recorded_picture("land")), Text("What is in the picture?"))))
    assert with_placeholders(row) == case["expanded_ids"] == RECORDED["understand.input_ids"][0].tolist()
    close(row.pixels[0], RECORDED["understand.pixel_values"][0, 0], 1e-6)
    for case in FACTS["generation_prompts"]:
        row = model.encode_prompt(Document((Text(case["text"]),)))
        assert [*row.text_ids.tolist(), model.image_spec.begin_id] == case["ids"]
    (case,) = (c for c in FACTS["prompts"] if c["name"] == "text_only" and not c["system_prompt"])
    assert model.encode_prompt(Document((Text("Fold the paper in half"),))).text_ids.tolist() == case["ids"]


def test_the_familys_own_template_strips_and_writes_nothing_for_nothing(bare):
    (case,) = (c for c in FACTS["prompts"] if c["name"] == "empty_user" and not c["system_prompt"])
    for empty in (Document(()), Document((Text(" \n"),))):
        assert bare.encode_prompt(empty).text_ids.tolist() == case["ids"]
    ids = with_placeholders(bare.encode_prompt(Document((Image(recorded_picture("sq")),))))
    drawn = "<begin_of_image>" + "<image_placeholder>" * 36 + "<end_of_image>"
    written = f"{FACTS['system_prompt']}\n\n<|User|>: {drawn}\n\n<|Assistant|>:"  # one newline less than before a question
    assert ids == [bare.bos_id, *bare.tokenizer.encode(written, add_special_tokens=False)]


@pytest.mark.parametrize("begins", ["", "{{ bos_token }}", "<｜begin▁of▁sentence｜>", "\n<｜begin▁of▁sentence｜>"])
def test_the_begin_token_stands_first_and_once(janus, begins, monkeypatch):
    monkeypatch.setattr(janus, "template", begins.replace("\n", "{{ '\\n' }}") + janus.template)
    for document in (Document((Text("hello"),)), Document((Image(recorded_picture("sq")), Text("hello")))):
        ids = janus.encode_prompt(document).text_ids.tolist()
        assert ids[0] == janus.bos_id
        assert ids.count(janus.bos_id) == 1


def test_the_unconditional_prompt_is_padding_but_for_the_begin_tokens(janus):
    conditional, unconditional = RECORDED["image_generation_cfg5.input_ids"][:2].tolist()
    assert [*janus.unconditional_prompt(len(conditional) - 1), janus.image_spec.begin_id] == unconditional
    assert unconditional == RECORDED["gen.uncond_ids"].tolist()
    row = janus.encode_prompt(Document((Image(recorded_picture("sq")), Text("and then?"))))
    (prefix,) = branch_prefixes(janus, ImageSampling(guidance_scale=5.0), len(row), lambda: row)
    pad, begin = FACTS["tokens"]["<｜▁pad▁｜>"], janus.image_spec.begin_id
    assert prefix.text_ids.tolist() == [janus.bos_id, *[pad] * (len(row) - 1), begin]  # also where pictures stood
    assert (prefix.modality == Modality.TEXT).all()


def test_the_padding_is_found_by_its_name(folder, tmp_path):
    """Fine-tuned checkpoints often give the end token as padding."""
    copied, end = shutil.copytree(folder, tmp_path / "copied"), "<｜end▁of▁sentence｜>"
    if (copied / "generation_config.json").is_file():
        edit_json(copied / "generation_config.json", lambda settings: settings.update(pad_token_id=FACTS["tokens"][end]))
    else:
        edit_json(copied / "special_tokens_map.json", lambda tokens: tokens.update(pad_token=end))
    assert load_model(copied).unconditional_prompt(2)[1] == FACTS["tokens"]["<｜▁pad▁｜>"]


# --- logits, scores and pictures -----------------------------------------------------------------------------------------


def test_logits_of_prompts_with_a_picture_with_two_and_without(janus):
    ids, greedy = RECORDED["understand.input_ids"][0].tolist(), RECORDED["understand.greedy_new_tokens"][0].tolist()
    picture = RECORDED["understand.pixel_values"][0]
    logits = logits_of(janus, [row_of(janus, [*ids, *greedy], list(picture))])[0]
    close(logits[: len(ids)], RECORDED["understand.logits"][0])
    assert logits[len(ids) - 1 : -1].argmax(-1).tolist() == greedy
    turns = row_of(janus, RECORDED["understand_turns.input_ids"][0].tolist(), list(RECORDED["understand_turns.pixel_values"][0]))
    close(logits_of(janus, [turns])[0, -8:], RECORDED["understand_turns.logits_last8"][0])
    text = row_of(janus, RECORDED["text_only.input_ids"][0].tolist(), [])
    close(logits_of(janus, [text])[0, -8:], RECORDED["text_only.logits_last8"][0])


def test_logits_of_a_batch(janus):
    """DeepSeek pads on the left and gives zeros for missing pictures."""
    rows = []
    for index, mask in enumerate(RECORDED["understand_batch.attention_mask"].bool()):
        num_pictures = int(RECORDED["understand_batch.images_emb_mask"][index].sum()) // janus.num_features
        pixels = RECORDED["understand_batch.pixel_values"][index, :num_pictures]
        rows.append(row_of(janus, RECORDED["understand_batch.input_ids"][index, mask].tolist(), list(pixels)))
    logits = logits_of(janus, rows)
    for index, row in enumerate(rows):
        close(logits[index, len(row) - 8 : len(row)], RECORDED["understand_batch.logits_last8"][index])


def test_codes_are_embedded_and_scored_as_by_deepseek(janus):
    codes = RECORDED["gen.codes"]
    close(janus.embed_codes(codes.view(-1, 1)).view_as(RECORDED["gen.code_embeds"]).detach(), RECORDED["gen.code_embeds"])
    prompt = TokenRow.text(RECORDED["gen.cond_ids"].tolist()[:-1], 1)
    batch = collate([TokenRow.concat([prompt, janus.image_spec.row(c[:, None], chosen=True, step=0, begin_step=0)]) for c in codes])
    for name, scale, temperature in (
        ("gen.cond_logprobs", 1.0, 1.0),
        ("gen.guided_logprobs_cfg5", 5.0, 1.0),
        ("gen.guided_logprobs_cfg5_temperature0.7", 5.0, 0.7),
    ):
        params = SamplingParams(image=ImageSampling(guidance_scale=scale, temperature=temperature))
        with torch.no_grad():
            found = score(janus, batch, params).logprobs[..., 0][batch.image_mask].view_as(RECORDED[name])
        close(found, RECORDED[name], 1e-3 if scale > 1 else 1e-4)  # guided logits reach 31


@pytest.mark.parametrize("name", ["cfg5", "cfg1", "cfg5_prompt1"])
def test_greedy_pictures_are_deepseeks(janus, monkeypatch, name):
    ids = RECORDED[f"image_generation_{name}.input_ids"][0].tolist()
    scale = float(FACTS["image_generation"][name]["cfg_weight"])
    params = SamplingParams(image=ImageSampling(guidance_scale=scale)).greedy()
    (drawn,) = drawn_first(janus, TokenRow.text(ids[:-1], 1), params, monkeypatch).document.images
    assert torch.equal(drawn.codes[:, 0], RECORDED[f"image_generation_{name}.codes"][0])
    pixels = torch.from_numpy(np.array(drawn.pixels)).int()
    assert (pixels - RECORDED[f"image_generation_{name}.pixels_uint8"][0].int()).abs().max() <= 1  # rounded here, cut off there


def test_an_interleaved_answer_is_laid_out_and_scored_as_recorded(janus):
    facts, ids = FACTS["interleaved"], RECORDED["interleaved.input_ids"]
    first, second = facts["answer_texts"]
    images = [Image(codes=codes[:, None]) for codes in RECORDED["interleaved.codes"]]
    prompt = Document((Image(recorded_picture("big")), Text("Draw the next step.")))
    answer = Document((Text(first.removeprefix(" ")), images[0], Text(second), images[1], Text(facts["tail"])))
    row = janus.encode_example(prompt, answer)
    assert with_placeholders(row) == ids.tolist()
    assert row.prompt_length == facts["prompt_length"]
    kinds = torch.tensor([Modality.TEXT, Modality.FEATURE, Modality.IMAGE])[RECORDED["interleaved.kind"]]
    assert torch.equal(row.modality, kinds)
    answered = RECORDED["interleaved.answer"]
    assert torch.equal(row.completion_mask, (answered == 1) | (answered == 2))
    close(row.pixels[0], RECORDED["interleaved.pixel_values"][0], 1e-6)
    with torch.no_grad():
        logprobs = score(janus, collate([row])).logprobs[0, :, 0]
    close(logprobs[answered == 1], RECORDED["interleaved.text_logprobs"][answered == 1])
    close(logprobs[answered == 2], RECORDED["interleaved.image_logprobs"].flatten())


# --- files ---------------------------------------------------------------------------------------------------------------


def test_a_config_that_leaves_the_head_open_does_not_tie_it(converted, tmp_path):
    """JanusConfig's default is a tied head. DeepSeek's config says nothing of it anyway."""
    copied = shutil.copytree(converted, tmp_path / "copied")
    edit_json(copied / "config.json", lambda config: config.pop("tie_word_embeddings"))
    model, janus = load_model(copied), load_model(converted)
    assert torch.equal(model.hf.lm_head.weight, janus.hf.lm_head.weight)
    assert not torch.equal(model.hf.lm_head.weight, model.hf.get_input_embeddings().weight)
    model.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(load_model(tmp_path / "saved").hf.lm_head.weight, janus.hf.lm_head.weight)


# --- DeepSeek's files ----------------------------------------------------------------------------------------------------


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def rewritten(deepseek: Path, folder: Path, kind: str, weights: dict[str, torch.Tensor] | None = None) -> Path:
    """The same checkpoint in other files: "bin", "safetensors", "sharded bin", "sharded safetensors"."""
    shutil.copytree(deepseek, folder, ignore=shutil.ignore_patterns("model*"))
    weights = weights_of(deepseek) if weights is None else weights
    sharded, suffix = kind.startswith("sharded"), kind.split()[-1]
    stem = "pytorch_model" if suffix == "bin" else "model"
    files = [f"{stem}-{i + 1:05d}-of-00003.{suffix}" for i in range(3)] if sharded else [f"{stem}.{suffix}"]
    shards = {file: dict(list(weights.items())[i :: len(files)]) for i, file in enumerate(files)}
    for file, content in shards.items():
        if suffix == "bin":
            torch.save(content, folder / file)
        else:
            save_file(content, folder / file, metadata={"format": "pt"})
    if sharded:
        index = {"metadata": {}, "weight_map": {name: file for file, content in shards.items() for name in content}}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder


def assert_equal_states(found: UnifiedModel, expected: UnifiedModel) -> None:
    states = found.state_dict(), expected.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.fixture(scope="module")
def original(deepseek) -> UnifiedModel:
    return load_model(deepseek)


def test_both_layouts_are_the_same_model(original, converted):
    other = load_model(converted)
    assert_equal_states(original, other)
    assert original.image_spec == other.image_spec
    assert tokenizer_hash(original) == tokenizer_hash(other)  # one `code_cache` serves both
    assert original.system_prompt == other.system_prompt
    for prompt in prompts()[:2]:
        assert torch.equal(original.encode_prompt(prompt).text_ids, other.encode_prompt(prompt).text_ids)
    assert original.hf.config.image_token_id == other.hf.config.image_token_id
    assert [key for key, value in vars(original.hf.config.text_config).items() if value != vars(other.hf.config.text_config).get(key)] == []


@pytest.mark.parametrize("kind", ["bin", "sharded bin", "sharded safetensors"])
def test_weights_are_read_from_every_kind_of_file_and_saved_with_the_same_keys(kind, deepseek, original, tmp_path, monkeypatch):
    folder = rewritten(deepseek, tmp_path / "other", kind)
    (folder / "model.safetensors.index.json.lock").write_text("")
    model = load_model(folder)
    assert_equal_states(model, original)
    assert all(torch.equal(value, weights_of(deepseek)[name]) for name, value in model.deepseek.unused.items())
    monkeypatch.setattr(janus_layout, "MAX_SHARD_SIZE", "1MB")
    shutil.rmtree(folder)  # nothing is read from there any more
    model.save(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "saved").glob("model-*.safetensors"))
    assert len(files) == 4
    assert sorted(set(index["weight_map"].values())) == files
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "saved" / file)
    saved, expected = weights_of(tmp_path / "saved"), weights_of(deepseek)
    assert saved.keys() == index["weight_map"].keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in saved.items())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in expected.values())
    assert_equal_states(load_model(tmp_path / "saved"), original)


def test_a_saved_checkpoint_is_the_one_that_was_read(deepseek, original, tmp_path):
    original.save(tmp_path / "saved")
    names = sorted(path.name for path in deepseek.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "saved").iterdir())
    assert all((tmp_path / "saved" / name).read_bytes() == (deepseek / name).read_bytes() for name in names if name != "model.safetensors")
    saved, expected = weights_of(tmp_path / "saved"), weights_of(deepseek)
    assert len(expected) == 276
    assert {name: value.shape for name, value in saved.items()} == {name: value.shape for name, value in expected.items()}
    assert all(torch.equal(value, expected[name]) for name, value in saved.items())


def test_weights_do_not_depend_on_the_files_that_they_were_read_from(deepseek, original, tmp_path):
    for kind in ("bin", "safetensors"):
        folder = rewritten(deepseek, tmp_path / kind, kind)
        model = load_model(folder)
        path = folder / ("pytorch_model.bin" if kind == "bin" else "model.safetensors")
        size = path.stat().st_size
        with path.open("r+b") as file:  # in place, where a mapped page would show it
            file.write(b"\0" * size)
        assert_equal_states(model, original)
        model.save(folder)  # over itself
        (folder / "pytorch_model.bin").unlink(missing_ok=True)
        assert_equal_states(load_model(folder), original)


@pytest.mark.parametrize(
    ("text", "num_keys", "digest"),
    [
        ({"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_hidden_layers": 24}, 868, "7c4852d66c8473d9"),
        ({"num_hidden_layers": 30}, 922, "5d8e999515bf586a"),
    ],
    ids=["1B", "7B"],
)
def test_keys_and_shapes_at_the_released_sizes(text, num_keys, digest, deepseek, tmp_path):
    """Digests of the keys of DeepSeek's classes, built at these sizes, with their shapes and their names in transformers."""
    folder = shutil.copytree(deepseek, tmp_path / "x", ignore=shutil.ignore_patterns("model*"))
    width = text.get("hidden_size", 4096)

    def enlarge(config):
        config["language_config"] = {"max_position_embeddings": 16384, "model_type": "llama", "vocab_size": 102400, **text}
        config["vision_config"]["params"] = {
            "image_size": 384, "model_name": "siglip_large_patch16_384", "select_feature": "same", "select_layer": -1,
        }  # fmt: skip
        config["gen_vision_config"]["params"] = {"image_token_size": 16384, "n_embed": 8}
        config["aligner_config"]["params"].update(input_dim=1024, n_embed=width)
        config["gen_aligner_config"]["params"].update(n_embed=width)
        config["gen_head_config"]["params"] = {"image_token_embed": width, "image_token_size": 16384, "n_embed": width}

    edit_json(folder / "config.json", enlarge)
    edit_json(folder / "processor_config.json", lambda settings: settings.update(num_image_tokens=576))
    config = janus_layout.stock_config(folder)
    with torch.device("meta"):
        hf = JanusForConditionalGeneration(config)
    shapes = janus_layout.deepseek_shapes(hf)
    assert len(shapes) == num_keys
    lines = sorted(f"{name} {list(shape)} {janus_layout.stock_names(name)}" for name, shape in shapes.items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == digest
    named = [stock for name in shapes for stock in janus_layout.stock_names(name)]
    assert sorted(named) == sorted(hf.state_dict())
    assert config.text_config.num_attention_heads == config.text_config.num_key_value_heads
    assert config.text_config.rms_norm_eps == 1e-6


@pytest.mark.parametrize("stage", ["warmup", "grpo"])
def test_what_is_trained_loads_again_and_in_transformers_after_conversion(stage, deepseek, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    records, before = write_records(tmp_path / "records"), weights_of(deepseek)
    if stage == "warmup":
        trained = warmup(warmup_config(deepseek, tmp_path / "run", records, "janus"))
    else:
        sampling = {"max_images": 1, "max_text_tokens": 24, "image": {"guidance_scale": 2.0}}
        trained = grpo(grpo_config(deepseek, tmp_path / "run", records, "janus", num_generations=4, sampling=sampling))
    saved = tmp_path / "run" / "checkpoints" / "step_1" / "model"
    assert (saved / "config.json").read_bytes() == (deepseek / "config.json").read_bytes()
    after = weights_of(saved)
    assert {name: value.shape for name, value in after.items()} == {name: value.shape for name, value in before.items()}
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert any(name.startswith("language_model.model.layers.1.") for name in changed)
    assert not any(name.startswith(("vision_model.", "gen_vision_model.")) for name in changed)
    assert_equal_states(load_model(saved), trained)
    stock = JanusForConditionalGeneration.from_pretrained(convert(saved, tmp_path / "converted"))
    row = trained.encode_prompt(Document((Text("hello"),)))
    with torch.no_grad():
        close(logits_of(trained, [row]), stock(input_ids=row.text_ids[None]).logits)


def test_adapters_and_merging(deepseek, original, tmp_path):
    model = load_model(deepseek)
    attach_lora(model, LoraConfig(r=4, train_in_full=("generation_head",)), {"source": str(deepseek), "load_in_4bit": False})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    model.save(tmp_path / "adapter")
    loaded, row = load_model(tmp_path / "adapter"), original.encode_prompt(prompts()[0])
    expected = logits_of(model, [row])
    assert not torch.equal(expected, logits_of(original, [row]))
    assert torch.equal(logits_of(loaded, [row]), expected)
    assert examine(str(tmp_path / "adapter")).problems == []
    loaded.adapter.merge().save(tmp_path / "merged")
    close(logits_of(load_model(tmp_path / "merged"), [row]), expected)
    assert weights_of(tmp_path / "merged").keys() == weights_of(deepseek).keys()


def test_4_bits(deepseek, original, tmp_path):
    pytest.importorskip("bitsandbytes")
    model = load_model(rewritten(deepseek, tmp_path / "bin", "bin"), load_in_4bit=True)
    kinds = {type(module).__name__ for module in model.language_model.layers.modules()}
    assert "Linear4bit" in kinds
    row = original.encode_prompt(prompts()[1])
    near, exact = logits_of(model, [row]), logits_of(original, [row])
    assert torch.nn.functional.cosine_similarity(near.flatten(), exact.flatten(), dim=0) > 0.9
    with pytest.raises(ValueError, match="4-bit weights cannot be written in DeepSeek's layout"):
        model.save(tmp_path / "saved")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_the_weights_own_type_counts_and_a_saved_config_names_it(kind, deepseek, tmp_path):
    """config.json says float32 here, files bfloat16."""
    weights = {name: value.bfloat16() for name, value in weights_of(deepseek).items()}
    folder = rewritten(deepseek, tmp_path / "half", kind, weights)
    model = load_model(folder)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model.save(tmp_path / "saved")
    assert all(torch.equal(value, weights[name]) for name, value in weights_of(tmp_path / "saved").items())
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "saved"))
    assert after == {**before, "torch_dtype": "bfloat16"}
    assert load_model(folder, dtype="float32").dtype == torch.float32


def test_files_of_old_torch_and_what_old_files_hold_besides(deepseek, original, tmp_path):
    weights = {**weights_of(deepseek), "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    folder = rewritten(deepseek, tmp_path / "x", "bin", weights)
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_equal_states(load_model(folder), original)
    assert examine(str(folder)).problems == []


def test_a_tied_head(deepseek, tmp_path):
    """No release has one. It is not in the files, and is not written."""
    weights = {name: value for name, value in weights_of(deepseek).items() if name != janus_layout.HEAD}
    folder = rewritten(deepseek, tmp_path / "x", "safetensors", weights)
    with pytest.raises(ValueError, match=r"lacks 1 weights .*first: language_model\.lm_head\.weight"):
        load_model(folder)
    edit_json(folder / "config.json", lambda config: config["language_config"].update(tie_word_embeddings=True))
    model = load_model(folder)
    assert model.hf.lm_head.weight is model.hf.get_input_embeddings().weight
    assert examine(str(folder)).problems == []
    model.save(tmp_path / "saved")
    assert weights_of(tmp_path / "saved").keys() == weights.keys()
    assert_equal_states(load_model(tmp_path / "saved"), model)


def test_a_model_is_known_by_its_bin_files(deepseek, tmp_path):
    folder = rewritten(deepseek, tmp_path / "bin", "bin")
    before = of_model(str(folder), False)
    assert "pytorch_model.bin" in before["files"]
    weights = weights_of(deepseek)
    weights["gen_embed.weight"][0, 0] += 1
    torch.save(weights, folder / "pytorch_model.bin")
    assert of_model(str(folder), False)["hash"] != before["hash"]


def edited(deepseek: Path, folder: Path, file: str, change) -> Path:
    copied = Path(shutil.copytree(deepseek, folder))
    edit_json(copied / file, change)
    return copied


def test_roles_of_the_first_release(deepseek, tmp_path):
    folder = edited(deepseek, tmp_path / "old", "processor_config.json", lambda settings: settings.update(sft_format="deepseek_old"))
    (case,) = (c for c in FACTS["prompts"] if c["sft_format"] == "deepseek_old")
    model = load_model(folder)
    row = model.encode_prompt(Document((Image(recorded_picture("land")), Text("What is in the picture?"))))
    begin, placeholder, end = (FACTS["tokens"][name] for name in ("<begin_of_image>", "<image_placeholder>", "<end_of_image>"))
    at = case["ids"].index(placeholder)
    assert with_placeholders(row) == [*case["ids"][:at], begin, *[placeholder] * 36, end, *case["ids"][at + 1 :]]
    assert load_model(rewritten(folder, tmp_path / "x", "safetensors")).template == model.template


def test_system_prompt_and_names_of_tokens_come_from_the_processors_settings(deepseek, original, tmp_path):
    changes = {"system_prompt": "Be brief.", "image_tag": "<patch_placeholder>", "image_start_tag": "<|ref|>", "pad_tag": "<|det|>"}
    model = load_model(edited(deepseek, tmp_path / "x", "processor_config.json", lambda settings: settings.update(changes)))
    row = model.encode_prompt(Document((Image(recorded_picture("sq")), Text("hello"))))
    begin, end = (model.tokenizer.convert_tokens_to_ids(token) for token in ("<|ref|>", "<end_of_image>"))
    written = [model.tokenizer.encode(text, add_special_tokens=False) for text in ("Be brief.\n\n<|User|>: ", "\nhello\n\n<|Assistant|>:")]
    assert row.text_ids.tolist() == [model.bos_id, *written[0], begin, *[0] * 36, end, *written[1]]
    assert model.unconditional_prompt(3)[1:] == [model.tokenizer.convert_tokens_to_ids("<|det|>")] * 2
    (tmp_path / "x" / "processor_config.json").write_text('{"num_image_tokens": 36, "system_prompt": ""}')
    model = load_model(tmp_path / "x")
    assert model.encode_prompt(prompts()[1]).text_ids[1] == model.token_id("<|User|>")
    (tmp_path / "x" / "tokenizer_config.json").write_text(
        (deepseek / "tokenizer_config.json").read_text().replace('"use_default_system_prompt": true', '"use_default_system_prompt": false')
    )
    assert load_model(deepseek).system_prompt == original.system_prompt != ""  # DeepSeek's code does not ask


def test_a_placeholder_that_the_tokenizer_lacks_is_added(deepseek, tmp_path):
    changed = edited(deepseek, tmp_path / "x", "processor_config.json", lambda settings: settings.update(image_tag="<picture_here>"))
    model = load_model(changed)
    number = model.token_id("<picture_here>")
    assert number == 409  # the first that is free
    assert number in model.forbidden_text_ids()
    assert model.encode_prompt(prompts()[1]).modality.eq(Modality.FEATURE).sum() == 36
    assert examine(str(changed)).problems == []
    model.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").read_bytes() == (deepseek / "tokenizer.json").read_bytes()


def test_settings_of_pictures_that_are_left_out_are_deepseeks(deepseek, tmp_path):
    def written(**settings) -> PIL.Image.Image:
        (tmp_path / "x" / "preprocessor_config.json").write_text(json.dumps({"image_size": 24, **settings}))
        return janus_layout.image_processor(tmp_path / "x")

    shutil.copytree(deepseek, tmp_path / "x")
    found = written(background_color=[1, 2, 3])
    assert (found.min_size, found.rescale_factor, found.do_normalize) == (14, 1 / 255, True)
    assert tuple(found.background_color) == (122, 116, 104)  # CLIP's mean, int(mean * 255); what the file says is not used
    assert list(found.image_std) == [0.26862954, 0.26130258, 0.27577711]
    found = written(image_mean=None, do_normalize=False, min_size=6)
    assert tuple(found.background_color) == (127, 127, 127)
    assert found.min_size == 6
    with pytest.raises(ValueError, match=r"image_mean or image_std in .* is null, but do_normalize is true"):
        written(image_mean=None)
    with pytest.raises(ValueError, match=r"image_size in .* is 48, but vision_config\.params\.image_size in config\.json is 24"):
        written(image_size=48)
    with pytest.raises(ValueError, match=r"image_size in .* is None; it must be a whole number"):
        written(image_size=None)
    (tmp_path / "x" / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"preprocessor_config\.json cannot be read"):
        load_model(tmp_path / "x")


def test_what_the_configs_say_reaches_transformers(deepseek, tmp_path):
    def change(config):
        config["language_config"].update(
            rms_norm_eps=1e-5, rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0}, _attn_implementation="flash_attention_2"
        )
        config["vision_config"]["params"]["select_layer"] = -2
        config["aligner_config"]["params"]["depth"] = 3
        config["bf16"] = True  # leftovers of trainings
        config["hidden_size"] = 7

    config = janus_layout.stock_config(edited(deepseek, tmp_path / "x", "config.json", change))
    assert config.text_config.rms_norm_eps == 1e-5
    rope = config.text_config.rope_parameters
    assert (rope["rope_theta"], rope["rope_type"], rope["factor"]) == (5e5, "linear", 2.0)
    assert config.vision_config.num_hidden_layers == 2  # of 3 blocks
    assert (config.vision_config.depth, config.vq_config.num_hidden_layers) == (3, 2)
    assert config.tie_word_embeddings is False
    with torch.device("meta"):
        names = janus_layout.deepseek_shapes(JanusForConditionalGeneration(config))
    assert "aligner.layers.4.weight" in names
    assert "vision_model.vision_tower.blocks.2.norm1.weight" not in names


def in_params(section: str, **values):
    return lambda config: config[f"{section}_config"]["params"].update(values)


WRONG_CONFIGS = {
    "JanusFlow": (lambda c: c.update(vision_und_enc_config={}), "is JanusFlow's, which draws by rectified flow"),
    "DeepSeek-VL": (lambda c: [c.pop(name) for name in list(c) if name.startswith("gen_")], "it is DeepSeek-VL's or another"),
    "a section": (lambda c: c.pop("gen_head_config"), "has no section gen_head_config, which DeepSeek's own layout of Janus needs"),
    "the decoder": (lambda c: c.pop("language_config"), "has no section language_config"),
    "another decoder": (lambda c: c["language_config"].update(model_type="qwen2"), "has model_type 'qwen2'; only 'llama'"),
    "decoder nonsense": (lambda c: c["language_config"].update(hidden_size="wide"), "config.json cannot be used"),
    "tower": (lambda c: [in_params("vision", model_name="vit_x")(c), c["vision_config"]["params"].pop("width")], "'vit_x', whose sizes"),
    "class": (lambda c: c["vision_config"].update(cls="HybridVisionTower"), r"vision_config\.cls in .* is 'HybridVisionTower'; only"),
    "features": (in_params("vision", select_feature="patch"), r"select_feature in .* is 'patch'; only 'same'"),
    "layer": (in_params("vision", select_layer=-9), "select_layer in .* is -9, but the tower has 3 layers"),
    "normalisation": (in_params("vision", pixel_mean=[0.5], pixel_std=[0.5]), "have pixel_mean and pixel_std"),
    "size": (in_params("vision", image_size="24"), r"vision_config\.params\.image_size in .* is '24'; it must be a positive number"),
    "grids": (in_params("gen_vision", ch_mult=[1, 2]), r"a grid of 6 x 6 positions for pictures that are read and 12 x 12 for drawn"),
    "levels": (in_params("gen_vision", ch_mult=4), "ch_mult in .* is 4; it must be a list of whole numbers"),
    "codes": (in_params("gen_head", image_token_size=64), r"gen_head_config\.params\.image_token_size in .* is 64, where 256 follows"),
    "embedding": (in_params("gen_head", image_token_embed=32), r"image_token_embed in .* is 32, where 64 follows"),
    "width": (in_params("aligner", n_embed=32), r"aligner_config\.params\.n_embed in .* is 32, where 64 follows"),
    "projector": (in_params("gen_aligner", projector_type="linear"), r"gen_aligner_config\.params\.projector_type in .* is 'linear'; only"),
    "no number": (lambda c: c["gen_aligner_config"]["params"].pop("input_dim"), r"gen_aligner_config\.params\.input_dim in .* is None"),
}


@pytest.mark.parametrize("what", WRONG_CONFIGS)
def test_configs_that_cannot_be_loaded_are_refused_by_name(what, deepseek, tmp_path):
    change, message = WRONG_CONFIGS[what]
    folder = edited(deepseek, tmp_path / "x", "config.json", change)
    with pytest.raises(ValueError, match=message):
        load_model(folder)
    problems = examine(str(folder)).problems
    assert any(re.search(message, problem) for problem in problems), problems


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_image_tokens": 35}, r"num_image_tokens in .* is 35, but the pictures of .* have 6 x 6 positions"),
        ({"sft_format": "plain"}, "sft_format in .* is 'plain'; known are deepseek, deepseek_old"),
        ({"add_special_token": True}, "add_special_token in .* is true"),
        ({"image_start_tag": "<nowhere>"}, "has no token '<nowhere>', which janus needs|lacks '<nowhere>', which janus needs"),
    ],
)
def test_processor_settings_that_cannot_be_followed_are_refused_by_name(settings, message, deepseek, tmp_path):
    folder = edited(deepseek, tmp_path / "x", "processor_config.json", lambda content: content.update(settings))
    with pytest.raises(ValueError, match=message):
        load_model(folder)
    assert any(re.search(message, problem) for problem in examine(str(folder)).problems)


@pytest.mark.parametrize("kind", ["safetensors", "bin", "sharded safetensors", "sharded bin"])
def test_broken_weights_are_named(kind, deepseek, tmp_path):
    weights = weights_of(deepseek)
    key = "vision_model.vision_tower.blocks.1.attn.qkv.weight"
    without = rewritten(deepseek, tmp_path / "without", kind, {name: value for name, value in weights.items() if name != key})
    others = {name: value for name, value in weights.items() if name != janus_layout.EMBEDDING}
    unembedded = rewritten(deepseek, tmp_path / "unembedded", kind, others)
    extra = rewritten(deepseek, tmp_path / "extra", kind, {**weights, "gen_vision_model.extra.weight": torch.zeros(2)})
    shape = rewritten(deepseek, tmp_path / "shape", kind, {**weights, key: weights[key][:, :-1].contiguous()})
    cut = rewritten(deepseek, tmp_path / "cut", kind)
    file = sorted([*cut.glob("*.bin"), *cut.glob("*.safetensors")])[-1]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    gone = rewritten(deepseek, tmp_path / "gone", kind)
    sorted([*gone.glob("*.bin"), *gone.glob("*.safetensors")])[-1].unlink()
    for folder, loading, doctor in (
        (without, rf"lacks 3 weights of .*first: {re.escape(key)}", rf"lacks 1 tensor \({re.escape(key)}\) of Janus"),
        (unembedded, rf"lacks 1 weights of .*first: {re.escape(janus_layout.EMBEDDING)}", "lacks 1 tensor"),
        (extra, r"holds 1 weights .*first: gen_vision_model\.extra\.weight", r"holds 1 tensor \(gen_vision_model\.extra\.weight\)"),
        (shape, rf"in another shape \(first: {re.escape(key)}\)", rf"in another shape: {re.escape(key)} is \[144, 47\]"),
        (cut, rf"{file.name} cannot be (read|loaded)", rf"{file.name} (cannot be read|is truncated|is no safetensors)"),
        (gone, r"lacks .*, which .*index\.json names|has no weights: neither", r"is missing|has no weights: neither"),
    ):
        with pytest.raises(ValueError, match=loading):
            load_model(folder)
        problems = examine(str(folder)).problems
        assert any(re.search(doctor, problem) for problem in problems), (folder, problems)
    (cut / "config.json").write_text(json.dumps({"model_type": "multi_modality"}))
    assert examine(str(cut)).problems


@pytest.mark.parametrize("kind", ["safetensors", "bin", "sharded bin"])
def test_the_doctor_reads_this_layout(kind, deepseek, original, converted, tmp_path):
    found, other = examine(str(rewritten(deepseek, tmp_path / "x", kind))), examine(str(converted))
    assert found.problems == []
    assert found.family == "janus"
    assert (found.parameters, found.architecture, found.image) == (other.parameters, other.architecture, other.image)
    assert found.parameters["total"] == sum(value.numel() for value in original.state_dict().values() if value.is_floating_point())
    assert found.dtypes == {"F32": sum(value.numel() for value in weights_of(deepseek).values())}
    assert (found.memory, found.lora_targets, found.special_tokens) == (other.memory, other.lora_targets, other.special_tokens)


def test_code_in_a_bin_file_is_not_run(deepseek, tmp_path):
    folder = rewritten(deepseek, tmp_path / "x", "bin", {"weights": Path("/")})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"pytorch_model\.bin cannot be read"):
        load_model(folder)
    torch.save(torch.zeros(2), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds more than tensors by name"):
        load_model(folder)


@pytest.mark.parametrize("kind", ["bin", "sharded bin", "both"])
def test_bin_files_are_fetched_where_a_repository_has_no_others(kind, deepseek, original, tmp_path, monkeypatch):
    repository = rewritten(deepseek, tmp_path / "repository", "bin" if kind == "both" else kind)
    if kind == "both":
        shutil.copy(deepseek / "model.safetensors", repository)
    (repository / "optimizer.bin").write_bytes(b"0")
    calls, commit = [], tmp_path / "snapshots" / ("a" * 40)

    def fetch(name: str, revision: str | None = None, allow_patterns=None, ignore_patterns=None) -> str:
        calls.append(revision)
        files = [path.name for path in repository.iterdir()]
        commit.mkdir(parents=True, exist_ok=True)
        for file in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            shutil.copy(repository / file, commit)
        return str(commit)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert_equal_states(load_model("deepseek-ai/Janus-Pro-1B"), original)
    assert calls == ([None] if kind == "both" else [None, commit.name])
    bins = sorted(path.name for path in commit.glob("*.bin"))
    assert bins == ([] if kind == "both" else sorted(path.name for path in repository.glob("pytorch_model*.bin")))
