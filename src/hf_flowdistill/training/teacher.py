# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The teacher of a training: its pipeline, and how it talks to its transformer at every image size."""

import functools
from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline

from hf_flowdistill.networks.loading import load_pipeline
from hf_flowdistill.networks.placement import modules_of, streamed
from hf_flowdistill.teachers import learn_contracts
from hf_flowdistill.teachers.contract import Contract
from hf_flowdistill.training.arguments import image_sizes_of, origin_of
from hf_flowdistill.training.sharding import Sharding


@dataclass(frozen=True)
class Teacher:
    """A teacher's pipeline, a contract for every image size, and how its networks lie on the processes."""

    pipeline: DiffusionPipeline
    contracts: list[Contract]
    sharding: Sharding

    def on_device(self):
        """Inside, the pipeline runs on the device, whatever of it waits in main memory."""
        return on_device(self.pipeline, self.sharding)


def load_teacher(args, device: Any) -> Teacher:
    """The teacher that the arguments name, in main memory where it is not sharded, and its contracts.

    Raises:
        UserError: it cannot be loaded, or is no teacher.
    """
    load = functools.partial(
        load_pipeline, args.pretrained_model_name_or_path, variant=args.variant, **origin_of(args)
    )
    sharding = Sharding(args.sharding, device, cpu_offload=args.cpu_offload)
    pipeline = sharding.load(load)
    with on_device(pipeline, sharding):
        contracts = learn_contracts(
            pipeline, image_sizes_of(args), args.pipeline_kwargs, row_by_row=args.sharding != "none"
        )
    return Teacher(pipeline, contracts, sharding)


def on_device(pipeline, sharding: Sharding):
    return streamed(modules_of(pipeline).values(), sharding.device)
