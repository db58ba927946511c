"""AdamW with moments in 8 bits: follows AdamW, takes a quarter of the room, and goes on exactly."""

from __future__ import annotations

import pytest
import torch
from test_parallel import alone, records, settings, together, trained  # noqa: F401 - fixtures
from test_training import tiny_folder  # noqa: F401 - a fixture

from diptych.config import MixtureSource, OptimConfig
from diptych.data import Mixture
from diptych.models import load_model
from diptych.training.eight_bit import EightBitAdamW
from diptych.training.optim import make_optimizer, optimizer_step
from diptych.training.supervised import encode, supervised_gradient

pytest.importorskip("bitsandbytes")
EIGHT = {"name": "adamw_8bit", "lr": 1e-4}


def moved(optim: OptimConfig, steps: int = 20) -> tuple[dict[str, torch.Tensor], int]:
    """How far each weight goes on the same batches, and bytes of moments."""
    model = load_model("storyboard")
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer, schedule = make_optimizer(model, optim, steps)
    mixture = Mixture([MixtureSource(name="storyboard:text_to_image")], 0)
    for step in range(steps):
        supervised_gradient(model, encode(model, mixture.batch(step, 2), 0.0, 0, step), text_weight=1.0, image_weight=1.0)
        optimizer_step(model, optimizer, schedule, optim)
    if isinstance(optimizer, EightBitAdamW):
        kept = [value for p in optimizer.parts for value in optimizer.moments(p).values()]
    else:
        kept = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    size = sum(value.nbytes for value in kept)
    return {name: p.detach() - start[name] for name, p in model.named_parameters() if name in start}, size


def test_it_follows_adamw_in_a_quarter_of_the_room():
    (mine, size), (theirs, full) = moved(OptimConfig(**EIGHT)), moved(OptimConfig(lr=1e-4))
    apart = sum((mine[n] - theirs[n]).square().sum() for n in theirs).sqrt() / sum(t.square().sum() for t in theirs.values()).sqrt()
    assert 0 < float(apart) < 0.15
    assert size < 0.27 * full


def test_the_rate_follows_the_schedule():
    model = load_model("storyboard")
    optim = OptimConfig(**EIGHT, schedule="linear", warmup_steps=2)
    optimizer, schedule = make_optimizer(model, optim, 10)
    batch = encode(model, Mixture([MixtureSource(name="storyboard:text_to_image")], 0).batch(0, 1), 0.0, 0, 0)
    rates = []
    for _ in range(4):
        supervised_gradient(model, batch, text_weight=1.0, image_weight=1.0)
        rates.append(optimizer_step(model, optimizer, schedule, optim)["learning_rate"])
    assert rates == pytest.approx([0.5e-4, 1e-4, 1e-4, 0.875e-4])


def test_a_run_goes_on_exactly(tiny_folder, records, tmp_path):  # noqa: F811
    values = settings(tiny_folder, records, "storyboard", max_steps=4, optim=EIGHT)["warmup"]
    alone("warmup", values, tmp_path / "whole")
    for steps in (2, 4):
        alone("warmup", {**values, "max_steps": steps}, tmp_path / "parts")
    one, other = trained(tmp_path / "whole", 4), trained(tmp_path / "parts", 4)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.slow
def test_a_sharded_run_goes_on_exactly_with_as_many_processes(records, tmp_path):  # noqa: F811
    values = settings("storyboard", records, "storyboard", max_steps=4, optim=EIGHT)["warmup"]
    together(2, 2, [("warmup", values, tmp_path / "whole"), ("warmup", {**values, "max_steps": 2}, tmp_path / "parts")])
    together(2, 2, [("warmup", values, tmp_path / "parts")])
    one, other = trained(tmp_path / "whole", 4), trained(tmp_path / "parts", 4)
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    with pytest.raises(ValueError, match="blocks of 8 bits cannot be divided anew"):
        alone("warmup", {**values, "max_steps": 5, "parallel": {"mode": "shard"}}, tmp_path / "parts")


def test_without_the_library_it_says_so(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match=r"adamw_8bit needs the extra: pip install 'diptych\[gpu\]'"):
        make_optimizer(torch.nn.Linear(2, 2), OptimConfig(**EIGHT), 1)
