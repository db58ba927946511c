"""Stage 2, unified GRPO: one objective over text and image choices of whole sampled documents (arXiv:2603.09538).

Where we depart from, or add to, the paper:
1. Old log-probabilities come from a replay of the sampler's exact distribution, guidance included; the gap to what the
   sampler reported is measured at every step, logged as `parity/*`, and bounded.
2. A missing reward is masked out of its group; too many missing ones stop the run.
3. Weight, clip range, KL and entropy are set per modality; step rewards may be discounted and normalised per step index.
4. A rollout batch may serve several optimizer steps (`num_iterations`, `num_minibatches`).
5. Document-level rewards reach every token (see `credit.py`).
6. Supervised examples of old skills may be mixed into every update (`ptx`), because the KL holds the policy to the
   reference only on documents.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diptych.config import GRPOConfig, ModalityConfig, SamplingParams
from diptych.credit import token_advantages
from diptych.data import Mixture
from diptych.experience import collect, held_out_rewards, reward_metrics, sample_records
from diptych.logprobs import Scores, score
from diptych.losses import Counts, ModalityTerms, PolicyBatch, policy_loss
from diptych.models import UnifiedModel, open_policy
from diptych.models.loading import Reference
from diptych.optim import make_optimizer, move_state, optimizer_step
from diptych.rewards import load_reward
from diptych.rewards.base import about
from diptych.runs import RunFolder
from diptych.runtime import generator, init_processes, pick_device, rank, seed_everything, set_threads, sum_over_processes, world_size
from diptych.sampling.rollout import Rollout
from diptych.supervised import encode, supervised_gradient
from diptych.tokens import TokenBatch, collate

Progress = Callable[[int, int, dict[str, float]], None]


class ParityError(RuntimeError):
    """The scorer does not reproduce what the sampler did."""


def grpo(config: GRPOConfig, progress: Progress | None = None) -> UnifiedModel:
    """Runs, or resumes, a training and returns the trained model. The last checkpoint is `step_<max_steps>`.

    Raises ValueError for settings, data or checkpoints that cannot be used, RewardError, ParityError, and
    FloatingPointError for a loss or gradient that is not finite; each before the optimizer step that it would spoil.
    """
    init_processes()
    set_threads(config.num_threads)
    if config.prompts_per_step % world_size():
        raise ValueError(f"prompts_per_step={config.prompts_per_step} cannot be shared by {world_size()} processes")
    if config.prompts_per_step * config.num_generations // world_size() % config.num_minibatches:
        raise ValueError(f"num_minibatches={config.num_minibatches} does not divide the rollouts of one of {world_size()} processes")
    seed_everything(config.seed)  # for rewards that draw while they are made
    reward_functions = [(reward, load_reward(reward.name)) for reward in config.rewards]
    told = [{"name": reward.key, "about": about(reward, function)} for reward, function in reward_functions]  # refuses wrong options
    run = RunFolder(config.output_dir, config)
    run.describe("rewards.json", told)
    device = pick_device(config.device)
    if config.offload and device.type == "cpu":
        raise ValueError(f"offload={list(config.offload)} frees a GPU's memory, and this run is on the CPU; leave it out")
    prompts = Mixture(config.prompts, config.seed)
    held_out = Mixture(config.prompts, config.seed, "validation").batch(0, config.num_eval_prompts) if config.eval_steps else []
    old_skills = Mixture(config.ptx.sources, config.seed) if config.ptx else None
    step = (run.steps() or [0])[-1]
    state: dict[str, Any] = {}
    run.truncate_logs(step)
    folder: Path | None = None
    if step:
        folder, state = run.load(step)
    seed_everything(config.seed)  # again: the adapters are the same whatever the rewards drew
    model = open_policy(config, device, folder).eval()  # no dropout: the policy that is scored is the policy that samples
    needs_reference = bool(config.text.beta or config.image.beta)
    reference = Reference(model, config, device, offload="reference" in config.offload) if needs_reference else None
    optimizer, schedule = make_optimizer(model, config.optim, config.max_steps * updates_per_step(config))
    if state:
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])

    while step < config.max_steps:
        began = time.perf_counter()
        if "optimizer" in config.offload:
            move_state(optimizer, torch.device("cpu"))
        sampled = collect(model, prompts, reward_functions, config, step)
        sampling_ended = time.perf_counter()
        batch = collate([r.row for r in sampled.rollouts]).to(device)  # (B, T)
        guided = config.score_guidance == "exact"
        old = replay(model, batch, config, guided)  # (B, T, D)
        metrics = check_parity(old.logprobs, sampled.rollouts, batch, config, guided)
        ref_logprobs = None
        if reference is not None:
            with reference.active() as frozen:
                ref_logprobs = replay(frozen, batch, config, guided).logprobs  # (B, T, D)
        experience = sampled.rewarded(config)
        advantages = token_advantages(experience.rewards, config.rewards, experience.group_ids, batch.to("cpu"), config.advantages).to(
            device
        )  # (B, T)
        move_state(optimizer, device)
        sums: list[dict[str, float]] = []
        for update, rows in enumerate(minibatches(config, len(batch), step)):
            sums.append(accumulate_gradient(model, batch, rows, old.logprobs, ref_logprobs, advantages, config))
            if old_skills is not None:
                metrics |= add_supervised_gradient(model, old_skills, config, step * updates_per_step(config) + update)
            metrics |= optimizer_step(model, optimizer, schedule, config.optim)
        step += 1
        metrics |= update_metrics(sums, config) | reward_metrics(experience, config)
        metrics |= {"seconds/rollout": sampling_ended - began, "step_time": time.perf_counter() - began}
        metrics["num_tokens"] = float(batch.attention_mask.sum())
        evaluates = config.eval_steps is not None and (step % config.eval_steps == 0 or step == config.max_steps)
        if evaluates and rank() == 0:
            metrics |= held_out_rewards(model, held_out, reward_functions, config, step)
        if step % config.logging_steps == 0 or step == config.max_steps or evaluates:
            run.log(step, metrics)
        if step % config.sample_steps == 0 or step == config.max_steps:
            run.save_samples(step, sample_records(experience, config.num_generations))
        if step % config.save_steps == 0 or step == config.max_steps:
            run.save(step, model, {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "step": step})
        if progress:
            progress(step, config.max_steps, metrics)
    return model.eval()


# --- score -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def replay(model: UnifiedModel, batch: TokenBatch, config: GRPOConfig, guided: bool) -> Scores:
    """Log-probabilities and entropy of every choice without gradient, micro-batch by micro-batch."""
    logprobs = torch.zeros(batch.codes.shape, device=batch.device)
    entropy = torch.zeros_like(logprobs)
    for index in micro_batches(torch.arange(len(batch)), config.micro_batch_size):
        scores = score(model, batch[index], config.sampling, guided=guided)
        logprobs[index, : scores.logprobs.shape[1]] = scores.logprobs
        entropy[index, : scores.logprobs.shape[1]] = scores.entropy
    return Scores(logprobs, entropy)


def check_parity(logprobs: Tensor, rollouts: list[Rollout], batch: TokenBatch, config: GRPOConfig, guided: bool) -> dict[str, float]:
    """|replayed - sampled| log-probability per modality. Raises ParityError beyond the bound (not where guidance is
    ignored on purpose: there the gap is the finding)."""
    sampled = torch.nn.utils.rnn.pad_sequence([r.rollout_logprobs for r in rollouts], batch_first=True).to(batch.device)
    gap = (logprobs - sampled).abs()
    metrics = {}
    for name, mask in (("text", batch.text_mask), ("image", batch.image_mask)):
        values = gap[batch.choice_mask & mask[..., None]]
        metrics[f"parity/{name}_max"] = float(values.max()) if len(values) else 0.0
        metrics[f"parity/{name}_mean"] = float(values.mean()) if len(values) else 0.0
    holds = [metrics[f"parity/{name}_max"] <= config.parity_bound for name in ("text", "image")]  # False for NaN
    if guided and not all(holds):
        raise ParityError(
            f"sampled and replayed log-probabilities differ by up to {metrics['parity/text_max']:.3g} (text) and "
            f"{metrics['parity/image_max']:.3g} (image); parity_bound is {config.parity_bound}. The update would train another "
            "policy than the one that sampled. Use fp32, check the model's adapter (positions, masks), or raise the bound "
            "knowingly"
        )
    return metrics


# --- update ------------------------------------------------------------------------------------------------------------


def updates_per_step(config: GRPOConfig) -> int:
    return config.num_iterations * config.num_minibatches


def minibatches(config: GRPOConfig, size: int, step: int) -> list[Tensor]:
    """Row indices of each optimizer step: `num_iterations` shuffled passes in `num_minibatches` parts."""
    order = generator(config.seed, 11, step)
    parts: list[Tensor] = []
    for _ in range(config.num_iterations):
        permuted = torch.randperm(size, generator=order) if config.num_minibatches > 1 else torch.arange(size)
        parts += list(permuted.chunk(config.num_minibatches))
    return parts


def micro_batches(rows: Tensor, size: int) -> list[Tensor]:
    """`rows` in parts of `size`, those of one group together, so that their prompt is computed once."""
    return list(rows.sort().values.split(size))


def accumulate_gradient(
    model: UnifiedModel, batch: TokenBatch, rows: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor | None,
    advantages: Tensor, config: GRPOConfig,
) -> dict[str, float]:  # fmt: skip
    """Backward over micro-batches of `rows`; the denominators are those of the whole minibatch over all processes."""
    counts = global_counts(batch, rows, config.sampling, model)
    total: dict[str, float] = {"loss": 0.0}
    needs_entropy = bool(config.text.entropy_coef or config.image.entropy_coef)
    for index in micro_batches(rows, config.micro_batch_size):
        part = batch[index]
        width = part.text_ids.shape[1]
        scores = score(model, part, config.sampling, guided=config.score_guidance == "exact", entropy_gradient=needs_entropy)
        policy = PolicyBatch(
            logprobs=scores.logprobs,
            old_logprobs=old_logprobs[index, :width],
            ref_logprobs=None if ref_logprobs is None else ref_logprobs[index, :width],
            advantages=advantages[index, :width],
            choice_mask=part.choice_mask,
            image_mask=part.image_mask,
            entropy=scores.entropy,
        )
        loss, sums = policy_loss(policy, config.loss_type, terms(config.text), terms(config.image), counts)
        if not torch.isfinite(loss):
            raise FloatingPointError("the loss is not finite; this optimizer step was not taken and earlier checkpoints are intact")
        loss.backward()
        total["loss"] += loss.item()
        for name, value in sums.items():
            total[name] = max(total.get(name, 0.0), value) if name.endswith("ratio_gap") else total.get(name, 0.0) + value
    return total


def add_supervised_gradient(model: UnifiedModel, old_skills: Mixture, config: GRPOConfig, update: int) -> dict[str, float]:
    """Backward of ptx.coef * (text loss + image loss) on examples of the old skills."""
    ptx = config.ptx
    assert ptx is not None
    batch = encode(model, old_skills.batch(update, ptx.batch_size), ptx.caption_dropout, config.seed, update)
    weights = {"text_weight": ptx.coef * ptx.text_weight, "image_weight": ptx.coef * ptx.image_weight}
    losses = supervised_gradient(model, batch, **weights, micro_batch_size=config.micro_batch_size)
    return {"ptx/loss/text": losses["loss/text"], "ptx/loss/image": losses["loss/image"]}


def global_counts(batch: TokenBatch, rows: Tensor, sampling: SamplingParams, model: UnifiedModel) -> Counts:
    mine = torch.tensor([len(rows), int(batch.choice_mask[rows].sum())], dtype=torch.float64)
    num_rollouts, num_choices = sum_over_processes(mine).tolist()
    spec = model.image_spec
    longest = (sampling.max_images + 1) * sampling.max_text_tokens + sampling.max_images * spec.num_positions * spec.depth
    return Counts(int(num_rollouts), int(num_choices), longest)


def terms(config: ModalityConfig) -> ModalityTerms:
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    return ModalityTerms(config.weight, config.epsilon, high, config.beta, config.entropy_coef)


# --- report ------------------------------------------------------------------------------------------------------------


def update_metrics(sums: list[dict[str, float]], config: GRPOConfig) -> dict[str, float]:
    """TRL's names where the quantity is the same, with `/text` and `/image` behind those that we have per modality."""
    metrics = {"loss": sum(s["loss"] for s in sums) / len(sums)}
    for kind in ("text", "image"):
        choices = max(1.0, sum(s[f"{kind}/choices"] for s in sums))
        metrics[f"clip_ratio/region_mean/{kind}"] = sum(s[f"{kind}/clipped"] for s in sums) / choices
        metrics[f"kl/{kind}"] = sum(s[f"{kind}/kl"] for s in sums) / choices
        metrics[f"entropy/{kind}"] = sum(s[f"{kind}/entropy"] for s in sums) / choices
        metrics[f"ratio/first_gap/{kind}"] = sums[0][f"{kind}/ratio_gap"]
        metrics[f"ratio/max_gap/{kind}"] = max(s[f"{kind}/ratio_gap"] for s in sums)
    return metrics


def checkpoint_of(config: GRPOConfig) -> str:
    """The folder of the finished model."""
    return f"{config.output_dir}/checkpoints/step_{config.max_steps}/model"
