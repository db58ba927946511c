"""Rewards that ask a model behind an OpenAI-compatible server (vLLM, SGLang, `transformers serve`): see docs/how-to/rewards.md.

`client` asks, with limits, retries and a memory; `prompts` says what is asked; `replies` reads what was said and refuses
what is ambiguous; `judges` puts them together into rewards.
"""

from diptych.rewards.judges.judges import DocumentJudge, Judge, LLMTextCritic, UnifiedReward

__all__ = ["DocumentJudge", "Judge", "LLMTextCritic", "UnifiedReward"]
