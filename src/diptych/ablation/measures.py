"""What can be measured of a trial: names, words and units. A name is `group/what`; suites and records use these names."""

from __future__ import annotations

import dataclasses

RATES = {
    "score": "score", "format": "format right", "text": "texts right", "image": "pictures right", "order": "order right",
    "document": "whole documents right",
}  # fmt: skip
MEMORY = {"given": "pictures right given text and picture before", "kept": "things kept"}
"""Rates of the terse telling alone: there pictures must remember."""
REWARDS = {
    "text_critic": "text critic", "text_likelihood": "text likelihood", "image_text": "image agreement", "format": "format",
    "image_likelihood": "picture likelihood",
}  # fmt: skip
SKILLS = {"text_to_image": "text to image kept", "understanding": "understanding kept", "editing": "editing kept"}
TRAINING = {
    "reward": "reward", "reward_std": "reward spread", "frac_reward_zero_std": "groups without spread", "kl/text": "KL per text choice",
    "kl/image": "KL per code", "entropy/text": "entropy per text choice", "entropy/image": "entropy per code",
    "clip_ratio/region_mean/text": "text choices clipped", "clip_ratio/region_mean/image": "codes clipped",
    "completions/mean_length": "tokens per document", "completions/mean_images": "pictures per document",
    "completions/clipped_ratio": "documents cut off",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Measure:
    """`per_cent`: a share between 0 and 1, shown times 100. `rises`: larger is better, so "reaching" a value has a meaning."""

    name: str
    label: str
    per_cent: bool
    rises: bool

    def show(self, value: float | None, *, signed: bool = False) -> str:
        """The number as the tables print it."""
        if value is None:
            return "–"
        scaled = 100 * value if self.per_cent else value
        sign = "+" if signed else ""
        return f"{scaled:{sign}.1f}" if self.per_cent else f"{scaled:{sign}.3g}"


def _all() -> dict[str, Measure]:
    found = []
    for mode in ("greedy", "sampled"):
        found += [Measure(f"{mode}/{name}", f"{label}, {mode}", True, True) for name, label in (RATES | MEMORY).items()]
        found += [Measure(f"{mode}_reward/{name}", f"reward: {label}, {mode}", True, True) for name, label in REWARDS.items()]
    found += [Measure(f"retention/{name}", label, True, True) for name, label in SKILLS.items()]
    found += [Measure(f"train/{name}", f"training: {label}", False, False) for name, label in TRAINING.items()]
    found += [Measure(f"train/rewards/{name}/mean", f"training: {label}", True, True) for name, label in REWARDS.items()]
    found += [Measure(f"parity/{kind}_max", f"largest |replayed - sampled|, {kind}", False, False) for kind in ("text", "image")]
    return {measure.name: measure for measure in found}


MEASURES = _all()
"""greedy, sampled: the oracle's rates on held-out prompts. *_reward: the packaged rewards' means on the same answers, whatever
was trained on. retention: earlier skills. train: means of the last steps before a checkpoint. parity: maxima of the whole training."""
