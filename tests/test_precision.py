"""In which numbers is trained: float16 never, bfloat16 weights only with a warning, guidance in float32."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from family_data import picture
from safetensors.torch import load_file, save_file
from test_family_training import common

from diptych.config import GRPOConfig, ImageSampling, WarmupConfig, build
from diptych.models import load_model
from diptych.models.loading import Reference, open_policy
from diptych.runs import read_jsonl
from diptych.sampling.guidance import mix
from diptych.training.grpo import grpo
from diptych.training.warmup import warmup


def stored_as(folder: Path, dtype: torch.dtype) -> Path:
    for file in folder.glob("*.safetensors"):
        cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in load_file(file).items()}
        save_file(cast, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": str(dtype).removeprefix("torch.")}))
    return folder


@pytest.fixture
def janus(tmp_path) -> Path:
    from toy_checkpoints import make_janus

    return make_janus(tmp_path / "janus")


def data(path: Path) -> str:
    rows = []
    for i in range(8):
        picture(i).save(path.parent / f"{i}.png")
        answer = [{"type": "text", "text": f"the ball {i} is small"}, {"type": "image", "image": f"{i}.png"}]
        rows.append({"messages": [{"role": "user", "content": "tell about the red ball"}, {"role": "assistant", "content": answer}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_float16_checkpoint_trains_in_float32(janus, tmp_path):
    stored_as(janus, torch.float16)
    settings = {"sources": [{"name": data(tmp_path / "d.jsonl")}], "batch_size": 4, "num_eval_records": 1, "optim": {"lr": 1e-3}}
    losses = {}
    for dtype in ("auto", "float32"):
        run = tmp_path / dtype
        warmup(build(WarmupConfig, {**common(janus, run, "janus", max_steps=6), **settings, "dtype": dtype}))
        losses[dtype] = [line["loss/text"] for line in read_jsonl(run / "metrics.jsonl")]
        assert load_model(run / "checkpoints" / "step_6" / "model").dtype == torch.float32
    assert losses["auto"] == losses["float32"]
    assert losses["auto"][-1] < losses["auto"][0]


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_the_reference_has_the_dtype_of_the_policy(janus, tmp_path, lora):
    stored_as(janus, torch.float16)
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(json.dumps({"messages": [{"role": "user", "content": "tell about the ball"}]}) + "\n")
    settings = {**common(janus, tmp_path / "run", "janus", max_steps=2), "prompts": [{"name": str(prompts)}], "num_generations": 2,
                "rewards": [{"name": "toy_rewards:per_step"}], "text": {"beta": 0.1}, "lora": lora, "prompts_per_step": 1}  # fmt: skip
    config = build(GRPOConfig, settings)
    policy = open_policy(config)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    with Reference(policy, config, torch.device("cpu")).active() as frozen:
        assert frozen.dtype == torch.float32
    grpo(config)
    first = read_jsonl(tmp_path / "run" / "metrics.jsonl")[0]
    assert first["kl/text"] < 1e-6
    again = load_model(tmp_path / "run" / "checkpoints" / "step_2" / "model")  # of an adapter its description says float32
    assert again.dtype == torch.float32
    assert load_model(janus).dtype == torch.float16  # what is only read keeps its own


@pytest.mark.parametrize(
    ("dtype", "lora", "mode", "warns"),
    [("bfloat16", None, "replicate", True), ("bfloat16", None, "auto", False), ("bfloat16", {"r": 2}, "replicate", False),
     ("float32", None, "replicate", False)],
)  # fmt: skip
def test_full_training_of_bfloat16_weights_is_warned_of(janus, tmp_path, caplog, dtype, lora, mode, warns):
    settings = {**common(janus, tmp_path / "run", "janus", dtype=dtype, lora=lora), "sources": [{"name": "x"}], "parallel": {"mode": mode}}
    config = build(WarmupConfig, settings)
    with caplog.at_level(logging.WARNING):
        open_policy(config)
    assert ("most updates round to nothing" in caplog.text) == warns
    assert ("Leave parallel.mode at auto" in caplog.text) == warns


@pytest.mark.parametrize("stored", ["config alone", "language model alone", "no dtype in config"])
def test_what_would_be_loaded_as_float16_counts_not_what_a_file_says(janus, tmp_path, stored):
    """transformers loads in the dtype of config.json, whatever that of the file is."""
    config = json.loads((janus / "config.json").read_text())
    config.pop("dtype", None)
    if stored == "config alone":
        (janus / "config.json").write_text(json.dumps({**config, "torch_dtype": "float16"}))
    else:
        for file in janus.glob("*.safetensors"):
            tensors = {k: v.half() if stored == "no dtype in config" or "language_model" in k else v for k, v in load_file(file).items()}
            save_file(tensors, file, metadata={"format": "pt"})
        (janus / "config.json").write_text(json.dumps(config | ({"torch_dtype": "float16"} if "language" in stored else {})))
    policy = open_policy(build(WarmupConfig, {**common(janus, tmp_path / "run", "janus"), "sources": [{"name": "x"}]}))
    assert {p.dtype for p in policy.parameters()} == {torch.float32}


def test_an_adapter_keeps_the_dtype_that_it_was_trained_with(janus, tmp_path):
    stored_as(janus, torch.float16)
    first = common(janus, tmp_path / "first", "janus", max_steps=2, lora={"r": 2}, dtype="bfloat16")
    warmup(build(WarmupConfig, {**first, "sources": [{"name": data(tmp_path / "d.jsonl")}], "batch_size": 2, "num_eval_records": 1}))
    adapter = tmp_path / "first" / "checkpoints" / "step_2" / "model"
    again = build(WarmupConfig, {**common(adapter, tmp_path / "second", "janus", lora={"r": 2}), "sources": [{"name": "x"}]})
    assert open_policy(again).dtype == torch.bfloat16


def test_guidance_is_mixed_in_float32():
    """Logits near 20 in bfloat16 lie 0.125 apart: mixed there, 5 times a difference lands 0.6 away from where it should."""
    torch.manual_seed(0)
    conditional, unconditional, pictures = (torch.randn(64, 512).mul(4).add(20).bfloat16() for _ in range(3))
    c, u, i = (logits.double() for logits in (conditional, unconditional, pictures))
    found = mix(conditional, [unconditional], ImageSampling(guidance_scale=5.0))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), u + 5 * (c - u), atol=1e-4, rtol=0)
    three = mix(conditional, [unconditional, pictures], ImageSampling(guidance_scale=5.0, image_guidance_scale=1.2))
    torch.testing.assert_close(three.double(), u + 1.2 * (i - u) + 5 * (c - i), atol=1e-4, rtol=0)
    assert mix(conditional, [], ImageSampling(guidance_scale=1.0)).dtype == torch.float32
