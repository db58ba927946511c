"""VILA-U's depth transformer: the D codes of one position, one after the other, given the LLM's state.

Slot 0 reads the state; slot d >= 1 reads the sum of code vectors 0..d-1 and predicts code d. The official residual dropout
of 0.1 in training is left out: a policy's logprobs must not be noisy.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diptych.models.vila_u.config import DepthConfig
from diptych.models.vila_u.quantizer import ResidualQuantizer


class _Attention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            project(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (N, heads, slots, width / heads)
            for project in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.proj(mixed.transpose(1, 2).flatten(-2))


class _Block(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = _Attention(width, num_heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class _Blocks(nn.Module):
    def __init__(self, config: DepthConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(config.embed_dim, config.head.block.n_head) for _ in range(config.head.n_layer))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class _Classifier(nn.Module):
    def __init__(self, width: int, num_codes: int) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, num_codes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.layer_norm(x))


class DepthTransformer(nn.Module):
    """Module names are the release's under `rqtransformer.`. Gradients reach the state and the parameters, never the codebook."""

    def __init__(self, config: DepthConfig) -> None:
        super().__init__()
        width, self.depth = config.embed_dim, config.block_size[2]
        self.in_mlp_1 = nn.Linear(config.input_embed_dim_1, width)
        self.in_mlp_2 = nn.Linear(config.input_embed_dim_2, width)
        self.pos_emb_d = nn.Parameter(torch.randn(1, self.depth, width) * 0.02)
        self.head_transformer = _Blocks(config)
        self.classifier_mlp = _Classifier(width, config.vocab_size)

    def _slots(self, hidden: Tensor, code_prefix: Tensor, quantizer: ResidualQuantizer) -> Tensor:
        """(N, H), (N, d) -> (N, d + 1, width)."""
        dtype, num_codes = self.pos_emb_d.dtype, code_prefix.shape[1]
        slots = self.in_mlp_2(hidden.to(dtype))[:, None]
        if num_codes:
            slots = torch.cat([slots, self.in_mlp_1(quantizer.running_sums(code_prefix).to(dtype))], dim=1)
        return self.head_transformer(slots + self.pos_emb_d[:, : num_codes + 1])

    def logits(self, hidden: Tensor, codes: Tensor, quantizer: ResidualQuantizer) -> Tensor:
        """Teacher-forced: states (N, H) and codes (N, D) -> (N, D, K); the last code is not read."""
        assert codes.shape == (len(hidden), self.depth), f"codes {tuple(codes.shape)} for {len(hidden)} states and depth {self.depth}"
        return self.classifier_mlp(self._slots(hidden, codes[:, :-1], quantizer))

    def step(self, hidden: Tensor, code_prefix: Tensor, quantizer: ResidualQuantizer) -> Tensor:
        """Logits of the next code: states (N, H) and the codes so far (N, d), d < D -> (N, K)."""
        assert code_prefix.shape[1] < self.depth, f"a position has {self.depth} codes, and {code_prefix.shape[1]} are there already"
        return self.classifier_mlp(self._slots(hidden, code_prefix, quantizer)[:, -1])
