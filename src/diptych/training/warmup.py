"""Stage 1, warm-up: supervised fine-tuning on a hybrid mixture.

1. Few interleaved documents, with understanding and text-to-image data beside them so that existing skills are retained.
2. Text and image choices have losses of their own, each a mean over the global batch, added with weights.
3. Departs from the paper (which is silent): caption dropout trains the unconditional branch that guidance needs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from diptych.config import WarmupConfig
from diptych.data import Mixture, Record
from diptych.data.background import Reader
from diptych.document import to_json_blocks
from diptych.models import UnifiedModel, equip, open_policy
from diptych.models.codes import defer_codes
from diptych.runs import SHARED_FOLDER, RunFolder
from diptych.runtime import agree, generator, joined_processes, pick_device, seed_everything, set_threads, weights_checksum
from diptych.sampling.engine import fit_to_context, sample
from diptych.training.admission import admit, note_skipped
from diptych.training.checkpoints import Checkpoints, restore
from diptych.training.inputs import check_inputs, summary
from diptych.training.optim import make_optimizer, optimizer_step
from diptych.training.parallel import parallelize
from diptych.training.preemption import Requests, asked_to_stop, preemptible
from diptych.training.supervised import encode, encode_batch, example_length, supervised_gradient, supervised_loss, usable_example

Progress = Callable[[int, int, dict[str, float]], None]


def warmup(config: WarmupConfig, progress: Progress | None = None) -> UnifiedModel:
    """Runs, or resumes, a warm-up and returns the trained model. The last checkpoint is `step_<max_steps>`.

    Raises ValueError for settings, data or checkpoints that cannot be used, and Preempted behind a step that is saved, where the process
    was asked to stop (SIGTERM, SIGUSR1).
    """
    with joined_processes(), RunFolder(config.output_dir, config) as run, preemptible() as requests, Reader.of(config) as reader:
        return _train(run, progress, requests, reader)


def _train(run: RunFolder[WarmupConfig], progress: Progress | None, requests: Requests, reader: Reader) -> UnifiedModel:
    config = run.config
    set_threads(config.num_threads)
    seed_everything(config.seed)
    device = pick_device(config.device)
    mixture = Mixture(config.sources, config.seed, max_skipped=config.max_skipped_records)
    validation = Mixture(config.sources, config.seed, "validation", max_skipped=config.max_skipped_records, beside=mixture)
    inputs = check_inputs(run, config, [mixture], needs_model=config.lora is not None)
    step = (run.steps() or [0])[-1]
    agree(step, "last checkpoint", SHARED_FOLDER)
    state: dict[str, Any] = {}
    run.truncate_logs(step)
    folder: Path | None = None
    if step:
        folder, state = run.load(step)
    model = open_policy(config, folder).eval()  # no dropout: resumed and split batches must give the same gradient
    mixture.check_model(model)
    agree(weights_checksum(model), "weights (by their checksum)", SHARED_FOLDER)
    model = equip(parallelize(model, config, device), config)
    optimizer, schedule = make_optimizer(model, config.optim, config.max_steps)
    if folder is not None:
        restore(model, optimizer, schedule, state, folder.parent)
    for name, some in (("train", mixture), ("validation", validation)):
        known = {"inputs": summary(inputs), "lengths": model.max_positions}
        admit(some, partial(example_length, model), model.max_positions, run, name, known)
    note_skipped(run, mixture)
    held_out = validation.made(0, config.num_eval_records, partial(usable_example, model))
    checkpoints = Checkpoints(run, model, optimizer, schedule)

    if reader.is_ahead:
        defer_codes(model)

    while step < config.max_steps:
        batch = encode_batch(model, mixture, config.batch_size, config.caption_dropout, config.seed, step, reader, config.max_steps)
        metrics = supervised_gradient(
            model, batch, text_weight=config.text_weight, image_weight=config.image_weight, micro_batch_size=config.micro_batch_size
        )
        metrics |= optimizer_step(model, optimizer, schedule, config.optim)
        step += 1
        mixture.share_skipped()
        evaluates = step % config.eval_steps == 0 or step == config.max_steps
        if evaluates:
            metrics |= validation_loss(model, held_out, config)
        if step % config.logging_steps == 0 or evaluates:
            run.log(step, metrics)
        if step % config.sample_steps == 0 or step == config.max_steps:
            save_samples(run, model, held_out, config, step)
        signal = asked_to_stop(requests)
        if checkpoints.due(step, signal):
            note_skipped(run, mixture)
        checkpoints.after(step, signal)
        if progress:
            progress(step, config.max_steps, metrics)
        checkpoints.stop(step, signal)
    checkpoints.finish()
    return model.eval()


def validation_loss(model: UnifiedModel, records: list[Record], config: WarmupConfig) -> dict[str, float]:
    batch = encode(model, records, 0.0, config.seed, 0)
    text, image = supervised_loss(model, batch, config.micro_batch_size)
    return {"eval/loss/text": text, "eval/loss/image": image}


def save_samples(run: RunFolder, model: UnifiedModel, records: list[Record], config: WarmupConfig, step: int) -> None:
    """An early look: what the model answers to a few held-out prompts, greedily."""
    chosen = [r for r in records if r.answer is not None and len(r.answer) > 1][:4] or records[:4]
    prompts = [model.encode_prompt(record.prompt, record.form or config.sampling.form, record.given) for record in chosen]
    greedy = config.sampling.greedy()
    params = min((fit_to_context(model, prompt, greedy) for prompt in prompts), key=lambda fitting: fitting.max_images)
    rollouts = sample(model, prompts, params, generator=generator(config.seed, 5, step))
    run.save_samples(
        step,
        [{"prompt": to_json_blocks(record.prompt), "answer": to_json_blocks(rollout.document)}
         for record, rollout in zip(chosen, rollouts, strict=True)],
    )  # fmt: skip


def checkpoint_of(config: WarmupConfig) -> str:
    """The folder of the finished model."""
    return f"{config.output_dir}/checkpoints/step_{config.max_steps}/model"
