"""Checkpoints of Janus in DeepSeek's own layout: configs and weights, read, written, trained and examined, and what is refused of them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import PIL.Image
import pytest
import torch
from family_data import prompts, write_records
from huggingface_hub.utils import filter_repo_objects
from janus_data import FACTS, close, convert, logits_of, recorded_picture, with_placeholders
from safetensors.torch import load_file, save_file
from test_family_training import grpo_config, warmup_config
from toy_checkpoints import edit_json
from transformers import JanusForConditionalGeneration

from diptych.config import LoraConfig
from diptych.doctor import examine
from diptych.document import Document, Image, Text
from diptych.models import UnifiedModel, janus_config, janus_weights, load_model
from diptych.models.codes import tokenizer_hash
from diptych.models.fingerprint import of_model
from diptych.models.lora import attach_lora
from diptych.tokens import Modality
from diptych.training.grpo import grpo
from diptych.training.warmup import warmup


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
    monkeypatch.setattr(janus_weights, "MAX_SHARD_SIZE", "1MB")
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
    weights = {name: value for name, value in weights_of(deepseek).items() if name != janus_weights.HEAD}
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
        return janus_config.image_processor(tmp_path / "x")

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

    config = janus_config.stock_config(edited(deepseek, tmp_path / "x", "config.json", change))
    assert config.text_config.rms_norm_eps == 1e-5
    rope = config.text_config.rope_parameters
    assert (rope["rope_theta"], rope["rope_type"], rope["factor"]) == (5e5, "linear", 2.0)
    assert config.vision_config.num_hidden_layers == 2  # of 3 blocks
    assert (config.vision_config.depth, config.vq_config.num_hidden_layers) == (3, 2)
    assert config.tie_word_embeddings is False
    with torch.device("meta"):
        names = janus_weights.deepseek_shapes(JanusForConditionalGeneration(config))
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
    others = {name: value for name, value in weights.items() if name != janus_weights.EMBEDDING}
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
        (unembedded, rf"lacks 1 weights of .*first: {re.escape(janus_weights.EMBEDDING)}", "lacks 1 tensor"),
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
