# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What a teacher is and what a training of it keeps, in lines."""

from collections import Counter

import torch

from hf_flowdistill.networks.blocks import sharding_units
from hf_flowdistill.networks.roles import FULL, RoleSettings
from hf_flowdistill.planning.sizes import adapter_sizes, count, dtype_name, training_memory
from hf_flowdistill.planning.skeleton import Shapes


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


def describe_roles(transformer, roles: RoleSettings) -> list[str]:
    """A line on the adapters, if there are any."""
    if roles.networks == "full":
        return []
    layers = len(roles.layers(transformer))
    size = sum(adapter_sizes(transformer, roles))
    return [f"networks: {roles.networks}, rank {roles.rank} on {layers:,} linear layers, {size:,} parameters each"]


def describe_memory(
    transformer,
    dtype: torch.dtype,
    roles: RoleSettings = FULL,
    shards: int = 1,
    cpu_offload: bool = False,
    **settings,
) -> list[str]:
    """Lines: the rows of `training_memory`, and their sum.

    With `cpu_offload`, what belongs to networks that are trained whole is listed apart, as in main memory, but for
    their values that are not trained.
    """
    rows = training_memory(transformer, dtype, roles, shards, **settings)
    stays = "teacher" if roles.networks == "full" else ("teacher", "adapter", "Adam's moments of the fake score")
    waiting = [row for row in rows if cpu_offload and not row[0].startswith(stays)]
    rows = [row for row in rows if row not in waiting]
    others = count(transformer)[1]
    if waiting and others:
        sizes = {"generator": dtype.itemsize, "fake score": dtype.itemsize, "average of the generator": 4}
        staying = [others * sizes.get(what, 0) for what, *_ in waiting]
        waiting = [(what, name, size - stays) for (what, name, size), stays in zip(waiting, staying)]
        rows.append(("buffers", "", sum(staying)))
    if shards > 1 or cpu_offload:
        units = [count(unit)[0] for unit in sharding_units(transformer)]
        gathered = count(transformer)[0] - sum(units) + 2 * max(units, default=0)  # the next while one is computed
        rows.append(("gathered for a moment, at most", dtype_name(dtype), gathered * dtype.itemsize))
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
