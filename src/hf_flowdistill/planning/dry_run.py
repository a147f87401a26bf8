# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What a training would be, before it starts: told from its arguments and the teacher's configurations, in lines."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hf_flowdistill.errors import UserError, first_line
from hf_flowdistill.networks.roles import role_settings
from hf_flowdistill.planning.cases import Case, Stage, case_of, stage_settings
from hf_flowdistill.planning.describe import describe_memory, describe_networks, describe_roles, describe_shapes
from hf_flowdistill.planning.rehearsal import BUFFERS, joined
from hf_flowdistill.planning.sizes import dtype_name
from hf_flowdistill.planning.skeleton import load_skeleton, measure_shapes
from hf_flowdistill.training.arguments import image_sizes_of, origin_of
from hf_flowdistill.training.recipes import paper_time
from hf_flowdistill.training.sharding import count_shards


def print_plan(args, prompts: Sequence[str], accelerator, chosen: Sequence[str], recipes: Path) -> None:
    """Print what would run, in lines: networks, sizes, memory, images, time; and so that it can, as far as they tell.

    Args:
        args: the parsed arguments of a training script; `dry_run` is the number of processes that is planned for, and
            0 the launched one.
        prompts: of the training, with repetitions.
        accelerator: as launched.
        chosen: lines from `planning.fit.fit`.
        recipes: folder of the recipes.

    Raises:
        UserError: as `load_skeleton`, `measure_shapes`, `linear_layers` and `Stage.of`.
    """
    processes, roles = args.dry_run or accelerator.num_processes, role_settings(args)
    path, sizes, origin = args.pretrained_model_name_or_path, image_sizes_of(args), origin_of(args)
    shards = count_shards(args.sharding, processes)
    case = case_of(args, autocast=accelerator.mixed_precision == "bf16")
    kind = "none" if args.sharding == "none" else "full, offloaded" if args.cpu_offload else "full"
    peak = describe_peak(path, case, shards, kind, **stage_settings(args))
    if getattr(args, "adversarial", False):
        peak.append("not in it: the pass of the real images, half of the fake score's activations again")
    skeleton = load_skeleton(path, **origin)
    settings = {"bf16_rounding": case.precision.rounding, "use_8bit_adam": case.use_8bit_adam}
    lines = [
        f"teacher: {path}",
        f"recipe: {args.recipe}",
        *chosen,
        f"pipeline: {type(skeleton).__name__}",
        f"transformer: {type(skeleton.transformer).__name__}",
        *describe_networks(skeleton),
        *describe_sizes(path, sizes, *number_of(args, prompts), pipeline_kwargs=args.pipeline_kwargs, **origin),
        *describe_roles(skeleton.transformer, roles),
        describe_precision(case),
        *describe_memory(skeleton.transformer, case.precision.dtype, roles, shards, args.cpu_offload, **settings),
        *peak,
        *describe_work(args, processes, paper_time(args.recipe, recipes)),
    ]
    print("\n".join(lines))


def describe_peak(path, case: Case, processes: int, sharding: str, **stage) -> list[str]:
    """Lines: what a process takes on its accelerator at the peak of an update, by component, and before training.

    Args:
        processes: over which networks are in shards, where they are.
        sharding: a key of `SHARDING_PLANS`.
        stage: as for `Stage.of`.
    """
    try:
        ((peak, start, _),) = case.memory(Stage.of(path, **stage), processes, [sharding])
    except (UserError, MemoryError):
        raise
    except Exception as error:  # what a network without values raises is of any kind
        return [f"the peak is not known without the weights ({first_line(error)})"]
    parts = joined(peak.components, BUFFERS).most_common()
    return [
        f"rehearsed, each process takes at its peak, the {peak.when}:",
        *(f"  {name:<41} {size / 1e9:>8,.2f} GB" for name, size in [*parts, ("together", peak.bytes)]),
        f"before training, with room for the text encoders: {start.bytes(float('inf')) / 1e9:,.2f} GB; without: "
        f"{start.bytes(0) / 1e9:,.2f} GB",
    ]


def describe_sizes(
    path,
    sizes: list[tuple[int, int]],
    prompts: int,
    what: str = "distinct",
    *,
    pipeline_kwargs: dict[str, Any] | None = None,
    **origin,
) -> list[str]:
    """Lines: image and text as the transformer sees them at all `sizes` (height, width), and what is kept of the text.

    Args:
        prompts: how many distinct ones are encoded.
        what: says so behind their number.
        pipeline_kwargs: of every call of the teacher's pipeline.
        origin: as for `load_skeleton`.
    """
    sizes = [{"height": height, "width": width} for height, width in sizes]
    try:
        shapes = [
            measure_shapes(load_skeleton(path, **origin), **size, pipeline_kwargs=pipeline_kwargs) for size in sizes
        ]
    except NotImplementedError as error:
        return [f"image and text: their sizes are not known without the weights ({error})"]
    described = [describe_shapes(shape, **size) for shape, size in zip(shapes, sizes)]
    # what is fed alike at every size is kept once
    together = prompts * sum({str(one.conditioning): one.bytes_per_prompt for one in shapes}.values())
    least = " or more" if shapes[0].longer_with_prompt else ""
    return [
        *dict.fromkeys(line for same_kind in zip(*described) for line in same_kind),
        f"prompts: {prompts:,} {what}, {together / 1e9:,.2f} GB{least} of conditioning",
    ]


def number_of(args, prompts: Sequence[str]) -> tuple[int, str]:
    """How many prompts are encoded at a time, and which these are."""
    if args.prompts_per_part:
        return args.prompts_per_part, f"at a time, of {args.dataset_name}"
    return len(set(prompts)), "distinct"


def describe_precision(case: Case) -> str:
    """A line: in what weights are, how what is trained of them is rounded, and what networks compute in."""
    dtype, autocast, rounding = case.precision
    rounds = dtype == torch.bfloat16 and rounding == "stochastic" and case.roles.networks != "lora"
    rounded = ", rounded stochastically" if rounds else ""
    return f"precision: {dtype_name(dtype)} weights{rounded}, {'bf16' if autocast else 'no'} autocast"


def describe_work(args, processes: int, paper: tuple[float, str] | None) -> list[str]:
    """Lines: images of an update and of the training, and the hours that they take at --images_per_second, or took
    where the `paper` ran the recipe: seconds for 1,000 images, and on what."""
    micro_batches, batch_size = args.gradient_accumulation_steps, args.train_batch_size
    per_update = batch_size * micro_batches * processes
    updates = math.ceil(args.max_train_images / per_update)
    images = updates * per_update
    lines = [
        f"images per update: {per_update:,} = {processes} processes x {micro_batches} micro-batches x {batch_size}",
        f"images: {images:,} in {updates:,} updates of each trained network",
    ]
    if args.images_per_second is not None:
        hours = images / args.images_per_second / 3600
        lines.append(f"time: {hours:,.1f} hours at {args.images_per_second:g} images per second")
    elif paper is not None:
        seconds, machine = paper
        lines.append(f"time: {images * seconds / 3.6e6:,.1f} hours for the paper, which had {machine}")
    return lines
