"""Rewards that run an image scorer in this process: see docs/how-to/image_scorers.md.

`base` has what they share: options, captions, batches, memory, rescaling, checkpoints. `clip` has the three that are CLIP models,
`image_reward` ImageReward's network on transformers' BLIP, `coherence` the likeness of a document's pictures; `open_clip` converts HPSv2's
files.
"""

from diptych.rewards.scorers.clip import ClipScore, HpsScore, PickScore
from diptych.rewards.scorers.coherence import ImageCoherence
from diptych.rewards.scorers.image_reward import ImageReward

__all__ = ["ClipScore", "HpsScore", "ImageCoherence", "ImageReward", "PickScore"]
