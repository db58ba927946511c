"""Janus' adapter against recordings of DeepSeek's own code, on its toy checkpoint in its own layout and converted to transformers'."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from family_data import drawn
from janus_data import FACTS, RECORDED, close, logits_of, recorded_picture, with_placeholders
from toy_checkpoints import edit_json
from transformers import JanusForConditionalGeneration
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from diptych.config import ImageSampling, SamplingParams
from diptych.document import Document, Image, Text
from diptych.models import UnifiedModel, janus_config, janus_weights, load_model
from diptych.models.codes import tokenizer_hash
from diptych.sampling.guidance import branch_prefixes
from diptych.sampling.logprobs import score
from diptych.tokens import AnswerForm, Modality, TokenRow, collate

PICTURES = ("land", "port", "sq", "big", "thin")


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


def row_of(janus: UnifiedModel, ids: list[int], pixels: list[torch.Tensor]) -> TokenRow:
    """Recorded ids, with a picture at each run of placeholders."""
    placeholder, pictures, rows = FACTS["tokens"]["<image_placeholder>"], list(pixels), []
    while placeholder in ids:
        at = ids.index(placeholder)
        rows += [TokenRow.text(ids[:at], 1), TokenRow.feature(pictures.pop(0), janus.num_features, 1)]
        ids = ids[at + janus.num_features :]
    assert not pictures
    return TokenRow.concat([*rows, TokenRow.text(ids, 1)])


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
    duplicated = copy.deepcopy(janus)
    codebook = duplicated.hf.model.vqmodel.quantize.embedding.weight
    with torch.no_grad():
        codebook[128:] = 2 * codebook[:128]  # the same directions, and lengths that round alike
    before = codebook.clone()
    codes = duplicated.encode_images(RECORDED["vq.pixels"])
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
def test_greedy_pictures_are_deepseeks(janus, name):
    ids = RECORDED[f"image_generation_{name}.input_ids"][0].tolist()
    scale = float(FACTS["image_generation"][name]["cfg_weight"])
    params = SamplingParams(image=ImageSampling(guidance_scale=scale)).greedy()
    begin = TokenRow.text(ids[-1:], 1, step=0)
    prompt = dataclasses.replace(TokenRow.concat([TokenRow.text(ids[:-1], 1), begin]), form=AnswerForm.IMAGE)
    (image,) = drawn(janus, prompt, params).document.images
    assert torch.equal(image.codes[:, 0], RECORDED[f"image_generation_{name}.codes"][0])
    pixels = torch.from_numpy(np.array(image.pixels)).int()
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


# --- names of weights -----------------------------------------------------------------------------------------------------


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
    config = janus_config.stock_config(folder)
    with torch.device("meta"):
        hf = JanusForConditionalGeneration(config)
    shapes = janus_weights.deepseek_shapes(hf)
    assert len(shapes) == num_keys
    lines = sorted(f"{name} {list(shape)} {janus_weights.stock_names(name)}" for name, shape in shapes.items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == digest
    named = [stock for name in shapes for stock in janus_weights.stock_names(name)]
    assert sorted(named) == sorted(hf.state_dict())
    assert config.text_config.num_attention_heads == config.text_config.num_key_value_heads
    assert config.text_config.rms_norm_eps == 1e-6
