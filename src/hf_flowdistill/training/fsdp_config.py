# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""An Accelerate configuration with FSDP, taken at its word: `accelerate launch` passes it on in the environment."""

import os

from hf_flowdistill.errors import UserError


USED = "ACCELERATE_USE_FSDP"
ELSEWHERE = {  # what the script does in its own way -> the values that ask for it, and what happens instead of others
    "FSDP_RESHARD_AFTER_FORWARD": (
        ("true", "full_shard"),
        "weights are released after every pass, forward and backward",
    ),
    "FSDP_AUTO_WRAP_POLICY": (("TRANSFORMER_BASED_WRAP",), "the transformer's repeated blocks are the units"),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": ((), "the transformer's repeated blocks are found by themselves"),
    "FSDP_STATE_DICT_TYPE": (("SHARDED_STATE_DICT",), "checkpoints of sharded networks are in shards"),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": (("true",), "the main process alone reads the weights"),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": (("false",), "checkpointed activations stay on the accelerator"),
    "FSDP_IGNORED_MODULES": ((), "every module is in shards"),
}


def is_launched_with_fsdp() -> bool:
    return _is_on(USED)


def take_fsdp_config(args) -> None:
    """Give sharding, offloading and checkpointing the values of the launch, in place, where the arguments have none.

    Raises:
        UserError: the configuration is of FSDP's first version, or of parallelism of several kinds.
    """
    if _is_on("ACCELERATE_USE_PARALLELISM_CONFIG"):
        raise UserError(
            "a parallelism_config was launched, which the script does not know: leave it out of the Accelerate "
            "configuration, and give the script --sharding full or hybrid."
        )
    if not is_launched_with_fsdp():
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError(
            "FSDP's first version was launched: set fsdp_version: 2 in the Accelerate configuration "
            "(`accelerate to-fsdp2` rewrites it), or launch with --multi_gpu, and give the script --sharding full."
        )
    offloads, checkpoints = (_is_on(name) for name in ("FSDP_OFFLOAD_PARAMS", "FSDP_ACTIVATION_CHECKPOINTING"))
    args.sharding = args.sharding or "full"
    if args.cpu_offload is None:
        args.cpu_offload = offloads and args.networks != "lora"
    if args.gradient_checkpointing is None:
        args.gradient_checkpointing = [] if checkpoints else False


def not_honoured() -> list[str]:
    """Settings of the launch's FSDP configuration that are not taken as they stand, each with what happens instead."""
    if not is_launched_with_fsdp():
        return []
    found = {name: os.environ.get(name, "None") for name in ELSEWHERE}
    return [
        f"{name.lower()}: {found[name]} of the Accelerate configuration is not taken: {instead}"
        for name, (honoured, instead) in ELSEWHERE.items()
        if found[name] not in ("None", "", *honoured)
    ]


def _is_on(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"
