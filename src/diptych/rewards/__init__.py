"""Rewards: any callable with TRL's protocol. To add one: one file here and one line in `BUILT_IN`."""

from diptych.rewards.base import BUILT_IN, RewardBatch, RewardError, call_rewards, load_reward

__all__ = ["BUILT_IN", "RewardBatch", "RewardError", "call_rewards", "load_reward"]
