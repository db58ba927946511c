"""Trainings of several processes at their edges: parts trained in full beside adapters, full disks, leftovers of killed processes."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_parallel import alone, records, settings, together, trained  # noqa: F401 - a fixture
from test_training import tiny_folder, warmup_config  # noqa: F401 - a fixture

from diptych.config import WarmupConfig, build
from diptych.models import open_policy
from diptych.runs import RunFolder
from diptych.training import checkpoints
from diptych.training.parallel import parallelize
from diptych.training.warmup import warmup


@pytest.mark.slow
@pytest.mark.parametrize("shard_size", [2, None])
def test_what_is_trained_in_full_beside_adapters_may_be_used_by_some_processes_only(folders, records, tmp_path, shard_size):  # noqa: F811
    """Pictures come through what is trained, words do not, and layers have no gradient at their input then: FSDP would add up the first
    layer's gradients earlier in one process than in the other."""
    jobs = []
    for kind, parts in (("warmup", ["aligner"]), ("grpo", ["generation_embeddings", "generation_head"])):
        values = settings(folders["janus"], records, "janus", max_steps=3, lora={"r": 4, "train_in_full": parts})[kind]
        jobs.append((kind, values, tmp_path / "many" / kind))
    together(2, shard_size, jobs)
    for kind, values, _ in jobs:
        alone(kind, values, tmp_path / "one" / kind)
        one, many = (trained(tmp_path / run / kind, 3) for run in ("one", "many"))
        assert one.keys() == many.keys()
        for name, value in one.items():
            assert float((many[name] - value).norm() / value.norm().clamp(min=1e-5)) <= 1e-5, name


def test_what_is_trained_in_full_beside_adapters_computes_in_the_type_of_the_base(folders, records, tmp_path):  # noqa: F811
    """It is kept in float32, as the adapters are; a layer of float32 would not take what the others compute in bfloat16."""
    lora = {"r": 4, "train_in_full": ["generation_head", "embed_tokens"]}
    values = settings(folders["janus"], records, "janus", max_steps=1, dtype="bfloat16", lora=lora, optim={"lr": 1e-3})["warmup"]
    alone("warmup", values, tmp_path / "run")
    saved = tmp_path / "run" / "checkpoints" / "step_1" / "model"
    adapter, full = (load_file(saved / f"{name}.safetensors") for name in ("adapter_model", "trained_in_full"))
    assert {value.dtype for value in adapter.values()} == {torch.float32}
    assert {value.dtype for value in full.values()} == {torch.bfloat16}
    alone("warmup", {**values, "max_steps": 2}, tmp_path / "run")  # goes on


def test_no_training_touches_an_image_tokenizer(folders, records, tmp_path):  # noqa: F811
    values = settings(folders["janus"], records, "janus", lora={"r": 4, "train_in_full": ["norm"]}, parallel={"mode": "shard"})["warmup"]
    config = build(WarmupConfig, {**values, "output_dir": str(tmp_path / "run")})
    with pytest.raises(ValueError, match=r"of the image tokenizer or the vision encoder \(hf\.model\.v"):
        open_policy(config)


def test_adapters_that_train_an_image_tokenizer_all_the_same_stay_in_one_process(folders, records, tmp_path):  # noqa: F811
    """As they could be trained once."""
    values = settings(folders["janus"], records, "janus", lora={"r": 4}, parallel={"mode": "shard"})["warmup"]
    config = build(WarmupConfig, {**values, "output_dir": str(tmp_path / "run")})
    model = open_policy(config)
    next(model.frozen_modules()[0].parameters()).requires_grad_()
    with pytest.raises(ValueError, match="train it on in one process"):
        parallelize(model, config, torch.device("cpu"))


def test_a_disk_that_is_full_while_the_model_is_exported_is_told(tiny_folder, tmp_path, monkeypatch):  # noqa: F811
    """Files that are mapped into memory have their room before they are written: else the process dies of SIGBUS."""
    calls = []

    def full(descriptor: int, offset: int, length: int, right=os.posix_fallocate) -> None:
        calls.append(length)
        if len(calls) > 40:  # in the second checkpoint
            raise OSError(errno.ENOSPC, "No space left on device")
        right(descriptor, offset, length)
        assert os.fstat(descriptor).st_blocks * 512 >= length

    monkeypatch.setattr(checkpoints.os, "posix_fallocate", full)
    config = warmup_config(tiny_folder, tmp_path / "run", max_steps=300, save_steps=1, parallel={"mode": "shard"})
    with pytest.raises(ValueError, match="no space left while writing"):
        warmup(config)
    assert calls
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert all((tmp_path / "run" / "checkpoints" / name / "model" / "config.json").is_file() for name in left)
    assert not [name for name in left if name.startswith(".tmp")]


def test_what_a_killed_process_left_is_gone_before_anything_is_written(tiny_folder, tmp_path, monkeypatch):  # noqa: F811
    """It may be what fills the disk."""
    config = warmup_config(tiny_folder, tmp_path / "run")
    left: Path = tmp_path / "run" / "checkpoints" / ".tmp-step_2-1"
    left.mkdir(parents=True)

    def written(_: RunFolder) -> None:
        assert not left.exists()
        raise ValueError("no space left")

    monkeypatch.setattr(RunFolder, "_settled", written)
    with pytest.raises(ValueError, match="no space left"), RunFolder(config.output_dir, config):
        pass


def test_one_process_that_fails_completes_the_checkpoint_that_is_being_written(tiny_folder, tmp_path, monkeypatch):  # noqa: F811
    """Else up to `save_steps` steps are lost at Ctrl-C, and another training begins in the folder while it is written."""

    def slow(*arguments, right=checkpoints.export) -> None:
        time.sleep(0.5)
        right(*arguments)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "export", slow)
    config = warmup_config(tiny_folder, tmp_path / "run", save_steps=1, parallel={"mode": "shard"})
    with pytest.raises(KeyboardInterrupt):
        warmup(config, interrupted)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_1"]
    assert len(trained(tmp_path / "run", 1))
