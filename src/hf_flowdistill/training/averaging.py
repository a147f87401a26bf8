# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What leaves a training, or several of one student: the averaged generator, and the mean of several of them."""

import copy
import dataclasses
from pathlib import Path

import torch

from hf_flowdistill.errors import UserError
from hf_flowdistill.networks.adapters import merged
from hf_flowdistill.networks.roles import RoleSettings
from hf_flowdistill.training import checkpointing, monitors


# What runs must have in common for their mean to be a student: what they learned from, their sampler, their networks.
OF_ONE_STUDENT = [
    *"teacher_weights height width aspect_ratio_buckets pipeline_kwargs num_steps sigmas noise_type".split(),
    *(field.name for field in dataclasses.fields(RoleSettings)),
]


def find_checkpoint(run) -> Path:
    """The last checkpoint of a run, or the checkpoint itself."""
    path = Path(run).resolve()
    checkpoint = path if (path / checkpointing.STATE_FILE).is_file() else checkpointing.latest_checkpoint(path)
    if checkpoint is None:
        finished = f": its finished student is in {run}/student" if (path / "student").is_dir() else ""
        raise UserError(f"{run} holds no checkpoint{finished or ': give the --output_dir of a training'}.")
    return checkpoint


def common_settings(found) -> dict:
    """The settings of runs, as lists where they differ. What makes a student must not: then a `UserError` says so."""
    settings = {path: state["settings"] for path, state in found.items()}
    first, *others = settings
    for name in OF_ONE_STUDENT:
        for other in others:
            mine, theirs = settings[first].get(name), settings[other].get(name)
            if mine != theirs:
                raise UserError(
                    f"{first} and {other} differ in {name} ({mine} and {theirs}): give runs of one teacher, with the "
                    "same sampler and networks."
                )
    used = [
        state["settings"] | state.get("used", {}) for state in found.values()
    ]  # runs of earlier versions have none
    values = {name: [one.get(name) for one in used] for name in used[0]}
    return {name: given[0] if all(one == given[0] for one in given) else given for name, given in values.items()}


def total_facts(found) -> dict:
    """What the runs of these checkpoints have cost together, as far as it is known of all; each run counts once."""
    in_order = sorted(found.items(), key=lambda item: item[1]["images_seen"])
    facts = [monitors.training_facts(*run) for run in {path.parent: state for path, state in in_order}.items()]
    skipped = "; ".join(one["skipped_updates"] for one in facts if "skipped_updates" in one)
    known = {name: [one[name] for one in facts] for name in facts[0] if all(name in one for one in facts)}
    known.pop("skipped_updates", None)
    hardware = ", ".join(dict.fromkeys(known.pop("hardware", [])))
    told = {name: text for name, text in {"hardware": hardware, "skipped_updates": skipped}.items() if text}
    return {name: sum(values) for name, values in known.items()} | told


@torch.no_grad()
def load_average(found, transformer, settings):
    """The averaged generator of a checkpoint: the teacher's `transformer` with its weights, or in its role.

    Of several checkpoints it is another transformer, with the mean of their weights in float32, adapters merged.
    """
    roles = RoleSettings(**{f.name: settings[f.name] for f in dataclasses.fields(RoleSettings) if f.name in settings})
    transformer = copy.deepcopy(transformer).float() if len(found) > 1 else transformer
    network = roles.share(transformer).add("student") if roles.networks == "lora" else transformer
    mean = None
    for count, checkpoint in enumerate(found, 1):
        checkpointing.load_checkpoint(checkpoint, networks={"ema": network}, optimizers={})
        if len(found) == 1:
            return network
        one = merged(network)
        mean = copy.deepcopy(one) if mean is None else mean
        for total, tensor in zip(mean.parameters(), one.parameters()):
            total.lerp_(tensor, 1 / count)
    return mean
