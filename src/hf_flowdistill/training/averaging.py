# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What leaves a training, or several of one student: the averaged generator, and the mean of several of them."""

import copy
import dataclasses

import torch

from hf_flowdistill.errors import UserError
from hf_flowdistill.methods.freeflow import told_at_the_end
from hf_flowdistill.methods.phases import method_of, not_reached, trained_sampler
from hf_flowdistill.networks.adapters import merged
from hf_flowdistill.networks.flow_map import attach, folded
from hf_flowdistill.networks.loading import configuration, weights_digest
from hf_flowdistill.networks.roles import RoleSettings
from hf_flowdistill.training import checkpointing, monitors
from hf_flowdistill.training.checkpointing import CONFIG, with_config


# What runs must have in common for their mean to be a student: what they learned from, their sampler, their networks.
OF_ONE_STUDENT = [
    *"teacher_weights height width aspect_ratio_buckets pipeline_kwargs num_steps sigmas noise_type".split(),
    *"method guidance_range student_guidance_scale time_layers".split(),
    *(field.name for field in dataclasses.fields(RoleSettings)),
]


def common_settings(found) -> dict:
    """The settings of runs as they were used, as lists where they differ. What makes a student must not: then a
    `UserError` says so."""
    settings = {path: _used(state) for path, state in found.items()}
    first, *others = settings
    for other in others:
        mine, theirs = with_config(settings[first]), with_config(settings[other])
        config = [name for name in mine if name.startswith(f"{CONFIG} ") and name in theirs]
        for name in [*OF_ONE_STUDENT, *config]:
            if mine.get(name) != theirs.get(name):
                values = f"{mine.get(name)} and {theirs.get(name)}"
                raise UserError(
                    f"{first} and {other} differ in {name} ({values}): give runs of one teacher, with the same "
                    "sampler and networks."
                )
        if (CONFIG in settings[first]) != (CONFIG in settings[other]):
            raise UserError(
                f"{first} and {other} are from different versions, of which the earlier did not record the teacher's "
                "configuration: give runs of one version."
            )
    used = list(settings.values())
    values = {name: [one.get(name) for one in used] for name in used[0]}
    return {name: given[0] if all(one == given[0] for one in given) else given for name, given in values.items()}


def _used(state) -> dict:
    """A run's settings as its student was trained with them; runs of earlier versions have recorded less."""
    settings = state["settings"]
    return settings | state.get("used", {}) | {"sigmas": trained_sampler(settings, state["images_seen"]).sigmas}


def common_method(found) -> dict:
    """The method of runs, and what none of them reached: arguments of `hub.export.TrainingRecord`."""
    told = [(state["settings"], state["images_seen"]) for state in found.values()]
    phrases = [not_reached(*one).values() for one in told]
    return {
        "method": max(method_of(*one) for one in told),  # one with the adversarial term is enough
        "not_reached": [phrase for phrase in phrases[0] if all(phrase in others for others in phrases)],
    }


def check_teacher(settings: dict, pipeline, path, load_transformer) -> None:
    """Refuse another teacher than the runs', as far as they recorded theirs.

    Args:
        settings: of `common_settings`.
        pipeline: the one that was loaded from `path`.
        load_transformer: () -> its transformer in float32, of which the weights are known; None where they need not be
            compared.

    Raises:
        UserError: naming what differs.
    """
    recorded, found = settings.get(CONFIG, {}), configuration(pipeline)
    for name in sorted(recorded.keys() & found.keys()):
        if recorded[name] != found[name]:
            what = f"{name} is {found[name]!r}, in training it was {recorded[name]!r}"
            raise UserError(f"{path} is not the teacher of this training, its {what}: name that with --teacher.")
    if load_transformer and weights_digest(load_transformer()) != settings["teacher_weights"]:
        raise UserError(f"{path} is not the teacher of this training, its weights differ: name that with --teacher.")


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
def load_average(found, transformer, settings, predict=None):
    """The averaged generator of a checkpoint: the teacher's `transformer` with its weights, or in its role.

    Of several checkpoints it is another transformer, with the mean of their weights in float32, adapters merged; of
    FreeFlow's it is another too, of the stock class.

    Args:
        predict: calls a transformer once, at sigma 1; see `networks.flow_map.folded`.
    """
    roles = RoleSettings(**{f.name: settings[f.name] for f in dataclasses.fields(RoleSettings) if f.name in settings})
    transformer = copy.deepcopy(transformer).float() if len(found) > 1 else transformer
    network = roles.share(transformer).add("student") if roles.networks == "lora" else transformer
    told, mean = told_at_the_end(settings) if settings.get("method") == "freeflow" else {}, None
    if told:
        attach(network, settings["time_layers"], list(told))
    for count, checkpoint in enumerate(found, 1):
        checkpointing.load_checkpoint(checkpoint, networks={"ema": network}, optimizers={})
        if len(found) == 1 and not told:
            return network
        one = folded(network, merged(network), predict, **told) if told else merged(network)
        if len(found) == 1:
            return one
        mean = copy.deepcopy(one) if mean is None else mean
        for total, tensor in zip(mean.parameters(), one.parameters()):
            total.lerp_(tensor, 1 / count)
    return mean
