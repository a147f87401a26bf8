# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Which ways of training a teacher fit on given accelerators: every choice rehearsed, as a table."""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch

from hf_flowdistill.evaluation.report import format_cells
from hf_flowdistill.methods.sid import SiDConfig
from hf_flowdistill.networks import Networks
from hf_flowdistill.planning import count, sharding_units
from hf_flowdistill.rehearsal import Peak, embeds_guidance, rehearse, stand_in_contract
from hf_flowdistill.skeleton import load_skeleton, measure_shapes
from hf_flowdistill.training.ema import EMA
from hf_flowdistill.training.optimizers import build_optimizer


class Precision(NamedTuple):
    arguments: str
    dtype: torch.dtype
    autocast: bool


class Sharding(NamedTuple):
    arguments: str
    shards: bool
    offloaded: bool


# What can be chosen, and the arguments of the training script for it. Of the networks: what makes them of a
# transformer without values and its dtype, and their optimizers.
NETWORKS = {"full": ("", Networks.from_teacher, functools.partial(build_optimizer, rounding="nearest"))}
PRECISIONS = {
    "AMP": Precision("--mixed_precision bf16", torch.float32, True),
    "BF16": Precision("--weight_dtype bfloat16 --bf16_rounding nearest", torch.bfloat16, False),
}
CHECKPOINTING = {True: "--gradient_checkpointing", False: ""}
SHARDINGS = {
    "none": Sharding("", False, False),
    "full": Sharding("--sharding full", True, False),
    "full, offloaded": Sharding("--sharding full --cpu_offload", True, True),
}
STAYING = ("teacher", "activations")  # on the accelerator, where the rest is offloaded
WHOLE = ("activations",)  # in every process, where the rest is in shards
SHARE = 0.9  # of the memory; what is no tensor, such as the context and the workspaces of CUDA, has the rest


@dataclass(frozen=True)
class Choice:
    """One way of training, and what one process takes, in bytes.

    Attributes:
        peak: on the accelerator while training, by component.
        start: on the accelerator before, when the whole pipeline is there in float32 and prompts are encoded.
        main_memory: of what is offloaded.
        fits: whether peak and start are within 90 % of the memory.
        command: that runs it.
    """

    networks: str
    precision: str
    sharding: str
    batch_size: int
    gradient_checkpointing: bool
    peak: Peak
    start: float
    main_memory: float
    fits: bool
    command: str

    def in_memory(self, memory: float) -> "Choice":
        """The same on accelerators of `memory` bytes."""
        return replace(self, fits=max(self.peak.bytes, self.start) <= SHARE * memory)

    def as_dict(self) -> dict:
        return asdict(self) | {"peak_bytes": self.peak.bytes}


def list_choices(
    path,
    *,
    gpus: int,
    memory: float,
    height: int,
    width: int,
    batch_sizes: Sequence[int] = (1,),
    guidance_mode: str | None = None,
    pipeline_kwargs: dict | None = None,
    share_rollout: bool = False,
    arguments: str = "",
    progress: Callable = lambda choices: choices,
    **origin,
) -> list[Choice]:
    """Every choice for the teacher at `path`, each rehearsed (`rehearsal.rehearse`).

    Args:
        gpus: how many processes, with an accelerator each.
        memory: of each accelerator, in bytes.
        batch_sizes: values of `--train_batch_size`.
        guidance_mode: of teacher and fake score; by default "embedded" where the transformer embeds a scale, or "cfg".
        pipeline_kwargs: of every call of the teacher's pipeline.
        arguments: more of the command.
        progress: wraps what is rehearsed one after the other, e.g. `tqdm`.
        origin: `revision` and `cache_dir`, as for `load_skeleton`.

    Raises:
        UserError: as `load_skeleton` and `measure_shapes`.
        NotImplementedError: as `measure_shapes`, or from a network that asks for the values of a tensor.
    """
    size = {"height": height, "width": width}
    skeleton = load_skeleton(path, **origin)
    pipeline_size = sum(sum(count(part)) for part in skeleton.components.values() if isinstance(part, torch.nn.Module))
    transformer_size = sum(count(skeleton.transformer))
    shapes = measure_shapes(skeleton, **size, pipeline_kwargs=pipeline_kwargs)
    contract = stand_in_contract(shapes, **size)
    mode = guidance_mode or ("embedded" if embeds_guidance(contract) else "cfg")
    config = SiDConfig(guidance_mode=mode, fake_guidance_mode=mode)
    # on one process a shard is all of it, so sharding is for offloading only
    shardings = [name for name, kind in SHARDINGS.items() if gpus > 1 or not kind.shards or kind.offloaded]
    choices = []
    for networks, precision, checkpointing, batch_size, cached in progress(
        [
            case
            for case in itertools.product(NETWORKS, PRECISIONS, CHECKPOINTING, batch_sizes, (True, False))
            if case[-1] or PRECISIONS[case[1]].autocast
        ]
    ):
        (words, make, optimizer), (more, dtype, autocast) = NETWORKS[networks], PRECISIONS[precision]
        transformer = load_skeleton(path, **origin).transformer
        gathered = _gathered(transformer, dtype)
        made = make(transformer, dtype)
        average = EMA(made.generator)
        if checkpointing:
            made.enable_gradient_checkpointing()
        # the script's autocast keeps its copies of weights only where these are whole
        here = [name for name in shardings if not autocast or SHARDINGS[name].shards != cached]
        shares = [_shares(gpus, SHARDINGS[name], where) for name in here for where in ("accelerator", "main memory")]
        peaks = rehearse(
            made,
            average.model,
            contract,
            optimizer,
            batch_size=batch_size,
            config=config,
            autocast=autocast,
            autocast_cache=cached,
            foreach=True,
            share_rollout=share_rollout,
            views=shares,
        )
        for name, peak, waiting in zip(here, peaks[::2], peaks[1::2]):
            kind = SHARDINGS[name]
            if kind.shards:
                peak = Peak(peak.when, {**peak.components, "gathered": gathered})
            start = 4 * (pipeline_size - transformer_size * (1 - 1 / (gpus if kind.shards else 1)))
            flags = words, more, kind.arguments, f"--train_batch_size {batch_size}", CHECKPOINTING[checkpointing]
            flags += ("--share_rollout" if share_rollout else "", arguments)
            choice = {
                "networks": networks,
                "precision": precision,
                "sharding": name,
                "batch_size": batch_size,
                "gradient_checkpointing": checkpointing,
                "peak": peak,
                "start": start,
                "main_memory": waiting.bytes,
                "fits": False,
                "command": _command(path, gpus, " ".join(filter(None, flags))),
            }
            choices.append(Choice(**choice).in_memory(memory))
    return choices


def _shares(gpus: int, kind: Sharding, where: str) -> Callable[[str], float]:
    """The share of a component that one process has on its accelerator, or in main memory."""

    def share(component):
        stays = not kind.offloaded or component in STAYING
        if stays != (where == "accelerator"):
            return 0.0
        return 1 / gpus if kind.shards and component not in WHOLE else 1.0

    return share


def _gathered(transformer, dtype: torch.dtype) -> float:
    """Bytes that come and go besides, where networks are in shards, at most: what is in no unit, one unit and the next
    one, and the gradient of a unit, which is reduced in float32. Not rehearsed."""
    units = [count(unit)[0] for unit in sharding_units(transformer)]
    largest = max(units, default=0)
    return (count(transformer)[0] - sum(units) + 3 * largest) * dtype.itemsize + 4 * largest


def _command(path, gpus: int, flags: str) -> str:
    launch = "accelerate launch -q" + (f" --multi_gpu --num_processes {gpus}" if gpus > 1 else "")
    script = "examples/score_distillation/train_sid_dit.py"
    return f"{launch} {script} --pretrained_model_name_or_path {path} --prompt_file prompts.txt {flags}"


COMPONENTS = {  # a column -> the components in it
    "networks": ("teacher", "generator", "fake score"),
    "average": ("average of the generator",),
    "Adam": ("Adam's moments", "update"),
    "gradients": ("gradients",),
    "activations": ("activations",),
    "gathered": ("gathered",),
}


def format_choices(choices: Sequence[Choice]) -> str:
    """The choices as a Markdown table, in GB (10^9 bytes) of one process."""

    def gigabytes(size):
        return f"{size / 1e9:.1f}"

    header = ["networks", "precision", "sharding", "batch", "checkpointing", *COMPONENTS, "peak", "start", "fits"]
    lines = [header]
    for choice in choices:
        parts = choice.peak.components
        lines.append(
            [
                *(choice.networks, choice.precision, choice.sharding, str(choice.batch_size)),
                "on" if choice.gradient_checkpointing else "off",
                *(gigabytes(sum(parts.get(name, 0) for name in names)) for names in COMPONENTS.values()),
                *(gigabytes(choice.peak.bytes), gigabytes(choice.start), "yes" if choice.fits else "no"),
            ]
        )
    return format_cells(lines)
