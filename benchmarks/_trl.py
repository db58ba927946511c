"""One optimizer update of TRL's `GRPOTrainer`, by TRL's own code, on tokens that are given: nothing is generated or tokenized.

TRL stays optional: `pip install trl`. Written against TRL 1.16 with transformers 5.24, whose private names it uses.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import LlamaForCausalLM


def import_trl() -> Any:
    """Raises RuntimeError where TRL is missing, or is a version with other inner parts."""
    try:
        import trl.trainer.grpo_trainer
        import trl.trainer.utils
    except ImportError as error:
        raise RuntimeError(f"TRL cannot be imported ({error}); `pip install trl` installs it beside Diptych") from error
    if not hasattr(trl.trainer.utils, "_use_triton"):
        raise RuntimeError(f"this comparison is written for TRL 1.16, found {trl.__version__}: `pip install 'trl>=1.16'`")
    return trl


class TRLUpdate:
    """TRL's update of one batch of rollouts: forward, loss, backward, clipping, AdamW, schedule, and the metrics of every step.

    Settings are TRL's defaults (no KL, AdamW fused, clipping at 1, entropy computed for the log), except that precision is the model's
    own (default: bfloat16 autocast) and layers are not checkpointed (default: they are). TRL left-pads all prompts and right-pads
    all completions to the longest of the whole batch, then splits it into micro-batches; it would also shuffle, which changes no cost.

    Args:
        language_model: patched and trained in place (TRL replaces its `forward`); a deep copy must be made before, not after.
        prompts, completions: B lists of token ids, none empty. B is at least 2 and a multiple of `micro_batch_size` (TRL's default: 8).
        advantages: (B,).
        old_logprobs: per rollout those of its completion; None: TRL takes the current ones, as it does when it trains on policy.
        scored_only: the head runs on completion tokens alone, as TRL does on a GPU. On a CPU its default runs the head on every position,
            prompts and padding included.
    """

    def __init__(
        self, language_model: LlamaForCausalLM, prompts: Sequence[list[int]], completions: Sequence[list[int]], advantages: Tensor,
        old_logprobs: Sequence[Tensor] | None = None, *, micro_batch_size: int = 8, loss_type: str = "dapo", learning_rate: float = 1e-6,
        checkpointing: bool = False, scored_only: bool = False,
    ) -> None:  # fmt: skip
        from datasets import Dataset
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from transformers import PreTrainedTokenizerFast

        self._trl, self.scored_only = import_trl(), scored_only
        self.lengths = [len(ids) for ids in completions]
        words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))  # never used: TRL wants one
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
        parts, rest = divmod(len(prompts), micro_batch_size)
        if rest or not all(map(len, prompts)) or not all(self.lengths):
            raise ValueError(f"{len(prompts)} rollouts, none of them empty, must make whole micro-batches of {micro_batch_size}")
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(self._trl.GRPOTrainer, "_send_telemetry"):
            config = self._trl.GRPOConfig(
                folder, per_device_train_batch_size=micro_batch_size, gradient_accumulation_steps=parts, num_generations=len(prompts),
                loss_type=loss_type, learning_rate=learning_rate, gradient_checkpointing=checkpointing, bf16=False,
                use_cpu=language_model.device.type == "cpu", disable_tqdm=True, report_to="none",
            )  # fmt: skip
            self.trainer = self._trl.GRPOTrainer(
                language_model, lambda completions, **_: [0.0] * len(completions), config, Dataset.from_dict({"prompt": ["unused"]}),
                processing_class=tokenizer,
            )  # fmt: skip
        trainer = self.trainer
        if checkpointing:  # as `Trainer.train` does
            trainer.model.gradient_checkpointing_enable()
        trainer.create_optimizer()
        self.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.create_scheduler(num_training_steps=1_000_000)
        trainer.current_gradient_accumulation_steps = parts
        trainer._prepare_inputs = lambda inputs: inputs  # what would generate, score and split
        self._seen: list[Tensor] = []
        score = trainer._get_per_token_logps_and_entropies

        def remember(*args: Any, **kwargs: Any) -> Any:
            found = score(*args, **kwargs)
            self._seen.append(found[0].detach())
            return found

        trainer._get_per_token_logps_and_entropies = remember

        device, pad = trainer.accelerator.device, self._trl.trainer.utils.pad
        batch: dict[str, Tensor] = {"advantages": advantages.to(device, torch.float32)}
        for name, rows, side in (("prompt", prompts, "left"), ("completion", completions, "right")):
            batch[f"{name}_ids"] = pad([torch.tensor(ids) for ids in rows], 0, side).to(device)
            batch[f"{name}_mask"] = pad([torch.ones(len(ids), dtype=torch.long) for ids in rows], 0, side).to(device)
        batch["num_items_in_batch"] = batch["completion_mask"].sum()
        if old_logprobs is not None:
            batch["old_per_token_logps"] = pad(list(old_logprobs), 0, "right").to(device)
        self.parts: list[dict[str, Tensor]] = self._trl.trainer.utils.split_tensor_dict(batch, parts)

    def gradient(self) -> tuple[float, list[Tensor]]:
        """Adds the whole batch's gradient to the parameters'. Returns the loss and, per rollout, its completion's log-probabilities."""
        self._seen.clear()
        as_on_gpu = mock.patch.object(self._trl.trainer.utils, "_use_triton", return_value=True)  # not the kernels' own switch
        with as_on_gpu if self.scored_only else contextlib.nullcontext():
            losses = [self.trainer.training_step(self.model, part, None) for part in self.parts]
        return float(sum(losses)), [row[:length] for row, length in zip(torch.cat(self._seen), self.lengths, strict=True)]

    def run(self) -> float:
        """One whole update, in the order of `Trainer._run_epoch`. Returns the loss before it."""
        loss, _ = self.gradient()
        self.trainer._clip_grad_norm(self.model)
        self.trainer.optimizer.step()
        self.trainer.lr_scheduler.step()
        self.model.zero_grad()
        return loss
