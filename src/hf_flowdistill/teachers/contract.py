# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""How a teacher talks to its transformer, and the velocity at any latent and any sigma that follows from it."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from hf_flowdistill.flow.timesteps import few_step_sigmas
from hf_flowdistill.teachers.arguments import Slot, get, pad, put
from hf_flowdistill.teachers.conditioning import EMBEDDED_GUIDANCE, LENGTH, Conditioning
from hf_flowdistill.teachers.guidance import Guidance, guided_inputs, guided_velocity
from hf_flowdistill.teachers.inference import same
from hf_flowdistill.teachers.precision import floating_dtype, seen_times, snap
from hf_flowdistill.teachers.watch import first_output
from hf_flowdistill.teachers.words import in_words


@dataclass(frozen=True)
class Contract:
    """Learned by `learn_contract`; see there. Shapes are without the batch dimension.

    Attributes:
        latent_shape: of the sampler's latents ("latent layout": what the pipeline's `scheduler.step` is given).
        latent_argument, latent_input_shape: what the transformer is given of them.
        latent_is_list: the transformer is given a list of samples instead of a batch.
        time_argument, time_scale, time_offset: the transformer is given time = time_scale * sigma + time_offset.
        time_table: (sigmas, times), both increasing in sigma, where time is no such line; it is read linearly.
        output_shape, output_sign, output_part: velocity = sign * output, or a part of it: (dimension of the batch,
            start, counted from the end if negative, length). A list that is returned counts as stacked.
        output_container: what the output comes in: "tuple", "object" (with the attribute `sample`) or "nothing".
        slots: path of an argument -> where its samples are, for what depends on the prompt.
        repeated: the same for arguments that are equal for all prompts; `static` has them for one sample.
        static: arguments that depend on neither prompt nor time.
        prompts_at_once: several prompts in one call are encoded as each is alone.
        dtype: of the pipeline's transformer; arguments of that dtype follow the dtype of the transformer in use.
        dtypes: path -> dtype in the pipeline's own call.
        time_dtype: of the time in the pipeline's own call. A network of low precision is given its time in its own
            dtype if this is a low one, and else in float32; see `rounding.learn_low_precision`.
        time_rounding: what the network makes of the time, a key of `precision.ROUNDINGS`, or None; see `snap`.
        embedded_guidance: (argument, factor) where the transformer is given factor * a scale, else None.
        embedded_guidance_argument: the pipeline's argument for that scale.
        embedded_guidance_dtype: of that argument of the transformer, as `time_dtype`.
        row_by_row: prompts whose embeddings may differ in length go one to a call, also where they do not: processes
            with shards of one network have to make equally many calls of it, whatever their prompts.
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
    output_part: tuple[int, int, int] | None
    dtype: torch.dtype
    slots: dict[str, Slot]
    repeated: dict[str, Slot]
    dtypes: dict[str, torch.dtype]
    static: dict[str, Any] = field(repr=False)
    latent_is_list: bool = False
    output_is_list: bool = False
    output_container: str = "nothing"
    time_table: tuple[Tensor, Tensor] | None = field(default=None, repr=False)
    time_dtype: torch.dtype = torch.float32
    time_rounding: str | None = None
    prompts_at_once: bool = True
    embedded_guidance: tuple[str, float] | None = None
    embedded_guidance_argument: str | None = None
    embedded_guidance_dtype: torch.dtype = torch.float32
    guidance: Guidance = Guidance()
    row_by_row: bool = False
    replay_error: float = float("nan")

    def velocity(self, transformer, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """The transformer's velocity, noise - x0, at any latent and any sigma.

        One call of `transformer`, or one for each length among prompts whose embeddings differ in length; so that no
        prompt is padded. Gradient flows to x_t, to the conditioning and to the parameters; it is the caller's to
        disable.

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
        conditioning = conditioning.expand(batch)
        groups = self.groups(conditioning)
        if len(groups) == 1:
            return self._velocity(transformer, x_t, sigma, conditioning)
        parts = [self._velocity(transformer, x_t[rows], sigma[rows], conditioning[rows]) for rows in groups]
        return torch.cat(parts)[self.places(conditioning).to(x_t.device)]

    def _velocity(self, transformer, x_t, sigma, conditioning):
        arguments = self.transformer_arguments(x_t, sigma, conditioning, floating_dtype(transformer))
        return self.velocity_from_output(first_output(transformer(**arguments))).to(x_t.dtype)

    def transformer_arguments(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning, dtype) -> dict[str, Any]:
        """What the transformer is given: `dtype` is its own. Conditioning of one length, as many rows as x_t."""
        batch, device = len(x_t), x_t.device
        arguments = {name: _moved(value, device) for name, value in self.static.items()}
        for path, slot in self.repeated.items():
            value = get(arguments, path)
            if isinstance(value, Tensor) and value.dtype == self.dtype:
                value = value.to(dtype)
            arguments = put(arguments, path, slot.argument(slot.rows(value) * batch))
        for path, value in self._conditioning_arguments(conditioning, device, dtype).items():
            arguments = put(arguments, path, value)
        latent = x_t.reshape(batch, *self.latent_input_shape).to(dtype)
        arguments[self.latent_argument] = list(latent) if self.latent_is_list else latent
        time = self.time(sigma.to(device, torch.float32))
        arguments[self.time_argument] = time.to(self._fed(self.time_dtype, dtype))
        return arguments

    def _fed(self, own: torch.dtype, dtype: torch.dtype) -> torch.dtype:
        """In what a number is given to a network of `dtype` that the pipeline's own network was given in `own`.

        Float32 wherever it can be: bfloat16 cannot tell 998 from 1000. Some networks compute in the dtype of their
        time, so where the pipeline rounds it to their precision, so it is here.
        """
        return torch.float32 if torch.float32 in (own, dtype) else dtype

    def time(self, sigma: Tensor) -> Tensor:
        """What the transformer is given for noise levels sigma [B], in float32."""
        if self.time_table is None:
            return self.time_scale * sigma + self.time_offset
        sigmas, times = (table.to(sigma.device) for table in self.time_table)
        right = torch.searchsorted(sigmas, sigma.double()).clamp(1, len(sigmas) - 1)
        low, high = sigmas[right - 1], sigmas[right]
        part = (sigma.double() - low) / (high - low)
        return torch.lerp(times[right - 1], times[right], part).float()

    def snap(self, sigma: Tensor) -> Tensor:
        """The nearest noise levels that the network tells apart, [B] in (0, 1): `sigma` where it sees every time.

        A network that rounds its time sees another noise level than that of x_t, unless x_t is made at one of these.
        """
        return sigma if self.time_rounding is None else snap(self._levels, sigma)

    @functools.cached_property
    def _levels(self) -> Tensor:
        """The noise levels at which the network sees the time that it is given, [n] in float64, increasing."""
        ends = self.time(torch.tensor([0.0, 1.0])).sort().values.tolist()
        sigmas = self.noise_levels(seen_times(self.time_rounding, *ends))
        return sigmas[(sigmas > 0) & (sigmas < 1)].unique()

    def noise_levels(self, times: Tensor) -> Tensor:
        """The noise levels at which the transformer is given `times`, [n] in float64: the inverse of `time`."""
        if self.time_table is None:
            return (times.double() - self.time_offset) / self.time_scale
        return torch.from_numpy(np.interp(times.double(), *(table.numpy() for table in self.time_table[::-1])))

    def guided_velocity(
        self,
        transformer,
        x_t: Tensor,
        sigma: Tensor,
        conditional: Conditioning,
        unconditional: Conditioning,
        scale: float,
        mode: str | None = None,
        rescale: float = 0.0,
    ) -> Tensor:
        """Velocity under guidance.

        Args:
            scale: 1 is no guidance, in one call without the unconditional half.
            mode: one of `guidance_modes`. "cfg" is classifier-free guidance, SiD-DiT Eq. 15, in one call of twice the
                batch, with an embedded scale at 1; "embedded" embeds `scale` in one call; "both" does both. None is
                classifier-free guidance with whatever scale the conditioning embeds.
            rescale: how far the contrast goes back to that without guidance, in [0, 1]; see `flow.rescale_guidance`.
                Where a scale is embedded, that takes one more call, with 1 in its place.

        Gradient flows through all calls. Other arguments, returned tensor and errors as in `velocity`.
        """
        velocity_fn = functools.partial(self.velocity, transformer)
        return guided_velocity(velocity_fn, x_t, sigma, conditional, unconditional, scale, mode, rescale)

    guided_inputs = staticmethod(guided_inputs)  # as those who have a contract look for it

    @property
    def guidance_modes(self) -> tuple[str, ...]:
        """How this teacher can be guided, its default first: "cfg", "embedded", "both"; () if in neither way.

        A network that embeds a scale was distilled from a guided one, and its pipeline leaves classifier-free guidance
        off; guiding it twice at the same scale overdoes it. So embedded comes first where there is a choice.
        """
        cfg, embedded = self.guidance.kind != "none", self.embedded_guidance is not None
        both = ("embedded", "cfg", "both") if cfg else ("embedded",)
        return both if embedded else ("cfg",) * cfg

    def conditioning_from(self, arguments: dict[str, Any]) -> Conditioning:
        """The conditioning in the arguments of one transformer call of the pipeline."""
        batch, tensors = len(arguments[self.latent_argument]), {}
        for path, slot in self.slots.items():
            rows = slot.rows(get(arguments, path))
            rows = rows * batch if slot.kind == "shared" else rows
            tensors[path] = pad(rows)
            if slot.ragged is not None:
                tensors[path + LENGTH] = torch.tensor([row.shape[slot.ragged] for row in rows])
        if self.embedded_guidance is not None:
            name, factor = self.embedded_guidance
            tensors[EMBEDDED_GUIDANCE] = arguments[name].float() / factor
        return Conditioning(tensors)

    def rows(self, conditioning: Conditioning, path: str) -> list[Tensor]:
        """The rows of one argument, each at its own length."""
        rows, ragged = list(conditioning.tensors[path]), self.slots[path].ragged
        if ragged is None:
            return rows
        lengths = conditioning.tensors[path + LENGTH].tolist()
        return [row.narrow(ragged, 0, length) for row, length in zip(rows, lengths, strict=True)]

    def changed_constant(self, calls: Sequence[dict[str, Any]]) -> str | None:
        """The argument of one of the pipeline's transformer calls that is not what it was learned to be, if any."""
        for call in calls:
            for path in self.slots.keys() - call.keys():  # those inside other arguments
                call = put(call, path, get(self.static, path))
            for path, slot in self.repeated.items():
                value, learned = get(call, path), get(self.static, path)
                if not all(same(row, slot.rows(learned)[0]) for row in slot.rows(value)):
                    return path
                call = put(call, path, learned)
            for name, value in self.static.items():
                if not same(value, call.get(name)):
                    return name
        return None

    def changed_shape(self, calls: Sequence[dict[str, Any]]) -> str | None:
        """The argument kept per prompt that has another shape there than it was learned with, if any."""
        paths = (path for call in calls for path, slot in self.slots.items() if not slot.fits(get(call, path)))
        return next(paths, None)

    def halves(self, calls: Sequence[dict[str, Any]]) -> tuple[Conditioning, Conditioning]:
        """(conditional, unconditional) in the arguments of the transformer calls of one guided step."""
        if self.guidance.kind == "doubled":
            both = self.conditioning_from(calls[0])
            first, second = both[: len(both) // 2], both[len(both) // 2 :]
        else:
            first, second = (self.conditioning_from(call) for call in calls)
        return (first, second) if self.guidance.conditional_first else (second, first)

    def velocity_from_output(self, output: Tensor | list[Tensor]) -> Tensor:
        """Transformer output [B, *output_shape] -> velocity [B, *latent_shape], in the output's dtype."""
        output = output if isinstance(output, Tensor) else torch.stack(output)
        if self.output_part is not None:
            output = output.narrow(*self.output_part)
        return self.output_sign * output.reshape(-1, *self.latent_shape)

    def student_arguments(self, num_steps: int, sigmas: Sequence[float] | None = None) -> dict[str, Any]:
        """Arguments of the pipeline's call for a student of `num_steps` steps: no guidance, and its sigmas if given.

        Where the network's times are a table of sigma, both: from its number of steps, the pipeline would make others.
        """
        arguments = self.guidance.arguments(on=False)
        if self.embedded_guidance is not None:
            arguments[self.embedded_guidance_argument] = 1.0
        if sigmas is not None or self.time_table is not None:
            levels = few_step_sigmas(num_steps) if sigmas is None else torch.tensor(sigmas, dtype=torch.float64)
            arguments["sigmas"] = levels.tolist()
        if self.time_table is not None:
            arguments["timesteps"] = [round(time, 4) for time in self.time(levels).tolist()]
        return arguments

    def zero_output(self, arguments: dict[str, Any]) -> Any:
        """What the transformer would return for these arguments, all zeros: a velocity that moves nothing."""
        latent = arguments[self.latent_argument]
        zeros = latent[0].new_zeros(len(latent), *self.output_shape)
        zeros = list(zeros) if self.output_is_list else zeros
        if self.output_container == "object":
            return Transformer2DModelOutput(sample=zeros)
        return (zeros,) if self.output_container == "tuple" else zeros

    def as_dict(self) -> dict[str, Any]:
        """What was learned, in words and numbers that go into a log or a table."""
        return in_words(self)

    def describe(self) -> str:
        """`as_dict`, one line each."""
        lines = ((key, ", ".join(v) if isinstance(v, list) else v) for key, v in self.as_dict().items())
        return "\n".join(
            f"{key.replace('_', ' ')}: {'none' if value in (None, '') else value}" for key, value in lines
        )

    def places(self, conditioning: Conditioning) -> Tensor:
        """Where each row of a batch is among those that `velocity` hands to the transformer, call after call: [B]."""
        return torch.tensor([row for rows in self.groups(conditioning) for row in rows]).argsort()

    def groups(self, conditioning: Conditioning) -> list[list[int]]:
        """Row numbers that can share a call of the transformer."""
        keys: list[tuple] = [()] * len(conditioning)
        for path, slot in self.slots.items():
            if slot.kind == "shared":
                values = [tuple(row.flatten().tolist()) for row in self.rows(conditioning, path)]
            elif slot.kind == "tensor" and slot.ragged is not None:
                values = conditioning.tensors[path + LENGTH].tolist()
            else:
                continue
            keys = [(*key, value) for key, value in zip(keys, range(len(keys)) if self.row_by_row else values)]
        groups: dict[tuple, list[int]] = {}
        for row, key in enumerate(keys):
            groups.setdefault(key, []).append(row)
        return list(groups.values())

    def _conditioning_arguments(self, conditioning: Conditioning, device, dtype) -> dict[str, Any]:
        """Path of an argument -> its value; the embedded guidance too."""
        arguments = {}
        for path, slot in self.slots.items():
            value = slot.argument(self.rows(conditioning.to(device), path))
            if self.dtypes[path].is_floating_point:
                wanted = dtype if self.dtypes[path] == self.dtype else self.dtypes[path]
                value = [row.to(wanted) for row in value] if slot.kind == "list" else value.to(wanted)
            arguments[path] = value
        if self.embedded_guidance is not None:
            name, factor = self.embedded_guidance
            scale = factor * conditioning.tensors[EMBEDDED_GUIDANCE].to(device, torch.float32)
            arguments[name] = scale.to(self._fed(self.embedded_guidance_dtype, dtype))
        return arguments


def _moved(value, device):
    """Tensors on `device`; dicts copied, because transformers take entries out of theirs."""
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value
