"""Train Storyboard's image tokenizer on rendered patches, and say how well pictures survive it."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from diptych.models.storyboard.codec import PatchCodec
from diptych.worlds.storyboard.render import strip
from diptych.worlds.storyboard.scene import Thing
from diptych.worlds.storyboard.world import BACKGROUNDS, COLOURS, KINDS, PLACES, SIZES


def all_strips() -> Tensor:
    """Every column that can be drawn, (876, 3, 96, 32) float in -1..1."""
    things = [None, *(Thing(k, c, s) for k in KINDS for c in COLOURS for s in SIZES)]
    columns = [strip(b, p, t) for b, p, t in itertools.product(BACKGROUNDS, range(len(PLACES)), things)]
    return torch.from_numpy(np.stack(columns)).permute(0, 3, 1, 2).float() / 127.5 - 1


def distinct_patches(strips: Tensor, patch: int) -> Tensor:
    """The distinct patches among the strips, (M, 3, patch, patch)."""
    patches = torch.cat(strips.split(patch, dim=2))
    return torch.unique(patches.flatten(1), dim=0).reshape(-1, 3, patch, patch)


def separation_loss(latent: Tensor, other: Tensor, margin: float = 0.15) -> Tensor:
    """Pushes the bounded latents of different patches at least `margin` apart, so that no two share all their codes."""
    return (margin - (latent.tanh() - other.tanh()).abs().amax(-1)).clamp(min=0).mean()


def train_codec(codec: PatchCodec, steps: int, lr: float, batch_size: int, seed: int, log: Callable[[str], None]) -> dict[str, float]:
    """L1 + L2 reconstruction of all distinct patches, drawn in proportion to their last error, plus separation from
    the patch that looks most alike. Returns the measures that the packaged model states."""
    generator = torch.Generator().manual_seed(seed)
    patches = distinct_patches(all_strips(), codec.patch)
    distance = torch.cdist(patches.flatten(1), patches.flatten(1)).fill_diagonal_(torch.inf)
    alike = distance.topk(8, largest=False).indices  # (M, 8)
    error = torch.ones(len(patches))
    optimizer = torch.optim.AdamW(codec.parameters(), lr=lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        index = torch.multinomial(error + error.mean(), batch_size, replacement=True, generator=generator)
        batch = patches[index]
        neighbour = alike[index, torch.randint(alike.shape[1], (batch_size,), generator=generator)]
        both = torch.cat([batch, patches[neighbour]])
        latent = codec.encoder(both + 0.02 * torch.randn(both.shape, generator=generator))
        quantized = codec.quantizer(latent[:batch_size].unsqueeze(1))[0].squeeze(1)
        difference = codec.decoder(quantized) - batch
        loss = difference.abs().mean() + 2 * difference.square().mean()
        loss = loss + separation_loss(latent[:batch_size], latent[batch_size:])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        error[index] = difference.detach().square().mean((1, 2, 3))
        if step % 250 == 0 or step == steps - 1:
            log(f"codec step {step}: loss {loss.item():.4f}, {measure_codec(codec, patches)}")
    return measure_codec(codec, patches)


@torch.no_grad()
def measure_codec(codec: PatchCodec, patches: Tensor) -> dict[str, float]:
    codec.eval()
    quantized, codes = codec.quantize_patches(patches)
    difference = codec.decoder(quantized).clamp(-1, 1) - patches
    codec.train()
    return {
        "patches": len(patches),
        "distinct_codes": len(torch.unique(codes, dim=0)),
        "rmse": round(float(difference.square().mean().sqrt()) / 2, 5),
        "worst_patch_rmse": round(float(difference.square().mean(dim=(1, 2, 3)).max().sqrt()) / 2, 5),
    }
