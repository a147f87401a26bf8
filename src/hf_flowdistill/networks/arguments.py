# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Arguments of which networks a training has."""

import dataclasses

from hf_flowdistill.cli import COUNT, POSITIVE, check_installed
from hf_flowdistill.errors import UserError
from hf_flowdistill.networks.adapters import QUANTIZATIONS
from hf_flowdistill.networks.roles import NETWORKS, RoleSettings


# Of adapters, as is usual for LoRAs; the paper's rate is of whole networks.
LORA_LEARNING_RATE = 1e-4


def add_network_arguments(parser) -> None:
    """Arguments of which networks there are, and of what is trained of them."""
    add = parser.add_argument_group("networks").add_argument
    add(
        "--networks",
        choices=NETWORKS,
        default="full",
        help="full: three networks; lora_fake: the fake score is a LoRA on the teacher; lora: the generator too",
    )
    add("--rank", type=COUNT, metavar="N", help="of the LoRAs; 64 by default")
    add("--lora_alpha", type=POSITIVE, metavar="X", help="a LoRA is scaled by this over its rank; by default the rank")
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
    check_installed("peft", f"--networks {args.networks}", args.networks != "full")
    check_installed("bitsandbytes", f"--base_quantization {args.base_quantization}", args.base_quantization != "none")
    if args.networks != "full" and args.rank is None:
        args.rank = RoleSettings.rank


def role_settings(args) -> RoleSettings:
    """The arguments of `add_network_arguments` that `Networks.from_teacher` takes."""
    return RoleSettings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(RoleSettings)})
