# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Text to cached tensors: what a teacher's transformer is fed for a prompt, computed once."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_flowdistill.errors import UserError
from hf_flowdistill.teachers.arguments import pad
from hf_flowdistill.teachers.watch import call_arguments, call_parameters, plain_scheduler, undisturbed, watch


EMBEDDED_GUIDANCE = "embedded_guidance"
LENGTH = ".length"


@dataclass(frozen=True)
class Conditioning:
    """What the transformer is fed besides latent and time, for n prompts.

    Attributes:
        tensors: transformer argument -> [n, ...]. A transformer that embeds a guidance scale has one more entry,
            "embedded_guidance", [n] in float32, in the units of the pipeline's `guidance_scale`. An argument that is
            longer for one prompt than for another is padded with zeros, and has its lengths, [n] in int64, beside it
            under the name with ".length" appended; what the transformer is given is not padded.
    """

    tensors: dict[str, Tensor]

    def __post_init__(self):
        if len({len(tensor) for tensor in self.tensors.values()}) != 1:
            shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
            raise ValueError(f"Conditioning takes tensors with one row per prompt, not {shapes}")

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> "Conditioning":
        """Rows, always with the batch dimension kept: an integer gives one row."""
        if isinstance(index, int):
            index = [index]
        if not isinstance(index, slice):
            index = torch.as_tensor(index)
        return Conditioning(
            {k: v[index if isinstance(index, slice) else index.to(v.device)] for k, v in self.tensors.items()}
        )

    def expand(self, n: int) -> "Conditioning":
        """The single row, n times (a view). n rows are returned as they are.

        Raises:
            ValueError: there are several rows, but not n.
        """
        if len(self) == n:
            return self
        if len(self) != 1:
            raise ValueError(f"only a single row can be expanded to {n}, not {len(self)}")
        return Conditioning({k: v.expand(n, *v.shape[1:]) for k, v in self.tensors.items()})

    def to(self, device=None, dtype: torch.dtype | None = None) -> "Conditioning":
        """Moved and cast; only floating tensors change dtype, and the embedded guidance stays in float32."""

        def moved(name, tensor):
            cast = dtype is not None and tensor.is_floating_point() and name != EMBEDDED_GUIDANCE
            return tensor.to(device=device, dtype=dtype if cast else tensor.dtype)

        return Conditioning({k: moved(k, v) for k, v in self.tensors.items()})

    def with_embedded_guidance(self, value: float) -> "Conditioning":
        """The same with another embedded guidance scale; unchanged for a transformer that embeds none."""
        if EMBEDDED_GUIDANCE not in self.tensors:
            return self
        replaced = torch.full_like(self.tensors[EMBEDDED_GUIDANCE], value)
        return Conditioning({**self.tensors, EMBEDDED_GUIDANCE: replaced})

    @staticmethod
    def cat(parts: Iterable["Conditioning"]) -> "Conditioning":
        """All rows of `parts`, in order.

        Raises:
            ValueError: the parts have different arguments, or rows of different shapes and no lengths.
        """
        parts = list(parts)
        ragged = {name.removesuffix(LENGTH) for name in parts[0].tensors if name.endswith(LENGTH)}
        for part in parts:
            for name, tensor in part.tensors.items():
                if part.tensors.keys() != parts[0].tensors.keys():
                    raise ValueError(f"cannot join {sorted(parts[0].tensors)} with {sorted(part.tensors)}")
                if name not in ragged and tensor.shape[1:] != parts[0].tensors[name].shape[1:]:
                    shapes = tuple(parts[0].tensors[name].shape[1:]), tuple(tensor.shape[1:])
                    raise ValueError(f"cannot join rows of '{name}' of shapes {shapes[0]} and {shapes[1]}")

        def joined(name):
            tensors = [part.tensors[name] for part in parts]
            if len({tensor.shape[1:] for tensor in tensors}) == 1:
                return torch.cat(tensors)
            return pad([row for tensor in tensors for row in tensor])

        return Conditioning({name: joined(name) for name in parts[0].tensors})


def encode_prompts(
    pipeline, contract, prompts: Sequence[str], *, negative_prompt: str = "", batch_size: int = 16
) -> tuple[Conditioning, Conditioning]:
    """What the teacher's transformer would be fed for each prompt, and for no prompt: (conditional, unconditional).

    Runs the pipeline's own call, `batch_size` prompts at a time, without its transformer; so templates, masks and
    padding are the pipeline's. `conditional` has one row per prompt. `unconditional` is a single row, from a guided
    call with `negative_prompt`; for a pipeline without classifier-free guidance it is `negative_prompt` encoded as a
    prompt. Both lie on the CPU, in the dtype that the pipeline gives them. The pipeline is left as it was.

    Prompts go one at a time (whatever `batch_size`) where a prompt's embedding would otherwise depend on the others of
    its batch, by padding for instance: what counts is what the pipeline feeds for the prompt alone.

    Raises:
        UserError: there are no prompts, something in the list is not a string, the pipeline takes no negative prompt,
            or an argument that was learned to be constant is another one for one of the prompts.
    """
    if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise UserError("encode_prompts takes a list with at least one prompt, each a string.")
    if negative_prompt and contract.guidance.kind != "none" and "negative_prompt" not in call_parameters(pipeline):
        raise UserError(f"{contract.pipeline_class} takes no negative prompt: leave it empty.")
    batch_size = batch_size if contract.prompts_at_once else 1
    chunks = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    with undisturbed(pipeline):
        conditional = [contract.conditioning_from(_capture(pipeline, contract, chunk)[0]) for chunk in chunks]
        if contract.guidance.kind == "none":
            unconditional = contract.conditioning_from(_capture(pipeline, contract, [negative_prompt])[0])
        else:
            # For the negative prompt as the prompt too: the pipeline may pad the shorter of the two to the longer.
            calls = _capture(pipeline, contract, [negative_prompt], negative_prompt)
            _, unconditional = contract.halves(calls)
            unconditional = _same_embedded_guidance(unconditional, conditional[0])
    return Conditioning.cat(part.to("cpu") for part in conditional), Conditioning.cat([unconditional.to("cpu")])


def _same_embedded_guidance(unconditional: Conditioning, conditional: Conditioning) -> Conditioning:
    """Where one number is both the scale of classifier-free guidance and embedded, the value for "off" is meant."""
    if EMBEDDED_GUIDANCE not in conditional.tensors:
        return unconditional
    return unconditional.with_embedded_guidance(conditional.tensors[EMBEDDED_GUIDANCE][0].item())


def _capture(pipeline, contract, prompts, negative_prompt=None):
    """The arguments of the transformer calls of one step; guided if there is a negative prompt."""
    guided = negative_prompt is not None
    arguments = call_arguments(
        pipeline,
        prompts,
        height=contract.height,
        width=contract.width,
        pipeline_kwargs=contract.pipeline_kwargs,
        negative_prompt=negative_prompt,
        num_inference_steps=1,
        output_type="latent",
        **contract.guidance.arguments(on=guided),
    )
    (step,), _ = watch(
        pipeline, arguments, scheduler=plain_scheduler(pipeline), stub=contract.zero_output, guided=guided
    )
    calls = [call.arguments for call in step.calls]
    changed = contract.changed_constant(calls)
    if changed is not None:
        raise UserError(
            f"{contract.pipeline_class}: its transformer's argument {changed} is another one for the prompt "
            f"{prompts[0]!r} than for those it was learned with: leave that prompt out."
        )
    return calls
