# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Which ways of training a teacher fit on given accelerators: every choice rehearsed, as a table."""

import itertools
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch

from hf_flowdistill.evaluation.report import format_cells
from hf_flowdistill.networks.arguments import LORA_LEARNING_RATE as RATE
from hf_flowdistill.networks.loading import read_index
from hf_flowdistill.networks.roles import ROLES, RoleSettings
from hf_flowdistill.planning.cases import SHARDING_PLANS, Case, Precision, ShardingPlan, Stage
from hf_flowdistill.planning.kept import Kept, teacher_key
from hf_flowdistill.planning.memory_tracker import Peak
from hf_flowdistill.planning.rehearsal import BUFFERS, LORA, joined
from hf_flowdistill.planning.sizes import dtype_name
from hf_flowdistill.planning.startup import Start
from hf_flowdistill.training.optimizers import ROUNDINGS


# What can be chosen.
AMP, BF16 = Precision(torch.float32, autocast=True), Precision(torch.bfloat16)
NEAREST = Precision(torch.bfloat16, rounding="nearest")
WHOLE_NETWORKS, QUANTIZED = {"AMP": AMP, "BF16": BF16, "BF16, nearest": NEAREST}, {"BF16": BF16}
BASES = {  # --networks -> base of the adapters -> precisions
    "full": {"none": WHOLE_NETWORKS},
    "lora_fake": {"none": WHOLE_NETWORKS},
    "lora": {"none": {"AMP": AMP, "BF16": BF16}, "8bit": QUANTIZED, "nf4": QUANTIZED},
}
CHECKPOINTING = {  # by how many networks
    "all": ROLES,
    "generator, fake score": ("generator", "fake_score"),
    "none": (),
}
SHARE = 0.9  # of the memory; what is no tensor, such as the context and the workspaces of CUDA, has the rest


@dataclass(frozen=True)
class Choice:
    """One way of training, and what one process takes, in bytes.

    Attributes:
        base_quantization: of the base of the adapters.
        gradient_checkpointing: of which networks, a key of `CHECKPOINTING`.
        peak: on the accelerator while training, by component.
        begin: what there is on the accelerator before.
        start: the most of that, in the memory that there is.
        main_memory: of what is offloaded.
        fits: whether peak and start are within 90 % of the memory.
        command: that runs it.
    """

    networks: str
    base_quantization: str
    precision: str
    sharding: str
    batch_size: int
    gradient_checkpointing: str
    peak: Peak
    begin: Start
    main_memory: float
    command: str
    start: float = 0.0
    fits: bool = False

    def in_memory(self, memory: float) -> "Choice":
        """The same on accelerators of `memory` bytes."""
        start = self.begin.bytes(memory)
        return replace(self, start=start, fits=max(self.peak.bytes, start) <= SHARE * memory)

    def as_dict(self) -> dict:
        return {name: value for name, value in asdict(self).items() if name != "begin"} | {
            "peak_bytes": self.peak.bytes
        }


def list_choices(
    path,
    *,
    gpus: int,
    memory: float,
    height: int,
    width: int,
    batch_sizes: Sequence[int] = (1,),
    networks: Sequence[str] = tuple(BASES),
    rank: int = RoleSettings.rank,
    checkpointing: Sequence[str] = tuple(CHECKPOINTING),
    guidance_mode: str | None = None,
    pipeline_kwargs: dict | None = None,
    share_rollout: bool = False,
    arguments: str = "",
    progress: Callable = lambda cases: cases,
    keep: bool = True,
    **origin,
) -> Iterator[Choice]:
    """Every choice for the teacher at `path`, one after the other as it is rehearsed.

    Args:
        gpus: how many processes, with an accelerator each.
        memory: of each accelerator, in bytes.
        batch_sizes: values of `--train_batch_size`.
        networks, rank: values of `--networks`; of the LoRAs on all linear layers of the blocks.
        checkpointing: keys of `CHECKPOINTING`.
        guidance_mode: of teacher and fake score; by default "embedded" where the transformer embeds a scale, or "cfg".
        pipeline_kwargs: of every call of the teacher's pipeline.
        arguments: more of the command.
        progress: wraps what is rehearsed one after the other, e.g. `tqdm`.
        keep: whether what was rehearsed before is taken, and what is rehearsed now is kept (`Kept`).
        origin: `revision` and `cache_dir`, as for `load_skeleton`.

    Raises:
        UserError: as `Stage.of`, `load_skeleton` and `measure_shapes`.
        NotImplementedError: as `measure_shapes`, or from a network that asks for the values of a tensor.
    """
    read_index(path, **origin)
    size = {"height": height, "width": width}
    teacher = teacher_key(path, **origin) if keep else None
    kept = Kept(teacher, size, rank, guidance_mode, pipeline_kwargs, share_rollout)
    stage = None
    try:
        for row in progress(list(_rows(gpus, networks, checkpointing, batch_sizes))):
            case = row.case(rank, share_rollout)
            if (key := repr((row, gpus))) not in kept.rows:
                guidance = {"guidance_mode": guidance_mode}
                stage = stage or Stage.of(path, **size, guidance=guidance, pipeline_kwargs=pipeline_kwargs, **origin)
                kept.rows[key] = case.memory(stage, gpus, row.shardings)
            for kind, (peak, begin, waiting) in zip(row.shardings, kept.rows[key]):
                command = _command(path, gpus, case, SHARDING_PLANS[kind], arguments)
                yield row.choice(kind, peak, begin, waiting, command).in_memory(memory)
    finally:
        if stage:
            kept.save()


class _Row(NamedTuple):
    """What is rehearsed once: a way of training, and the shardings that it can be combined with."""

    networks: str
    base: str
    precision_name: str
    precision: Precision
    checkpointing: str
    batch_size: int
    cached: bool
    shardings: list[str]

    def case(self, rank: int, share_rollout: bool) -> Case:
        roles = RoleSettings(self.networks, rank, base_quantization=self.base)
        checkpointed = CHECKPOINTING[self.checkpointing]
        return Case(roles, self.precision, checkpointed, self.batch_size, self.cached, share_rollout)

    def choice(self, sharding: str, peak: Peak, begin: Start, main_memory: float, command: str) -> Choice:
        networks, base, precision = self.networks, self.base, self.precision_name
        how = networks, base, precision, sharding, self.batch_size, self.checkpointing
        return Choice(*how, peak, begin, main_memory, command)


def _rows(gpus: int, networks, checkpointing, batch_sizes) -> Iterator[_Row]:
    for name in networks:
        for base, precisions in BASES[name].items():
            for (called, precision), checkpointed in itertools.product(precisions.items(), checkpointing):
                for batch_size, cached in itertools.product(batch_sizes, (True, False)):
                    # autocast keeps its copies of weights only where these are whole; without it there are none
                    shardings = [
                        kind
                        for kind in _shardings(gpus, name, base)
                        if (SHARDING_PLANS[kind].shards != cached if precision.autocast else cached)
                    ]
                    if shardings:
                        yield _Row(name, base, called, precision, checkpointed, batch_size, cached, shardings)


def _shardings(gpus: int, networks: str, base: str) -> list[str]:
    """What can be combined, "none" first. On one process a shard is all of it, so sharding is for offloading only."""
    if base != "none":
        return ["none"]
    offloaded = ["full, offloaded"] if networks != "lora" else []
    return ["none", *(["full"] if gpus > 1 else []), *offloaded]


def _command(path, gpus: int, case: Case, sharding: ShardingPlan, more: str) -> str:
    """That trains so, by the script's arguments, without what is their default."""
    launch = "accelerate launch -q" + (f" --multi_gpu --num_processes {gpus}" if gpus > 1 else "")
    script = "examples/score_distillation/train_sid_dit.py"
    roles, precision = case.roles, case.precision
    checkpointed = "" if case.checkpointed == ROLES else " ".join(("", *case.checkpointed))
    rates = {"lora": f"--learning_rate {RATE:g}", "lora_fake": f"--fake_score_learning_rate {RATE:g}"}
    flags = {  # in this order
        f"--pretrained_model_name_or_path {shlex.quote(str(path))} --prompt_file prompts.txt": True,
        f"--networks {roles.networks}": roles.networks != "full",
        f"--rank {roles.rank}": roles.networks != "full" and roles.rank != RoleSettings.rank,
        f"--base_quantization {roles.base_quantization}": roles.base_quantization != "none",
        "--mixed_precision bf16": precision.autocast,
        f"--weight_dtype {dtype_name(precision.dtype)}": precision.dtype != torch.float32,
        f"--bf16_rounding {precision.rounding}": precision.rounding != ROUNDINGS[0],
        "--sharding full": sharding.shards,
        "--cpu_offload": sharding.offloaded,
        f"--train_batch_size {case.batch_size}": True,
        f"--gradient_checkpointing{checkpointed}": bool(case.checkpointed),
        "--share_rollout": case.share_rollout,
        rates.get(roles.networks, ""): roles.networks in rates,
        more: bool(more),
    }
    return " ".join([launch, script, *(flag for flag, given in flags.items() if given)])


COMPONENTS = {  # a column -> the components in it, those of LoRAs and buffers too
    "networks": ("teacher", "generator", "fake score"),
    "average": ("average of the generator",),
    "Adam": ("Adam's moments", "update"),
    "gradients": ("gradients",),
    "activations": ("activations",),
    "gathered": ("gathered",),
}


HEADER = ["networks", "base", "precision", "sharding", "batch", "checkpointing", *COMPONENTS, "peak", "start", "fits"]


def format_choices(choices: Sequence[Choice]) -> str:
    """The choices as a Markdown table, in GB (10^9 bytes) of one process."""
    return format_cells([HEADER, *map(_cells, choices)])


def format_lines(choices: Iterable[Choice]) -> Iterator[str]:
    """The lines of such a table one after the other, as wide as they may become."""
    widths = [
        *(max(map(len, names)) for names in (BASES, [base for bases in BASES.values() for base in bases])),
        max(len(name) for bases in BASES.values() for names in bases.values() for name in names),
        *(max(map(len, SHARDING_PLANS)), 0, max(map(len, CHECKPOINTING)), *[6] * (len(COMPONENTS) + 2), 0),
    ]
    widest = ["x" * width for width in widths]
    for number, choice in enumerate(choices):
        if not number:
            yield from format_cells([HEADER, widest]).splitlines()[:2]
        yield format_cells([HEADER, widest, _cells(choice)]).splitlines()[-1]


def _cells(choice: Choice) -> list[str]:
    parts = joined(choice.peak.components, LORA, BUFFERS)
    sizes = [sum(parts[name] for name in names) for names in COMPONENTS.values()]
    return [
        *(choice.networks, choice.base_quantization, choice.precision, choice.sharding),
        *(str(choice.batch_size), choice.gradient_checkpointing),
        *(f"{size / 1e9:.1f}" for size in [*sizes, choice.peak.bytes, choice.start]),
        "yes" if choice.fits else "no",
    ]
