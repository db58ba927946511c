"""A picture decoder of one's own: what may be named, that it draws, and that it is no part of what is trained or saved."""

from __future__ import annotations

import json
import shutil

import numpy as np
import PIL.Image
import pytest
import torch
from family_data import params, prompts
from toy_decoders import first_code_as_grey
from typer.testing import CliRunner

from diptych.cli import app
from diptych.config import GRPOConfig, build
from diptych.document import Document, Text
from diptych.models import load_model
from diptych.models.image_decoder import set_image_decoder
from diptych.models.pixels import to_images
from diptych.sampling.engine import sample
from diptych.tokens import AnswerForm
from diptych.training.grpo import grpo


@pytest.fixture
def model(folders):
    return load_model(folders["janus"])


def draw(model):
    row = model.encode_prompt(prompts()[0], AnswerForm.IMAGE)
    return sample(model, [row], params(1.0), generator=torch.Generator().manual_seed(0))[0].document.images[0]


def test_what_is_named_draws(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    own = draw(model)
    grey = draw(set_image_decoder(model, "toy_decoders:first_code_as_grey"))
    assert torch.equal(own.codes, grey.codes)
    assert np.array_equal(np.asarray(grey.pixels), np.asarray(to_images(first_code_as_grey(own.codes[None]))[0]))
    mirrored = draw(set_image_decoder(model, "toy_decoders:of_the_model"))
    assert np.array_equal(np.asarray(mirrored.pixels), np.asarray(own.pixels)[:, ::-1])
    assert draw(set_image_decoder(model, "toy_decoders:Learned")).pixels.size == (4, 4)
    assert model.state_dict().keys() == before.keys()  # a module does not become the model's


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("toy_decoders:none", "cannot load 'toy_decoders:none'"),
        ("no.such.module:name", "cannot load 'no.such.module:name'"),
        ("toy_decoders", "names no code; give package.module:name"),
        (":name", "names no code"),
        (".decoders:name", "names no code"),
        ("broken_decoder:name", "cannot load 'broken_decoder:name': SyntaxError"),
        ("toy_decoders:NUMBER", "is int; a function, a module, or a class is needed"),
    ],
)
def test_what_is_no_decoder_is_refused_at_once(model, name, said, tmp_path, monkeypatch):
    (tmp_path / "broken_decoder.py").write_text("def name(:")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=said):
        set_image_decoder(model, name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("numpy_pictures", r"gave ndarray for codes \(1, 16, 1\); it must be \(N, num_positions, D\) int64 -> "),
        ("not_finite", "gave NaN or infinity"),
        ("bytes_of_pixels", r"gave values up to 255; pixels lie in -1\.\.1"),
        ("two_few", r"gave torch.float32 \(0, 3, 4, 4\)"),
    ],
)
def test_what_gives_no_pictures_is_named(model, name, said):
    set_image_decoder(model, f"toy_decoders:{name}")
    with pytest.raises(ValueError, match=said):
        draw(model)


def test_chameleon_without_a_decoder_says_so_before_it_samples(folders, tmp_path, monkeypatch):
    folder = shutil.copytree(folders["chameleon"], tmp_path / "chameleon")
    for name in ("vqgan.ckpt", "tokenizer/vqgan.ckpt", "picture_decoder.safetensors"):
        (folder / name).unlink(missing_ok=True)
    model = load_model(folder)
    row = model.encode_prompt(Document((Text("a cat"),)), AnswerForm.IMAGE)
    with monkeypatch.context() as patch:
        patch.setattr(model, "backbone", lambda *_: pytest.fail("nothing is sampled"))
        with pytest.raises(ValueError, match=r"cannot turn codes into pictures.*or name a decoder of your own"):
            sample(model, [row], params(1.0), generator=torch.Generator())
    assert draw(set_image_decoder(model, "toy_decoders:first_code_as_grey")).pixels.size == (2, 2)


def test_a_training_draws_with_it_and_knows_it_again(tmp_path, monkeypatch):
    """The reward sees its pictures; another decoder, or changed code of it, is another run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_decoder.py").write_text("import torch\ndef grey(codes):\n    return torch.zeros(len(codes), 3, 5, 7)\n")
    (tmp_path / "my_reward.py").write_text(
        "def small(completions, **_):\n"
        "    return [[float(b['image'].size == (7, 5)) if b['type'] == 'image' else None for b in m[-1]['content']] for m in completions]\n"
    )
    settings = {
        "output_dir": "run", "max_steps": 1, "num_generations": 2, "prompts_per_step": 1, "optim": {"lr": 1e-5}, "device": "cpu",
        "prompts": [{"name": "storyboard:text_to_image", "form": "image"}], "rewards": [{"name": "my_reward:small"}],
        "image_decoder": "my_decoder:grey",
    }  # fmt: skip
    found = []
    grpo(build(GRPOConfig, settings), lambda step, total, metrics: found.append(metrics))
    assert found[0]["rewards/my_reward:small/mean"] == 1.0
    (tmp_path / "my_decoder.py").write_text("import torch\ndef grey(codes):\n    return torch.ones(len(codes), 3, 5, 7)\n")
    with pytest.raises(ValueError, match=r"trained on other inputs: image_decoder my_decoder:grey \(changed: my_decoder.py\)"):
        grpo(build(GRPOConfig, {**settings, "max_steps": 2}))


def test_commands_take_one(folders, tmp_path):
    command = ["generate", "a cat", "--model", str(folders["janus"]), "--form", "image", "--out", str(tmp_path / "a.json")]
    result = CliRunner().invoke(app, [*command, "--image-decoder", "toy_decoders:first_code_as_grey"])
    assert result.exception is None, result.exception
    (block,) = json.loads((tmp_path / "a.json").read_text())
    assert block["type"] == "image"
    assert Document.from_blocks([block]).images[0].pixels.size == (2, 2)


def test_an_evaluation_keeps_the_size_that_it_draws(folders, tmp_path):
    (tmp_path / "prompts").mkdir()
    line = {"tag": "colors", "include": [], "exclude": [], "prompt": "a red ball"}
    (tmp_path / "prompts" / "evaluation_metadata.jsonl").write_text(json.dumps(line) + "\n")
    command = ["evaluate", "geneval", str(tmp_path), "--model", str(folders["janus"]), "--out", str(tmp_path / "out"), "--temperature", "1"]
    result = CliRunner().invoke(app, [*command, "--image-decoder", "toy_decoders:large"])
    assert result.exception is None, result.exception
    sizes = {PIL.Image.open(path).size for path in (tmp_path / "out").rglob("*.png")}
    assert sizes == {(96, 64)}
