"""Stage 2, unified GRPO: one objective over text and image choices of whole sampled documents (arXiv:2603.09538).

Where we depart from, or add to, the paper:
1. Old log-probabilities come from a replay of the sampler's exact distribution, guidance included; the gap to what the
   sampler reported is measured at every step, logged as `parity/*`, and bounded.
2. A missing reward is masked out of its group; too many missing ones stop the run.
3. Weight, clip range, KL and entropy are set per modality; step rewards may be discounted and normalised per step index.
4. A rollout batch may serve several optimizer steps (`num_iterations`, `num_minibatches`).
5. Document-level rewards reach every token (see `credit.py`).
6. Supervised examples of existing skills may be mixed into every update (`ptx`), because the KL holds the policy to the
   reference only on documents.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diptych.config import GRPOConfig, ModalityConfig, SamplingParams
from diptych.data import Mixture
from diptych.data.background import IN_TURN, Reader
from diptych.models import UnifiedModel, equip, open_policy
from diptych.models.codes import defer_codes
from diptych.models.loading import Reference
from diptych.rewards import load_reward
from diptych.rewards.base import about, changeable_options, check_columns, configured
from diptych.runs import SHARED_FOLDER, RunFolder
from diptych.runtime import (
    agree,
    gather,
    generator,
    joined_processes,
    pick_device,
    seed_everything,
    set_threads,
    sum_over_processes,
    weights_checksum,
    world_size,
)
from diptych.sampling.engine import context_needed, most_choices
from diptych.sampling.logprobs import Scores, score
from diptych.sampling.rollout import Rollout
from diptych.tokens import TokenBatch, collate
from diptych.training.admission import admit, note_skipped
from diptych.training.checkpoints import Checkpoints, restore
from diptych.training.credit import token_advantages
from diptych.training.experience import (
    RewardFunctions,
    collect,
    held_out_rewards,
    prompt_length,
    refuse_missing,
    seen_by_all,
    usable_prompt,
)
from diptych.training.inputs import check_inputs, summary
from diptych.training.losses import Counts, ModalityTerms, PolicyBatch, policy_loss
from diptych.training.optim import make_optimizer, move_state, optimizer_step
from diptych.training.parallel import parallelize
from diptych.training.preemption import Requests, asked_to_stop, preemptible
from diptych.training.step_report import Silence, reward_metrics, sample_records
from diptych.training.supervised import encode_batch, example_length, supervised_gradient

Progress = Callable[[int, int, dict[str, float]], None]


class ParityError(RuntimeError):
    """The scorer does not reproduce what the sampler did."""


def grpo(config: GRPOConfig, progress: Progress | None = None) -> UnifiedModel:
    """Runs, or resumes, a training and returns the trained model. The last checkpoint is `step_<max_steps>`.

    Raises ValueError for settings, data or checkpoints that cannot be used, RewardError, ParityError, and
    FloatingPointError for a loss or gradient that is not finite; each before the optimizer step that it would spoil. Raises Preempted
    behind a step that is saved, where the process was asked to stop (SIGTERM, SIGUSR1).
    """
    with joined_processes():
        check_shares(config)
        seed_everything(config.seed)  # for rewards that draw while they are made
        reward_functions = [(reward, load_reward(reward.name)) for reward in config.rewards]
        abouts = [{"name": reward.key, "about": about(reward, function)} for reward, function in reward_functions]  # refuses wrong options
        folder = RunFolder(config.output_dir, config, changeable_options(reward_functions))
        with folder as run, preemptible() as requests, Reader.of(config) as reader:
            run.describe("rewards.json", abouts)
            return _train(run, [(reward, load_reward(reward.name)) for reward in run.config.rewards], progress, requests, reader)


def _train(
    run: RunFolder[GRPOConfig], reward_functions: RewardFunctions, progress: Progress | None, requests: Requests, reader: Reader
) -> UnifiedModel:
    config = run.config
    set_threads(config.num_threads)
    device = pick_device(config.device)
    mix = partial(Mixture, seed=config.seed, max_skipped=config.max_skipped_records)
    prompts = mix(config.prompts)
    held_out_prompts = mix(config.prompts, split="validation", beside=prompts) if config.eval_steps else None
    retained = mix(config.ptx.sources) if config.ptx else None
    check_columns(reward_functions, prompts.columns)
    check_judges(reward_functions, prompts)
    needs_reference = bool(config.text.beta or config.image.beta)
    mixtures = [mixture for mixture in (prompts, retained) if mixture is not None]
    inputs = check_inputs(run, config, mixtures, config.rewards, needs_model=needs_reference or config.lora is not None)
    step = (run.steps() or [0])[-1]
    agree(step, "last checkpoint", SHARED_FOLDER)
    state: dict[str, Any] = {}
    run.truncate_logs(step)
    folder: Path | None = None
    if step:
        folder, state = run.load(step)
    seed_everything(config.seed)  # again: the adapters are the same whatever the rewards drew
    model = open_policy(config, folder).eval()  # no dropout: the policy that is scored is the policy that samples
    for source in mixtures:
        source.check_model(model)
    agree(weights_checksum(model), "weights (by their checksum)", SHARED_FOLDER)
    model = equip(parallelize(model, config, device), config)
    if config.offload and (model.is_sharded or device.type == "cpu"):
        why = "this run is on the CPU" if not model.is_sharded else "sharded weights and moments stay where they are (parallel.mode)"
        raise ValueError(f"offload={list(config.offload)} frees a GPU's memory, and {why}; leave it out")
    reference = Reference(model, config, device, offload="reference" in config.offload) if needs_reference else None
    if reference is not None and reference.copy is not None and "reference" not in config.offload:
        parallelize(reference.copy, config, device, model)
    optimizer, schedule = make_optimizer(model, config.optim, config.max_steps * updates_per_step(config))
    if folder is not None:
        restore(model, optimizer, schedule, state, folder.parent)
    answers = [config.sampling.form, *(source.form for source in config.prompts)]
    known = {"inputs": summary(inputs), "lengths": [model.max_positions, context_needed(model, config.sampling)], "forms": answers}
    for name, mixture in (("prompts", prompts), ("held_out", held_out_prompts)):
        if mixture is not None:
            admit(mixture, partial(prompt_length, model, config.sampling), model.max_positions, run, name, known)
    if retained is not None:
        admit(retained, partial(example_length, model), model.max_positions, run, "ptx", known)
    note_skipped(run, *mixtures)
    usable = partial(usable_prompt, model, config)
    held_out = held_out_prompts.made(0, config.num_eval_prompts, usable) if held_out_prompts else []
    silence = Silence(config)
    if reader.is_ahead:
        defer_codes(model)
    checkpoints = Checkpoints(run, model, optimizer, schedule)

    while step < config.max_steps:
        began = time.perf_counter()
        if "optimizer" in config.offload:
            move_state(optimizer, torch.device("cpu"))
        sampled = collect(model, prompts, reward_functions, config, step, reader)
        sampling_ended = time.perf_counter()
        batch = collate([r.row for r in sampled.rollouts]).to(device)  # (B, T)
        guided = config.score_guidance == "exact"
        old = replay(model, batch, config, guided)  # (B, T, D)
        metrics = check_parity(old.logprobs, sampled.rollouts, batch, config, guided)
        ref_logprobs = None
        if reference is not None:
            with reference.active() as frozen:
                ref_logprobs = replay(frozen, batch, config, guided).logprobs  # (B, T, D)
        experience = sampled.experience(config)
        seen = seen_by_all(experience, config)
        refuse_missing(seen.rewards, config)
        silence.heard(seen.rewards)
        advantages = token_advantages(experience.rewards, config.rewards, experience.group_ids, batch.to("cpu"), config.advantages).to(
            device
        )  # (B, T)
        move_state(optimizer, device)
        sums: list[dict[str, float]] = []
        for update, rows in enumerate(minibatches(config, len(batch), step)):
            sums.append(accumulate_gradient(model, batch, rows, old.logprobs, ref_logprobs, advantages, config))
            if retained is not None:
                metrics |= add_supervised_gradient(model, retained, config, step * updates_per_step(config) + update, reader)
            metrics |= optimizer_step(model, optimizer, schedule, config.optim)
        step += 1
        metrics |= update_metrics(sums) | reward_metrics(seen, config)
        metrics |= {"seconds/rollout": sampling_ended - began, "step_time": time.perf_counter() - began}
        metrics["num_tokens"] = float(sum(gather(int(batch.attention_mask.sum()))))
        for mixture in mixtures:
            mixture.share_skipped()
        evaluates = config.eval_steps is not None and (step % config.eval_steps == 0 or step == config.max_steps)
        if evaluates:
            metrics |= held_out_rewards(model, held_out, prompts.columns, reward_functions, config, step)
        if step % config.logging_steps == 0 or step == config.max_steps or evaluates:
            run.log(step, metrics)
        if step % config.sample_steps == 0 or step == config.max_steps:
            run.save_samples(step, sample_records(experience, advantages, config))
        signal = asked_to_stop(requests)
        if checkpoints.due(step, signal):
            note_skipped(run, *mixtures)
        checkpoints.after(step, signal)
        if progress:
            progress(step, config.max_steps, metrics)
        checkpoints.stop(step, signal)
    checkpoints.finish()
    return model.eval()


def check_shares(config: GRPOConfig) -> None:
    """Raises ValueError where the processes could not take equal shares."""
    if config.prompts_per_step % world_size():
        raise ValueError(f"prompts_per_step={config.prompts_per_step} cannot be shared by {world_size()} processes")
    if config.prompts_per_step * config.num_generations // world_size() % config.num_minibatches:
        raise ValueError(f"num_minibatches={config.num_minibatches} does not divide the rollouts of one of {world_size()} processes")


def check_judges(reward_functions: RewardFunctions, prompts: Mixture) -> None:
    """Raises ValueError where a reward judges by a model that does not know the words and pictures of the prompts' world."""
    for reward, function in reward_functions:
        judge = getattr(configured(reward, function), "model", None)
        if isinstance(judge, UnifiedModel):
            try:
                prompts.check_model(judge)
            except ValueError as error:
                raise ValueError(f"reward {reward.key!r} judges by {reward.options.get('model', 'its own model')}: {error}") from None


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
    mine = []
    for mask in (batch.text_mask, batch.image_mask):
        values = gap[batch.choice_mask & mask[..., None]]
        mine.append([float(values.max()), float(values.sum(dtype=torch.float64)), len(values)] if len(values) else [0.0, 0.0, 0])
    metrics = {}
    for name, parts in zip(("text", "image"), zip(*gather(mine), strict=True), strict=True):
        largest, total, count = torch.tensor(parts, dtype=torch.float64).unbind(1)  # (W,) each
        metrics[f"parity/{name}_max"] = float(largest.max())  # NaN where any is
        metrics[f"parity/{name}_mean"] = float(total.sum() / count.sum().clamp(min=1))
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
    parts = micro_batches(rows, config.micro_batch_size)
    for number, index in enumerate(parts):
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
        model.backward(loss, more=number + 1 < len(parts) or config.ptx is not None)
        total["loss"] += loss.item()
        for name, value in sums.items():
            total[name] = max(total.get(name, 0.0), value) if name.endswith("ratio_gap") else total.get(name, 0.0) + value
    return total


def add_supervised_gradient(
    model: UnifiedModel, retained: Mixture, config: GRPOConfig, update: int, reader: Reader = IN_TURN
) -> dict[str, float]:
    """Backward of ptx.coef * (text loss + image loss) on examples of the skills to retain."""
    ptx = config.ptx
    assert ptx is not None
    last = config.max_steps * updates_per_step(config)
    batch = encode_batch(model, retained, ptx.batch_size, ptx.caption_dropout, config.seed, update, reader, last)
    weights = {"text_weight": ptx.coef * ptx.text_weight, "image_weight": ptx.coef * ptx.image_weight}
    losses = supervised_gradient(model, batch, **weights, micro_batch_size=config.micro_batch_size)
    return {"ptx/loss/text": losses["loss/text"], "ptx/loss/image": losses["loss/image"]}


def global_counts(batch: TokenBatch, rows: Tensor, sampling: SamplingParams, model: UnifiedModel) -> Counts:
    mine = torch.tensor([len(rows), int(batch.choice_mask[rows].sum())], dtype=torch.float64)
    num_rollouts, num_choices = sum_over_processes(mine).tolist()
    return Counts(int(num_rollouts), int(num_choices), most_choices(model, sampling))


def terms(config: ModalityConfig) -> ModalityTerms:
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    return ModalityTerms(config.weight, config.epsilon, high, config.beta, config.entropy_coef)


# --- report ------------------------------------------------------------------------------------------------------------


def update_metrics(own: list[dict[str, float]]) -> dict[str, float]:
    """TRL's names where the quantity is the same, with `/text` and `/image` behind those that we have per modality.

    `own`: for each update the sums over this process's share; the metrics are about all of them.
    """
    sums = [
        {name: (max if name.endswith("ratio_gap") else sum)(part[name] for part in parts) for name in parts[0]}
        for parts in zip(*gather(own), strict=True)
    ]
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
