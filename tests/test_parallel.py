"""Sharded training is the training of one process: weights, metrics, checkpoints, whatever the mesh."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from family_data import SIZE, picture
from safetensors.torch import load_file
from test_processes import ENVIRONMENT, LAUNCH, TESTS
from test_training import tiny_folder  # noqa: F401 - a fixture
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.tensor import DTensor
from toy_checkpoints import make_emu3_5

from diptych.config import GRPOConfig, OptimConfig, WarmupConfig, build, to_yaml
from diptych.data import Mixture
from diptych.models import load_model, open_policy
from diptych.models.storyboard import StoryboardModel
from diptych.runs import read_jsonl
from diptych.training import checkpoints
from diptych.training.grpo import grpo
from diptych.training.optim import make_optimizer, optimizer_step
from diptych.training.parallel import parallelize
from diptych.training.supervised import encode, supervised_gradient
from diptych.training.warmup import warmup

STEPS = 5


@pytest.fixture(autouse=True)
def _own_rewards(monkeypatch):
    monkeypatch.syspath_prepend(str(TESTS))


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> dict[str, Path]:
    """Answers of every form, of which half are words alone, so that processes draw different numbers of pictures; and prompts for them."""
    folder = tmp_path_factory.mktemp("records")
    for seed in range(3):
        picture(seed).save(folder / f"{seed}.png")
    asked, image = {"role": "user", "content": "tell a story"}, {"type": "image", "image": "0.png"}
    seen = {"role": "user", "content": [{"type": "image", "image": "1.png"}, {"type": "text", "text": "and then?"}]}
    told = [
        ([asked, {"role": "assistant", "content": [{"type": "text", "text": "a red cat."}, image]}], "free"),
        ([asked, {"role": "assistant", "content": "a bird."}], "text"),
        ([seen, {"role": "assistant", "content": "it rains."}], "text"),
        ([asked, {"role": "assistant", "content": [image]}], "image"),
    ]
    examples = [{"messages": messages, "answer_form": form} for messages, form in told]
    prompts = [{"messages": messages[:1], "answer_form": form, "num_images": None} for messages, form in told]
    prompts.append({"messages": [asked], "answer_form": "text_image", "num_images": None})
    files = {"examples": folder / "examples.jsonl", "prompts": folder / "prompts.jsonl"}
    files["examples"].write_text("".join(json.dumps(line) + "\n" for line in examples * 8))
    files["prompts"].write_text("".join(json.dumps(line) + "\n" for line in prompts * 8))
    return files


def settings(model: str | Path, records: dict[str, Path], family: str, **changes: Any) -> dict[str, dict[str, Any]]:
    common = {
        "model": str(model), "image_size": SIZE.get(family), "max_steps": STEPS, "save_steps": 2, "num_threads": 1, "device": "cpu",
        "optim": {"lr": 1e-5}, "sampling": {"max_images": 1, "max_text_tokens": 6, "image": {"guidance_scale": 2.0}}, **changes,
    }  # fmt: skip
    warm = {"sources": [{"name": str(records["examples"])}], "batch_size": 3, "micro_batch_size": 1, "num_eval_records": 2}
    policy = {
        "prompts": [{"name": str(records["prompts"])}], "rewards": [{"name": "toy_rewards:per_step"}], "num_generations": 2,
        "prompts_per_step": 4, "micro_batch_size": 2, "text": {"beta": 0.01}, "image": {"beta": 0.01},
        "ptx": {"sources": [{"name": str(records["examples"])}], "coef": 0.5, "batch_size": 3},
    }  # fmt: skip
    return {"warmup": {**common, **warm}, "grpo": {**common, **policy}}


def built(kind: str, values: dict[str, Any], out: Path) -> WarmupConfig | GRPOConfig:
    return build(WarmupConfig if kind == "warmup" else GRPOConfig, {**values, "output_dir": str(out)})


def alone(kind: str, values: dict[str, Any], out: Path) -> None:
    config = built(kind, values, out)
    warmup(config) if isinstance(config, WarmupConfig) else grpo(config)


def together(count: int, shard_size: int | None, jobs: list[tuple[str, dict[str, Any], Path]], **environment: str) -> str:
    """`shard_size` None: each process holds all of the model."""
    recipes = []
    parallel = {"mode": "replicate"} if shard_size is None else {"mode": "shard", "shard_size": shard_size}
    for number, (kind, values, out) in enumerate(jobs):
        path = out.parent / f"{number}_{count}_{kind}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(to_yaml(built(kind, {**values, "parallel": parallel}, out)))
        recipes.append(str(path))
    done = subprocess.run(
        [*LAUNCH, str(count), str(TESTS / "several_trainings.py"), *recipes], env={**ENVIRONMENT, **environment}, capture_output=True,
        text=True, timeout=90,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def trained(out: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    """All tensors of the model that a run saved."""
    folder = out / "checkpoints" / f"step_{step}" / "model"
    return {
        f"{file.relative_to(folder)}/{name}": value.float()
        for file in sorted(folder.rglob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def moments(out: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    """The running mean of the gradients, by weight: of a run in shards, and of one in one process."""
    folder = out / "checkpoints" / f"step_{step}"
    if (folder / checkpoints.SHARDS).is_dir():
        dcp_to_torch_save(folder / checkpoints.SHARDS, folder / "whole.pt")
        found = torch.load(folder / "whole.pt")
        return {name.removeprefix("exp_avg/"): value for name, value in found.items() if name.startswith("exp_avg/")}
    state = torch.load(folder / "trainer.pt")["optimizer"]
    model = load_model(folder / "model")
    optimizer, _ = make_optimizer(model, OptimConfig(lr=1), 1)
    names = {id(p): name for name, p in model.named_parameters()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    return {order[number]: one["exp_avg"] for number, one in state["state"].items()}


def far(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest |a - b| / |a| of a tensor; up to a few 1e-5 is rounding (biases of keys have no gradient but that).

    What only the second has is 0: of weights that were never used.
    """
    assert mine.keys() <= theirs.keys()
    assert not any(theirs[name].any() for name in theirs.keys() - mine.keys())
    return max(float((theirs[name] - value).norm() / value.norm().clamp(min=1e-5)) for name, value in mine.items())


def assert_same_run(one: Path, other: Path) -> None:
    assert trained(one).keys() == trained(other).keys()
    assert far(trained(one), trained(other)) <= 1e-5
    assert far(moments(one), moments(other)) <= 4e-5  # gradients of five steps, summed in another order
    for a, b in zip(read_jsonl(one / "metrics.jsonl"), read_jsonl(other / "metrics.jsonl"), strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"step_time", "seconds/rollout"}:
            assert b[name] == pytest.approx(a[name], rel=1e-5, abs=1e-5, nan_ok=True), name


REPLICATED = ("storyboard grpo", "janus warmup lora", "vila_u grpo", "emu3 grpo lora")
IN_TWO = (
    "storyboard warmup", "storyboard grpo", "janus grpo", "janus grpo lora", "vila_u grpo", "emu3 grpo lora", "chameleon grpo",
    "emu3_5 grpo",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "shard_size", "trainings"),
    [(2, 2, IN_TWO), (4, 2, ("storyboard grpo", "janus warmup")), (2, None, REPLICATED)],
    ids=["2 processes", "2 x 2 processes", "2 whole ones"],
)
def test_trainings_of_several_processes_are_those_of_one(folders, records, tmp_path, count, shard_size, trainings):
    """Of every family; GRPO's with supervised examples beside it."""
    jobs = []
    toys = {**folders, "emu3_5": make_emu3_5(tmp_path / "emu3_5"), "storyboard": "storyboard"}
    for training in trainings:
        name, kind, *adapts = training.split()
        values = settings(toys[name], records, name, lora={"r": 4} if adapts else None)[kind]
        jobs.append((kind, values, tmp_path / "one" / training.replace(" ", "_")))
    together(count, shard_size, [(kind, values, tmp_path / "many" / out.name) for kind, values, out in jobs])
    for kind, values, out in jobs:
        alone(kind, values, out)
        assert_same_run(out, tmp_path / "many" / out.name)


@pytest.mark.parametrize(("count", "shard_size"), [(2, 2), (4, 2)])
def test_each_process_holds_its_part_and_a_sampling_phase_gathers_once(count, shard_size):
    command = [*LAUNCH, str(count), str(TESTS / "sharded_facts.py"), str(shard_size)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    everyone = json.loads(done.stdout.splitlines()[-1])
    assert len(everyone) == count
    for facts in everyone:
        for name in ("weights", "gradients", "moments"):
            assert facts[name] == pytest.approx(1 / shard_size, rel=0.1), name
        assert facts["float32"] == facts["sampled in bfloat16"] == 1
        assert facts["gathers"] == 1


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(tiny_folder, records, tmp_path):  # noqa: F811
    """4 processes, then 2, then 1 that holds all; and one that began in one process goes on in two."""
    values = settings(tiny_folder, records, "storyboard", max_steps=6)["grpo"]
    alone("grpo", values, tmp_path / "whole")
    for name, stages in (("fewer", ((4, 2), (2, 4), (1, 6))), ("more", ((1, 2), (2, 6)))):
        for count, step in stages:
            part = {**values, "max_steps": step}
            if count == 1:
                alone("grpo", {**part, "parallel": {"mode": "replicate"}}, tmp_path / name)
            else:
                together(count, 2, [("grpo", part, tmp_path / name)])
        assert far(trained(tmp_path / "whole", 6), trained(tmp_path / name, 6)) <= 1e-5
        lines = [read_jsonl(tmp_path / run / "metrics.jsonl") for run in ("whole", name)]
        for a, b in zip(*lines, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-3, abs=2e-5)


def test_small_updates_count_where_weights_are_float32(tiny_folder, records, tmp_path):  # noqa: F811
    """100 updates at 1e-6, computing in bfloat16: weights move as AdamW in float32 moves them on the same gradients; those in bfloat16 do
    not."""
    batch_of = Mixture(build(WarmupConfig, {**settings(tiny_folder, records, "storyboard")["warmup"], "output_dir": "x"}).sources, 0)
    moved = {}
    for mode in ("shard", "replicate"):
        optim = OptimConfig(lr=1e-6)
        values = settings(tiny_folder, records, "storyboard", dtype="bfloat16", parallel={"mode": mode}, optim=optim.model_dump())["warmup"]
        config = build(WarmupConfig, {**values, "output_dir": str(tmp_path / mode)})
        model = parallelize(open_policy(config), config, torch.device("cpu"))
        optimizer, schedule = make_optimizer(model, optim, 100)
        batch = encode(model, batch_of.batch(0, 2), 0.0, 0, 0)
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        start = {name: whole(p).float().clone() for name, p in model.named_parameters() if name in names}
        copies = {name: value.clone().requires_grad_() for name, value in start.items()}
        by_hand = torch.optim.AdamW(copies.values(), lr=1e-6, betas=optim.betas, weight_decay=0.0)
        for _ in range(100):
            supervised_gradient(model, batch, text_weight=1.0, image_weight=1.0)
            gradients = {name: p.grad for name, p in model.named_parameters() if name in names}
            norm = sum(whole(g).float().square().sum() for g in gradients.values() if g is not None).sqrt()
            for name, gradient in gradients.items():
                copies[name].grad = None if gradient is None else whole(gradient).float() * min(1.0, 1.0 / (float(norm) + 1e-6))
            by_hand.step()
            optimizer_step(model, optimizer, schedule, optim)
        now = {name: whole(p).float() for name, p in model.named_parameters() if name in names}
        difference = sum((now[n] - copies[n].detach()).square().sum() for n in names).sqrt()
        moved[mode] = float(difference / sum((copies[n].detach() - start[n]).square().sum() for n in names).sqrt())
    assert moved["shard"] <= 1e-2
    assert moved["replicate"] >= 0.3


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"parallel": {"mode": "shard", "shard_size": 2}},
            "shard_size is 2, which does not divide the 1 processes; choose a divisor",
        ),
        ({"parallel": {"mode": "sharded"}}, "parallel.mode"),
        ({"parallel": {"mode": "shard"}, "offload": ["optimizer"]}, "sharded weights and moments stay where they are"),
        ({"offload": ["optimizer"]}, "this run is on the CPU"),
    ],
)
def test_what_cannot_be_sharded_is_refused(tiny_folder, records, tmp_path, changes, said):  # noqa: F811
    values = {**settings(tiny_folder, records, "storyboard")["grpo"], **changes}
    with pytest.raises(ValueError, match=said):
        alone("grpo", values, tmp_path / "run")


def test_processes_that_sample_more_often_than_others_wait_for_nobody(tiny_folder, records, tmp_path):  # noqa: F811
    """One process has groups to sample again where another has none, and a held-out prompt where another has none."""
    values = settings(tiny_folder, records, "storyboard", max_steps=3)["grpo"]
    changes = {
        "resample_attempts": 2, "rewards": [{"name": "toy_rewards:flat_for_some"}], "eval_steps": 1, "num_eval_prompts": 1,
        "rollout_batch_size": 1, "prompts": [{"name": "storyboard:prompts"}], "ptx": None,
    }  # fmt: skip
    together(2, 2, [("grpo", {**values, **changes}, tmp_path / "many" / "run")])
    alone("grpo", {**values, **changes}, tmp_path / "one" / "run")
    shares = [line["frac_groups_resampled"] for line in read_jsonl(tmp_path / "many" / "run" / "metrics.jsonl")]
    assert shares == [line["frac_groups_resampled"] for line in read_jsonl(tmp_path / "one" / "run" / "metrics.jsonl")]
    assert any(shares)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_of_adapters_is_sharded_in_its_own_type(folders, records, tmp_path, dtype):
    values = settings(folders["janus"], records, "janus", lora={"r": 4}, dtype=dtype, parallel={"mode": "shard"})["warmup"]
    config = build(WarmupConfig, {**values, "output_dir": str(tmp_path / "run")})
    model = parallelize(open_policy(config), config, torch.device("cpu"))
    frozen = {id(p) for module in model.frozen_modules() for p in module.parameters()}
    base = [p for p in model.parameters() if not p.requires_grad and id(p) not in frozen]
    adapters = [p for p in model.parameters() if p.requires_grad]
    assert all(isinstance(p, DTensor) for p in (*base, *adapters))
    assert {p.dtype for p in base} == {getattr(torch, dtype)}
    assert {p.dtype for p in adapters} == {torch.float32}
    warmup(config)
    (saved,) = (tmp_path / "run" / "checkpoints" / f"step_{STEPS}" / "model").glob("adapter_model.safetensors")
    assert load_file(saved)


def test_4_bit_weights_are_not_sharded(folders, records, tmp_path):
    pytest.importorskip("bitsandbytes")
    values = settings(folders["janus"], records, "janus", lora={"r": 4}, load_in_4bit=True, parallel={"mode": "shard"})["warmup"]
    with pytest.raises(ValueError, match="cannot shard 4-bit weights; use replicate"):
        alone("warmup", values, tmp_path / "run")


@pytest.mark.slow
def test_a_model_trains_that_one_process_could_not_hold(tmp_path):
    """Weights, gradients and moments in float32 exceed what a process may take; a quarter of them does not."""
    base = load_model("storyboard")
    wide = {"hidden_size": 640, "num_heads": 5, "intermediate_size": 2560, "num_layers": 8}
    model = StoryboardModel(dataclasses.replace(base.config, **wide), base.tokenizer)
    model.save_pretrained(tmp_path / "model")
    state = 16 * sum(p.numel() for p in model.parameters()) / 2**20
    limit = int(0.75 * state)
    environment = {**ENVIRONMENT, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2"}  # what is freed is given back
    config = build(
        WarmupConfig,
        {
            "model": str(tmp_path / "model"), "output_dir": str(tmp_path / "run"), "max_steps": 2, "batch_size": 4, "micro_batch_size": 1,
            "num_eval_records": 1, "save_steps": 1, "sample_steps": 100, "num_threads": 1, "optim": {"lr": 1e-4},
            "parallel": {"mode": "shard"},
            "sources": [{"name": "storyboard:text_to_image"}], "sampling": {"max_images": 1, "max_text_tokens": 1}, "device": "cpu",
        },
    )  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(to_yaml(config))
    for count in (1, 4):
        command = [*LAUNCH, str(count), str(TESTS / "limited_memory.py"), str(tmp_path / "recipe.yaml"), str(limit)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        if count == 1:
            assert done.returncode != 0
            assert "memory" in done.stderr
        else:
            assert done.returncode == 0, done.stderr[-3000:]
    assert len(read_jsonl(tmp_path / "run" / "metrics.jsonl")) == 2
