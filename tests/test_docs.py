"""The examples of docs/extending.md and docs/python.md are run as they stand there."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from diptych import config, losses
from diptych.models import loading
from diptych.rewards import base
from diptych.runs import read_jsonl

DOCS = Path(__file__).parents[1] / "docs"


def blocks_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.S)


BLOCKS = blocks_of("extending.md")


def block(start: str) -> str:
    (found,) = [text for text in BLOCKS if text.startswith(start)]
    return found


def as_module(name: str, source: str, monkeypatch) -> types.ModuleType:
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(source, f"docs/extending.md ({name})", "exec"), module.__dict__)
    return module


def test_the_reward(monkeypatch):
    as_module("my_rewards", block('"""`colourful`'), monkeypatch)
    as_module("its_test", block("import PIL.Image\nimport pytest"), monkeypatch).test_colourful_by_hand()
    assert "colourful" not in base.BUILT_IN  # the example ships nothing


def test_the_loss(monkeypatch):
    exec(compile(block("def quadratic_surrogate"), "docs/extending.md", "exec"), losses.__dict__)
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
    for number, source in enumerate(blocks_of("python.md")):
        exec(compile(source, f"docs/python.md ({number})", "exec"), found)
    assert len(found["rollouts"]) == 4
    sampled = torch.stack([rollout.rollout_logprobs.sum() for rollout in found["rollouts"]])
    torch.testing.assert_close(found["scores"].logprobs.sum((1, 2)), sampled, atol=1e-3, rtol=0)
    assert [len(read_jsonl(tmp_path / "runs" / "py" / stage / "metrics.jsonl")) for stage in ("warmup", "grpo")] == [2, 2]
