"""The examples of extending.md, python.md and your_own.md in docs/how-to are run as they stand there, the last one at toy size."""

from __future__ import annotations

import re
import shlex
import sys
import types
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
import toy_checkpoints
import toy_scorers
from typer.testing import CliRunner

from diptych import config
from diptych.cli.app import app
from diptych.models import loading
from diptych.models.image_decoder import set_image_decoder
from diptych.rewards import base
from diptych.runs import read_jsonl
from diptych.training import losses

DOCS = Path(__file__).parents[1] / "docs"


def blocks_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.S)


BLOCKS = blocks_of("how-to/extending.md")


def block(start: str) -> str:
    (found,) = [text for text in BLOCKS if text.startswith(start)]
    return found


def as_module(name: str, source: str, monkeypatch) -> types.ModuleType:
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(source, f"docs/how-to/extending.md ({name})", "exec"), module.__dict__)
    return module


def test_the_reward(monkeypatch):
    as_module("my_rewards", block('"""`colourful`'), monkeypatch)
    as_module("its_test", block("import PIL.Image\nimport pytest"), monkeypatch).test_colourful_by_hand()
    assert "colourful" not in base.BUILT_IN  # the example ships nothing


def test_the_picture_decoder(monkeypatch):
    as_module("my_decoder", block("def blocks"), monkeypatch)
    model = set_image_decoder(loading.load_model("storyboard"), "my_decoder:blocks")
    (image,) = model.to_pictures(torch.tensor([[[0, 0]] * 8 + [[511, 0]]]))
    assert image.size == (3, 3)
    assert [image.getpixel((2, y)) for y in range(3)] == [(0, 0, 0)] * 2 + [(255, 255, 255)]


def test_the_loss(monkeypatch):
    exec(compile(block("def quadratic_surrogate"), "docs/how-to/extending.md", "exec"), losses.__dict__)
    monkeypatch.setitem(losses.LOSSES, "spo", (losses.quadratic_surrogate, losses.per_rollout))
    as_module("its_test", block("import math\n\nimport pytest"), monkeypatch).test_spo_by_hand()
    del losses.quadratic_surrogate
    with pytest.raises(ValueError, match="loss_type"):  # the third step of the text: its name in the configuration
        config.build(
            config.GRPOConfig, {"output_dir": "x", "max_steps": 1, "optim": {"lr": 1}, "rewards": [{"name": "format"}], "loss_type": "spo"}
        )


def test_the_family(monkeypatch, tmp_path):
    as_module("diptych.models.grey", block('"""A small family with one shared vocabulary'), monkeypatch)
    monkeypatch.setitem(loading.FAMILIES, "grey", "diptych.models.grey:GreyModel")
    as_module("its_test", block("import torch\n\nfrom diptych.config import ImageSampling"), monkeypatch).test_replay_equals_sampling(
        tmp_path
    )


def test_the_page_on_python(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    for number, source in enumerate(blocks_of("how-to/python.md")):
        exec(compile(source, f"docs/how-to/python.md ({number})", "exec"), found)
    assert len(found["rollouts"]) == 4
    sampled = torch.stack([rollout.rollout_logprobs.sum() for rollout in found["rollouts"]])
    torch.testing.assert_close(found["scores"].logprobs.sum((1, 2)), sampled, atol=1e-3, rtol=0)
    assert [len(read_jsonl(tmp_path / "runs" / "py" / stage / "metrics.jsonl")) for stage in ("warmup", "grpo")] == [2, 2]


SMALLER = {  # of docs/how-to/your_own.md, for a toy model and a test
    "step_400": "step_2", "max_steps: 400": "max_steps: 2", "step_200": "step_1", "max_steps: 200": "max_steps: 1",
    "batch_size: 16": "batch_size: 2", "prompts_per_step: 4": "prompts_per_step: 2", "num_generations: 8": "num_generations: 2",
    "max_text_tokens: 96": "max_text_tokens: 12",
}  # fmt: skip


def test_the_page_on_documents_of_your_own(monkeypatch, tmp_path):
    """Its files are written as they stand (fewer steps), its commands run one after the other; only downloads are made here."""
    page = (DOCS / "how-to" / "your_own.md").read_text()
    for given, smaller in SMALLER.items():
        assert given in page
        page = page.replace(given, smaller)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for name in ("soil", "fern"):
        PIL.Image.new("RGB", (40, 30), "green").save(tmp_path / "mine" / f"{name}.png")
    for name, text in re.findall(r"`([\w/]+\.(?:jsonl|yaml))`:\n\n```(?:json|yaml)\n(.*?)```", page, re.S):
        Path(name).write_text(text * (40 if name.endswith(".jsonl") else 1))
    toy_checkpoints.make_janus(tmp_path / "checkpoints" / "Janus-Pro-1B")
    toy_scorers.write_clip(tmp_path / "checkpoints" / "clip")
    commands = [shlex.split(line) for text in re.findall(r"```bash\n(.*?)```", page, re.S) for line in text.splitlines()]
    ours = [words[1:] for words in commands if words[:2] != ["hf", "download"]]
    expected = "doctor data warmup view generate rewards rewards grpo view merge generate"
    assert [words[0] for words in ours] == expected.split()
    for words in ours:
        result = CliRunner().invoke(app, words, catch_exceptions=False)
        assert result.exit_code == 0, f"diptych {shlex.join(words)}: {result.output}"
    assert (tmp_path / "kite.html").stat().st_size > 1000
    assert {path.name for path in (tmp_path / "merged").iterdir()} >= {"config.json", "model.safetensors"}
    (line,) = read_jsonl(tmp_path / "runs" / "mine" / "grpo" / "metrics.jsonl")
    for column in re.findall(r"^\| `([^`]+)`(?:, `([^`]+)`)? \|", page, re.M):
        for name in filter(None, column):
            assert name.replace("NAME", "format") in line, f"the page's metric {name} is not logged"
    known = re.findall(r"`([\w/.]+)`", (DOCS / "reference" / "metrics.md").read_text())
    patterns = [re.escape(name).replace("NAME", r"\w+").replace(r"rewards/\.\.\.", r"rewards/.*") for name in known]
    for stage in ("warmup", "grpo"):
        for name in read_jsonl(tmp_path / "runs" / "mine" / stage / "metrics.jsonl")[-1]:
            assert name == "step" or any(re.fullmatch(pattern, name) for pattern in patterns), f"docs/reference/metrics.md lacks {name}"
