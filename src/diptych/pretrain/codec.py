"""Train Storyboard's image tokenizer on rendered patches, and say how well pictures survive it."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from diptych.models.pixels import to_images, to_pixels
from diptych.models.storyboard.codec import PatchCodec
from diptych.runtime import rng
from diptych.worlds.storyboard.oracle import read_pictures
from diptych.worlds.storyboard.reading import all_things
from diptych.worlds.storyboard.render import render, render_array, strip
from diptych.worlds.storyboard.scene import random_scene
from diptych.worlds.storyboard.world import FULL, World

MEASURED = 2000  # patches, at most twice as many, of which the measures are taken


def all_strips(world: World = FULL) -> Tensor:
    """Every column that can be drawn in a world of one row: (876, 3, 96, 32) float in -1..1 in the standard one."""
    columns = [
        strip(b, c, t, world.looks)
        for b, c, t in itertools.product(world.backgrounds, range(len(world.columns)), all_things(world.looks))
    ]  # fmt: skip
    return torch.from_numpy(np.stack(columns)).permute(0, 3, 1, 2).float() / 127.5 - 1


def patches_of(world: World, patch: int, seed: int = 0, num_scenes: int = 12_000) -> Tensor:
    """Distinct patches of a world's pictures, (M, 3, patch, patch): all of them or, where things cover one another, those of random
    scenes."""
    if world.rows == 1:
        return distinct_patches(all_strips(world), patch)
    random, side, found = rng(seed, 20), world.pixels // patch, set()
    most = min(len(world.places), world.things[1] + 1)
    for _ in range(num_scenes):
        picture = render_array(random_scene(random, int(random.integers(most + 1)), world), world)
        tiles = picture.reshape(side, patch, side, patch, 3).swapaxes(1, 2).reshape(-1, patch, patch, 3)
        found |= {tile.tobytes() for tile in tiles}
    tiles = np.stack([np.frombuffer(tile, dtype=np.uint8) for tile in sorted(found)]).reshape(-1, patch, patch, 3)
    return torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 127.5 - 1


def distinct_patches(strips: Tensor, patch: int) -> Tensor:
    """The distinct patches among the strips, (M, 3, patch, patch)."""
    patches = torch.cat([part for row in strips.split(patch, dim=2) for part in row.split(patch, dim=3)])
    return torch.unique(patches.flatten(1), dim=0).reshape(-1, 3, patch, patch)


def separation_loss(latent: Tensor, other: Tensor, margin: float = 0.15) -> Tensor:
    """Pushes the bounded latents of different patches at least `margin` apart, so that no two share all their codes."""
    return (margin - (latent.tanh() - other.tanh()).abs().amax(-1)).clamp(min=0).mean()


def nearest(patches: Tensor, count: int) -> Tensor:
    """The `count` other patches that look most like each, (M, count)."""
    flat, found = patches.flatten(1), []
    for begin in range(0, len(flat), 2000):
        distance = torch.cdist(flat[begin : begin + 2000], flat)
        row = torch.arange(len(distance))
        distance[row, begin + row] = torch.inf
        found.append(distance.topk(count, largest=False).indices)
    return torch.cat(found)


def train_codec(
    codec: PatchCodec, patches: Tensor, steps: int, lr: float, batch_size: int, seed: int, log: Callable[[str], None]
) -> dict[str, float]:
    """L1 + L2 reconstruction of the distinct `patches` (M, 3, patch, patch), drawn in proportion to their last error, plus separation from
    the patch that looks most alike. Returns the measures that the packaged model states."""
    generator = torch.Generator().manual_seed(seed)
    alike = nearest(patches, 8)  # (M, 8)
    some = patches[:: max(1, len(patches) // MEASURED)]
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
            log(f"codec step {step}: loss {loss.item():.4f}, {measure_codec(codec, some)}")
    return measure_codec(codec, some)


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


def measure_reading(codec: PatchCodec, world: World, num_pictures: int = 240) -> float:
    """Share of rendered pictures that, encoded and decoded, the oracle still reads exactly."""
    random = rng(0, 22)
    scenes = [random_scene(random, int(random.integers(world.things[1] + 1)), world) for _ in range(num_pictures)]
    side = codec.grid * codec.patch
    drawn = [codec.decode(codec.encode(to_pixels([render(scene, world)], side))) for scene in scenes]
    seen = read_pictures(to_images(torch.cat(drawn)), world)
    return round(sum(a == b for a, b in zip(seen, scenes, strict=True)) / num_pictures, 4)
