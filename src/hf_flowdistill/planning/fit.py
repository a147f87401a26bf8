# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What a training is adapted to its machine by, without changing its mathematics: shards, offloading, checkpointing of
activations and the size of micro-batches; and which precision of its recipe it has.

Ways are tried in the order of the time that they cost: without offloading before with it, the recipe's first precision
before its second, and then as few checkpointed networks, and as little in shards, as possible. The first that fits
with one image at a time is taken, with the largest micro-batch that fits then.
"""

import functools
import shlex
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from hf_flowdistill.errors import UserError
from hf_flowdistill.networks.arguments import LORA_LEARNING_RATE
from hf_flowdistill.networks.roles import ROLES, RoleSettings
from hf_flowdistill.planning.cases import SHARDING_PLANS, Stage, case_of, stage_of
from hf_flowdistill.planning.choices import CHECKPOINTING, SHARE
from hf_flowdistill.training.distributed import on_main, together
from hf_flowdistill.training.fit_arguments import parts_of, settle, share_of
from hf_flowdistill.training.names import ROUNDINGS
from hf_flowdistill.training.recipes import launched_precision
from hf_flowdistill.training.sharding import count_shards


LARGEST_MICRO_BATCH = 16  # the paper's
ADAPTERS = (  # what whole networks that do not fit are exchanged for, in this order
    {"networks": "lora_fake", "base_quantization": "none", "bf16_rounding": ROUNDINGS[0]},
    {"networks": "lora", "base_quantization": "none", "bf16_rounding": None},
    {"networks": "lora", "base_quantization": "nf4", "bf16_rounding": None},
)
DROPPED = ("--hub_token", "--recipe", "--fit", "--device_memory", "--dry_run")  # of a command line that is shown again


class Way(NamedTuple):
    """One way of training: all its arguments, and the most that a process takes, in bytes."""

    args: Namespace
    peak: float


def fit(candidates: Sequence[Namespace], words: Sequence[str], *, processes: int, device) -> tuple[Namespace, list]:
    """The arguments of the training, with everything chosen that was not given, and lines that say what and why.

    Every process calls this; the main one rehearses. Without an accelerator and without --device_memory nothing is
    sharded, offloaded or checkpointed.

    Args:
        candidates: from `training.recipes.parse_with_recipe`.
        words: of the command line, for the command that repeats the choice.
        processes: that there will be.
        device: of this process.

    Raises:
        UserError: on all processes: nothing fits, and what would.
    """
    args, lines = candidates[0], []
    memory = None if args.fit == "none" else free_memory(args, device)
    if memory is not None:
        try:
            found, lines, refusal = on_main(lambda: _choose(candidates, words, processes, memory))
        except OSError as error:  # what a network without values raises is of any kind
            found, lines, refusal = args, [f"fit: nothing is chosen, since the peak is not known ({error})"], None
        if refusal is not None:
            raise UserError(refusal)
        args = found
    wanted = args.images_per_update
    settle(args, processes)
    if wanted not in (None, args.images_per_update):
        lines.append(
            f"{args.images_per_update} images per update instead of {wanted}: {processes} processes x "
            f"{args.gradient_accumulation_steps} micro-batches x {args.train_batch_size} images are the nearest"
        )
    return args, lines


def free_memory(args, device) -> float | None:
    """Bytes on the accelerator that has least, of all processes; None where there is no accelerator."""
    if args.device_memory is not None:
        return args.device_memory * 1e9
    if torch.device(device).type == "cpu":
        return None
    return min(together(lambda: torch.accelerator.get_memory_info(device)[0]))


def _choose(candidates, words, processes: int, memory: float) -> tuple[Namespace | None, list[str], str | None]:
    """The arguments that fit, and the lines that tell them; or what to say where none do."""
    try:
        stage = stage_of(candidates[0])
        way = _first_that_fits(stage, candidates, processes, memory)
        adapted = []
        if way is None and candidates[0].networks == "full":
            ways = [_first_that_fits(stage, [_adapted(candidates[0], more)], processes, memory) for more in ADAPTERS]
            adapted = [one for one in ways if one is not None]
    except UserError as error:
        return None, [], str(error)
    if way is None and candidates[0].fit == "lora":
        way = next(iter(adapted), None)
    if way is None:
        return None, [], _refusal(adapted, words, processes, memory)
    return (
        way.args,
        [f"fit: {_describe(way, processes, memory)}", f"fit: {_command(way.args, words, processes)}"],
        None,
    )


def _first_that_fits(stage: Stage, candidates, processes: int, memory: float) -> Way | None:
    """The first of all ways that fits with the smallest micro-batch, with the largest that fits then."""
    for args, kind, checkpointed in _ways(candidates, processes):
        measure = functools.partial(_measure, stage, args, processes, memory, kind, checkpointed)
        largest, *smaller = _micro_batches(args, processes)
        if smaller and measure(smaller[-1]) > SHARE * memory:
            continue
        peaks = ((size, measure(size)) for size in (largest, *smaller))
        found = next(((size, peak) for size, peak in peaks if peak <= SHARE * memory), None)
        if found is not None:
            size, peak = found
            return Way(laid_out(args, kind, checkpointed, size), peak)
    return None


def _ways(candidates, processes: int) -> Iterator[tuple[Namespace, str, tuple[str, ...]]]:
    """Arguments, a key of `SHARDING_PLANS` and the checkpointed networks, in the order of the time that they cost."""
    for offloaded in (False, True):
        for args in candidates:
            given = args.gradient_checkpointing
            checkpointed = reversed(CHECKPOINTING.values()) if given is None else [tuple(given or ())]
            for names in checkpointed:
                yield from (
                    (args, kind, names)
                    for kind in _shardings(args, processes)
                    if SHARDING_PLANS[kind].offloaded is offloaded
                )


def _shardings(args, processes: int) -> list[str]:
    """Keys of `SHARDING_PLANS` that are left open; on one process a shard is all, so it is for offloading."""
    whole = args.use_8bit_adam or args.base_quantization != "none"  # bitsandbytes takes no shards
    return [
        kind
        for kind, (shards, offloaded) in SHARDING_PLANS.items()
        if args.sharding is None or (args.sharding != "none") is shards
        if args.cpu_offload in (None, offloaded)
        if not (offloaded and args.networks == "lora")
        if not shards or not whole
        if not shards or offloaded or processes > 1 or args.sharding
    ]


def _micro_batches(args, processes: int) -> list[int]:
    """Values of --train_batch_size that make the images per update, largest first."""
    if args.train_batch_size is not None:
        return [args.train_batch_size]
    share = share_of(args, processes)
    if args.gradient_accumulation_steps is not None:
        return [parts_of(share, args.gradient_accumulation_steps)]
    return [size for size in range(min(share, LARGEST_MICRO_BATCH), 0, -1) if share % size == 0]


def _measure(stage: Stage, args, processes: int, memory: float, kind: str, checkpointed, batch_size: int) -> float:
    """Bytes of a process on its accelerator, at the most."""
    args = laid_out(args, kind, checkpointed, batch_size)
    case = case_of(args, autocast=launched_precision(args) == "bf16")
    ((peak, start, _),) = case.memory(stage, count_shards(args.sharding, processes), [kind])
    # the pass of the real images, half of the fake score's activations again, is not rehearsed
    more = peak.components.get("activations", 0) / 2 if getattr(args, "adversarial", False) else 0
    return max(peak.bytes + more, start.bytes(memory))


def laid_out(args, kind: str, checkpointed, batch_size: int) -> Namespace:
    """The arguments with a layout: a key of `SHARDING_PLANS`, checkpointed networks, images of a micro-batch."""
    shards, offloaded = SHARDING_PLANS[kind]
    sharding = args.sharding or ("full" if shards else "none")
    chosen = {"sharding": sharding, "cpu_offload": offloaded, "train_batch_size": batch_size}
    return Namespace(**vars(args) | chosen | {"gradient_checkpointing": list(checkpointed)})


def _adapted(args, more: dict) -> Namespace:
    """The same training with LoRAs, on weights in bfloat16."""
    rates = {"fake_score_learning_rate": LORA_LEARNING_RATE}
    rates |= {"learning_rate": LORA_LEARNING_RATE} if more["networks"] == "lora" else {}
    adapters = {"rank": RoleSettings.rank, "weight_dtype": "bfloat16", "mixed_precision": None}
    return Namespace(**vars(args) | adapters | rates | more)


def _describe(way: Way, processes: int, memory: float) -> str:
    args, twice = way.args, way.args.gradient_checkpointing
    twice = "all networks" if set(twice) == set(ROLES) else " and ".join(twice) or "no network"
    parts = [
        *([] if args.networks == "full" else [f"--networks {args.networks} on a base of {args.base_quantization}"]),
        f"{args.weight_dtype} weights",
        "whole on every process" if args.sharding == "none" else f"in shards ({args.sharding})",
        *(["offloaded"] * args.cpu_offload),
        f"activations of {twice} computed twice",
        f"micro-batches of {args.train_batch_size}",
    ]
    return f"{', '.join(parts)}: {_gigabytes(way.peak)} of {_gigabytes(memory)} GB on each of {processes} at the peak"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f}"


ADAPTED = "networks base_quantization rank weight_dtype bf16_rounding learning_rate fake_score_learning_rate".split()


def _command(args, words: Sequence[str], processes: int) -> str:
    """That trains so without choosing."""
    launch = ["accelerate", "launch", "-q", *(["--multi_gpu", "--num_processes", str(processes)] * (processes > 1))]
    flags = [f"--recipe={args.recipe}", "--fit=none"]
    if args.networks != "full":
        flags += [f"--{name}={getattr(args, name)}" for name in ADAPTED if getattr(args, name) not in (None, "none")]
    flags += [f"--sharding={args.sharding}", *(["--cpu_offload"] * args.cpu_offload)]
    flags += ["--gradient_checkpointing", *args.gradient_checkpointing] if args.gradient_checkpointing else []
    flags += [f"--train_batch_size={args.train_batch_size}"]
    return shlex.join([*launch, sys.argv[0], *_shown(words), *flags])


def _shown(words: Sequence[str]) -> list[str]:
    """The words of a command line without those that the command has anew, and without the token."""
    dropped, shown = False, []
    for word in words:
        dropped = word in DROPPED or (dropped and not word.startswith("--"))
        shown += [] if dropped or word.startswith(tuple(f"{name}=" for name in DROPPED)) else [word]
    return shown


def _refusal(adapted: Sequence[Way], words: Sequence[str], processes: int, memory: float) -> str:
    room = f"{_gigabytes(memory)} GB on each of {processes}"
    if not adapted:
        return (
            f"this training does not fit into {room} in any way: take more or larger accelerators, a smaller "
            "--resolution or a smaller teacher."
        )
    rows = [f"{_describe(way, processes, memory)}:\n    {_command(way.args, words, processes)}" for way in adapted]
    return (
        f"whole networks do not fit into {room}: choose LoRAs, by --fit lora or one of these commands, or take more "
        "accelerators.\n  " + "\n  ".join(rows)
    )
