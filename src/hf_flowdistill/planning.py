# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What a run needs, before it starts: told from the teacher's configurations, without any weights."""

import functools
import math
from collections import Counter
from typing import Any

import torch

from hf_flowdistill.skeleton import Shapes, load_skeleton, measure_shapes


def count(module: torch.nn.Module) -> tuple[int, int]:
    """(parameters, values saved with them that are not trained, such as a table of positions)."""
    saved = module.state_dict().keys()
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return parameters, sum(buffer.numel() for name, buffer in module.named_buffers() if name in saved)


def sharding_units(transformer: torch.nn.Module) -> list[torch.nn.Module]:
    """The blocks of `transformer`: what is gathered, computed and released at a time where networks are sharded.

    They are the members of its lists of modules that diffusers says must not be split (`_no_split_modules`), or all
    members where it says nothing; lists inside a block do not count.
    """
    whole = set(getattr(transformer, "_no_split_modules", None) or ())
    units, inside = [], set()
    for module in transformer.modules():  # outer modules come before inner ones
        if isinstance(module, torch.nn.ModuleList) and module not in inside:
            members = [member for member in module if not whole or type(member).__name__ in whole]
            units += members
            inside.update(inner for member in members for inner in member.modules())
    return units


def training_memory(transformer, dtype: torch.dtype) -> list[tuple[str, str, int]]:
    """(what, precision, bytes) of all that a process keeps for as long as it trains, activations aside.

    The weights of the three networks, their gradients and Adam's moments are in `dtype`, the average in float32.
    Gradients are there for one network at a time.
    """
    parameters, others = count(transformer)
    size, precision = dtype.itemsize, _name(dtype)
    weights = [(name, precision, (parameters + others) * size) for name in ("teacher", "generator", "fake score")]
    moments = [
        (f"Adam's moments of the {name}", precision, 2 * parameters * size) for name in ("generator", "fake score")
    ]
    average = ("average of the generator", "float32", (parameters + others) * 4)
    return [*weights, average, *moments, ("gradients of one network", precision, parameters * size)]


def describe_plan(
    path,
    *,
    revision=None,
    cache_dir=None,
    height: int,
    width: int,
    aspect_ratio_buckets: list[tuple[int, int]] | None = None,
    pipeline_kwargs: dict[str, Any] | None = None,
    weight_dtype: torch.dtype = torch.float32,
    autocast: str = "no",
    shards: int = 1,
    cpu_offload: bool = False,
    prompts: int,
    max_train_images: int,
    batch_size: int,
    accumulation: int,
    processes: int,
    images_per_second: float | None = None,
) -> str:
    """What a training run of the teacher at `path` is, in lines: networks, sizes, memory, images, time.

    Args:
        aspect_ratio_buckets: (height, width) of all sizes; None where there is one.
        pipeline_kwargs: of every call of the teacher's pipeline.
        weight_dtype, autocast: of the weights, gradients and moments; of the computation ("no" or "bf16").
        shards: over how many processes each network is sharded; 1 is not at all.
        cpu_offload: whether all but the teacher waits in main memory.
        prompts: how many distinct ones.
        batch_size, accumulation, processes: whose product is the number of images per update.
        images_per_second: of all processes together; None leaves the time out.

    Raises:
        UserError: as `load_skeleton` and `measure_shapes`.
    """
    load = functools.partial(load_skeleton, path, revision=revision, cache_dir=cache_dir)
    skeleton = load()
    lines = [
        f"teacher: {path}",
        f"pipeline: {type(skeleton).__name__}",
        f"transformer: {type(skeleton.transformer).__name__}",
        *describe_networks(skeleton),
    ]
    try:
        sizes = [{"height": height, "width": width} for height, width in aspect_ratio_buckets or [(height, width)]]
        shapes = [measure_shapes(load(), **size, pipeline_kwargs=pipeline_kwargs) for size in sizes]
        described = [describe_shapes(shape, **size) for shape, size in zip(shapes, sizes)]
        lines += dict.fromkeys(line for same_kind in zip(*described) for line in same_kind)
        # what is fed alike at every size is kept once
        together = prompts * sum({str(one.conditioning): one.bytes_per_prompt for one in shapes}.values())
        least = " or more" if shapes[0].longer_with_prompt else ""
        lines.append(f"prompts: {prompts:,} distinct, {together / 1e9:,.2f} GB{least} of conditioning")
    except NotImplementedError as error:
        lines.append(f"image and text: their sizes are not known without the weights ({error})")
    lines.append(f"precision: {_name(weight_dtype)} weights, {autocast} autocast")
    lines += describe_memory(skeleton.transformer, weight_dtype, shards, cpu_offload)
    per_update = batch_size * accumulation * processes
    updates = math.ceil(max_train_images / per_update)
    images = updates * per_update
    lines.append(
        f"images per update: {per_update:,} = {processes} processes x {accumulation} micro-batches x {batch_size}"
    )
    lines.append(f"images: {images:,} in {updates:,} updates of each trained network")
    if images_per_second is not None:
        hours = images / images_per_second / 3600
        lines.append(f"time: {hours:,.1f} hours at {images_per_second:g} images per second")
    return "\n".join(lines)


def describe_networks(pipeline) -> list[str]:
    """Lines: how large the transformer is and which blocks it consists of; the other networks' sizes."""
    transformer = pipeline.transformer
    parameters, others = count(transformer)
    units = sharding_units(transformer)
    kinds = " + ".join(f"{number} {kind}" for kind, number in Counter(type(unit).__name__ for unit in units).items())
    share = sum(count(unit)[0] for unit in units) / parameters
    rest = {
        name: sum(count(module))
        for name, module in pipeline.components.items()
        if isinstance(module, torch.nn.Module) and module is not transformer
    }
    return [
        f"parameters: {parameters:,}" + (f", and {others:,} values that are not trained" if others else ""),
        f"sharding units: {kinds}, with {share:.1%} of the parameters" if units else "sharding units: none found",
        "other networks: " + (", ".join(f"{name} {size / 1e6:,.0f}M" for name, size in rest.items()) or "none"),
    ]


def describe_shapes(shapes: Shapes, *, height: int, width: int) -> list[str]:
    """Lines: the image and the text as the transformer sees them, and what is kept of the latter."""
    name, shape = shapes.latent
    tokens = "" if shapes.image_tokens is None else f", {shapes.image_tokens:,} tokens"
    return [
        f"image: {height}x{width}, {name} {list(shape)}{tokens}",
        f"text: {shapes.text_tokens:,} tokens" + (", more for longer prompts" if shapes.longer_with_prompt else ""),
        describe_conditioning(shapes.conditioning),
    ]


def describe_memory(transformer, dtype: torch.dtype, shards: int = 1, cpu_offload: bool = False) -> list[str]:
    """Lines: what each process keeps, by role and precision; of `shards` of each network it keeps one.

    With `cpu_offload`, what belongs to the trained networks is listed apart, as in main memory.
    """
    rows = [(what, precision, size / shards) for what, precision, size in training_memory(transformer, dtype)]
    waiting = [row for row in rows if cpu_offload and row[0] != "teacher"]
    rows = [row for row in rows if row not in waiting]
    if shards > 1 or cpu_offload:
        units = [count(unit)[0] for unit in sharding_units(transformer)]
        gathered = count(transformer)[0] - sum(units) + 2 * max(units, default=0)  # the next while one is computed
        rows.append(("gathered for a moment, at most", _name(dtype), gathered * dtype.itemsize))
    sharded = f" that holds 1/{shards} of each network" if shards > 1 else ""
    lines = [f"memory of each process{sharded}, before activations:", *_table(rows)]
    return lines + ["in main memory, of each process:", *_table(waiting)] if waiting else lines


def _table(rows: list[tuple[str, str, float]]) -> list[str]:
    rows = [*rows, ("together", "", sum(size for *_, size in rows))]
    return [f"  {what:<32} {precision:<8} {size / 1e9:>8,.2f} GB" for what, precision, size in rows]


def describe_conditioning(conditioning: dict[str, tuple[tuple[int, ...], int]]) -> str:
    """A line: what is kept for each prompt, from argument -> (shape, bytes)."""
    parts = ", ".join(f"{name} {list(shape)}" for name, (shape, _) in conditioning.items())
    return f"kept for each prompt: {parts}; {sum(size for _, size in conditioning.values()):,} bytes"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
