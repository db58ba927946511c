"""Both trainings end to end on a tiny random model: they learn, they resume exactly, they fail clearly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diptych.config import GRPOConfig, WarmupConfig, build, to_yaml
from diptych.data import Mixture
from diptych.document import to_message
from diptych.models import load_model
from diptych.report import run_page
from diptych.rewards import RewardBatch, RewardError, base, load_reward
from diptych.rewards.base import merge
from diptych.runs import read_jsonl
from diptych.sampling.engine import sample
from diptych.sampling.logprobs import score
from diptych.tokens import collate
from diptych.training import experience as experience_module
from diptych.training import grpo as grpo_module
from diptych.training import step_report
from diptych.training.experience import collect, groups_without_spread, seen_by_all
from diptych.training.grpo import ParityError, accumulate_gradient, check_parity, grpo, minibatches, replay
from diptych.training.supervised import encode, encode_batch, supervised_gradient
from diptych.training.warmup import warmup

TESTS = Path(__file__).parent


@pytest.fixture(autouse=True)
def _own_rewards(monkeypatch):
    monkeypatch.syspath_prepend(str(TESTS))


@pytest.fixture(scope="session")
def tiny_folder(tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny_model.save_pretrained(folder)
    return folder


def warmup_config(model: Path, out: Path, **changes) -> WarmupConfig:
    return build(
        WarmupConfig,
        {
            "model": str(model), "output_dir": str(out), "max_steps": 6, "batch_size": 4, "save_steps": 2, "eval_steps": 3,
            "sample_steps": 6, "num_eval_records": 4, "num_threads": 1, "optim": {"lr": 1e-3},
            "sources": [{"name": "storyboard:interleaved", "weight": 1, "num_records": 20},
                        {"name": "storyboard:text_to_image", "weight": 1}],
            "sampling": {"max_images": 2, "max_text_tokens": 12}, **changes,
        },
    )  # fmt: skip


def grpo_config(model: Path, out: Path, **changes) -> GRPOConfig:
    return build(
        GRPOConfig,
        {
            "model": str(model), "output_dir": str(out), "max_steps": 4, "num_generations": 4, "prompts_per_step": 2,
            "save_steps": 2, "sample_steps": 2, "num_threads": 1, "optim": {"lr": 1e-3}, "num_minibatches": 2,
            "rewards": [{"name": "toy_rewards:per_step"}], "text": {"beta": 0.01}, "image": {"beta": 0.01},
            "sampling": {"max_images": 2, "max_text_tokens": 8, "image": {"guidance_scale": 2.0}}, **changes,
        },
    )  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


# --- learning ------------------------------------------------------------------------------------------------------------


def test_warmup_lowers_both_losses(tiny_folder, tmp_path):
    warmup(warmup_config(tiny_folder, tmp_path / "run", max_steps=25, optim={"lr": 3e-3}))
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    evaluated = [line for line in lines if "eval/loss/text" in line]
    assert evaluated[-1]["eval/loss/text"] < 0.7 * evaluated[0]["eval/loss/text"]
    assert evaluated[-1]["eval/loss/image"] < 0.95 * evaluated[0]["eval/loss/image"]
    assert (tmp_path / "run" / "samples" / "step_6.jsonl").is_file()


def test_grpo_raises_a_reward_that_any_model_can_learn(tiny_folder, tmp_path):
    config = grpo_config(
        tiny_folder, tmp_path / "run", max_steps=20, prompts_per_step=4, num_generations=8, num_minibatches=1,
        rewards=[{"name": "toy_rewards:likes_ball"}], optim={"lr": 3e-3}, text={}, image={},
        sampling={"max_images": 0, "max_text_tokens": 8},
    )  # fmt: skip
    grpo(config)
    values = [line["reward"] for line in read_jsonl(tmp_path / "run" / "metrics.jsonl")]
    assert sum(values[-3:]) / 3 > sum(values[:3]) / 3 + 0.3


def test_equal_rewards_change_nothing(tiny_folder, tmp_path):
    config = grpo_config(tiny_folder, tmp_path / "run", rewards=[{"name": "toy_rewards:always_equal"}], text={}, image={})
    grpo(config)
    before, after = weights(tiny_folder), weights(tmp_path / "run/checkpoints/step_4/model")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl")[0]["frac_reward_zero_std"] == 1


def test_a_grpo_step_trains_the_policy_and_nothing_else(tiny_folder, tmp_path):
    grpo(grpo_config(tiny_folder, tmp_path / "run"))
    before, after = weights(tiny_folder), weights(tmp_path / "run/checkpoints/step_4/model")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any(name.startswith("codec.") for name in changed)
    assert {"code_embeddings", "lm_head.weight", "depth_heads"} <= changed


# --- exactness -----------------------------------------------------------------------------------------------------------


def experience_of(config: GRPOConfig):
    model = load_model(config.model)
    rewards = [(r, load_reward(r.name)) for r in config.rewards]
    prompts = Mixture(config.prompts, config.seed)
    return model, collect(model, prompts, rewards, config, 0).experience(config)


def gradient(config: GRPOConfig, micro: int) -> torch.Tensor:
    config = config.model_copy(update={"micro_batch_size": micro})
    model, experience = experience_of(config.model_copy(update={"micro_batch_size": 8}))
    batch = collate([r.row for r in experience.rollouts])
    old = replay(model, batch, config, True).logprobs + 0.01
    advantages = torch.randn(batch.text_ids.shape, generator=torch.Generator().manual_seed(0))
    accumulate_gradient(model, batch, torch.arange(len(batch)), old, old - 0.05, advantages, config)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "gspo"])
def test_gradient_accumulation_cannot_change_the_gradient(tiny_folder, tmp_path, loss_type):
    config = grpo_config(tiny_folder, tmp_path / "run", loss_type=loss_type)
    whole, parts = gradient(config, 8), gradient(config, 3)
    assert whole.abs().max() > 0
    torch.testing.assert_close(whole, parts, atol=1e-6, rtol=1e-3)


def test_warmup_micro_batches_cannot_change_the_gradient(tiny_folder, tmp_path):
    found = []
    for size in (None, 3):
        config = warmup_config(tiny_folder, tmp_path / "run", micro_batch_size=size, batch_size=8)
        model = load_model(tiny_folder)
        batch = encode(model, Mixture(config.sources, 0).batch(0, 8), config.caption_dropout, 0, 0)
        supervised_gradient(model, batch, text_weight=1.0, image_weight=1.0, micro_batch_size=size)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-3)


def test_a_process_without_rows_adds_nothing(tiny_folder, monkeypatch):
    """Three processes, two rows: each has its share of the batch, and the third has none."""
    model = load_model(tiny_folder)
    config = warmup_config(tiny_folder, Path("unused"))
    whole = encode(model, Mixture(config.sources, 0).batch(0, 2), 0.0, 0, 0)
    monkeypatch.setattr("diptych.training.supervised.world_size", lambda: 3)
    for number in range(3):
        monkeypatch.setattr("diptych.training.supervised.rank", lambda number=number: number)
        batch = encode_batch(model, Mixture(config.sources, 0), 2, 0.0, 0, 0)
        if number < 2:
            assert batch.text_ids.tolist() == whole[[number]].text_ids.tolist()
    assert batch is None
    found = supervised_gradient(model, batch, text_weight=1.0, image_weight=1.0)
    assert found == {"loss/text": 0.0, "loss/image": 0.0, "num_tokens": 0.0}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_two_processes_give_the_gradient_of_one(tiny_folder, tmp_path):
    """Warm-up and GRPO with KL, entropy and ptx: sums over processes with global denominators."""
    found = []
    for count in (1, 2):
        out = tmp_path / f"gradients_{count}.pt"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        done = subprocess.run([*command, TESTS / "two_processes.py", tiny_folder, out], capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(torch.load(out))
    one, two = found
    assert (one["world_size"], two["world_size"]) == (1, 2)
    for stage in ("warmup", "words", "grpo"):
        (gradient, unused), (other, other_unused) = one[stage], two[stage]
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, other, atol=1e-6, rtol=1e-3)
        assert other_unused == unused  # zeros in their place would let weight decay shrink what nobody used
    assert len(one["words"][1]) > len(one["warmup"][1])


def test_ptx_adds_the_gradient_of_the_likelihood(tiny_folder, tmp_path):
    """The term is coef * (mean text loss + image_weight * mean image loss), by autograd over a sum of our own."""
    ptx = {"sources": [{"name": "storyboard:text_to_image", "weight": 1}, {"name": "storyboard:understanding", "weight": 1}],
           "coef": 0.25, "batch_size": 6, "image_weight": 2.0, "caption_dropout": 0.0}  # fmt: skip
    config = grpo_config(tiny_folder, tmp_path / "run", ptx=ptx, micro_batch_size=4)
    model, other = load_model(tiny_folder), load_model(tiny_folder)
    mixture = Mixture(config.ptx.sources, 0)
    metrics = grpo_module.add_supervised_gradient(model, mixture, config, 3)
    sums, counts = {"text": 0.0, "image": 0.0}, {"text": 0, "image": 0}
    for record in mixture.batch(3, 6):
        batch = collate([other.encode_example(record.prompt, record.answer)])
        logprobs = score(other, batch).logprobs
        for kind, mask in (("text", batch.text_mask), ("image", batch.image_mask)):
            chosen = batch.choice_mask & mask[..., None]
            sums[kind] = sums[kind] - logprobs[chosen].sum()
            counts[kind] += int(chosen.sum())
    assert min(counts.values()) > 0
    (0.25 * (sums["text"] / counts["text"] + 2.0 * sums["image"] / counts["image"])).backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-3)
    assert metrics["ptx/loss/text"] == pytest.approx(float(sums["text"]) / counts["text"], rel=1e-4)


def test_ptx_changes_the_update_and_is_logged(tiny_folder, tmp_path):
    ptx = {"sources": [{"name": "storyboard:text_to_image", "weight": 1}], "coef": 1.0, "batch_size": 4}
    weights = []
    for name, term in (("with", ptx), ("without", None)):
        model = grpo(grpo_config(tiny_folder, tmp_path / name, max_steps=1, ptx=term))
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert not torch.equal(*weights)
    assert "ptx/loss/image" in read_jsonl(tmp_path / "with" / "metrics.jsonl")[0]
    assert "ptx/loss/image" not in read_jsonl(tmp_path / "without" / "metrics.jsonl")[0]


def test_first_update_has_ratio_one_and_parity_holds(tiny_folder, tmp_path):
    grpo(grpo_config(tiny_folder, tmp_path / "run", num_iterations=2))
    for line in read_jsonl(tmp_path / "run" / "metrics.jsonl"):
        assert line["parity/text_max"] <= 1e-4
        assert line["parity/image_max"] <= 1e-4
        assert line["ratio/first_gap/text"] <= 1e-4
        assert line["ratio/first_gap/image"] <= 1e-4
        assert line["ratio/max_gap/image"] > 1e-4  # later updates of a batch do move the ratio


def test_fault_reference_fed_by_the_policy(tiny_folder, tmp_path):
    """The reference is a model of its own: after the policy moved, the KL sees it, embeddings included."""
    grpo(grpo_config(tiny_folder, tmp_path / "run", max_steps=2, num_minibatches=1))
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert lines[0]["kl/text"] < 1e-6  # before the first update they are the same
    assert lines[1]["kl/text"] > 1e-4
    assert lines[1]["kl/image"] > 1e-4
    config = grpo_config(tiny_folder, tmp_path / "other")
    model, experience = experience_of(config)
    reference = load_model(config.model)
    batch = collate([r.row for r in experience.rollouts])
    before = replay(reference, batch, config, True).logprobs
    with torch.no_grad():
        model.code_embeddings.add_(0.5)
        model.llama.embed_tokens.weight.add_(0.5)
    torch.testing.assert_close(replay(reference, batch, config, True).logprobs, before, atol=0, rtol=0)
    assert (replay(model, batch, config, True).logprobs - before).abs().max() > 0.1


def test_minibatches_cover_every_rollout_in_each_iteration(tiny_folder, tmp_path):
    config = grpo_config(tiny_folder, tmp_path / "run", num_iterations=3)
    parts = minibatches(config, 8, 0)
    assert [len(p) for p in parts] == [4] * 6
    for i in range(0, 6, 2):
        assert sorted(torch.cat(parts[i : i + 2]).tolist()) == list(range(8))


def test_groups_without_spread_are_sampled_again(tiny_folder, tmp_path):
    config = grpo_config(tiny_folder, tmp_path / "run", rewards=[{"name": "toy_rewards:always_equal"}])
    _, flat = experience_of(config)
    _, again = experience_of(config.model_copy(update={"resample_attempts": 2}))
    assert [r.prompt.text for r in flat.records] != [r.prompt.text for r in again.records]
    assert len(again.rollouts) == len(flat.rollouts)
    assert again.rewards.steps.shape[:2] == flat.rewards.steps.shape[:2]
    assert (flat.num_resampled, again.num_resampled) == (0, 2 * config.prompts_per_step)  # every group, in both attempts
    metrics = step_report.reward_metrics(seen_by_all(again, config), config.model_copy(update={"resample_attempts": 2}))
    assert (metrics["frac_groups_resampled"], metrics["frac_reward_zero_std"]) == (2, 1)
    assert "frac_groups_resampled" not in step_report.reward_metrics(seen_by_all(flat, config), config)


@pytest.mark.parametrize(
    ("watch", "changes"),
    [("toy_rewards:likes_ball", {}), ("toy_rewards:per_step", {"advantages": {"normalize": "group"}}), ("toy_rewards:raises", {}),
     ("text_likelihood", {"lora": {"r": 2}})],
)  # fmt: skip
def test_a_reward_of_weight_0_watches_and_changes_nothing(tiny_folder, tmp_path, watch, changes):
    """Whatever it says, of which steps, where it fails, and whatever it draws while it is made: the same weights and metrics."""
    trains = [{"name": "toy_rewards:texts_only"}]
    rewards = {"alone": trains, "watched": [{"name": watch, "weight": 0}, *trains]}
    for name, given in rewards.items():
        base._made.clear()
        grpo(grpo_config(tiny_folder, tmp_path / name, max_steps=2, rewards=given, **changes))
    files = [next((tmp_path / name / "checkpoints/step_2/model").glob("*.safetensors")) for name in rewards]
    alone, watched = (load_file(file) for file in files)
    assert all(torch.equal(alone[name], watched[name]) for name in alone)
    without, beside = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in rewards)
    for a, b in zip(without, beside, strict=True):
        assert all(b[name] == value for name, value in a.items() if "time" not in name and not name.startswith("seconds"))
        assert b[f"rewards/{watch}/missing"] == (watch == "toy_rewards:raises")
        assert (f"rewards/{watch}/mean" in b) == (watch != "toy_rewards:raises")
    assert (f"</i>{watch} (watches)<" in run_page(tmp_path / "watched")) == (watch != "toy_rewards:raises")


def test_held_out_prompts_are_rewarded_and_nothing_is_learned_from_them(tiny_folder, tmp_path):
    """The same weights and metrics as without; the means are those of the rewards, called here on greedy answers sampled here."""
    rewards = [{"name": "toy_rewards:per_step"}, {"name": "toy_rewards:raises", "label": "broken", "weight": 0}]
    grpo(grpo_config(tiny_folder, tmp_path / "without", max_steps=3, save_steps=3, rewards=rewards))
    config = grpo_config(tiny_folder, tmp_path / "with", max_steps=3, save_steps=3, rewards=rewards, eval_steps=2, num_eval_prompts=5)
    model = grpo(config)
    without, beside = (weights(tmp_path / name / "checkpoints/step_3/model") for name in ("without", "with"))
    assert all(torch.equal(without[name], beside[name]) for name in without)
    lines = read_jsonl(tmp_path / "with" / "metrics.jsonl")
    assert ["eval/rewards/toy_rewards:per_step/mean" in line for line in lines] == [False, True, True]
    assert [line.get("eval/rewards/broken/missing") for line in lines] == [None, 1.0, 1.0]
    assert not any("eval/rewards/broken/mean" in line for line in lines)

    records = Mixture(config.prompts, config.seed, "validation").batch(0, 5)
    trained = Mixture(config.prompts, config.seed).batch(0, 50)
    in_words = [{r.prompt.text for r in some if not r.prompt.images} for some in (records, trained)]
    assert in_words[0]
    assert not in_words[0] & in_words[1]
    noise = torch.Generator().manual_seed(9)  # greedy answers do not depend on it
    rollouts = [sample(model, [model.encode_prompt(r.prompt)], config.sampling.greedy(), generator=noise)[0] for r in records]
    said = load_reward("toy_rewards:per_step")(completions=[[to_message("assistant", r.document)] for r in rollouts])
    expected = sum(sum(steps) / len(steps) for steps in said) / 5
    assert lines[-1]["eval/rewards/toy_rewards:per_step/mean"] == pytest.approx(expected, abs=1e-5)
    assert "Rewards of held-out prompts" in run_page(tmp_path / "with")
    assert "Rewards of held-out prompts" not in run_page(tmp_path / "without")


@pytest.mark.parametrize("stage", ["warmup", "grpo"])
def test_what_was_evaluated_is_logged_between_the_logging_steps_too(tiny_folder, tmp_path, stage):
    few = {"max_steps": 5, "logging_steps": 4, "eval_steps": 3}
    if stage == "warmup":
        warmup(warmup_config(tiny_folder, tmp_path / "run", **few))
    else:
        grpo(grpo_config(tiny_folder, tmp_path / "run", num_eval_prompts=2, **few))
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    evaluated = [any(name.startswith("eval/") for name in line) for line in lines]
    assert dict(zip([line["step"] for line in lines], evaluated, strict=True)) == {3: True, 4: False, 5: True}


def test_a_reward_that_draws_while_it_is_made_draws_the_same_in_every_run(tiny_folder, tmp_path):
    found = []
    for name in ("one", "two"):
        base._made.clear()
        torch.rand(len(name) + len(found))  # wherever the global generator stands
        grpo(grpo_config(tiny_folder, tmp_path / name, max_steps=1, rewards=[{"name": "toy_rewards:Draws"}]))
        found.append(read_jsonl(tmp_path / name / "metrics.jsonl")[0]["rewards/toy_rewards:Draws/mean"])
    assert found[0] == found[1]


def test_a_label_tells_one_reward_from_another_of_the_same_name(tiny_folder, tmp_path):
    twice = [{"name": "toy_rewards:per_step"}, {"name": "toy_rewards:per_step", "label": "second opinion", "weight": 0, "scale": 2.0}]
    config = grpo_config(tiny_folder, tmp_path / "run", max_steps=1, sample_steps=1, rewards=twice)
    grpo(config)
    (line,) = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    first, second = (line[f"rewards/{key}/mean"] for key in ("toy_rewards:per_step", "second opinion"))
    assert 0 < second == pytest.approx(first / 2)
    record = read_jsonl(tmp_path / "run" / "samples" / "step_1.jsonl")[0]
    assert record["steps"][0]["second opinion"] == pytest.approx(record["steps"][0]["toy_rewards:per_step"] / 2, abs=1e-4)
    with pytest.raises(ValueError, match="or a label where its options differ"):
        grpo_config(tiny_folder, tmp_path / "run", rewards=[twice[0], twice[0]])
    with pytest.raises(ValueError, match="label"):
        grpo_config(tiny_folder, tmp_path / "run", rewards=[{**twice[0], "label": "a/b"}])


def test_spread_in_a_reward_that_only_watches_is_none(tiny_folder, tmp_path):
    rewards = [{"name": "toy_rewards:always_equal"}, {"name": "toy_rewards:per_step", "weight": 0}]
    config = grpo_config(tiny_folder, tmp_path / "run", rewards=rewards)
    _, experience = experience_of(config)
    assert groups_without_spread(experience.rewards, config) == [0, 1]
    trains = grpo_config(tiny_folder, tmp_path / "run", rewards=[{**reward, "weight": 1} for reward in rewards])
    assert groups_without_spread(experience.rewards, trains) == []
    with pytest.raises(ValueError, match=r"all rewards have weight 0 \(format\): they would watch and nothing would be trained"):
        grpo_config(tiny_folder, tmp_path / "run", rewards=[{"name": "format", "weight": 0}])


def test_a_function_written_for_trl_trains_and_logs(tiny_folder, tmp_path, tiny_model):
    config = grpo_config(
        tiny_folder, tmp_path / "run", max_steps=2, rollout_batch_size=1, rewards=[{"name": "toy_rewards:as_for_trl", "content": "text"}]
    )
    grpo(config)
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [line["rewards/toy_rewards:as_for_trl/progress"] for line in lines] == [0.0, 0.5]  # steps that are done
    for record in read_jsonl(tmp_path / "run" / "samples" / "step_2.jsonl"):
        codes, pictures = (record["extra"][f"toy_rewards:as_for_trl/{name}"] for name in ("codes", "pictures"))
        assert pictures == sum(block["type"] == "image" for block in record["answer"])
        assert codes == pictures * tiny_model.image_spec.num_positions


def test_batches_and_a_thread_of_their_own_change_no_document_and_no_reward(tiny_folder, tmp_path):
    """Sampled two prompts at a time, rewarded in the background or not: the same rollouts, values and shares of missing ones."""
    rewards = [{"name": "format"}, {"name": "toy_rewards:per_step"}]
    config = grpo_config(tiny_folder, tmp_path / "run", prompts_per_step=5, rewards=rewards)
    _, whole = experience_of(config)
    for background in (False, True):
        changes = {"rollout_batch_size": 2, "background_rewards": background}
        _, parts = experience_of(config.model_copy(update=changes))
        assert torch.equal(parts.group_ids, whole.group_ids)
        for one, other in zip(whole.rollouts, parts.rollouts, strict=True):
            assert torch.equal(one.row.text_ids, other.row.text_ids)
            assert torch.equal(one.row.codes, other.row.codes)
        for name in ("steps", "applies", "documents", "documents_apply"):
            assert torch.equal(getattr(whole.rewards, name), getattr(parts.rewards, name))
        assert parts.rewards.missing == whole.rewards.missing


def test_background_rewards_run_while_the_next_batch_is_sampled(tiny_folder, tmp_path, monkeypatch):
    order: list[str] = []
    first_may_end = threading.Event()

    def reward(completions, **_):
        if "reward begins" not in order:
            order.append("reward begins")
            assert first_may_end.wait(30)
        order.append("reward ends")
        return [1.0] * len(completions)

    right = experience_module.sample

    def sampling(*arguments, **options):
        found = right(*arguments, **options)
        order.append("sampled")
        if order.count("sampled") == 2:
            first_may_end.set()
        return found

    monkeypatch.setattr(experience_module, "sample", sampling)
    config = grpo_config(tiny_folder, tmp_path / "run", rollout_batch_size=1, prompts_per_step=2, background_rewards=True)
    prompts = Mixture(config.prompts, config.seed)
    sampled = collect(load_model(config.model), prompts, [(config.rewards[0], reward)], config, 0)
    assert sampled.experience(config).rewards.documents.tolist() == [[1.0] * 2 * config.num_generations]
    assert order.index("reward ends") > [i for i, what in enumerate(order) if what == "sampled"][1]


def test_shares_of_missing_values_are_merged_by_what_was_owed():
    """3 of 4 and 0 of 1 missing: 3 of 5; errors of either."""

    def batch(size: int, lost: int, error: dict[str, str]) -> RewardBatch:
        documents = torch.zeros(1, size)
        documents[0, :lost] = torch.nan
        nothing = torch.zeros(1, size, 1)
        return RewardBatch(nothing, nothing.bool(), documents, torch.ones(1, size, dtype=torch.bool), {"a": lost / size}, error)

    both = merge([batch(4, 3, {"a": "timed out"}), batch(1, 0, {})])
    assert both.missing == {"a": pytest.approx(0.6)}
    assert both.errors == {"a": "timed out"}
    assert both.documents.isnan().sum() == 3


# --- resume --------------------------------------------------------------------------------------------------------------


def kill_and_resume(command: list[str], run: Path, seconds_per_reward: str = "0") -> None:
    """Starts the command, kills it with -9 soon after its first checkpoint, and runs it again to the end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOY_REWARD_SECONDS": seconds_per_reward}
    process = subprocess.Popen(command, cwd=TESTS, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (run / "checkpoints" / "step_2").is_dir():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.time() < deadline
        time.sleep(0.01)
    time.sleep(0.3)  # somewhere in the next step
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(command, cwd=TESTS, env=environment, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["warmup", "grpo"])
def test_fault_lost_on_resume(tiny_folder, tmp_path, stage):
    """kill -9, run the same command again: final weights are bit-identical to an uninterrupted run, and so is the log."""
    make = warmup_config if stage == "warmup" else grpo_config
    changes = {} if stage == "warmup" else {"rewards": [{"name": "toy_rewards:slow"}], "num_iterations": 2}
    finals, logs = [], []
    for name in ("whole", "killed"):
        config = make(tiny_folder, tmp_path / name, max_steps=6, **changes)
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(to_yaml(config))
        command = [sys.executable, "-m", "diptych", stage, str(recipe)]
        if name == "whole":
            subprocess.run(command, cwd=TESTS, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, stdout=subprocess.DEVNULL)
        else:
            kill_and_resume(command, tmp_path / name, seconds_per_reward="0.3")
        finals.append(weights(tmp_path / name / "checkpoints" / "step_6" / "model"))
        lines = read_jsonl(tmp_path / name / "metrics.jsonl")
        logs.append([{k: v for k, v in line.items() if "second" not in k and k != "step_time"} for line in lines])
    assert all(torch.equal(finals[0][k], finals[1][k]) for k in finals[0])
    assert logs[0] == logs[1]
    assert [line["step"] for line in logs[1]] == [1, 2, 3, 4, 5, 6]


# --- clear failures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("toy_rewards:raises", "100% of the values of reward 'toy_rewards:raises' are missing.*ConnectionError: the judge is not there"),
        ("toy_rewards:not_a_number", "values that are not finite"),
        ("toy_rewards:wrong_count", "returned 1 values for 8 documents"),
    ],
)
def test_bad_rewards_stop_the_run(tiny_folder, tmp_path, reward, message):
    with pytest.raises(RewardError, match=message):
        grpo(grpo_config(tiny_folder, tmp_path / "run", rewards=[{"name": reward}]))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_fault_missing_reward_is_masked_not_zero(tiny_folder, tmp_path):
    """With one reward missing in half the group, the others are compared among themselves."""
    config = grpo_config(tiny_folder, tmp_path / "run", max_missing_rewards=1.0, rewards=[{"name": "toy_rewards:not_a_number"}])
    no_kl = {kind: getattr(config, kind).model_copy(update={"beta": 0.0}) for kind in ("text", "image")}
    grpo(config.model_copy(update=no_kl))
    before, after = weights(tiny_folder), weights(tmp_path / "run/checkpoints/step_4/model")
    assert all(torch.equal(before[name], after[name]) for name in before)
    line = read_jsonl(tmp_path / "run" / "metrics.jsonl")[0]
    assert line["rewards/toy_rewards:not_a_number/missing"] == 1
    assert "rewards/toy_rewards:not_a_number/mean" not in line


def test_offloading_without_a_gpu_is_refused(tiny_folder, tmp_path):
    with pytest.raises(ValueError, match=r"offload=\['optimizer'\] frees a GPU's memory, and this run is on the CPU"):
        grpo(grpo_config(tiny_folder, tmp_path / "run", offload=["optimizer"]))


@pytest.mark.gpu
def test_offloading_changes_no_loss(tiny_folder, tmp_path):
    found = []
    for name, offload in (("with", ["reference", "optimizer"]), ("without", [])):
        grpo(grpo_config(tiny_folder, tmp_path / name, offload=offload, device="cuda"))
        found.append([line["loss"] for line in read_jsonl(tmp_path / name / "metrics.jsonl")])
    assert found[0] == found[1]


def test_broken_parity_stops_the_run(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(experience_module, "sample", broken_sample)
    with pytest.raises(ParityError, match=r"differ by up to .* The update would train another policy"):
        grpo(grpo_config(tiny_folder, tmp_path / "run"))


def broken_sample(model, rows, params, **kwargs):
    from diptych.sampling.engine import sample

    hotter = params.model_copy(update={"text": params.text.model_copy(update={"temperature": 1.5})})
    return sample(model, rows, hotter, **kwargs)


def test_ignored_guidance_is_allowed_and_its_gap_logged(tiny_folder, tmp_path):
    grpo(grpo_config(tiny_folder, tmp_path / "run", max_steps=1, score_guidance="ignore"))
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl")[0]["parity/image_max"] > 0.1


def test_other_settings_in_the_same_folder_are_refused(tiny_folder, tmp_path):
    grpo(grpo_config(tiny_folder, tmp_path / "run", max_steps=1))
    with pytest.raises(ValueError, match=r"holds a run with other settings \(different: seed\)"):
        grpo(grpo_config(tiny_folder, tmp_path / "run", max_steps=1, seed=5))


def test_damaged_checkpoints_are_named(tiny_folder, tmp_path):
    config = warmup_config(tiny_folder, tmp_path / "run", max_steps=2)
    warmup(config)
    file = tmp_path / "run/checkpoints/step_2/model/model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        load_model(file.parent)
    file.unlink()
    with pytest.raises(ValueError, match=r"model.safetensors is missing"):
        load_model(file.parent)
    with pytest.raises(ValueError, match=r"no model at .*config.json does not exist"):
        load_model(tmp_path / "nothing")


def test_steps_logged_before_the_first_checkpoint_are_logged_once(tiny_folder, tmp_path):
    """Killed before its first checkpoint, in the middle of a line: the next run starts the log over."""
    config = grpo_config(tiny_folder, tmp_path / "run", max_steps=2)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 0.1}\n{"step": 2, "lo')
    grpo(config)
    assert [line["step"] for line in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


def test_spread_is_looked_for_in_every_step(tiny_folder, tmp_path):
    """Step rewards (0, 1) and (1, 0) have the same mean, but there is something to learn."""
    config = grpo_config(tiny_folder, tmp_path / "run")
    nothing = torch.zeros(1, 8, 2, dtype=torch.bool)
    steps = torch.zeros(1, 8, 2)
    steps[0, 0] = torch.tensor([0.0, 1.0])
    steps[0, 1:4] = torch.tensor([1.0, 0.0])
    steps[0, 4:] = torch.tensor([float("nan"), 2.0])  # the second group: missing, and all the same
    rewards = RewardBatch(steps, ~nothing, torch.zeros(1, 8), nothing[..., 0], {}, {})
    assert groups_without_spread(rewards, config) == [1]


def test_parity_that_is_not_a_number_stops_the_run(tiny_folder, tmp_path):
    config = grpo_config(tiny_folder, tmp_path / "run")
    model, experience = experience_of(config)
    batch = collate([r.row for r in experience.rollouts])
    with pytest.raises(ParityError):
        check_parity(torch.full(batch.codes.shape, float("nan")), experience.rollouts, batch, config, True)
    assert model is not None


def test_a_reward_cannot_be_listed_twice(tiny_folder, tmp_path):
    with pytest.raises(ValueError, match="listed twice"):
        grpo_config(tiny_folder, tmp_path / "run", rewards=[{"name": "format"}, {"name": "format"}])
