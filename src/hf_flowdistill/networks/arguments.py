# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Arguments of a training's networks; apart from `arguments`, which commands without torch use too."""

import dataclasses
import importlib.util

from hf_flowdistill.errors import UserError
from hf_flowdistill.networks.adapters import QUANTIZATIONS
from hf_flowdistill.networks.roles import NETWORKS, RoleSettings
from hf_flowdistill.training.optimizers import ROUNDINGS


def add_network_arguments(parser) -> None:
    """Arguments of which networks there are, and of how what is trained of them is kept and updated."""
    add = parser.add_argument_group("networks").add_argument
    add(
        "--networks",
        choices=NETWORKS,
        default="full",
        help="full: three networks; lora_fake: the fake score is a LoRA on the teacher; lora: the generator too",
    )
    add("--rank", type=int, metavar="N", help="of the LoRAs; 64 by default")
    add("--lora_alpha", type=float, metavar="X", help="a LoRA is scaled by this over its rank; by default the rank")
    add(
        "--lora_layers",
        metavar="NAMES",
        help="layers with a LoRA, e.g. to_k,to_q,to_v,to_out.0; by default all linear layers of all blocks",
    )
    add("--base_quantization", choices=QUANTIZATIONS, default="none", help="of the teacher under --networks lora")
    add(
        "--weight_dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of networks and gradients, LoRAs aside; bfloat16 goes without autocast",
    )
    add(
        "--bf16_rounding",
        choices=ROUNDINGS,
        help="of updates of bfloat16 weights: stochastic, the default, keeps the smallest on average, from float32 "
        "moments; nearest is the paper's BF16, moments too, and loses those below 1/512 of their weight",
    )
    add("--use_8bit_adam", action="store_true", help="Adam's moments in 8 bits, by bitsandbytes")


def check_network_arguments(args) -> None:
    """Fill in the defaults of `add_network_arguments` that depend on others, in place.

    Raises:
        UserError: for arguments of what is not trained here, or a library that is not installed.
    """
    for name in ("rank", "lora_alpha", "lora_layers"):
        if getattr(args, name) is not None and args.networks == "full":
            raise UserError(f"--{name} is of LoRAs: choose --networks lora or lora_fake, or leave it out.")
    if args.base_quantization != "none" and args.networks != "lora":
        raise UserError("--base_quantization is of a teacher that nothing else is trained on: choose --networks lora.")
    rounds = args.weight_dtype == "bfloat16" and args.networks != "lora"
    if args.bf16_rounding is not None and not rounds:
        raise UserError(
            "--bf16_rounding is of bfloat16 weights that are trained, and LoRAs are float32: choose --weight_dtype "
            "bfloat16 and --networks full or lora_fake, or leave it out."
        )
    for library, argument, used in (
        ("peft", f"--networks {args.networks}", args.networks != "full"),
        ("bitsandbytes", "--use_8bit_adam", args.use_8bit_adam),
        ("bitsandbytes", f"--base_quantization {args.base_quantization}", args.base_quantization != "none"),
    ):
        if used and importlib.util.find_spec(library) is None:
            raise UserError(f"{argument} needs {library}, which is not installed: pip install {library}.")
    if args.networks != "full" and args.rank is None:
        args.rank = RoleSettings.rank
    if rounds and args.bf16_rounding is None:
        args.bf16_rounding = ROUNDINGS[0]


def role_settings(args) -> RoleSettings:
    """The arguments of `add_network_arguments` that `Networks.from_teacher` takes."""
    return RoleSettings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(RoleSettings)})
