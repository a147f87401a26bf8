# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""How the networks of a shapes teacher are trained and saved: both loops, their precision, their optimizers."""

import contextlib
import math
import os
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from hf_flowdistill.flow.draws import stream_seed
from hf_flowdistill.training.distributed import average_gradients
from scenes import random_scene, render


def multiplies_bf16() -> bool:
    """Whether the CPU multiplies bfloat16. Where that is emulated, on AVX2, float32 is two to nine times as fast."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last one is Arm's


def mixed_precision() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bf16())


class Float32(TorchFunctionMode):
    """torch's Muon makes its matrices orthogonal in bfloat16; within this, in the float32 they come in."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return args[0].clone() if function is torch.Tensor.bfloat16 else function(*args, **(kwargs or {}))


def fit_vae(vae, steps: int, rng: random.Random, loss_of) -> None:
    """Lower the absolute and squared error of the pictures that `loss_of(images)` restores from fresh renders, and the
    further loss that it gives; its third result is what the progress line says of that."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    vae.train().to(memory_format=torch.channels_last)
    started = time.time()
    for step in range(steps):
        images = render([random_scene(rng) for _ in range(16)], rng).mul(2).sub(1)
        images = images.contiguous(memory_format=torch.channels_last)
        with mixed_precision():
            restored, further, says = loss_of(images)
        restored = restored.float()
        error = F.mse_loss(restored, images)
        loss = (restored - images).abs().mean() + error + further
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(
                f"vae {step}/{steps} loss {loss.item():.4f} mse {error.item():.5f} {says()} "
                f"{time.time() - started:.0f}s",
                flush=True,
            )
    vae.eval().to(memory_format=torch.contiguous_format)


def build_optimizers(networks, learning_rate):
    """Muon for the matrices of the transformer's blocks, AdamW for the rest."""
    named = [(name, p) for name, p in networks.named_parameters() if p.requires_grad]
    is_matrix = [p.ndim == 2 and "transformer_blocks" in name for name, p in named]
    matrices = [p for (_, p), matrix in zip(named, is_matrix) if matrix]
    rest = [p for (_, p), matrix in zip(named, is_matrix) if not matrix]
    return [
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True),
    ]


def fit(networks, loss_of, args) -> None:
    """Lower `loss_of(step, generator)`, and leave the average over the last steps in the networks.

    Resumes from --work_dir/transformer.pt. Under torchrun every process draws from a generator of its own.
    """
    state_file, rank = Path(args.work_dir) / "transformer.pt", int(os.environ.get("RANK", 0))
    trainable = [p for p in networks.parameters() if p.requires_grad]
    average, optimizers, start = [p.detach().clone() for p in trainable], build_optimizers(networks, 0.0), 0
    if state_file.exists():
        state = torch.load(state_file)
        networks.load_state_dict(state["networks"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        average, start = state["average"], state["step"]
        print(f"resumed at step {start}", flush=True)
    generator = torch.Generator().manual_seed(stream_seed(args.seed, rank, start))
    muon_precision = contextlib.nullcontext() if multiplies_bf16() else Float32()
    mean_loss, started = None, time.time()
    for step in range(start, args.steps):
        factor = min(1.0, (step + 1) / 500) * (0.5 + 0.5 * math.cos(math.pi * step / args.steps))
        loss = loss_of(step, generator)
        networks.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(trainable)
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * factor
            with muon_precision:
                optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, trainable, 1 - min(args.ema_decay, (step + 1) / (step + 10)))
        mean_loss = loss.item() if mean_loss is None else 0.99 * mean_loss + 0.01 * loss.item()
        if step % 200 == 0 and rank == 0:
            rate = (step + 1 - start) / (time.time() - started)
            print(f"transformer {step}/{args.steps} loss {mean_loss:.4f} {rate:.2f} steps/s", flush=True)
        if ((step + 1) % 1000 == 0 or step == args.steps - 1) and rank == 0:
            state = {"networks": networks.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
            torch.save({**state, "average": average, "step": step + 1}, state_file.with_suffix(".tmp"))
            state_file.with_suffix(".tmp").replace(state_file)
    with torch.no_grad():
        for parameter, value in zip(trainable, average):
            parameter.copy_(value)


def save(pipeline, folder) -> None:
    """Save a pipeline without the paths of the machine it was trained on."""
    for part in (pipeline, pipeline.vae, pipeline.transformer):
        part.register_to_config(_name_or_path="")
    pipeline.save_pretrained(folder)
