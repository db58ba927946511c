"""Checkpoint folders that will not do: each is refused with a message that says what is wrong and what to do."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from family_data import SIZE, prompts
from toy_checkpoints import MAKERS, edit_json

from diptych.models import load_model
from diptych.models.loading import FAMILIES

DATA = Path(__file__).parent / "data" / "vila_u"


def broken(folders: dict[str, Path], name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders[name], tmp_path / name))


def test_unknown_families_and_folders_are_named(folders, tmp_path):
    folder = broken(folders, "janus", tmp_path)
    edit_json(folder / "config.json", lambda config: config.update(model_type="show_o"))
    with pytest.raises(ValueError, match="model_type 'show_o'; known families are " + ", ".join(FAMILIES)):
        load_model(folder)
    edit_json(folder / "config.json", lambda config: config.update(model_type="multi_modality"))
    with pytest.raises(ValueError, match=r"has no section .*gen_head_config.*; Janus and Janus-Pro can be loaded"):
        load_model(folder)
    edit_json(folder / "config.json", lambda config: config.update(model_type="Emu3"))
    with pytest.raises(ValueError, match=r"BAAI's own layout of Emu3; use the conversion for transformers"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        load_model(folder)
    with pytest.raises(ValueError, match="dtype is 'float8'; allowed are auto, float32, bfloat16"):
        load_model(folder, dtype="float8")


@pytest.mark.parametrize("name", ["janus", "emu3", "chameleon", "vila_u"])
def test_missing_truncated_and_wrong_weights_are_named(name, folders, tmp_path):
    folder = tmp_path / name
    MAKERS[name](folder, **({} if name == "vila_u" else {"shards": True}))
    part = folder / "llm" if name == "vila_u" else folder
    shard = sorted(part.glob("model-*.safetensors"))[-1]
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(ValueError, match=rf"{shard.name}|cannot be loaded"):
        load_model(folder, image_size=SIZE.get(name))
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(folder, image_size=SIZE.get(name))
    shard.write_bytes(content)
    edit_json(part / "config.json", lambda config: config.get("text_config", config).update(intermediate_size=64))
    with pytest.raises(ValueError, match=r"in another shape|cannot be loaded"):
        load_model(folder, image_size=SIZE.get(name))


@pytest.mark.parametrize("name", ["janus", "emu3", "chameleon", "vila_u", "vila_u depth", "vila_u siglip"])
def test_weights_that_the_config_leaves_no_place_for_are_refused(name, folders, tmp_path):
    """They would be lost when the model is saved, and a model with fewer layers is another model."""
    folder = broken(folders, name.split()[0], tmp_path)
    if name == "vila_u depth":
        edit_json(folder / "vision_tower" / "config.json", lambda config: config["rqtransformer"]["head"].update(n_layer=1))
    elif name == "vila_u siglip":
        edit_json(folder / "siglip_config" / "config.json", lambda config: config.get("vision_config", config).update(num_hidden_layers=2))
    else:
        part = folder / "llm" if name == "vila_u" else folder
        edit_json(part / "config.json", lambda config: config.get("text_config", config).update(num_hidden_layers=1))
    with pytest.raises(ValueError, match=r"no place for .*from one release"):
        load_model(folder, image_size=SIZE.get(name))


@pytest.mark.parametrize(
    ("name", "token"), [("janus", "<begin_of_image>"), ("emu3", "<|extra_201|>"), ("chameleon", "<racm3:break>"), ("vila_u", "<im_end>")]
)
def test_a_tokenizer_without_the_image_tokens_is_named(name, token, models, folders, tmp_path, monkeypatch):
    model = copy.copy(models[name])
    vocabulary = {k: v for k, v in model.tokenizer.get_vocab().items() if k != token}
    monkeypatch.setattr(type(model.tokenizer), "get_vocab", lambda self: vocabulary)
    with pytest.raises(ValueError, match=f"has no token '{token}'.*came with the checkpoint".replace("|", r"\|")):
        load_model(folders[name], image_size=SIZE.get(name))


def test_a_misread_tokenizer_is_refused(folders, monkeypatch):
    from diptych.models import hf

    monkeypatch.setattr(hf.AutoTokenizer, "from_pretrained", lambda *a, **k: Spaceless())
    with pytest.raises(ValueError, match="this version of transformers misreads its files"):
        load_model(folders["janus"])


class Spaceless:
    """What transformers 5.3 made of Janus' tokenizer."""

    def encode(self, text, **_):
        return [ord(c) for c in text if c != " "]

    def decode(self, ids, **_):
        return "".join(map(chr, ids))


def test_chameleon_without_its_picture_decoder_says_what_is_missing(tmp_path):
    from toy_checkpoints import make_chameleon

    model = load_model(make_chameleon(tmp_path / "bare", decoder=False))
    with pytest.raises(ValueError, match=r"has no decoder. Put the original release's vqgan.ckpt"):
        model.decode_codes(torch.zeros(1, 16, 1, dtype=torch.long))
    (tmp_path / "bare" / "vqgan.ckpt").write_bytes(b"PK not a checkpoint")
    with pytest.raises(ValueError, match=r"vqgan.ckpt is damaged"):
        load_model(tmp_path / "bare")


def test_vila_u_with_a_missing_part(folders, tmp_path):
    folder = broken(folders, "vila_u", tmp_path)
    shutil.rmtree(folder / "mm_projector")
    with pytest.raises(
        ValueError, match=r"mm_projector/config.json is missing; a VILA-U checkpoint has llm/, vision_tower/ and mm_projector/"
    ):
        load_model(folder)


def test_emu3s_options_file_is_checked(folders, tmp_path):
    folder = broken(folders, "emu3", tmp_path)
    for content, said in (("{", "Invalid JSON"), ('{"image_size": "big"}', "image_size"), ('{"size": 64}', "size: Extra inputs")):
        (folder / "diptych.json").write_text(content)
        with pytest.raises(ValueError, match=rf"diptych.json may hold image_size, negative_prompt only: .*{said}"):
            load_model(folder)
    (folder / "diptych.json").write_text('{"image_size": 24, "negative_prompt": "ugly"}')
    model = load_model(folder)
    assert model.image_spec.pixel_size == 24
    assert model.decode_text(model.unconditional_prompt(9)[1:]) == "ugly"


def test_hub_ids(folders, monkeypatch):
    """A name with one slash that is no folder is looked for on the hub; what the hub says is passed on."""
    asked = []

    def fetch(name: str, **_) -> str:
        asked.append(name)
        if name == "org/janus":
            return str(folders["janus"])
        raise OSError("no connection")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert load_model("org/janus").family == "janus"
    with pytest.raises(ValueError, match=r"no folder 'org/other', and the hub did not give a model of that name: no connection"):
        load_model("org/other")
    with pytest.raises(ValueError, match=r"no model at 'a/b/c'.*Give a checkpoint folder, a hub id such as org/name"):
        load_model("a/b/c")
    assert asked == ["org/janus", "org/other"]


def test_unreadable_tokenizers_and_picture_settings_are_named(folders, tmp_path):
    folder = broken(folders, "janus", tmp_path)
    settings = (folder / "preprocessor_config.json").read_text()
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"the image processor's settings in .*janus cannot be read"):
        load_model(folder)
    (folder / "preprocessor_config.json").write_text(settings)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"the tokenizer in .*janus cannot be read"):
        load_model(folder)


def test_a_chat_template_that_loses_pictures_is_named(folders, tmp_path):
    folder = broken(folders, "janus", tmp_path)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'][-1]['text'] }}")
    with pytest.raises(ValueError, match=r"wrote 0 times '<image_placeholder>' for 1 pictures; a template must write it once"):
        load_model(folder).encode_prompt(prompts()[1])


def test_templates_are_found_where_older_checkpoints_keep_them(folders, tmp_path):
    folder = broken(folders, "janus", tmp_path)
    expected = load_model(folder).encode_prompt(prompts()[0]).text_ids
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert torch.equal(load_model(folder).encode_prompt(prompts()[0]).text_ids, expected)
    (folder / "chat_template.json").unlink()
    own = load_model(folder)  # none at all: the family's
    assert own.template == type(own).default_template
    assert own.decode_text(own.encode_prompt(prompts()[0]).text_ids.tolist()).count("tell a story") == 1


def test_4_bits_without_the_library_and_without_a_form(folders, monkeypatch):
    with pytest.raises(ValueError, match="the Storyboard model has 3 M parameters and no 4-bit form"):
        load_model("storyboard", load_in_4bit=True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"load_in_4bit needs the extra: pip install 'diptych\[gpu\]'"):
        load_model(folders["janus"], load_in_4bit=True)


@pytest.mark.parametrize("name", ["janus", "emu3", "chameleon"])
def test_default_templates_frame_the_prompt_as_the_release(name, folders):
    """Written out, for one picture and a question: what stands before, between and after."""
    frames = {
        "janus": ("<|User|>: ", "\nwhat is it?\n\n<|Assistant|>:"),
        "emu3": ("You are a helpful assistant. USER: ", "what is it?. ASSISTANT:"),
        "chameleon": ("", "what is it?<reserved08706>"),
    }  # fmt: skip
    model = load_model(folders[name], image_size=SIZE.get(name))
    content = [{"type": "image"}, {"type": "text", "text": " what is it? "}]
    message = [{"role": "user", "content": content}]
    written = model.tokenizer.apply_chat_template(message, chat_template=model.default_template, tokenize=False)
    assert written == model.image_marker.join(frames[name])
