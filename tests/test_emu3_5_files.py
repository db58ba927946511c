"""Emu3.5's two repositories: where the vision tokenizer is looked for, what is written, and what broken folders say."""

from __future__ import annotations

import base64
import json
import pickle
import shutil
import time
from pathlib import Path

import pytest
import torch
import yaml
from emu3_5_data import FACTS, RECORDED, TOY, VISION, close, copy_toy, logits_of, prompt_row
from safetensors.torch import load_file, save_file
from toy_checkpoints import edit_json
from transformers import Qwen3ForCausalLM

from diptych.config import LoraConfig
from diptych.models import UnifiedModel, load_model
from diptych.models.emu3_5 import checkpoint
from diptych.models.emu3_5 import tokenizer as words
from diptych.models.emu3_5.model import Emu35Model
from diptych.models.emu3_5.prompts import SAMPLING
from diptych.models.loading import family_of
from diptych.models.lora import attach_lora

NAME = VISION.name


def works(model: UnifiedModel) -> bool:
    """Its vision tokenizer is the toy's."""
    assert isinstance(model, Emu35Model)
    return torch.equal(model.vision_tokenizer.encode(RECORDED["vq.land.pixel_values"]), RECORDED["vq.land.codes"].long())


# --- where things lie ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["inside", "beside", "stated", "stated relative"])
def test_places_of_the_vision_tokenizer(tmp_path, place):
    other = tmp_path / "elsewhere" / "vq"
    stated = {"stated": str(other), "stated relative": "../../elsewhere/vq"}
    options = {"image_size": 64, **({"vision_tokenizer": stated[place]} if place in stated else {})}
    folder = copy_toy(tmp_path / "both", **options)
    target = {"inside": folder / NAME, "beside": folder.parent / NAME}.get(place, other)
    if target != folder.parent / NAME:
        target.parent.mkdir(exist_ok=True)
        shutil.move(folder.parent / NAME, target)
    model = load_model(folder)
    assert works(model)
    model.save(tmp_path / "saved")
    shutil.rmtree(target)
    assert works(load_model(tmp_path / "saved"))  # complete by itself
    assert json.loads((tmp_path / "saved" / "diptych.json").read_text()) == {"image_size": 64, "task": "story"}


@pytest.mark.parametrize("stated", [None, "someone/vq"])
@pytest.mark.parametrize("weights", ["model.safetensors", "model.ckpt"])
def test_the_hub_is_the_last_place(tmp_path, monkeypatch, stated, weights):
    folder = copy_toy(tmp_path / "both", **({} if stated is None else {"vision_tokenizer": stated}))
    shutil.move(folder.parent / NAME, tmp_path / "snapshots" / "abc")
    if weights == "model.ckpt":
        to_torch(tmp_path / "snapshots" / "abc")
    asked = []

    def download(name, *, allow_patterns, revision=None, local_files_only):
        asked.append((name, allow_patterns[-1], revision, local_files_only))
        return str(tmp_path / "snapshots" / "abc")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert works(load_model(folder, image_size=64))
    name = stated or "BAAI/Emu3.5-VisionTokenizer"
    assert asked[0] == (name, "model.safetensors", None, False)
    assert asked[1:] == ([] if weights == "model.safetensors" else [(name, "model.ckpt", "abc", False)])


def to_torch(folder: Path, wrapped: bool = True) -> None:
    """The layout that the official code reads from a local folder."""
    tensors = load_file(folder / "model.safetensors")
    torch.save({"state_dict": tensors} if wrapped else tensors, folder / "model.ckpt")
    (folder / "model.safetensors").unlink()
    (folder / "config.json").unlink(missing_ok=True)


@pytest.mark.parametrize("wrapped", [True, False])
def test_config_yaml_and_model_ckpt_are_read_and_written_as_safetensors(tmp_path, wrapped):
    folder = copy_toy(tmp_path / "both")
    to_torch(folder.parent / NAME, wrapped)
    model = load_model(folder, image_size=64)
    assert works(model)
    model.save(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved" / NAME).iterdir()) == ["config.yaml", "model.safetensors"]
    assert (tmp_path / "saved" / NAME / "config.yaml").read_bytes() == (VISION / "config.yaml").read_bytes()
    assert works(load_model(tmp_path / "saved"))


def test_a_pickle_that_is_code_is_not_run(tmp_path):
    folder = copy_toy(tmp_path / "both")
    to_torch(folder.parent / NAME)

    class Harm:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "harm",))

    (folder.parent / NAME / "model.ckpt").write_bytes(pickle.dumps({"state_dict": Harm()}))
    with pytest.raises(ValueError, match=r"model\.ckpt cannot be read .*copy it again"):
        load_model(folder)
    assert not (tmp_path / "harm").exists()


# --- what is written -----------------------------------------------------------------------------------------------------


def test_a_saved_model_has_the_releases_names_files_and_bytes(tmp_path, monkeypatch):
    model = load_model(TOY, image_size=64)
    monkeypatch.setattr(checkpoint.save_language_model, "__defaults__", ("600KB",))
    model.save(tmp_path / "saved")
    saved, same = tmp_path / "saved", ("config.json", "generation_config.json", "tokenizer_config.json", words.RANKS, words.VISUAL)
    for name in same:
        assert (saved / name).read_bytes() == (TOY / name).read_bytes()
    others = {path.name for path in saved.iterdir() if not path.name.startswith("model-")}
    assert others == {*same, "model.safetensors.index.json", "diptych.json", NAME}
    for part in ("config.json", "config.yaml"):
        assert (saved / NAME / part).read_bytes() == (VISION / part).read_bytes()
    for before, after in ((TOY, saved), (VISION, saved / NAME)):
        old, new = ({k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()} for folder in (before, after))
        assert old.keys() == new.keys()
        assert all(torch.equal(old[name], new[name]) for name in old)
    index = json.loads((saved / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index.values()) == {path.name for path in saved.glob("model-*.safetensors")}
    again = load_model(saved)
    assert again.image_spec == model.image_spec
    row = prompt_row(RECORDED["lm.text.input_ids"].tolist())
    close(logits_of(again, row), RECORDED["lm.text.logits"])


def test_another_dtype_is_named_and_the_vision_tokenizer_stays_in_float32(tmp_path):
    load_model(TOY, dtype="bfloat16", image_size=64).save(tmp_path / "saved")
    theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in (TOY, tmp_path / "saved"))
    assert ours == {**theirs, "torch_dtype": "bfloat16"}
    assert all(value.dtype == torch.float32 for value in load_file(tmp_path / "saved" / NAME / "model.safetensors").values())
    edit_json(tmp_path / "saved" / "config.json", lambda config: config.update(torch_dtype="float32"))
    again = load_model(tmp_path / "saved")
    assert again.dtype == torch.bfloat16  # what the weights are counts, not what a file says
    assert works(again)


def test_adapters_load_onto_the_stock_class(tmp_path):
    from peft import PeftModel

    model = load_model(TOY, image_size=64)
    attach_lora(model, LoraConfig(r=2, alpha=4), {"source": str(TOY), "image_size": 64})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    model.save(tmp_path / "adapter")
    row = prompt_row(RECORDED["lm.text.input_ids"].tolist())
    expected = logits_of(model, row)
    assert (expected - RECORDED["lm.text.logits"]).abs().max() > 0.01
    from diptych.models.emu3_5 import config

    stock = Qwen3ForCausalLM.from_pretrained(TOY, config=config.stock_config(config.read_language_config(TOY))).eval()
    with torch.no_grad():
        close(PeftModel.from_pretrained(stock, tmp_path / "adapter")(input_ids=row.text_ids[None]).logits[0], expected)
    close(logits_of(load_model(tmp_path / "adapter"), row), expected)


def test_options(tmp_path):
    model = load_model(copy_toy(tmp_path / "a", grid=[3, 5], task="howto", prompt_area=4096))
    assert model.grid == (3, 5)
    assert model.default_sampling == SAMPLING["howto"]
    assert model.prompt_area == 4096
    assert model.image_spec.num_positions == 15
    model.save(tmp_path / "saved")
    assert load_model(tmp_path / "saved").image_spec == model.image_spec
    assert load_model(tmp_path / "saved", image_size=32).grid == (2, 2)  # what is asked for counts
    assert load_model(copy_toy(tmp_path / "b")).image_spec.num_positions == 45 * 45
    assert FACTS["generation"]["story_square"]["height_width_used"] == [4, 4]
    for size in (30, 0, -16):
        with pytest.raises(ValueError, match=f"image_size={size} is no multiple of the 16 pixels"):
            load_model(TOY, image_size=size)


def test_both_generations_have_one_model_type(tmp_path):
    assert family_of(TOY) is Emu35Model
    folder = copy_toy(tmp_path / "both")
    edit_json(folder / "config.json", lambda config: config.update(vocab_size=184_622))
    with pytest.raises(ValueError, match=r"model_type 'Emu3' \(this is BAAI's own layout of Emu3; use the conversion"):
        load_model(folder)
    edit_json(folder / "config.json", lambda config: config.update(vocab_size=1291))
    edit_json(
        folder / "model.safetensors.index.json",
        lambda index: index.update(weight_map={key: file for key, file in index["weight_map"].items() if "q_norm" not in key}),
    )
    with pytest.raises(ValueError, match="BAAI's own layout of Emu3; use the conversion"):
        load_model(folder)
    (folder / "model.safetensors.index.json").unlink()  # what is missing is the loader's to tell
    assert family_of(folder) is Emu35Model


# --- broken folders ------------------------------------------------------------------------------------------------------


def drop(name: str):
    return lambda folder: (folder / name).unlink()


def config(**changes):
    return lambda folder: edit_json(folder / "config.json", lambda content: content.update(changes))


def vision_config(**changes):
    return lambda folder: edit_json(folder.parent / NAME / "config.json", lambda content: content.update(changes))


def cut(name: str):
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return change


def line(name: str, number: int, text: str):
    def change(folder: Path) -> None:
        lines = (folder / name).read_text().splitlines()
        lines[number - 1] = text
        (folder / name).write_text("".join(f"{one}\n" for one in lines))

    return change


def extra_weight(name: str, shape: tuple[int, ...]):
    def change(folder: Path) -> None:
        shard = folder / "model-00001-of-00002.safetensors"
        save_file({**load_file(shard), name: torch.zeros(shape)}, shard, metadata={"format": "pt"})
        edit_json(folder / "model.safetensors.index.json", lambda index: index["weight_map"].update({name: shard.name}))

    return change


def vision_weights(change):
    def apply(folder: Path) -> None:
        path = folder.parent / NAME / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return apply


def no_vision(folder: Path) -> None:
    shutil.rmtree(folder.parent / NAME)


def yaml_alone(content: str):
    def change(folder: Path) -> None:
        (folder.parent / NAME / "config.json").unlink()
        (folder.parent / NAME / "config.yaml").write_text(content)

    return change


def option(content: str):
    return lambda folder: (folder / "diptych.json").write_text(content)


BROKEN = {
    "no ranks": (drop(words.RANKS), r"emu3\.tiktoken is missing; copy it again from the release"),
    "half the ranks": (cut(words.RANKS), r"does not fit together: the tokenizer has \d+ text tokens|emu3\.tiktoken is damaged in line"),
    "a damaged rank": (line(words.RANKS, 300, "%%% 299"), r"emu3\.tiktoken is damaged in line 300"),
    "a rank twice": (line(words.RANKS, 300, "IQ== 0"), r"emu3\.tiktoken does not number its tokens from 0"),
    "no visual tokens": (drop(words.VISUAL), r"emu3_vision_tokens\.txt is missing"),
    "half the visual tokens": (cut(words.VISUAL), r"emu3_vision_tokens\.txt is damaged in line \d+|visual ones, the embedding"),
    "another visual token": (line(words.VISUAL, 10, "<|visual token 000003|>"), r"emu3_vision_tokens\.txt is damaged in line 10"),
    "no config": (drop("config.json"), r"config\.json does not exist"),
    "another activation": (config(hidden_act="gelu"), r"config\.json describes no Emu3\.5 that can be loaded: hidden_act"),
    "scaled rope": (config(rope_scaling={"type": "linear", "factor": 2.0}), r"config\.json describes no Emu3\.5 .*rope_scaling"),
    "a word for a number": (config(hidden_size="wide"), r"hidden_size: .*given wide"),
    "other sizes": (config(intermediate_size=96), r"in another shape|cannot be loaded"),
    "fewer layers": (config(num_hidden_layers=2), r"no place for .*from one release"),
    "biases": (extra_weight("model.layers.0.self_attn.q_proj.bias", (96,)), r"1 biases of attention \(first: .*q_proj\.bias\)"),
    "another vocabulary": (config(vocab_size=1290), r"in another shape|cannot be loaded"),
    "a lost shard": (drop("model-00002-of-00002.safetensors"), r"model-00002-of-00002\.safetensors|cannot be loaded"),
    "half a shard": (cut("model-00002-of-00002.safetensors"), r"cannot be loaded as Qwen3ForCausalLM"),
    "no vision tokenizer": (no_vision, r"and BAAI/Emu3\.5-VisionTokenizer cannot be had from the hub .*: hf download BAAI"),
    "a path to nothing": (
        lambda folder: (no_vision(folder), option('{"vision_tokenizer": "./vq"}')(folder)),
        r"vq, which .*diptych\.json names \(vision_tokenizer\), is no folder, .*mend the path",
    ),
    "no vision weights": (lambda folder: drop("model.safetensors")(folder.parent / NAME), r"has no weights: neither model\.safetensors"),
    "half of them": (lambda folder: cut("model.safetensors")(folder.parent / NAME), r"model\.safetensors cannot be read .*copy it again"),
    "no vision config": (
        lambda folder: [drop(name)(folder.parent / NAME) for name in ("config.json", "config.yaml")], r"config\.json is missing",
    ),
    "of the first generation": (vision_config(model_type="Emu3VisionVQ"), r"model_type 'Emu3VisionVQ'.*use BAAI/Emu3\.5-VisionTokenizer"),
    "twice as many channels": (vision_config(double_z=True), r"config\.json describes no IBQ tokenizer .*double_z"),
    "a normalised codebook": (vision_config(cosine_similarity=True), r"describes no IBQ tokenizer .*cosine_similarity"),
    "another codebook": (vision_config(codebook_size=79), r"in another shape than its config says"),
    "channels that no norm takes": (vision_config(ch=33), r"config\.json describes no IBQ tokenizer .*multiples of 32"),
    "a lost weight": (vision_weights(lambda tensors: tensors.pop("quant_conv.bias")), r"lacks 1 weights .*quant_conv\.bias"),
    "a weight too many": (
        vision_weights(lambda tensors: tensors.update({"loss.x": torch.zeros(1)})), r"no place by its config for 1 weights .*loss\.x",
    ),
    "a yaml of nothing": (yaml_alone("n_embed: 80"), r"config\.yaml has no ddconfig"),
    "a damaged yaml": (yaml_alone("a: [1"), r"config\.yaml is no valid YAML"),
    "another option": (option('{"size": 3}'), r"diptych\.json may hold image_size, grid, task, prompt_area, vision_tokenizer only: size"),
    "an unknown task": (option('{"task": "poem"}'), r"diptych\.json may hold .*task"),
    "an empty grid": (option('{"grid": [0, 4]}'), r"diptych\.json may hold .*grid"),
    "damaged options": (option("{"), r"diptych\.json may hold"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BROKEN))
def test_broken_folders_say_what_to_do(tmp_path, case, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    folder = copy_toy(tmp_path / "both")
    change, message = BROKEN[case]
    change(folder)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_4_bit_weights_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="4-bit weights cannot be written"):
        load_model(TOY, load_in_4bit=True, image_size=64).save(tmp_path / "saved")


def test_yaml_and_json_of_the_release_say_the_same():
    from diptych.models.emu3_5.config import read_vision_config

    raw = yaml.safe_load((VISION / "config.yaml").read_text())
    found = read_vision_config(VISION)
    assert (found.codebook_size, found.embed_dim) == (raw["n_embed"], raw["embed_dim"])
    assert found.factor == 16


def test_151643_ranks_load_in_seconds(tmp_path):
    tokens, known = [bytes([i]) for i in range(256)], {bytes([i]) for i in range(256)}
    source = torch.Generator().manual_seed(0)
    for left, right in torch.randint(0, 10**9, (500_000, 2), generator=source).tolist():
        joined = tokens[left % len(tokens)] + tokens[right % min(len(tokens), 2000)]
        if len(joined) <= 24 and joined not in known and len(tokens) < 151_643:
            known.add(joined)
            tokens.append(joined)
    assert len(tokens) == 151_643
    (tmp_path / words.RANKS).write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
    codes = (f"<|visual token {code:06d}|>" for code in range(131_072))
    (tmp_path / words.VISUAL).write_text("".join(f"{token}\n" for token in (*words.AROUND, *codes)))
    started = time.perf_counter()
    found, num_codes = words.read_tokenizer(tmp_path)
    assert time.perf_counter() - started < 20  # 2 seconds here
    assert (len(found), num_codes) == (151_854, 131_072)
    ids = found.convert_tokens_to_ids([words.PAD, words.BOS, words.EOS, words.SIZE_END, words.BEGIN, words.END, words.ROW_END])
    assert ids == [151_643, 151_849, 151_850, 151_851, 151_852, 151_853, 151_846]
