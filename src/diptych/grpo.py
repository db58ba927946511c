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

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diptych.config import GRPOConfig, ModalityConfig, SamplingParams
from diptych.credit import document_rewards, token_advantages
from diptych.data import Mixture, Record
from diptych.document import to_json_blocks
from diptych.logprobs import Scores, score
from diptych.losses import Counts, ModalityTerms, PolicyBatch, policy_loss
from diptych.models import UnifiedModel, open_policy
from diptych.models.loading import Reference
from diptych.optim import make_optimizer, optimizer_step
from diptych.rewards import RewardBatch, RewardError, call_rewards, load_reward
from diptych.runs import RunFolder
from diptych.runtime import generator, init_processes, pick_device, rank, seed_everything, set_threads, sum_over_processes, world_size
from diptych.sampling.engine import sample
from diptych.sampling.rollout import Rollout
from diptych.supervised import encode, supervised_gradient
from diptych.tokens import TokenBatch, collate

Progress = Callable[[int, int, dict[str, float]], None]


class ParityError(RuntimeError):
    """The scorer does not reproduce what the sampler did."""


@dataclasses.dataclass(frozen=True)
class Experience:
    """B rollouts (P prompts, G each, groups adjacent) with everything an update needs."""

    records: list[Record]  # (B,)
    rollouts: list[Rollout]  # (B,)
    rewards: RewardBatch
    group_ids: Tensor  # (B,)


def grpo(config: GRPOConfig, progress: Progress | None = None) -> UnifiedModel:
    """Runs, or resumes, a training and returns the trained model. The last checkpoint is `step_<max_steps>`.

    Raises ValueError for settings, data or checkpoints that cannot be used, RewardError, ParityError, and
    FloatingPointError for a loss or gradient that is not finite; each before the optimizer step that it would spoil.
    """
    init_processes()
    set_threads(config.num_threads)
    seed_everything(config.seed)
    if config.prompts_per_step % world_size():
        raise ValueError(f"prompts_per_step={config.prompts_per_step} cannot be shared by {world_size()} processes")
    if config.prompts_per_step * config.num_generations // world_size() % config.num_minibatches:
        raise ValueError(f"num_minibatches={config.num_minibatches} does not divide the rollouts of one of {world_size()} processes")
    reward_functions = [(reward, load_reward(reward.name)) for reward in config.rewards]
    run = RunFolder(config.output_dir, config)
    device = pick_device(config.device)
    prompts = Mixture([config.prompts], config.seed)
    old_skills = Mixture(config.ptx.sources, config.seed) if config.ptx else None
    step = (run.steps() or [0])[-1]
    state: dict[str, Any] = {}
    run.truncate_logs(step)
    folder: Path | None = None
    if step:
        folder, state = run.load(step)
    model = open_policy(config, device, folder).eval()  # no dropout: the policy that is scored is the policy that samples
    reference = Reference(model, config, device) if config.text.beta or config.image.beta else None
    optimizer, schedule = make_optimizer(model, config.optim, config.max_steps * updates_per_step(config))
    if state:
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])

    while step < config.max_steps:
        began = time.perf_counter()
        experience = collect(model, prompts, reward_functions, config, step)
        sampled = time.perf_counter()
        batch = collate([r.row for r in experience.rollouts]).to(device)  # (B, T)
        advantages = token_advantages(experience.rewards, config.rewards, experience.group_ids, batch.to("cpu"), config.advantages).to(
            device
        )  # (B, T)
        guided = config.score_guidance == "exact"
        old = replay(model, batch, config, guided)  # (B, T, D)
        metrics = check_parity(old.logprobs, experience.rollouts, batch, config, guided)
        ref_logprobs = None
        if reference is not None:
            with reference.active() as frozen:
                ref_logprobs = replay(frozen, batch, config, guided).logprobs  # (B, T, D)
        sums: list[dict[str, float]] = []
        for update, rows in enumerate(minibatches(config, len(batch), step)):
            sums.append(accumulate_gradient(model, batch, rows, old.logprobs, ref_logprobs, advantages, config))
            if old_skills is not None:
                metrics |= add_supervised_gradient(model, old_skills, config, step * updates_per_step(config) + update)
            metrics |= optimizer_step(model, optimizer, schedule, config.optim)
        step += 1
        metrics |= update_metrics(sums, config) | reward_metrics(experience, config)
        metrics |= {"seconds/rollout": sampled - began, "step_time": time.perf_counter() - began}
        metrics["num_tokens"] = float(batch.attention_mask.sum())
        if step % config.logging_steps == 0 or step == config.max_steps:
            run.log(step, metrics)
        if step % config.sample_steps == 0 or step == config.max_steps:
            run.save_samples(step, sample_records(experience, config.num_generations))
        if step % config.save_steps == 0 or step == config.max_steps:
            run.save(step, model, {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "step": step})
        if progress:
            progress(step, config.max_steps, metrics)
    return model.eval()


# --- sample and score --------------------------------------------------------------------------------------------------


def collect(
    model: UnifiedModel, prompts: Mixture, reward_functions: Sequence[tuple[Any, Callable[..., Any]]], config: GRPOConfig, step: int
) -> Experience:
    """Samples and rewards this process's share of the step's prompts; groups without spread are sampled again from
    other prompts, `resample_attempts` times at most."""
    mine = slice(rank(), None, world_size())
    records = prompts.batch(step, config.prompts_per_step)[mine]
    experience = _collect_once(model, records, reward_functions, config, (step, 0))
    for attempt in range(1, config.resample_attempts + 1):
        flat = groups_without_spread(experience, config.num_generations)
        if not flat:
            break
        fresh = prompts.batch(step + attempt * 1_000_003, config.prompts_per_step)[mine][: len(flat)]
        again = _collect_once(model, fresh, reward_functions, config, (step, attempt))
        experience = _replace_groups(experience, flat, again, config.num_generations)
    missing = experience.rewards.missing
    worst = max(missing, key=missing.__getitem__)
    if missing[worst] > config.max_missing_rewards:
        raise RewardError(
            f"{missing[worst]:.0%} of the values of reward {worst!r} are missing (allowed: {config.max_missing_rewards:.0%}); "
            f"last error: {experience.rewards.errors.get(worst, 'values that are not finite')}. Nothing was trained on "
            "them: mend the reward and run the same command again to resume"
        )
    return experience


def _collect_once(
    model: UnifiedModel, records: list[Record], reward_functions: Sequence[tuple[Any, Callable[..., Any]]],
    config: GRPOConfig, stream: tuple[int, int],
) -> Experience:  # fmt: skip
    rows = [model.encode_prompt(record.prompt) for record in records]
    noise = generator(config.seed, 10, *stream, rank())
    rollouts = sample(model, rows, config.sampling, num_generations=config.num_generations, generator=noise)
    repeated = [record for record in records for _ in range(config.num_generations)]
    keys = sorted({key for record in records for key in record.columns})
    columns: dict[str, list[Any]] = {key: [record.columns.get(key) for record in repeated] for key in keys}
    columns["truncated"] = [rollout.truncated for rollout in rollouts]
    rewards = call_rewards(reward_functions, [r.prompt for r in repeated], [r.document for r in rollouts], columns)
    group_ids = torch.arange(len(records)).repeat_interleave(config.num_generations)
    return Experience(repeated, rollouts, rewards, group_ids)


def groups_without_spread(experience: Experience, group_size: int) -> list[int]:
    """Groups in which every reward gives all members the same: nothing can be learned from them."""
    rewards = experience.rewards
    values, speaks, missing = document_rewards(*_reward_parts(rewards))  # (R, B)
    steps = rewards.steps.permute(0, 2, 1).flatten(0, 1)  # (R * J, B): each step is compared with the same step
    applies = rewards.applies.permute(0, 2, 1).flatten(0, 1)
    everything = torch.cat([values, steps.nan_to_num()])
    known = torch.cat([speaks & ~missing, applies & ~steps.isnan()])
    high = everything.masked_fill(~known, -torch.inf).unflatten(1, (-1, group_size)).amax(-1)
    low = everything.masked_fill(~known, torch.inf).unflatten(1, (-1, group_size)).amin(-1)
    return [g for g, spread in enumerate((high > low).any(0).tolist()) if not spread]


def _reward_parts(rewards: RewardBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return rewards.steps, rewards.applies, rewards.documents, rewards.documents_apply


def _replace_groups(old: Experience, groups: list[int], new: Experience, group_size: int) -> Experience:
    """The experience with some groups exchanged for new ones, in place of the old."""
    source = list(range(len(old.rollouts)))
    for position, group in enumerate(groups):
        for member in range(group_size):
            source[group * group_size + member] = len(old.rollouts) + position * group_size + member
    steps = max(old.rewards.steps.shape[-1], new.rewards.steps.shape[-1])

    def merge(name: str) -> Tensor:
        parts = [getattr(old.rewards, name), getattr(new.rewards, name)]
        if parts[0].ndim == 3:
            parts = [torch.nn.functional.pad(p, (0, steps - p.shape[-1])) for p in parts]
        return torch.cat(parts, dim=1)[:, source]

    missing = {name: max(share, new.rewards.missing[name]) for name, share in old.rewards.missing.items()}
    rewards = RewardBatch(
        merge("steps"),
        merge("applies"),
        merge("documents"),
        merge("documents_apply"),
        missing,
        old.rewards.errors | new.rewards.errors,
    )
    records, rollouts = old.records + new.records, old.rollouts + new.rollouts
    return Experience([records[i] for i in source], [rollouts[i] for i in source], rewards, old.group_ids)


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


def reward_metrics(experience: Experience, config: GRPOConfig) -> dict[str, float]:
    rewards, group = experience.rewards, config.num_generations
    values, speaks, missing = document_rewards(*_reward_parts(rewards))  # (R, B)
    valid = speaks & ~missing
    metrics: dict[str, float] = {}
    for r, reward in enumerate(config.rewards):
        used = values[r][valid[r]]
        if len(used):
            metrics[f"rewards/{reward.name}/mean"] = float(used.mean())
            metrics[f"rewards/{reward.name}/std"] = float(used.std()) if len(used) > 1 else 0.0
        metrics[f"rewards/{reward.name}/missing"] = rewards.missing[reward.name]
    weights = torch.tensor([reward.weight for reward in config.rewards])
    total = (values * weights[:, None]).sum(0)[~missing.any(0)]
    if len(total):
        metrics["reward"] = float(total.mean())
        metrics["reward_std"] = float(total.std()) if len(total) > 1 else 0.0
    metrics["frac_reward_zero_std"] = len(groups_without_spread(experience, group)) / (len(experience.rollouts) // group)
    lengths = [len(r.row) - r.prompt_length for r in experience.rollouts]
    metrics["completions/mean_length"] = sum(lengths) / len(lengths)
    metrics["completions/max_length"] = float(max(lengths))
    metrics["completions/mean_images"] = sum(len(r.document.images) for r in experience.rollouts) / len(lengths)
    metrics["completions/clipped_ratio"] = sum(r.truncated for r in experience.rollouts) / len(lengths)
    return metrics


def sample_records(experience: Experience, group_size: int, num_groups: int = 1) -> list[dict[str, Any]]:
    """The first groups of a step as JSON: prompt, answer, and for each step what every reward said."""
    names = list(experience.rewards.missing)
    records = []
    for b in range(min(num_groups * group_size, len(experience.rollouts))):
        rollout, rewards = experience.rollouts[b], experience.rewards
        steps = [
            {n: round(float(rewards.steps[r, b, j]), 4) for r, n in enumerate(names) if rewards.applies[r, b, j]}
            for j in range(rollout.num_steps)
        ]
        whole = {n: round(float(rewards.documents[r, b]), 4) for r, n in enumerate(names) if rewards.documents_apply[r, b]}
        records.append(
            {"prompt": to_json_blocks(experience.records[b].prompt), "answer": to_json_blocks(rollout.document),
             "steps": steps, "document": whole}
        )  # fmt: skip
    return records


def checkpoint_of(config: GRPOConfig) -> str:
    """The folder of the finished model."""
    return f"{config.output_dir}/checkpoints/step_{config.max_steps}/model"
