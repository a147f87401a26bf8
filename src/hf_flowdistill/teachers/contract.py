# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""How a teacher talks to its transformer, and the velocity at any latent and any sigma that follows from it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_flowdistill.flow import guide
from hf_flowdistill.teachers.conditioning import EMBEDDED_GUIDANCE, Conditioning
from hf_flowdistill.teachers.watch import first_output


@dataclass(frozen=True)
class Guidance:
    """How the pipeline does classifier-free guidance.

    Attributes:
        kind: "doubled" (one call with both halves in its batch), "two calls", or "none".
        argument: the pipeline's argument that scales it; None if there is none.
        off: the value of that argument that switches it off.
        conditional_first: the order of the halves, or of the calls.
        plain: the pipeline combines the halves as unconditional + scale (conditional - unconditional). Where it does
            not, `Contract.guided_velocity` still does.
    """

    kind: str = "none"
    argument: str | None = None
    off: float = 1.0
    conditional_first: bool = False
    plain: bool = True

    def arguments(self, *, on: bool, scale: float = 2.0) -> dict[str, float]:
        """Arguments of the pipeline's call that switch guidance on or off."""
        return {} if self.argument is None else {self.argument: scale if on else self.off}


@dataclass(frozen=True)
class Contract:
    """Learned by `learn_contract`; see there. Shapes are without the batch dimension.

    Attributes:
        latent_shape: of the sampler's latents ("latent layout": what the pipeline's `scheduler.step` is given).
        latent_argument, latent_input_shape: what the transformer is given of them.
        time_argument, time_scale, time_offset: the transformer is given time = time_scale * sigma + time_offset.
        output_shape, output_sign, output_is_first_half: velocity = sign * output, or its first half of the channels.
        conditioning_dims: argument -> its batch dimension, for what depends on the prompt.
        static: arguments that depend on neither prompt, time nor batch size.
        dtype: of the pipeline's transformer; arguments of that dtype follow the dtype of the transformer in use.
        dtypes: argument -> dtype in the pipeline's own call.
        embedded_guidance: (argument, factor) where the transformer is given factor * `guidance_scale`, else None.
        replay_error: largest error of the replay against the pipeline's own outputs, relative to the largest output.
    """

    pipeline_class: str
    transformer_class: str
    height: int
    width: int
    pipeline_kwargs: dict[str, Any]
    latent_shape: tuple[int, ...]
    latent_argument: str
    latent_input_shape: tuple[int, ...]
    time_argument: str
    time_scale: float
    time_offset: float
    output_shape: tuple[int, ...]
    output_sign: int
    output_is_first_half: bool
    dtype: torch.dtype
    conditioning_dims: dict[str, int]
    dtypes: dict[str, torch.dtype]
    static: dict[str, Any] = field(repr=False)
    embedded_guidance: tuple[str, float] | None = None
    guidance: Guidance = Guidance()
    replay_error: float = float("nan")

    def velocity(self, transformer, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """The transformer's velocity, noise - x0, at any latent and any sigma. One call of `transformer`.

        Gradient flows to x_t, to the conditioning and to the parameters; it is the caller's to disable.

        Args:
            transformer: the teacher's own, a copy of it, or a wrapped one.
            x_t: [B, *latent_shape].
            sigma: [B] in [0, 1]; different values in one batch are fine.
            conditioning: B rows, or one row for all. It is moved to x_t's device.

        Returns:
            [B, *latent_shape] in x_t's dtype.

        Raises:
            ValueError: shapes that do not fit.
        """
        batch = x_t.shape[0]
        if tuple(x_t.shape[1:]) != self.latent_shape or sigma.shape != (batch,):
            given = tuple(x_t.shape), tuple(sigma.shape)
            raise ValueError(f"expected x_t [B, *{self.latent_shape}] and sigma [B], not {given[0]} and {given[1]}")
        dtype = _floating_dtype(transformer)
        arguments = {name: _moved(value, x_t.device) for name, value in self.static.items()}
        arguments.update(self._conditioning_arguments(conditioning.expand(batch), x_t.device, dtype))
        arguments[self.latent_argument] = x_t.reshape(batch, *self.latent_input_shape).to(dtype)
        # Float32, whatever the dtype of the network: bfloat16 cannot tell 998 from 1000.
        arguments[self.time_argument] = self.time_scale * sigma.to(x_t.device, torch.float32) + self.time_offset
        return self.velocity_from_output(first_output(transformer(**arguments))).to(x_t.dtype)

    def guided_velocity(
        self,
        transformer,
        x_t: Tensor,
        sigma: Tensor,
        conditional: Conditioning,
        unconditional: Conditioning,
        scale: float,
    ) -> Tensor:
        """Velocity under classifier-free guidance, SiD-DiT Eq. 15, in one call of twice the batch.

        `scale` 1 is one call without the unconditional half. Gradient flows through both halves. Arguments, returned
        tensor and errors as in `velocity`.
        """
        if scale == 1:
            return self.velocity(transformer, x_t, sigma, conditional)
        batch = x_t.shape[0]
        both = Conditioning.cat([unconditional.to(x_t.device).expand(batch), conditional.to(x_t.device).expand(batch)])
        halves = self.velocity(transformer, torch.cat([x_t, x_t]), torch.cat([sigma, sigma]), both)
        return guide(*halves.chunk(2), scale)

    def conditioning_from(self, arguments: dict[str, Any]) -> Conditioning:
        """The conditioning in the arguments of one transformer call of the pipeline."""
        rows = {name: arguments[name].movedim(dim, 0) for name, dim in self.conditioning_dims.items()}
        if self.embedded_guidance is not None:
            name, factor = self.embedded_guidance
            rows[EMBEDDED_GUIDANCE] = arguments[name].float() / factor
        return Conditioning(rows)

    def halves(self, calls: Sequence[dict[str, Any]]) -> tuple[Conditioning, Conditioning]:
        """(conditional, unconditional) in the arguments of the transformer calls of one guided step."""
        if self.guidance.kind == "doubled":
            both = self.conditioning_from(calls[0])
            first, second = both[: len(both) // 2], both[len(both) // 2 :]
        else:
            first, second = (self.conditioning_from(call) for call in calls)
        return (first, second) if self.guidance.conditional_first else (second, first)

    def velocity_from_output(self, output: Tensor) -> Tensor:
        """Transformer output [B, *output_shape] -> velocity [B, *latent_shape], in the output's dtype."""
        if self.output_is_first_half:
            output = output.chunk(2, dim=1)[0]
        return self.output_sign * output.reshape(-1, *self.latent_shape)

    def zero_output(self, arguments: dict[str, Any]) -> Tensor:
        """What the transformer would return for these arguments, all zeros: a velocity that moves nothing."""
        latent = arguments[self.latent_argument]
        return latent.new_zeros(latent.shape[0], *self.output_shape)

    def as_dict(self) -> dict[str, Any]:
        """What was learned, in words and numbers that go into a log or a table."""
        output = "first half of the channels" if self.output_is_first_half else "output"
        order = (
            ("conditional", "unconditional") if self.guidance.conditional_first else ("unconditional", "conditional")
        )
        guidance = "none" if self.guidance.kind == "none" else f"{self.guidance.kind}, {order[0]} first"
        return {
            "pipeline": self.pipeline_class,
            "transformer": self.transformer_class,
            "size": f"{self.height}x{self.width}",
            "latent": f"{self.latent_argument} {list(self.latent_shape)}",
            "time": f"{self.time_argument} = {_affine(self.time_scale, self.time_offset)}",
            "velocity": ("-" if self.output_sign < 0 else "") + output,
            "conditioning": sorted(self.conditioning_dims),
            "constant": sorted(name for name, value in self.static.items() if value is not None),
            "guidance": guidance
            if self.guidance.plain
            else f"{guidance}, combined here without the pipeline's rescaling",
            "guidance_argument": self.guidance.argument,
            "embedded_guidance": self.embedded_guidance and self.embedded_guidance[0],
            "replay_error": self.replay_error,
        }

    def describe(self) -> str:
        """`as_dict`, one line each."""
        lines = ((key, ", ".join(v) if isinstance(v, list) else v) for key, v in self.as_dict().items())
        return "\n".join(
            f"{key.replace('_', ' ')}: {'none' if value in (None, '') else value}" for key, value in lines
        )

    def _conditioning_arguments(self, conditioning: Conditioning, device, dtype) -> dict[str, Tensor]:
        arguments = {}
        for name, dim in self.conditioning_dims.items():
            value = conditioning.tensors[name].to(device)
            if value.is_floating_point():
                value = value.to(dtype if self.dtypes[name] == self.dtype else self.dtypes[name])
            arguments[name] = value.movedim(0, dim)
        if self.embedded_guidance is not None:
            name, factor = self.embedded_guidance
            arguments[name] = factor * conditioning.tensors[EMBEDDED_GUIDANCE].to(device, torch.float32)
        return arguments


def _floating_dtype(transformer) -> torch.dtype:
    return next(parameter.dtype for parameter in transformer.parameters() if parameter.is_floating_point())


def _moved(value, device):
    """Tensors on `device`; dicts copied, because transformers take entries out of theirs."""
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value


def _affine(scale: float, offset: float) -> str:
    slope = {1.0: "sigma", -1.0: "-sigma"}.get(scale, f"{scale:g} * sigma")
    if offset == 0:
        return slope
    return (
        f"{offset:g} - {slope[1:]}"
        if slope.startswith("-")
        else f"{slope} {'+' if offset > 0 else '-'} {abs(offset):g}"
    )
