"""The doctor on Emu3.5's two repositories."""

from __future__ import annotations

import json

import pytest
import torch
from emu3_5_data import RECORDED, TOY, copy_toy
from rich.console import Console
from test_doctor import write_hole
from test_emu3_5_files import BROKEN, NAME, no_vision, to_torch
from toy_checkpoints import make_emu3_5
from transformers import Qwen3ForCausalLM

from diptych.config import ImageSampling, SamplingParams
from diptych.doctor import DocumentSize, Sizes, estimate, examine, render
from diptych.document import Document, Image, Text
from diptych.models import load_model
from diptych.models.emu3_5 import config as configs
from diptych.models.emu3_5 import tokenizer as words
from diptych.sampling.logprobs import image_branches

RELEASED = {
    "vocab_size": 282_926, "hidden_size": 5120, "intermediate_size": 25_600, "num_hidden_layers": 64, "num_attention_heads": 64,
    "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 32_768, "image_area": 518_400, "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture
def offline(monkeypatch):
    """Nothing may be asked of the hub."""

    def refused(*args, local_files_only, **kwargs):
        assert local_files_only
        raise OSError("not here")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refused)


def test_a_healthy_folder(offline):
    found = examine(str(TOY))
    assert found.problems == []
    assert found.family == "emu3_5"
    model = load_model(TOY)
    assert found.parameters is not None
    assert found.parameters["total"] == sum(p.numel() for p in model.parameters())
    assert found.dtypes == {"F32": found.parameters["total"]}
    assert found.image == {"positions": 2025, "depth": 1, "codebook_size": 80, "pixel_size": 720, "length": 2077}
    assert found.architecture == {"hidden_size": 64, "layers": 3, "heads": 6, "kv_heads": 2, "context": 2048, "vocab_size": 1211}
    assert found.special_tokens is not None
    assert found.special_tokens["begin of image"] == (1209, "<|image start|>")
    assert found.lora_targets == 21
    assert found.defaults is not None
    assert found.defaults["guidance_scale"] == 3
    assert found.defaults["image_top_k"] == 10240
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(found))
    assert "No problems found" in console.export_text()


def test_the_layout_that_torch_saved(offline, tmp_path):
    folder = copy_toy(tmp_path / "both")
    to_torch(folder.parent / NAME)
    found = examine(str(folder))
    assert found.problems == []
    assert found.parameters == examine(str(TOY)).parameters
    (folder.parent / NAME / "model.ckpt").write_bytes(b"PK\x03\x04 cut off")
    (problem,) = examine(str(folder)).problems
    assert "model.ckpt cannot be read" in problem


def test_the_released_size_without_anything_else(offline, tmp_path):
    """Half a download: sizes are told all the same, from a stand-in for the tokenizer and the release's vision tokenizer."""
    raw = {**json.loads((TOY / "config.json").read_text()), **RELEASED}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with torch.device("meta"):
        model = Qwen3ForCausalLM(configs.stock_config(configs.read_language_config(tmp_path)))
    write_hole(tmp_path / "model.safetensors", {name: value.shape for name, value in model.state_dict().items()})
    found = examine(str(tmp_path), num_images=3, num_generations=8)
    vision, *others = found.problems
    assert "lacks its vision tokenizer, and BAAI/Emu3.5-VisionTokenizer was not downloaded yet: hf download" in vision
    assert [other.split(" is missing")[0] for other in others] == [str(tmp_path / name) for name in (words.RANKS, words.VISUAL)]
    assert found.parameters is not None
    assert found.parameters["total"] == 34_103_460_864 + 455_336_963
    assert found.image is not None
    assert (found.image["positions"], found.image["length"]) == (2025, 2077)
    assert found.architecture is not None
    assert found.architecture["vocab_size"] == 151_854
    assert found.memory is not None
    weights = (2 * 34_103_460_864 + 4 * 455_336_963) / 2**30
    assert found.memory["sampling"].weights == pytest.approx(weights)
    in_4_bits = (21.9e9 + 4 * 455_336_963 + 4 * 134_217_728) / 2**30  # LoRA r=16: 134,217,728 parameters
    assert found.memory["qlora"].weights == pytest.approx(in_4_bits, rel=0.002)
    assert found.memory["qlora"].fits(74.5)  # a card of 80 GB
    assert not found.memory["lora"].fits(74.5)


def test_positions_of_the_unconditional_branch_are_counted(tmp_path):
    """Each picture's branch holds all before it, and the scorer lays them out one beside the other."""
    model = load_model(make_emu3_5(tmp_path / "toy"))
    sizes, pictures = Sizes.of(model), [Image(codes=torch.full((16, 1), code)) for code in range(3)]
    answer = Document((Text("a"), pictures[0], Text("b"), pictures[1], pictures[2]))
    row = model.encode_example(Document((Text("tell"),)), answer)
    params = SamplingParams(image=ImageSampling(guidance_scale=3.0))
    branches = [branch for (branch,) in image_branches(model, row, params)]
    bare = len(model.unconditional_prompt(0))
    lengths = [len(prefix) - bare + len(drawn) for prefix, drawn in branches]
    sampled, scored = sizes.branch_positions(3)
    assert max(lengths) + 2 == sampled  # but for the last code and the end, whose states predict no code
    assert sum(lengths) + 6 == scored
    assert Sizes.branch_positions(sizes, 0) == (0, 0)
    few, many = (estimate(sizes, DocumentSize(count, 1, 8, 1), "lora") for count in (1, 3))
    assert many.kv_cache > 2.5 * few.kv_cache


@pytest.mark.parametrize("case", [case for case in BROKEN if case not in ("no config",)])
def test_what_the_loader_refuses_the_doctor_tells(offline, tmp_path, case):
    folder = copy_toy(tmp_path / "both")
    BROKEN[case][0](folder)
    problems = examine(str(folder)).problems
    assert problems
    assert not any(problem.startswith("warning: ") for problem in problems)
    named = (str(folder), str(folder.parent / NAME))
    assert all(any(place in problem for place in named) for problem in problems), problems


def test_a_vision_tokenizer_that_is_missing_is_told_and_sizes_too(offline, tmp_path):
    folder = copy_toy(tmp_path / "both", image_size=64)
    no_vision(folder)
    found = examine(str(folder))
    (problem,) = found.problems
    assert str(folder.parent / NAME) in problem
    assert "hf download BAAI/Emu3.5-VisionTokenizer" in problem
    assert found.image is not None
    assert found.image["codebook_size"] == 80
    assert RECORDED["vq.land.codes"].max() < 80
