# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""One way of training a teacher, and the memory that it takes on one process: while it trains and before."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from hf_flowdistill.errors import UserError
from hf_flowdistill.methods.sid import SCALES, SiDConfig, check_unguided
from hf_flowdistill.networks.blocks import sharding_units
from hf_flowdistill.networks.quantized_sizes import Adam8bitSizes
from hf_flowdistill.networks.roles import Networks, RoleSettings, role_settings
from hf_flowdistill.planning.few_blocks import rehearse_blocks, shortened
from hf_flowdistill.planning.memory_tracker import Peak
from hf_flowdistill.planning.rehearsal import BUFFERS, LORA, embeds_guidance, rehearse, stand_in_contract
from hf_flowdistill.planning.shared import Rehearsals
from hf_flowdistill.planning.sizes import count
from hf_flowdistill.planning.skeleton import load_skeleton, measure_shapes
from hf_flowdistill.planning.startup import Start, measure_start
from hf_flowdistill.planning.traces import NotAlike
from hf_flowdistill.teachers.contract import Contract
from hf_flowdistill.teachers.watch import can_be_guided
from hf_flowdistill.training.arguments import image_sizes_of, origin_of
from hf_flowdistill.training.ema import EMA
from hf_flowdistill.training.optimizers import ROUNDINGS, build_optimizer


class Precision(NamedTuple):
    """Of weights and gradients; whether networks run under autocast to bfloat16; `rounding` of `build_optimizer`."""

    dtype: torch.dtype
    autocast: bool = False
    rounding: str = ROUNDINGS[0]


class ShardingPlan(NamedTuple):
    """Whether networks are in shards, and whether all but the teacher waits in main memory."""

    shards: bool
    offloaded: bool


SHARDING_PLANS = {
    "none": ShardingPlan(False, False),
    "full": ShardingPlan(True, False),
    "full, offloaded": ShardingPlan(True, True),
}
STAYING = ("teacher", "activations")  # on the accelerator, where the rest is offloaded; so do adapters and buffers
WHOLE = ("activations",)  # in every process, where the rest is in shards; so are adapters and buffers


class Sizes(NamedTuple):
    """How many parameters and other values a transformer has, and parameters each of its `sharding_units`."""

    parameters: int
    others: int
    units: list[int]


@dataclass(frozen=True, eq=False)
class Stage:
    """A teacher without values, and what every rehearsal of it needs."""

    transformer: torch.nn.Module
    contract: Contract
    config: SiDConfig
    start: Start

    @functools.cached_property
    def rehearsals(self) -> Rehearsals:
        """What its cases share."""
        return Rehearsals(self.transformer, self.contract, self.config)

    @functools.cached_property
    def sizes(self) -> Sizes:
        return Sizes(*count(self.transformer), [count(unit)[0] for unit in sharding_units(self.transformer)])

    @classmethod
    def of(cls, path, *, height: int, width: int, guidance=None, pipeline_kwargs=None, **origin) -> "Stage":
        """Of the teacher at `path`; arguments and errors as for `choices.list_choices`.

        Args:
            guidance: scales and modes, fields of `SiDConfig`; a mode that is None is that of the teacher, and the
                teacher's is then "embedded" where the transformer embeds a scale, or else "cfg".
        """
        size, skeleton = {"height": height, "width": width}, load_skeleton(path, **origin)
        transformer, guided = skeleton.transformer, can_be_guided(skeleton)
        skeleton.register_modules(transformer=shortened(transformer))  # few blocks are given what all are
        shapes = measure_shapes(skeleton, **size, pipeline_kwargs=pipeline_kwargs)
        contract = stand_in_contract(shapes, **size)
        embeds = embeds_guidance(contract)
        given = {name: value for name, value in (guidance or {}).items() if value is not None}
        if not guided:
            check_unguided(type(skeleton).__name__, given)
            given |= dict.fromkeys(SCALES, 1.0)
        given.setdefault("guidance_mode", "embedded" if embeds else "cfg")
        given.setdefault("fake_guidance_mode", given["guidance_mode"])
        for mode in (given["guidance_mode"], given["fake_guidance_mode"]):
            if mode != "cfg" and not embeds:
                raise UserError(
                    f"{type(transformer).__name__} embeds no guidance scale: its guidance mode must be cfg."
                )
        return cls(transformer, contract, SiDConfig(**given), measure_start(shapes, transformer))


@dataclass(frozen=True)
class Case:
    """What is rehearsed.

    Attributes:
        checkpointed: names of the networks whose activations are computed a second time.
        cached: whether autocast keeps its copies of weights until the backward pass.
        use_8bit_adam: as for `build_optimizer`.
    """

    roles: RoleSettings
    precision: Precision
    checkpointed: tuple[str, ...]
    batch_size: int
    cached: bool = True
    share_rollout: bool = False
    use_8bit_adam: bool = False

    def memory(self, stage: Stage, gpus: int, shardings: Sequence[str]) -> list[tuple[Peak, Start, float]]:
        """For each of `shardings` (keys of `SHARDING_PLANS`) on `gpus` processes: the peak on the accelerator, what
        there is before, and the bytes that wait in main memory."""
        plans = [SHARDING_PLANS[name] for name in shardings]
        views = [_shares(gpus, plan, where) for plan in plans for where in ("accelerator", "main memory")]
        try:
            peaks = stage.rehearsals.peaks(self, views)
        except NotAlike:
            peaks = rehearse_blocks(stage.transformer, functools.partial(self._rehearse, stage, views))
        rows = []
        for plan, peak, waiting in zip(plans, peaks[::2], peaks[1::2]):
            start = stage.start
            if plan.shards:
                peak = Peak(peak.when, {**peak.components, "gathered": self._gathered(stage.sizes)})
                start = start.beside(4 * (stage.sizes.parameters / gpus + stage.sizes.others))
            rows.append((peak, start, waiting.bytes))
        return rows

    def _rehearse(self, stage, views, transformer):
        with torch.device("meta"):
            networks = Networks.from_teacher(transformer, self.precision.dtype, self.roles)
            average = EMA(networks.generator).model
        networks.enable_gradient_checkpointing(self.checkpointed)
        return rehearse(
            networks,
            average,
            stage.contract,
            self.build_optimizer,
            batch_size=self.batch_size,
            config=stage.config,
            autocast=self.autocast,
            share_rollout=self.share_rollout,
            views=views,
        )

    def autocast(self):
        """A context in which networks run forward."""
        enabled = self.precision.autocast
        return torch.autocast("cpu", torch.bfloat16, enabled=enabled, cache_enabled=self.cached)

    def build_optimizer(self, network):
        if self.use_8bit_adam:
            return Adam8bitSizes(network.parameters())
        return build_optimizer(network, rounding=self.precision.rounding)

    def _gathered(self, sizes: Sizes) -> float:
        """Bytes that come and go besides, where networks are in shards, at most: what is in no unit, one unit and the
        next one, and the gradient of a unit, which is reduced in float32. Not rehearsed."""
        largest, size = max(sizes.units, default=0), self.precision.dtype.itemsize
        weights = (sizes.parameters - sum(sizes.units) + 2 * largest) * size
        return weights if self.roles.networks == "lora" else weights + largest * (size + 4)


def stage_of(args) -> Stage:
    """The teacher that a script's arguments name, at its largest size."""
    return Stage.of(args.pretrained_model_name_or_path, **stage_settings(args))


def stage_settings(args) -> dict:
    """What `Stage.of` takes by name, of a script's arguments."""
    height, width = max(image_sizes_of(args), key=math.prod)
    guidance = {name: value for name, value in vars(args).items() if "guidance_" in name}
    size = {"height": height, "width": width}
    return {**size, "guidance": guidance, "pipeline_kwargs": args.pipeline_kwargs, **origin_of(args)}


def case_of(args, *, autocast: bool) -> Case:
    """What a script's arguments, with their layout, are a case of."""
    return Case(
        role_settings(args),
        Precision(getattr(torch, args.weight_dtype), autocast, args.bf16_rounding or ROUNDINGS[0]),
        tuple(args.gradient_checkpointing or ()),
        args.train_batch_size,
        cached=args.sharding == "none",
        share_rollout=getattr(args, "share_rollout", False),  # not every method has it
        use_8bit_adam=args.use_8bit_adam,
    )


def _shares(gpus: int, plan: ShardingPlan, where: str) -> Callable[[str], float]:
    """The share of a component that one process has on its accelerator, or in main memory."""

    def share(component):
        whole = component.endswith((LORA, BUFFERS))
        stays = not plan.offloaded or component in STAYING or whole
        if stays != (where == "accelerator"):
            return 0.0
        return 1 / gpus if plan.shards and component not in WHOLE and not whole else 1.0

    return share
