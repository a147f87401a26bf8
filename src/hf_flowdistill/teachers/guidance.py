# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Guidance of a teacher: how its pipeline does it, and how any velocity is guided here."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_flowdistill.flow import guide, rescale_guidance
from hf_flowdistill.teachers.conditioning import Conditioning
from hf_flowdistill.teachers.watch import SCALE


@dataclass(frozen=True)
class Guidance:
    """How the pipeline does classifier-free guidance.

    Attributes:
        kind: "doubled" (one call with both halves in its batch), "two calls", or "none".
        argument: the pipeline's argument that scales it; None if there is none, or if a guider component does it.
        off: the value of that argument that switches it off, which 1 does here: a pipeline that adds
            scale (conditional - unconditional) to the conditional half counts from 0.
        conditional_first: the order of the halves, or of the calls.
        plain: the pipeline combines the halves as unconditional + scale (conditional - unconditional). Where it does
            not, `Contract.guided_velocity` still does.
    """

    kind: str = "none"
    argument: str | None = None
    off: float = 1.0
    conditional_first: bool = False
    plain: bool = True

    def arguments(self, *, on: bool) -> dict[str, float]:
        """Arguments of the pipeline's call that switch guidance on, at `watch.SCALE`, or off."""
        return {} if self.argument is None else {self.argument: SCALE if on else self.off}

    @property
    def watched_scale(self) -> float:
        """The scale, counted as here, of guided calls that are watched."""
        return SCALE + 1 - self.off


def guided_inputs(x_t, sigma, conditional, unconditional, scale, mode=None) -> tuple[Tensor, Tensor, Conditioning]:
    """(x_t, sigma, conditioning) of the call that `guided_velocity` makes; arguments as there.

    Of B samples, or of twice as many, the unconditional half first: the conditional half is the last B of either.
    """
    if mode is not None:
        embedded = 1.0 if mode == "cfg" else scale
        conditional = conditional.with_embedded_guidance(embedded)
        unconditional = unconditional.with_embedded_guidance(embedded)
    if scale == 1 or mode == "embedded":
        return x_t, sigma, conditional
    batch = x_t.shape[0]
    both = Conditioning.cat([unconditional.to(x_t.device).expand(batch), conditional.to(x_t.device).expand(batch)])
    return torch.cat([x_t, x_t]), torch.cat([sigma, sigma]), both


def guided_velocity(
    velocity_fn: Callable[..., Tensor], x_t, sigma, conditional, unconditional, scale, mode=None, rescale=0.0
) -> Tensor:
    """`Contract.guided_velocity`, whose other arguments are as there, of any velocity.

    Args:
        velocity_fn: (x_t [B, ...], sigma [B], conditioning of B rows or one) -> velocity [B, ...]. It is called with
            `guided_inputs`, and where the unguided velocity has to be predicted too, a second time.
    """
    velocity = velocity_fn(*guided_inputs(x_t, sigma, conditional, unconditional, scale, mode))
    guided = velocity if len(velocity) == len(x_t) else guide(*velocity.chunk(2), scale)
    if scale == 1 or not rescale:
        return guided
    if mode in ("embedded", "both"):
        unguided = velocity_fn(x_t, sigma, conditional.with_embedded_guidance(1.0))
    else:
        unguided = velocity[len(x_t) :]
    return rescale_guidance(guided, unguided, x_t, sigma, rescale)
