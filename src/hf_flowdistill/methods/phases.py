# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What begins at some number of images, so what a training did, and not only what it was asked for.

`settings` are the arguments of a training as its checkpoints record them, with "images_per_update".
"""

import math
from collections.abc import Mapping

from hf_flowdistill.flow.draws import k_in_turn
from hf_flowdistill.flow.rollout import Sampler


PHASES = {  # argument -> what begins with the first update after so many images
    "sigmas_start_images": "training at --sigmas",
    "discriminator_warmup_images": "training the student",
    "adversarial_start_images": "the adversarial term",
    "correction_delay_images": "the correction",
    "lr_warmup_images": "training at the whole learning rate",
}


def last_begun(settings: Mapping, images_seen: int) -> int:
    """How many images there were before the last of the updates that make `images_seen`; 0 before the first update."""
    size = settings["images_per_update"]
    return max(0, math.ceil(images_seen / size) - 1) * size


def sampler_of(settings: Mapping, begun: int) -> Sampler:
    """The student's sampler in the update that begins after `begun` images."""
    early = begun < (settings.get("sigmas_start_images") or 0)
    return Sampler(settings["num_steps"], settings["noise_type"], None if early else settings.get("sigmas"))


def trained_sampler(settings: Mapping, images_seen: int) -> Sampler:
    """The sampler of a student of `images_seen` images: that of its last update."""
    return sampler_of(settings, last_begun(settings, images_seen))


def method_of(settings: Mapping, images_seen: int) -> str:
    """The method that trained a student of `images_seen` images, by its name on a card: adversarial training is one
    in which that term had a weight and its time had come."""
    if "method" in settings:
        return settings["method"]
    acts = settings.get("adversarial") and settings["adversarial_weight"] > 0
    begun = acts and last_begun(settings, images_seen) >= settings["adversarial_start_images"]
    return "sid_adversarial" if begun else "sid"


def not_reached(settings: Mapping, images_seen: int) -> dict[str, str]:
    """What does not begin within `images_seen` images: argument -> a phrase that names it."""
    begun = last_begun(settings, images_seen)
    starts = {name: settings.get(name) or 0 for name in PHASES}
    starts["lr_warmup_images"] -= settings["images_per_update"]  # its last update has the whole rate
    found = {name: f"{what} (--{name} {settings[name]})" for name, what in PHASES.items() if begun < starts[name]}
    if steps := _without_a_turn(settings, begun):
        shares = " ".join(f"{share:g}" for share in settings["step_shares"])
        found["step_shares"] = f"the turn of sampler step {' and '.join(map(str, steps))} (--step_shares {shares})"
    return found


def _without_a_turn(settings: Mapping, begun: int) -> list[int]:
    """The sampler steps with a share of which no update has been, up to that which began after `begun` images."""
    shares, size = settings.get("step_shares") or [], settings["images_per_update"]
    found = []
    for k, share in enumerate(shares, start=1):
        start = 1 - sum(shares) + sum(shares[: k - 1])
        first = math.ceil((start * settings["max_train_images"] - 1e-6) / size) * size
        missed = first > begun or k_in_turn(shares, first / settings["max_train_images"]) != k
        if share > 0 and missed:
            found.append(k)
    return found
