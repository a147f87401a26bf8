# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Arguments of how a training is laid out on its machine, which do not change its mathematics: what is not given is
chosen by `planning.fit`, where a script makes that choice, or has the defaults of `settle`."""

from argparse import Namespace

from hf_flowdistill.cli import COUNT, POSITIVE
from hf_flowdistill.errors import UserError
from hf_flowdistill.networks.names import ROLES
from hf_flowdistill.training.fsdp_config import take_fsdp_config
from hf_flowdistill.training.names import SHARDINGS


FITS = ("auto", "lora", "none")
IMAGES_PER_UPDATE = 256  # the paper's


def add_fit_arguments(parser) -> None:
    """Arguments of the choice, of the scripts that make it."""
    add = parser.add_argument_group("fit to the machine").add_argument
    add(
        "--fit",
        choices=FITS,
        default="auto",
        help="auto: choose sharding, offloading, checkpointing and micro-batch, where they are not given, and the "
        "recipe's precision, for the memory that is free; lora: LoRAs too, where whole networks do not fit; none: "
        "shard, offload and checkpoint nothing that is not asked for",
    )
    add(
        "--device_memory",
        type=POSITIVE,
        metavar="GB",
        help="of each accelerator, for --fit; by default what is free on the one that has least",
    )


def add_layout_arguments(add) -> None:
    """Arguments of what can be chosen."""
    add("--images_per_update", type=COUNT, metavar="IMAGES", help="of all processes together; 256 by default")
    add(
        "--train_batch_size",
        type=COUNT,
        metavar="IMAGES",
        help="per process and micro-batch; by default what fits (--fit), 2 where nothing is known",
    )
    add(
        "--gradient_accumulation_steps",
        type=COUNT,
        metavar="N",
        help="micro-batches per update; by default as many as make --images_per_update",
    )
    add(
        "--gradient_checkpointing",
        nargs="*",
        choices=ROLES,
        metavar="NETWORK",
        help=f"less memory, more time, in these networks: {', '.join(ROLES)}; without names in all three; by default "
        "where it is needed (--fit)",
    )
    add(
        "--sharding",
        choices=SHARDINGS,
        help="none: every process holds the networks whole; full: in shards over all processes (FSDP2); hybrid: over "
        "those of one machine; by default what is needed (--fit)",
    )
    add(
        "--cpu_offload",
        action="store_true",
        default=None,
        help="sharded: generator, fake score and Adam wait in main memory; by default where it is needed (--fit)",
    )


def check_layout_arguments(args) -> None:
    """Take over what the launch says, in place.

    Raises:
        UserError: for arguments that are sane by themselves but not together.
    """
    take_fsdp_config(args)
    if args.gradient_checkpointing == []:
        args.gradient_checkpointing = list(ROLES)
    fits = getattr(args, "fit", "none") != "none"  # not every script has it
    if args.cpu_offload and (args.sharding == "none" or (args.sharding is None and not fits)):
        raise UserError("--cpu_offload is of sharded networks: give --sharding full too, also on one process.")
    if args.cpu_offload and args.networks == "lora":
        raise UserError("--cpu_offload is of networks that are trained whole, which --networks lora has none of.")
    if (args.sharding or "none") != "none" and (args.use_8bit_adam or args.base_quantization != "none"):
        raise UserError(
            "bitsandbytes takes no shards: leave out --use_8bit_adam and --base_quantization, or --sharding."
        )


def share_of(args, processes: int) -> int:
    """The images per update of one process, as near as can be."""
    return parts_of(args.images_per_update or IMAGES_PER_UPDATE, processes)


def parts_of(images: int, parts: int) -> int:
    """How many images each of so many parts has, at least one."""
    return max(1, round(images / parts))


def settle(args, processes: int) -> None:
    """Give what is left open its default, in place, once the number of processes is known: nothing is sharded,
    offloaded or checkpointed, and the micro-batches make the images per update, or the nearest number to them that
    `processes` can make.

    Raises:
        UserError: all three numbers are given, and do not go together.
    """
    args.sharding, args.cpu_offload = args.sharding or "none", bool(args.cpu_offload)
    args.gradient_checkpointing = args.gradient_checkpointing or False
    wanted, batch_size, accumulation = args.images_per_update, args.train_batch_size, args.gradient_accumulation_steps
    if wanted and batch_size and accumulation and wanted != batch_size * accumulation * processes:
        raise UserError(
            f"--images_per_update is {wanted}, but {processes} processes x {accumulation} micro-batches x "
            f"{batch_size} images are another number: leave out one of the three."
        )
    share = share_of(args, processes)
    if batch_size is None:
        batch_size = parts_of(share, accumulation) if accumulation else 2 - share % 2
    args.train_batch_size = batch_size
    args.gradient_accumulation_steps = accumulation or parts_of(share, batch_size)
    args.images_per_update = processes * args.gradient_accumulation_steps * args.train_batch_size


def images_of_update(args, processes: int) -> int:
    """How many images an update of `processes` has, whatever micro-batches they come in."""
    args = Namespace(**vars(args))
    settle(args, processes)
    return args.images_per_update
