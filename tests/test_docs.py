"""The examples of docs/extending.md are run as they stand there."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest

from diptych import config, losses
from diptych.models import loading
from diptych.rewards import base

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "docs" / "extending.md").read_text(), re.S)


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
