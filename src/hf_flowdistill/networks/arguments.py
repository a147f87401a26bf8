# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Arguments of which networks a training has."""

from hf_flowdistill.cli import COUNT, POSITIVE, check_installed
from hf_flowdistill.errors import UserError, first_line
from hf_flowdistill.networks.names import NETWORKS, QUANTIZATIONS, RANK


LORA_LEARNING_RATE = 1e-4  # what diffusers' LoRA scripts train at; of the shapes teacher's LoRAs see docs/memory.md


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
        help="of networks and gradients, LoRAs aside; bfloat16 goes without autocast; float32 by default",
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
    if args.weight_dtype is None:  # who says how bfloat16 is to be rounded asks for it
        args.weight_dtype = (
            "bfloat16" if getattr(args, "bf16_rounding", None) and args.networks != "lora" else "float32"
        )
    if args.networks != "full" and args.rank is None:
        args.rank = RANK


def add_device_argument(add) -> None:
    """--device, for `check_device`."""
    add("--device", metavar="NAME", help="where to run; by default cuda where there is one, else cpu")


def check_device(name: str | None) -> str:
    """The device of --device that can be used, where torch is imported anyway.

    Raises:
        UserError: it cannot.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # the latter where torch is built without CUDA
        raise UserError(f"--device {name} cannot be used: {first_line(error)}") from error
    return name
