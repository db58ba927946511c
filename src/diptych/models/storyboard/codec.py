"""Storyboard's image tokenizer: 96 x 96 pixels <-> a 3 x 3 grid of positions with two codes each, or another grid of other patches.

Each patch (of 32 x 32 pixels) is encoded on its own (no cross-talk between patches), so a thing has the same codes wherever it
stands. The quantizer is residual finite scalar quantization (`ResidualFSQ` of vector-quantize-pytorch).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from vector_quantize_pytorch import ResidualFSQ


class ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class PatchCodec(nn.Module):
    """Encoder, residual FSQ, decoder. `grid` patches a side, `patch` pixels each, `depth` codes a patch."""

    def __init__(self, grid: int = 3, patch: int = 32, depth: int = 2, levels: tuple[int, ...] = (8, 8, 8), width: int = 48) -> None:
        super().__init__()
        self.grid, self.patch, self.depth = grid, patch, depth
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=4), ResidualBlock(width),
            nn.Conv2d(width, 2 * width, 2, stride=2), ResidualBlock(2 * width),
            nn.Flatten(), nn.Linear(2 * width * (patch // 8) ** 2, 256), nn.SiLU(), nn.Linear(256, len(levels)),
        )  # fmt: skip
        self.quantizer = ResidualFSQ(levels=list(levels), num_quantizers=depth, dim=len(levels))
        self.decoder = nn.Sequential(
            nn.Linear(len(levels), 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(),
            nn.Linear(256, 2 * width * (patch // 8) ** 2), nn.Unflatten(1, (2 * width, patch // 8, patch // 8)),
            ResidualBlock(2 * width),
            nn.ConvTranspose2d(2 * width, width, 2, stride=2), ResidualBlock(width),
            nn.ConvTranspose2d(width, 24, 2, stride=2), nn.SiLU(),
            nn.ConvTranspose2d(24, 3, 2, stride=2),
        )  # fmt: skip

    @property
    def codebook_size(self) -> int:
        return self.quantizer.codebook_size

    def to_patches(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N * grid * grid, 3, patch, patch), positions in raster order."""
        n, g, p = len(pixels), self.grid, self.patch
        return pixels.reshape(n, 3, g, p, g, p).permute(0, 2, 4, 1, 3, 5).reshape(n * g * g, 3, p, p)

    def from_patches(self, patches: Tensor) -> Tensor:
        g, p = self.grid, self.patch
        n = len(patches) // (g * g)
        return patches.reshape(n, g, g, 3, p, p).permute(0, 3, 1, 4, 2, 5).reshape(n, 3, g * p, g * p)

    def quantize_patches(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """(M, 3, p, p) in -1..1 -> quantized (M, C), codes (M, depth)."""
        latent = self.encoder(patches)
        quantized, codes = self.quantizer(latent.unsqueeze(1))
        return quantized.squeeze(1), codes.squeeze(1)

    def _vectors(self) -> Tensor:
        """(depth, codebook_size, C): what each code adds to a patch's quantized vector."""
        return self.quantizer.codebooks * self.quantizer.scales[:, None]

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) float in -1..1 -> codes (N, grid * grid, depth) int64."""
        codes = self.quantize_patches(self.to_patches(pixels))[1]
        return codes.reshape(len(pixels), self.grid**2, self.depth).long()

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """codes (N, grid * grid, depth) -> (N, 3, S, S) float in -1..1. Patches that are alike are decoded once: most are background."""
        different, which = codes.reshape(-1, self.depth).unique(dim=0, return_inverse=True)
        latent = self._vectors()[torch.arange(self.depth, device=codes.device), different].sum(1)
        return self.from_patches(self.decoder(latent).clamp(-1, 1)[which])
