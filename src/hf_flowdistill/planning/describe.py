# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What a run needs, before it starts: told from the teacher's configurations, without any weights."""

import functools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from hf_flowdistill.networks.blocks import linear_layers, sharding_units
from hf_flowdistill.networks.roles import FULL, RoleSettings
from hf_flowdistill.planning.skeleton import Shapes, load_skeleton, measure_shapes


def count(module: torch.nn.Module) -> tuple[int, int]:
    """(parameters, values saved with them that are not trained, such as a table of positions)."""
    saved = module.state_dict().keys()
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return parameters, sum(buffer.numel() for name, buffer in module.named_buffers() if name in saved)


class _Trained(NamedTuple):
    """What is trained of a network, all of it or an adapter: sizes of parameters, and values that are not trained."""

    name: str
    sizes: list[int]
    others: int
    dtype: torch.dtype
    shards: int = 1


def training_memory(
    transformer,
    dtype: torch.dtype,
    roles: RoleSettings = FULL,
    shards: int = 1,
    *,
    bf16_rounding: str = "stochastic",
    use_8bit_adam: bool = False,
) -> list[tuple[str, str, float]]:
    """(what, precision, bytes) of all that a process keeps for as long as it trains, activations aside.

    The weights of the networks are in `dtype`, but for a quantized teacher; adapters and the average are float32.
    Gradients are in the dtype of what is trained, and there for one network at a time.

    Args:
        roles, bf16_rounding, use_8bit_adam: as for `Networks.from_teacher` and `build_optimizer`.
        shards: over how many processes each network is sharded; adapters are whole on each, and so are values that are
            not trained.

    Raises:
        UserError: as `linear_layers`.
    """
    parameters, others = count(transformer)
    whole = _Trained("{}", [parameter.numel() for parameter in transformer.parameters()], others, dtype, shards)
    adapter = _Trained("adapter of the {}", _adapter_sizes(transformer, roles), 0, torch.float32)
    kinds = {"full": (whole, whole), "lora_fake": (whole, adapter), "lora": (adapter, adapter)}[roles.networks]
    trained = dict(zip(("generator", "fake score"), kinds))
    teacher = (_name(dtype), (parameters / shards + others) * dtype.itemsize)
    if roles.base_quantization != "none":
        teacher = (roles.base_quantization, _quantized_size(transformer, dtype, roles.base_quantization))
    values = [sum(kind.sizes) / kind.shards + kind.others for kind in kinds]
    weights = [
        (kind.name.format(name), _name(kind.dtype), size * kind.dtype.itemsize)
        for (name, kind), size in zip(trained.items(), values)
    ]
    moments = [
        (f"Adam's moments of the {name}", *_moments(kind, bf16_rounding, use_8bit_adam))
        for name, kind in trained.items()
    ]
    gradients = max((sum(kind.sizes) * kind.dtype.itemsize / kind.shards, _name(kind.dtype)) for kind in kinds)
    return [
        ("teacher", *teacher),
        *weights,
        ("average of the generator", "float32", values[0] * 4),
        *moments,
        ("gradients of one network", *reversed(gradients)),
    ]


def _adapter_sizes(transformer, roles: RoleSettings) -> list[int]:
    layers = [transformer.get_submodule(name) for name in roles.layers(transformer)]
    return [roles.rank * size for layer in layers for size in (layer.in_features, layer.out_features)]


def _quantized_size(transformer, dtype: torch.dtype, kind: str) -> int:
    """Bytes of a transformer whose blocks' linear layers are quantized: values and their scales; and of the rest."""
    layers = [transformer.get_submodule(name) for name in linear_layers(transformer)]
    sizes = [(layer.weight.numel(), layer.out_features) for layer in layers]
    if kind == "nf4":  # one float32 for every 64 values
        quantized = sum(math.ceil(size / 2) + 4 * math.ceil(size / 64) for size, _ in sizes)
    else:  # one float32 for every row
        quantized = sum(size + 4 * rows for size, rows in sizes)
    return quantized + (sum(count(transformer)) - sum(size for size, _ in sizes)) * dtype.itemsize


def _moments(kind: _Trained, bf16_rounding: str, use_8bit_adam: bool) -> tuple[str, float]:
    """(precision, bytes) of Adam's two moments; bitsandbytes keeps those of fewer than 4,096 values in float32."""
    if use_8bit_adam:
        return "8bit", sum(2 * size + 8 * math.ceil(size / 256) if size >= 4096 else 8 * size for size in kind.sizes)
    dtype = kind.dtype if bf16_rounding == "nearest" else torch.float32
    return _name(dtype), 2 * sum(kind.sizes) * dtype.itemsize / kind.shards


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
    roles: RoleSettings = FULL,
    bf16_rounding: str = "stochastic",
    use_8bit_adam: bool = False,
    prompts: int,
    max_train_images: int,
    batch_size: int,
    accumulation: int,
    processes: int,
    images_per_second: float | None = None,
    peak: Sequence[str] = (),
) -> str:
    """What a training run of the teacher at `path` is, in lines: networks, sizes, memory, images, time.

    Args:
        aspect_ratio_buckets: (height, width) of all sizes; None where there is one.
        pipeline_kwargs: of every call of the teacher's pipeline.
        weight_dtype, autocast: of the weights and gradients; of the computation ("no" or "bf16").
        shards: over how many processes each network is sharded; 1 is not at all.
        cpu_offload: whether all but the teacher waits in main memory.
        roles, bf16_rounding, use_8bit_adam: as for `training_memory`.
        prompts: how many distinct ones.
        batch_size, accumulation, processes: whose product is the number of images per update.
        images_per_second: of all processes together; None leaves the time out.
        peak: lines on what is rehearsed (`cases.describe_peak`).

    Raises:
        UserError: as `load_skeleton`, `measure_shapes` and `linear_layers`.
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
    lines += describe_roles(skeleton.transformer, roles)
    rounding = ", rounded stochastically" if weight_dtype == torch.bfloat16 and bf16_rounding == "stochastic" else ""
    lines.append(f"precision: {_name(weight_dtype)} weights{rounding}, {autocast} autocast")
    settings = {"bf16_rounding": bf16_rounding, "use_8bit_adam": use_8bit_adam}
    lines += describe_memory(skeleton.transformer, weight_dtype, roles, shards, cpu_offload, **settings)
    lines += peak
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


def describe_roles(transformer, roles: RoleSettings) -> list[str]:
    """A line on the adapters, if there are any."""
    if roles.networks == "full":
        return []
    layers = len(roles.layers(transformer))
    size = sum(_adapter_sizes(transformer, roles))
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
