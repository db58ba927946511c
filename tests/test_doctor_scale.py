"""The doctor's count of several GPUs: against what processes hold and send at toy size, and as arithmetic.

Run as a program, it starts processes and prints what each process held and sent. Argument: a checkpoint folder.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from diptych.cli import app
from diptych.config import GRPOConfig, OptimConfig, build
from diptych.doctor import DocumentSize, Fleet, Sizes, fleet, plan, plans, released
from diptych.doctor import hardware as hardware_module
from diptych.doctor.hardware import REFERENCES, Gpu
from diptych.doctor.memory import GIB
from diptych.doctor.scale import WAYS, gpu_memory, traffic
from diptych.document import Document, Text
from diptych.models.loading import load_model
from diptych.models.lora import attach_lora
from diptych.runtime import end_process, gather, generator, joined_processes, rank
from diptych.sampling.engine import sample
from diptych.tokens import collate
from diptych.training.grpo import accumulate_gradient, replay
from diptych.training.optim import make_optimizer, optimizer_step
from diptych.training.parallel import parallelize

MACHINES, GPUS, GROUP, MICRO_BATCHES = 2, 2, 4, 2
MEASURED = ("full", "lora", "lora_shard")


# --- what a process measures -----------------------------------------------------------------------------------------
class Sent(TorchDispatchMode):
    """Bytes that this process sends where rings carry the collectives; those of a few numbers (counts) are left out."""

    FEW = 64

    def __init__(self) -> None:
        super().__init__()
        self.within = self.between = 0.0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = str(function)
        if name.startswith("c10d."):
            group = dist.ProcessGroup.unbox(next(a for a in arguments if isinstance(a, torch.ScriptObject)))
            tensors = [a for a in arguments if isinstance(a, torch.Tensor)] or arguments[0]
            total = max(t.numel() * t.element_size() for t in tensors)
            if max(t.numel() for t in tensors) > self.FEW:
                self.note(total * (2 if "allreduce" in name else 1), dist.get_process_group_ranks(group))
        return function(*arguments, **(options or {}))

    def note(self, total: float, ranks: list[int]) -> None:
        sent = total * (len(ranks) - 1) / len(ranks)
        if len({number // GPUS for number in ranks}) == 1:
            self.within += sent
        else:
            self.between += sent


def held(tensors: Any) -> int:
    return sum(local.numel() * local.element_size() for local in (t.to_local() if isinstance(t, DTensor) else t for t in tensors))


def measured(folder: str, way: str) -> dict[str, Any]:
    config = build(
        GRPOConfig,
        {
            "output_dir": "unused", "max_steps": 1, "optim": {"lr": 1e-4}, "rewards": [{"name": "format"}], "num_generations": GROUP,
            "prompts_per_step": dist.get_world_size(), "micro_batch_size": GROUP // MICRO_BATCHES,
            "sampling": {"max_images": 1, "max_text_tokens": 6}, "lora": None if way == "full" else {"r": 16},
            "parallel": {"mode": "replicate"} if way == "lora" else {"mode": "shard", "shard_size": GPUS},
        },
    )  # fmt: skip
    model = load_model(folder, dtype="bfloat16")
    if config.lora is not None:
        attach_lora(model, config.lora, {"source": folder})
    model = parallelize(model, config, torch.device("cpu"))
    optimizer, schedule = make_optimizer(model, config.optim, 1)
    aside = {id(p) for module in model.frozen_modules() for p in module.parameters()}
    weights = [p for p in model.parameters() if id(p) not in aside]
    names = {name for name, _ in model.named_parameters()}
    buffers = [tensor for name, tensor in model.state_dict().items() if name not in names]
    found: dict[str, Any] = {"weights": held(weights), "frozen": held(p for p in model.parameters() if id(p) in aside) + held(buffers)}
    with model.gathered():
        found["whole"] = sum(held([p]) for p in model.parameters() if id(p) not in aside)
    prompt = model.encode_prompt(Document((Text("a red ball"),)))
    with Sent() as sampling:
        rollouts = sample(model, [prompt], config.sampling, num_generations=GROUP, generator=generator(rank()))
    batch = collate([rollout.row for rollout in rollouts])
    with Sent() as scoring:
        old = replay(model, batch, config, True)
    with Sent() as update:
        advantages = torch.randn(batch.text_ids.shape)
        accumulate_gradient(model, batch, torch.arange(len(batch)), old.logprobs, None, advantages, config)
        found["gradients"] = held(p.grad for p in model.parameters() if p.grad is not None)
        optimizer_step(model, optimizer, schedule, config.optim)
    found["moments"] = held(value for state in optimizer.state.values() for name, value in state.items() if name != "step")
    for name, phase in (("sampling", sampling), ("scoring", scoring), ("update", update)):
        found[name] = {"within": phase.within, "between": phase.between}
    return found


def process(number: int, folder: str, port: int) -> None:
    """One of them, with what torchrun would tell it."""
    told = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": MACHINES * GPUS, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in told.items()}
    with joined_processes():
        everyone = {way: gather(measured(folder, way)) for way in MEASURED}
        if rank() == 0:
            print(json.dumps(everyone))
    end_process(0)


# --- the count ---------------------------------------------------------------------------------------------------------
def bytes_of(memory: Any) -> dict[str, float]:
    return {name: value * GIB for name, value in dataclasses.asdict(memory).items()}


def test_what_processes_hold_and_send_is_what_is_counted(tmp_path):
    """2 x 2 processes: full training and adapters on 2 x 2 (shards of 2, two copies), adapters replicated over 4."""
    from test_processes import ENVIRONMENT
    from toy_checkpoints import MAKERS

    folder = MAKERS["janus"](tmp_path / "janus")
    done = subprocess.run(
        [sys.executable, __file__, str(folder)], env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    everyone, sizes = json.loads(done.stdout.splitlines()[-1]), Sizes.of(load_model(folder, dtype="bfloat16"))
    those, document = Fleet(GPUS, 80, MACHINES), DocumentSize(1, GROUP, 10, 1)
    for way in MEASURED:
        memory = bytes_of(gpu_memory(way, sizes, those, document, GROUP // MICRO_BATCHES))
        counted = dataclasses.asdict(traffic(way, sizes, those, MICRO_BATCHES))
        whole = memory["gathered"] if way != "lora" else memory["weights"]  # of a whole base nothing but adapters is gathered
        assert len(everyone[way]) == MACHINES * GPUS
        for found in everyone[way]:
            assert found["whole"] == pytest.approx(whole, rel=0.1), way
            for item in ("weights", "frozen", "gradients", "moments"):
                assert found[item] == pytest.approx(memory[item], rel=0.1), (way, item)
            for phase in ("sampling", "scoring", "update"):
                assert found[phase] == pytest.approx(counted[phase], rel=0.1), (way, phase)


SMALL = Sizes(
    weight_bytes=10_000, trained=3000, hidden=8, intermediate=16, layers=2, heads=4, kv_heads=2, head_dim=2, vocab=50, codebook=30,
    positions=4, depth=3, length=6, context=100, branches=1,
)  # fmt: skip
LITTLE = DocumentSize(num_images=2, num_generations=3, text_tokens=10, num_prompts=2)


def test_memory_by_hand():
    """3000 trained, 2 * 576 = 1152 of them in the decoder's matrices, 1848 outside; 10000 - 6000 bytes frozen; 4096 in adapters.

    KV cache 5376, logits 7200, inputs 1088, one layer 34 * 384 = 13056 in full and 34 * 1184 = 40256 with adapters, scored logits
    38800 (`test_estimates_by_hand` has these).
    """
    those = Fleet(4, 80, 2)
    full = bytes_of(gpu_memory("full", SMALL, those, LITTLE, 1, kl=True))
    assert (full["weights"], full["moments"], full["gradients"]) == (3000, 6000, 3000)  # 4, 8 and 4 bytes, a quarter each
    assert (full["frozen"], full["reference"], full["gathered"]) == (4000, 1500 + 4000, 6000)
    assert full["sampling"] == 3000 + 4000 + 6000 + 5500 + 6000 + 5376 + 7200
    # at the logits: 1848 gathered weights and their gradients in 2 bytes; more than six times a layer's 2 * 576 beside one layer's 13056
    assert (full["units"], full["activations"]) == (4 * 1848, 1088 + 38_800)
    assert full["training"] == 3000 + 4000 + 6000 + 5500 + 3000 + 7392 + 39_888
    assert full["total"] == full["training"]
    lora = bytes_of(gpu_memory("lora", SMALL, those, LITTLE, 1, kl=True))
    assert (lora["weights"], lora["moments"], lora["gradients"]) == (6000 + 4 * 4096, 8 * 4096, 4 * 4096)
    assert (lora["reference"], lora["gathered"]) == (0, 4 * 4096)
    # a layer: three times its adapters (8192), their gradients twice (16384)
    assert (lora["units"], lora["activations"]) == (3 * 8192 + 2 * 8192, 1088 + 40_256)
    part = bytes_of(gpu_memory("lora_shard", SMALL, those, LITTLE, 1))
    assert (part["weights"], part["moments"], part["gradients"]) == (22_384 / 4, 8192, 4096)
    assert part["gathered"] == 22_384
    assert part["units"] == 2 * 1848 + 3 * (1152 + 8192) + 2 * 8192
    qlora = bytes_of(gpu_memory("qlora", SMALL, those, LITTLE, 1))
    assert qlora["weights"] == 6000 - 2 * 1152 + 2 * (288 + 10 + 7 * 4) + 4 * 4096
    alone = bytes_of(gpu_memory("lora", SMALL, Fleet(1, 80), LITTLE, 1))
    assert alone["gathered"] == alone["units"] == 0
    twice = bytes_of(gpu_memory("full", SMALL, those, LITTLE, 2))
    assert twice["activations"] == 2 * (1088 + 38_800)
    eight = bytes_of(gpu_memory("full", SMALL, those, LITTLE, 1, adamw_8bit=True))
    assert eight["moments"] == 2 * (1 + 4 / 256) * 3000 / 4  # two of a byte, and a float32 scale for 256 of each
    with pytest.raises(ValueError, match="the way of training is 'fp8'; allowed are full, lora"):
        gpu_memory("fp8", SMALL, those, LITTLE, 1)


def test_moments_of_8_bits_are_counted():
    pytest.importorskip("bitsandbytes")
    module = torch.nn.Linear(1024, 512, bias=False)
    optimizer, _ = make_optimizer(module, OptimConfig(lr=1e-4, name="adamw_8bit"), 1)
    module.weight.grad = torch.randn_like(module.weight)
    optimizer.step()
    (state,) = optimizer.inner.state.values()
    stored = sum(state[name].nbytes for name in ("state1", "state2", "absmax1", "absmax2"))
    sizes = dataclasses.replace(SMALL, trained=module.weight.numel(), weight_bytes=2 * module.weight.numel())
    assert bytes_of(gpu_memory("full", sizes, Fleet(1, 80), LITTLE, 1, adamw_8bit=True))["moments"] == stored


def test_traffic_by_hand():
    """All weights: 6000 bytes gathered, 3/4 from other GPUs of a shard of 4; gradients 12000, a quarter of them over 2 copies."""
    those = Fleet(4, 80, 2)
    sent = traffic("full", SMALL, those, 3)
    assert (sent.sampling.within, sent.scoring.within) == (4500, 3 * 4500)
    assert sent.update.within == 3 * (2 * 4500 + 9000)
    assert sent.update.between == 2 * 3000 / 2
    assert traffic("full", SMALL, those, 3, kl=True).scoring.within == 6 * 4500
    lora = traffic("lora", SMALL, those, 3)
    assert lora.sampling.within == lora.scoring.within == lora.update.within == 0
    assert lora.update.between == 2 * 4 * 4096 * 7 / 8
    assert traffic("lora", SMALL, Fleet(8, 80), 3).update.within == 2 * 4 * 4096 * 7 / 8
    part = traffic("lora_shard", SMALL, those, 1)
    assert part.update.within == (2 * 22_384 + 16_384) * 3 / 4
    assert part.update.between == 4096
    everywhere = traffic("full", SMALL, Fleet(4, 80, 2, 8), 1)  # one copy over both machines
    assert everywhere.sampling.within == everywhere.update.within == 0
    assert everywhere.update.between == (2 * 6000 + 12_000) * 7 / 8
    assert traffic("full", SMALL, Fleet(1, 80), 5).update.within == 0


def test_the_choice_and_its_settings():
    found = plan(REFERENCES["Janus-Pro-7B"], Fleet(8, 80, 2), DocumentSize())
    assert list(found.ways) == list(WAYS)
    assert found.choice == "full"
    config = found.ways["full"].settings.split()
    assert dict(zip(config[::2], config[1::2], strict=True)) == {
        "--parallel.mode": "shard", "--parallel.shard_size": "8", "--gradient_checkpointing": "true", "--prompts_per_step": "16",
        "--num_generations": "8", "--micro_batch_size": str(found.ways["full"].micro_batch_size),
    }  # fmt: skip
    alone = plan(REFERENCES["Janus-Pro-7B"], Fleet(1, 24), DocumentSize(), four_bits=False)
    assert list(alone.ways) == ["full", "lora"]  # nothing to share with one GPU
    assert alone.choice is None
    assert alone.ways["full"].micro_batch_size == 1
    assert 8 % plan(REFERENCES["Emu3-8B"], Fleet(8, 80), DocumentSize(num_images=1)).ways["full"].micro_batch_size == 0
    for way in WAYS[1:]:  # their settings are those of a recipe
        values = plans(Fleet(8, 80), only="Janus-Pro-7B")["Janus-Pro-7B"].ways[way].settings.split()
        nested: dict[str, Any] = {"output_dir": "x", "max_steps": 1, "optim": {"lr": 1e-5}, "rewards": [{"name": "format"}]}
        for key, value in zip(values[::2], values[1::2], strict=True):
            *folders, leaf = key.removeprefix("--").split(".")
            place = nested.setdefault(folders[0], {}) if folders else nested
            place[leaf] = value
        assert build(GRPOConfig, nested).parallel.mode == ("shard" if way == "lora_shard" else "replicate")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ((0, 80, None, None), "--gpus is 0; give at least 1"),
        ((-8, 80, None, None), "--gpus is -8; give at least 1"),
        ((8, 80, 0, None), "--nodes is 0; give at least 1"),
        ((8, 80, 2, 0), "--shard-size is 0; give at least 1"),
        ((8, 80, 2, 5), r"--shard-size is 5, which does not divide the 16 GPUs \(2 x 8\); choose a divisor"),
        ((8, 0, 2, None), "--gpu-memory is 0; give the GiB of one GPU, e.g. 80"),
        ((8, float("nan"), 2, None), "--gpu-memory is nan"),
        ((8, None, None, None), "this machine has no GPU to take the memory from; give it in GiB: --gpu-memory 80"),
        ((None, 80, None, None), "--gpu-memory is about several GPUs; say how many each machine has: --gpus 8"),
        ((None, None, 8, None), "--nodes is about several GPUs"),
        ((None, None, None, 8), "--shard-size is about several GPUs"),
    ],
)
def test_fleets_that_cannot_be(asked, said, monkeypatch):
    monkeypatch.setattr(hardware_module, "gpus", list)
    with pytest.raises(ValueError, match=said):
        fleet(*asked)


def test_memory_is_that_of_this_machine_where_it_is_not_given(monkeypatch):
    monkeypatch.setattr(hardware_module, "gpus", lambda: [Gpu("a", 80, True), Gpu("b", 24, True)])
    assert fleet(2, None, None, None) == Fleet(2, 24)
    assert fleet(None, None, None, None) is None
    assert released("janus-pro-7b") == "Janus-Pro-7B"
    assert released("nobody/knows") is None


def doctor(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["doctor", *arguments], catch_exceptions=False)


def test_the_command(monkeypatch):
    monkeypatch.setattr(hardware_module, "gpus", list)
    found = json.loads(doctor("storyboard", "--gpus", "2", "--gpu-memory", "24", "--json").stdout)
    assert list(found["scale"]["ways"]) == ["full", "lora", "lora_shard"]  # no 4-bit form
    assert found["scale"]["fleet"] == {"gpus": 2, "gpu_gib": 24, "nodes": 1, "shard_size": None}
    assert found["scale"]["choice"] == "full"
    one = json.loads(doctor("janus-pro-1b", "--gpus", "8", "--gpu-memory", "80", "--nodes", "8", "--kl", "--json").stdout)
    assert one["Janus-Pro-1B"]["ways"]["full"]["memory"]["reference"] > 0
    text = doctor("storyboard", "--gpus", "2", "--gpu-memory", "24").stdout
    for part in (
        "Memory in MiB on each of 2 GPUs of 24 GiB (one machine, a copy on 2)",
        "LoRA, sharded",
        "Choose full: --parallel.mode shard",
    ):
        assert part in text
    assert "more than the context" in doctor("storyboard", "--gpus", "2", "--gpu-memory", "24", "--num-images", "100").stdout
    assert "Nothing fits" in doctor("Chameleon-34B", "--gpus", "1", "--gpu-memory", "24").stdout
    everything = json.loads(doctor("--gpus", "1", "--gpu-memory", "24", "--json").stdout)
    assert set(everything) == set(REFERENCES)
    with pytest.raises(ValueError, match="the model is given twice, as 'a' and as --model 'b'; leave one out"):
        doctor("a", "--model", "b")
    with pytest.raises(ValueError, match="--adamw-8bit is about several GPUs"):
        doctor("storyboard", "--adamw-8bit")
    smaller = json.loads(doctor("Janus-Pro-7B", "--gpus", "1", "--gpu-memory", "141", "--adamw-8bit", "--json").stdout)["Janus-Pro-7B"]
    assert smaller["ways"]["full"]["settings"].endswith("--optim.name adamw_8bit")
    with pytest.raises(ValueError, match="the released size of that name is known with --gpus"):
        doctor("Janus-Pro-7B")


# --- the documents -----------------------------------------------------------------------------------------------------
def test_tables_of_the_documents_are_what_is_printed():
    """Every row of docs/how-to/scale.md's tables, under the command that stands above it."""
    text = (Path(__file__).parents[1] / "docs" / "how-to" / "scale.md").read_text()
    blocks = re.findall(r"^\$ diptych (doctor --gpus .*)\n((?:[^`\n].*\n)+)", text, re.MULTILINE)
    assert len(blocks) == 4
    for command, rows in blocks:
        printed = {" ".join(line.split()) for line in doctor(*command.split()[1:]).stdout.splitlines()}
        for row in rows.strip().splitlines():
            assert " ".join(row.split()) in printed, command


if __name__ == "__main__":
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # forked, so that modules are imported once
    torch.multiprocessing.start_processes(process, (sys.argv[1], port), MACHINES * GPUS, start_method="fork")
