"""VILA-U's pixel decoder, in the manner of VQGAN (arXiv:2012.09841). Module names are the release's under `rqvaesiglip.decoder.`."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from diptych.models.vila_u.config import DecoderConfig


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = group_norm(channels_in), nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2, self.conv2 = group_norm(channels_out), nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else None

    def forward(self, x: Tensor) -> Tensor:
        change = self.conv1(F.silu(self.norm1(x)))
        change = self.conv2(F.silu(self.norm2(change)))
        return change + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class PixelAttention(nn.Module):
    """One head over all pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.v, self.proj_out = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        query, key, value = (project(normed).flatten(2).transpose(1, 2)[:, None] for project in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(query, key, value)[:, 0]  # (N, h * w, channels)
        return x + self.proj_out(mixed.transpose(1, 2).unflatten(2, x.shape[2:]))


class Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = (
            ResidualBlock(channels, channels), PixelAttention(channels), ResidualBlock(channels, channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class _Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Level(nn.Module):
    def __init__(self, channels_in: int, channels: int, num_blocks: int, attends: bool, upsamples: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(channels if i else channels_in, channels) for i in range(num_blocks))
        self.attn = nn.ModuleList(PixelAttention(channels) for _ in range(num_blocks if attends else 0))
        self.upsample = _Upsample(channels) if upsamples else None

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return x if self.upsample is None else self.upsample(x)


class PixelDecoder(nn.Module):
    """(N, z_channels, h, w) -> (N, out_ch, h * 2^(L-1), w * 2^(L-1)), L levels. Runs in the dtype of its weights."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        channels, last = config.ch * config.ch_mult[-1], len(config.ch_mult) - 1
        self.conv_in = nn.Conv2d(config.z_channels, channels, 3, padding=1)
        self.mid = Middle(channels)
        levels = []
        for level in range(last, -1, -1):  # from the coarsest
            attends = config.resolution // 2**level in config.attn_resolutions
            channels_in, channels = channels, config.ch * config.ch_mult[level]
            levels.append(_Level(channels_in, channels, config.num_res_blocks + 1, attends, upsamples=level > 0))
        self.up = nn.ModuleList(reversed(levels))  # the release counts from the finest
        self.norm_out = group_norm(channels)
        self.conv_out = nn.Conv2d(channels, config.out_ch, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        x = self.mid(self.conv_in(latent))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))
