# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Text to cached tensors: what a teacher's transformer is fed for a prompt, computed once."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_flowdistill.errors import UserError, first_line
from hf_flowdistill.teachers.arguments import pad
from hf_flowdistill.teachers.finite import has_nan
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

    @property
    def nbytes(self) -> int:
        """Bytes of all rows together."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

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

        Where texts differ in length, the shorter rows are filled up with zeros at their end. Their lengths are beside
        them, or they have a mask, which is filled up too: an argument [n, length] of zeros and ones, as long as the
        text in every part. Without either nothing is filled up: the transformer would take the zeros for text.

        Raises:
            ValueError: the parts have different arguments, or rows of different shapes with neither lengths nor mask.
        """
        parts = list(parts)
        for part in parts:
            if part.tensors.keys() != parts[0].tensors.keys():
                raise ValueError(f"cannot join {sorted(parts[0].tensors)} with {sorted(part.tensors)}")
        columns = {name: [part.tensors[name] for part in parts] for name in parts[0].tensors}
        uneven = {name: column for name, column in columns.items() if len({t.shape[1:] for t in column}) > 1}
        mask_lengths = [[len(t[0]) for t in column] for column in uneven.values() if all(map(_is_mask, column))]
        for name, column in uneven.items():
            known = name + LENGTH in columns
            columns[name] = [pad([r for t in column for r in t])] if known else _padded(name, column, mask_lengths)
        return Conditioning({name: torch.cat(column) for name, column in columns.items()})


def _is_mask(tensor: Tensor) -> bool:
    """[n, length], zeros and ones, no row without a one."""
    return tensor.ndim == 2 and bool(((tensor == 0) | (tensor == 1)).all() and tensor.any(1).all())


def _padded(name: str, column: list[Tensor], mask_lengths: list[list[int]]) -> list[Tensor]:
    """The tensors of one argument, made as long as the longest of them; its lengths must be those of a mask."""
    if len({tensor.ndim for tensor in column}) == 1:
        uneven = [dim for dim in range(1, column[0].ndim) if len({tensor.shape[dim] for tensor in column}) > 1]
        lengths = [tensor.shape[uneven[0]] for tensor in column]
        if len(uneven) == 1 and lengths in mask_lengths:
            after = (0, 0) * (column[0].ndim - 1 - uneven[0])
            return [F.pad(tensor, (*after, 0, max(lengths) - n)) for tensor, n in zip(column, lengths)]
    shapes = sorted({tuple(tensor.shape[1:]) for tensor in column})
    raise ValueError(f"cannot join rows of '{name}' of shapes {shapes[0]} and {shapes[1]}: no mask has their lengths")


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
            or, with the prompt in the message, the pipeline fails for one of them or feeds its transformer another
            constant or another shape than those that were learned.
    """
    if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise UserError("encode_prompts takes a list with at least one prompt, each a string.")
    if negative_prompt and contract.guidance.kind != "none" and "negative_prompt" not in call_parameters(pipeline):
        raise UserError(f"{contract.pipeline_class} takes no negative prompt: leave it empty.")
    chunks = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    conditional = Conditioning.cat([encode_batch(pipeline, contract, chunk) for chunk in chunks])
    return conditional, encode_unconditional(pipeline, contract, negative_prompt)


def encode_batch(pipeline, contract, prompts: Sequence[str]) -> Conditioning:
    """The conditional rows of `encode_prompts`, [len(prompts)], for as many prompts as the encoders take at once."""
    chunks = [prompts] if contract.prompts_at_once else [[prompt] for prompt in prompts]
    with undisturbed(pipeline):
        parts = [contract.conditioning_from(_capture(pipeline, contract, chunk)[0]) for chunk in chunks]
    return Conditioning.cat([part.to("cpu") for part in parts])


def encode_unconditional(pipeline, contract, negative_prompt: str = "") -> Conditioning:
    """The unconditional row of `encode_prompts`."""
    if negative_prompt and contract.guidance.kind != "none" and "negative_prompt" not in call_parameters(pipeline):
        raise UserError(f"{contract.pipeline_class} takes no negative prompt: leave it empty.")
    as_prompt = encode_batch(pipeline, contract, [negative_prompt])
    if contract.guidance.kind == "none":
        return as_prompt
    with undisturbed(pipeline):
        # For the negative prompt as the prompt too: the pipeline may pad the shorter of the two to the longer.
        _, unconditional = contract.halves(_capture(pipeline, contract, [negative_prompt], negative_prompt))
    unconditional = Conditioning.cat([unconditional.to("cpu")])  # a copy: half of a doubled batch keeps all of it
    if EMBEDDED_GUIDANCE not in unconditional.tensors:
        return unconditional
    # Where one number is both the scale of classifier-free guidance and embedded, the value for "off" is meant.
    return unconditional.with_embedded_guidance(as_prompt.tensors[EMBEDDED_GUIDANCE][0].item())


def bytes_per_prompt(pipeline, contract, prompt: str = "a photograph of a cat") -> int:
    """How many bytes the conditioning of `prompt` takes: the same for every prompt of a fixed text length."""
    return encode_batch(pipeline, contract, [prompt]).nbytes


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
    scheduler = plain_scheduler(pipeline)
    try:
        (step,), _ = watch(pipeline, arguments, scheduler=scheduler, stub=contract.zero_output, guided=guided)
    except (UserError, torch.OutOfMemoryError):
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        calls, problem = [], f"it fails ({first_line(error)})"
    else:
        calls = [call.arguments for call in step.calls]
        problem = _unlike_learned(contract, calls)
    if problem is None:
        return calls
    if len(prompts) > 1:
        for prompt in prompts:  # to find the one
            _capture(pipeline, contract, [prompt], negative_prompt)
    raise UserError(
        f"{contract.pipeline_class}: {problem} for the prompt {prompts[0]!r}, unlike for those it was learned with: "
        "leave that prompt out."
    )


def _unlike_learned(contract, calls) -> str | None:
    """What is not as it was when the contract was learned, in words."""
    overflowing = next((name for call in calls for name, value in call.items() if has_nan(value)), None)
    if overflowing is not None:
        return f"its text encoders make NaN ({overflowing}), as float16 does where numbers are large,"
    constant = contract.changed_constant(calls)
    if constant is not None:
        return f"its transformer's argument {constant} is another one"
    argument = contract.changed_shape(calls)
    return None if argument is None else f"its transformer's argument {argument} has another shape"
