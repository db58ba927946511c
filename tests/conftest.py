from __future__ import annotations

from pathlib import Path

import pytest
import torch
from family_data import SIZE
from janus_data import DATA, convert, with_what_is_left_out
from toy_checkpoints import MAKERS

from diptych.config import ImageSampling, SamplingParams, TextSampling
from diptych.models import UnifiedModel, load_model
from diptych.models.storyboard import StoryboardConfig, StoryboardModel, build_tokenizer
from diptych.worlds.storyboard.language import vocabulary


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Whatever a training before it has set: many threads on few cores wait for one another."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model() -> StoryboardModel:
    """Random weights, three layers; weights are scaled up so that distributions are far from uniform."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(vocabulary())
    config = StoryboardConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=64, num_layers=3, num_heads=2, intermediate_size=96,
        depth_hidden_size=32, depth_layers=1, depth=3, levels=(3, 3), codec_width=8,
    )  # fmt: skip
    model = StoryboardModel(config, tokenizer)
    with torch.no_grad():
        for parameter in (model.lm_head.weight, model.depth_heads, model.code_embeddings, model.llama.embed_tokens.weight):
            parameter.mul_(4)
        model.lm_head.weight[[model.image_spec.begin_id, model.eos_id]] *= 4  # documents that switch and end often
    return model.eval()


@pytest.fixture(scope="session")
def guided_params() -> SamplingParams:
    return SamplingParams(
        text=TextSampling(temperature=0.8), image=ImageSampling(temperature=0.7, guidance_scale=3.0), max_images=3, max_text_tokens=6
    )


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A toy checkpoint of every family in its own layout."""
    root = tmp_path_factory.mktemp("toys")
    return {name: maker(root / name) for name, maker in MAKERS.items()}


@pytest.fixture(scope="session")
def models(folders) -> dict[str, UnifiedModel]:
    return {name: load_model(folder, image_size=SIZE.get(name)) for name, folder in folders.items()}


@pytest.fixture(scope="session")
def deepseek(tmp_path_factory) -> Path:
    """Janus' toy in DeepSeek's own layout."""
    return with_what_is_left_out(tmp_path_factory.mktemp("janus") / "deepseek")


@pytest.fixture(scope="session")
def converted(tmp_path_factory) -> Path:
    """The same in transformers' layout."""
    return convert(DATA / "toy_checkpoint", tmp_path_factory.mktemp("janus") / "converted")


@pytest.fixture(params=list(MAKERS))
def family(request) -> str:
    return request.param
