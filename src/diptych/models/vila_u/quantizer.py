"""VILA-U's residual quantizer: each position becomes D codes, each the nearest code vector to what the ones before left over.

Frozen: code vectors are buffers, nothing depends on `training`. (The official one rewrites its codebook in any forward in
training mode.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_MAX_DISTANCES = 2**24  # held at a time; 128 MiB


class Codebook(nn.Module):
    """K code vectors and a padding row that is never selected, (K + 1, C)."""

    weight: Tensor

    def __init__(self, num_codes: int, width: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(num_codes + 1, width) * width**-0.5)


class ResidualQuantizer(nn.Module):
    """`depth` codes a position out of `num_codes`; one codebook for all depths if `shared`, else one for each."""

    def __init__(self, num_codes: int, width: int, depth: int, shared: bool) -> None:
        super().__init__()
        self.depth, self.shared = depth, shared
        self.codebooks = nn.ModuleList(Codebook(num_codes, width) for _ in range(1 if shared else depth))

    def code_vectors(self, index: int) -> Tensor:
        """(K, C) of depth `index`, without the padding row."""
        weight = self.codebooks[0 if self.shared else index].weight
        assert isinstance(weight, Tensor)
        return weight[:-1]

    @torch.no_grad()
    def encode(self, features: Tensor) -> Tensor:
        """(N, S, C) -> codes (N, S, D) int64. code_d = argmin_k |r_d - e_k|^2, lowest k on ties; r_0 = x, r_{d+1} = r_d - e."""
        residual = features.float().flatten(0, 1)  # (N * S, C)
        codes = []
        for index in range(self.depth):
            vectors = self.code_vectors(index).float()
            codes.append(_nearest(residual, vectors))
            residual = residual - vectors[codes[-1]]
        return torch.stack(codes, dim=-1).unflatten(0, features.shape[:2])

    @torch.no_grad()
    def vectors(self, codes: Tensor) -> Tensor:
        """Code vectors of the first d depths: (..., d) -> (..., d, C) float32."""
        each = [F.embedding(codes[..., i], self.code_vectors(i)).float() for i in range(codes.shape[-1])]
        return torch.stack(each, dim=-2)

    def running_sums(self, codes: Tensor) -> Tensor:
        """(..., d) -> (..., d, C) float32; entry i is the sum of code vectors 0..i."""
        return self.vectors(codes).cumsum(dim=-2)

    @torch.no_grad()
    def sums(self, codes: Tensor) -> Tensor:
        """(..., d) -> (..., C) float32, the sum over depths."""
        total = F.embedding(codes[..., 0], self.code_vectors(0)).float()
        for index in range(1, codes.shape[-1]):
            total = total + F.embedding(codes[..., index], self.code_vectors(index))
        return total


def _nearest(points: Tensor, vectors: Tensor) -> Tensor:
    """(M, C), (K, C) -> (M,) int64. Distances less |r|^2, in float64: TF32, autocast and cancellation decide no close call."""
    table = vectors.double()
    norms = table.square().sum(dim=1)  # (K,)
    chunks = points.split(max(1, _MAX_DISTANCES // len(vectors)))
    return torch.cat([torch.addmm(norms, chunk.double(), table.T, alpha=-2).argmin(dim=1) for chunk in chunks])
