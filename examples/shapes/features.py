# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The feature space in which the FID of shapes pictures is taken.

A small convolutional network trained on renders to count the objects of every kind and colour, to say where they are,
to measure the background, and to tell how much a picture was blurred or made noisy. Its 64 pooled features therefore
see what is drawn, how it is spread over the picture, and how clean it is. They are multiplied by ten, so that
distances come out as numbers of a usual size.
"""

import random
import time

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from scenes import COLOURS, SHAPES, draw, place, random_scene


class FeatureNetwork(nn.Module):
    """Images [N, 3, H, W] in [0, 1] -> features [N, 64]."""

    num_features = 64

    def __init__(self):
        super().__init__()
        widths = (24, 48, 64)
        layers, channels = [], 3
        for width in widths:
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.SiLU()]
            layers += [nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.SiLU()]
            channels = width
        self.body = nn.Sequential(*layers)
        self.features = nn.Linear(2 * channels + 2 * channels, 64)
        self.heads = nn.Linear(64, len(SHAPES) * len(COLOURS) + 2 * len(COLOURS) + 6 + 2)

    def forward(self, images):
        x = self.body(images * 2 - 1)
        along = torch.linspace(-1, 1, x.shape[-1], device=x.device)
        pooled = [x.mean((2, 3)), x.std((2, 3)), (x * along).mean((2, 3)), (x * along[:, None]).mean((2, 3))]
        return 10 * F.silu(self.features(torch.cat(pooled, 1)))

    def save(self, path):
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, path)

    @classmethod
    def load(cls, path):
        network = cls()
        network.load_state_dict(load_file(path))
        return network.eval()


def _example(rng):
    """One render, blurred or noised half of the time, and what the network has to say of it."""
    placed = place(random_scene(rng), rng)
    image = draw(placed, rng)
    counts, middles = torch.zeros(len(SHAPES), len(COLOURS)), torch.zeros(len(COLOURS), 2)
    for p in placed:
        colour = list(COLOURS).index(p.colour)
        counts[SHAPES.index(p.shape), colour] += 1
        middles[colour] += torch.tensor([p.x, p.y]) / image.shape[-1] - 0.5
    edges = torch.stack([image[:, :8].mean(), image[:, -8:].mean(), image[:, :, :8].mean(), image[:, :, -8:].mean()])
    extent = torch.stack([image.mean(), image.std()])
    blur, noise = (rng.uniform(0, 1), rng.uniform(0, 1)) if rng.random() < 0.5 else (0.0, 0.0)
    if blur:
        taps = torch.exp(-0.5 * (torch.arange(-3, 4) / (0.2 + 1.2 * blur)) ** 2)
        kernel = (taps[:, None] * taps[None, :] / taps.sum() ** 2).expand(3, 1, 7, 7)
        image = F.conv2d(F.pad(image[None], (3, 3, 3, 3), mode="replicate"), kernel, groups=3)[0]
        image = (
            image
            + 0.15 * noise * torch.randn(image.shape, generator=torch.Generator().manual_seed(rng.getrandbits(40)))
        ).clamp(0, 1)
    return image, torch.cat(
        [counts.flatten(), 2 * middles.flatten(), 4 * edges, 4 * extent, torch.tensor([blur, noise])]
    )


def train_features(network: FeatureNetwork, steps: int, seed: int) -> FeatureNetwork:
    """Regress everything a render says of itself, mean squared error, one-cycle Adam."""
    rng = random.Random(seed + 7)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    started = time.time()
    for step in range(steps):
        images, targets = (torch.stack(column) for column in zip(*(_example(rng) for _ in range(64))))
        loss = F.mse_loss(network.heads(network(images) / 10), targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps - 1:
            print(f"features {step}/{steps} loss {loss.item():.4f} {time.time() - started:.0f}s", flush=True)
    return network.eval()
