# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What to watch while a signed loss says nothing: averaged metrics, teacher samples, a metrics file."""

import json
import math
from pathlib import Path

import numpy as np
import torch

from hf_flowdistill.training.distributed import mean_over_ranks


def average_metrics(micro_batches: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Average metrics over equally large micro-batches and over processes.

    A `<name>_std` that comes with a `<name>_mean` is pooled, i.e. the spread over all samples together.
    """
    names = list(micro_batches[0])
    rows = []
    for metrics in micro_batches:
        row = dict(metrics)
        for name in names:
            if name.endswith("_std"):
                row[name] = metrics[name] ** 2 + metrics[name.removesuffix("std") + "mean"] ** 2
        rows.append(torch.stack([row[name].float() for name in names]))
    means = dict(zip(names, mean_over_ranks(torch.stack(rows).mean(0)).tolist()))
    for name in names:
        if name.endswith("_std"):
            variance = means[name] - means[name.removesuffix("std") + "mean"] ** 2
            means[name] = math.sqrt(max(variance, 0.0)) if math.isfinite(variance) else math.nan
    return means


@torch.no_grad()
def latent_statistics(velocity, noise, conditional, unconditional, *, batch_size: int, num_steps: int = 20) -> dict:
    """Mean and standard deviation, over all elements, of latents that the teacher samples from `noise`, [B, ...].

    `velocity(x_t=, sigma=, conditional=, unconditional=)` is integrated from sigma 1 to 0 in `num_steps` equal Euler
    steps, `batch_size` samples at a time. Returns "teacher_latent_mean" and "teacher_latent_std".
    """
    samples = []
    for rows in torch.arange(len(noise)).split(batch_size):
        x_t = noise[rows.to(noise.device)]
        for i in range(num_steps):
            sigma = torch.full((len(rows),), 1 - i / num_steps, device=noise.device)
            step = velocity(x_t=x_t, sigma=sigma, conditional=conditional[rows], unconditional=unconditional)
            x_t = x_t - step / num_steps
        samples.append(x_t.flatten())
    samples = torch.cat(samples)
    return {"teacher_latent_mean": samples.mean().item(), "teacher_latent_std": samples.std(correction=0).item()}


class MetricsFile:
    """One JSON object per line, each with "images_seen". Reopening at `images_seen` drops the lines after it."""

    def __init__(self, path, *, images_seen: int = 0):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if _seen(line) <= images_seen]
            self.path.write_text("".join(f"{line}\n" for line in lines))

    def write(self, record: dict) -> None:
        """Append one line; a value that is not finite becomes null, as JSON has no other way to say it."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(finite) + "\n")


def _seen(line: str) -> float:
    try:
        return json.loads(line)["images_seen"]
    except ValueError:  # the half line of a killed run
        return math.inf


def save_image(accelerator, image, folder, images_seen: int) -> None:
    """Write a PIL image to `folder`/images-<images_seen>.png and give it to the trackers that take images."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    image.save(Path(folder, f"images-{images_seen}.png"))
    for tracker in accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        if tracker.name in ("tensorboard", "wandb"):
            tracker.log_images({Path(folder).name: np.asarray(image)[None]}, step=images_seen, **layout)


def tracker_config(args) -> dict:
    """Parsed arguments as trackers take them: numbers and text, and no token."""
    return {
        name: value if isinstance(value, (int, float, str)) else str(value)
        for name, value in vars(args).items()
        if not name.endswith("token")
    }
