"""The IBQ vision tokenizer (arXiv:2412.02692): a VQGAN with one large codebook, whose rows are chosen by their dot product.

Module names are the release's. Always in float32: in less, rounding decides close calls.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.models.emu3_5.config import VisionConfig
from diptych.models.pixels import full_precision
from diptych.models.vila_u.decoder import Middle, PixelAttention, PixelDecoder, ResidualBlock, group_norm

POSITIONS_AT_ONCE = 256  # that are compared with the whole codebook: 131,072 rows make 128 MiB of scores


class _Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # on the right and below only


class _Level(nn.Module):
    def __init__(self, channels_in: int, channels: int, num_blocks: int, attends: bool, downsamples: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(channels if i else channels_in, channels) for i in range(num_blocks))
        self.attn = nn.ModuleList(PixelAttention(channels) for _ in range(num_blocks if attends else 0))
        self.downsample = _Downsample(channels) if downsamples else None

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return x if self.downsample is None else self.downsample(x)


class PixelEncoder(nn.Module):
    """(N, 3, h, w) -> (N, z_channels, h / factor, w / factor)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        channels, last = config.ch, len(config.ch_mult) - 1
        self.conv_in = nn.Conv2d(config.in_channels, channels, 3, padding=1)
        levels = []
        for level, factor in enumerate(config.ch_mult):
            attends = config.resolution // 2**level in config.attn_resolutions
            channels_in, channels = channels, config.ch * factor
            levels.append(_Level(channels_in, channels, config.num_res_blocks, attends, downsamples=level < last))
        self.down, self.mid = nn.ModuleList(levels), Middle(channels)
        self.norm_out = group_norm(channels)
        self.conv_out = nn.Conv2d(channels, config.z_channels, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv_in(pixels)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class _Codebook(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.codebook_size, config.embed_dim)


class VisionTokenizer(nn.Module):
    """Pictures (3, h, w) in -1..1, both sides multiples of the factor, to codes (H, W) and back."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = PixelEncoder(config), PixelDecoder(config)
        self.quantize = _Codebook(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    def latents(self, pixels: Tensor) -> Tensor:
        """(3, h, w) -> (C, H, W)."""
        with full_precision(pixels.device):
            return self.quant_conv(self.encoder(pixels[None].float()))[0]

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """(3, h, w) -> codes (H, W): the row of the codebook with the largest dot product, neither side normalised."""
        latents, rows = self.latents(pixels), self.quantize.embedding.weight
        with full_precision(pixels.device):
            best = [(part.T @ rows.T).argmax(-1) for part in latents.flatten(1).split(POSITIONS_AT_ONCE, dim=1)]
        return torch.cat(best).view(latents.shape[1:])

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """(H, W) -> (3, h, w), as the decoder gives it: not clamped."""
        with full_precision(codes.device):
            vectors = self.quantize.embedding(codes).permute(2, 0, 1)  # (C, H, W)
            return self.decoder(self.post_quant_conv(vectors[None]))[0]
