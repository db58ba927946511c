"""The two stages of the method, warm-up and unified GRPO, and what they are made of."""
