# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Whether a pipeline guides alike in all of its steps: three watched ones do not show where guidance begins or ends.

A student is trained at all noise levels with one guidance, so a pipeline that guides otherwise in some of them is
refused, by the name of the argument that makes it do so, if leaving one out helps.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from hf_flowdistill.errors import UserError
from hf_flowdistill.teachers.contract import Contract
from hf_flowdistill.teachers.inference import refuse, relative_error
from hf_flowdistill.teachers.replay import half_velocities
from hf_flowdistill.teachers.watch import Step, call_arguments, first_output, own_scheduler, watch


STEPS = 100  # so that what acts in a fiftieth of the way is seen


class GuidedSteps:
    """The guided steps of a pipeline's call, without its transformer, which costs little.

    Args:
        contract: of the pipeline without guidance, whose argument for it is known.
        prompts, negative_prompt: of the call.
    """

    def __init__(self, pipeline, contract: Contract, prompts: list[str], negative_prompt: str):
        self.pipeline, self.contract = pipeline, contract
        self.prompts, self.negative_prompt = prompts, negative_prompt
        self.steps = self._watch(contract.pipeline_kwargs)

    def check_calls(self) -> None:
        """Refuse a pipeline that calls its transformer in another way in some of the steps."""
        self._check("calls its transformer in another way", _unlike)

    def check_scale(self, contract: Contract, tolerance: float) -> bool:
        """Whether the halves are combined as plain guidance in all steps; refuse where an argument prevents it.

        Args:
            contract: the same with guidance, plain in the steps that were seen.
        """
        scale = contract.guidance.watched_scale

        def otherwise(steps):
            combined = (
                (_guide(*half_velocities(contract, step), scale), step.model_output.double()) for step in steps
            )
            return sum(not relative_error(ours, its) <= tolerance for ours, its in combined)

        return not self._check("guides at another scale", otherwise, always=False)

    def _check(self, does: str, count: Callable[[list[Step]], int], *, always: bool = True) -> int:
        """How many steps are otherwise; refuse if that comes of an argument, or `always`."""
        otherwise, kwargs = count(self.steps), self.contract.pipeline_kwargs
        if not otherwise:
            return 0
        name, where = self.contract.pipeline_class, f"in {otherwise} of {STEPS} steps"
        for argument in kwargs:
            rest = {key: value for key, value in kwargs.items() if key != argument}
            try:
                helps = not count(self._watch(rest))
            except (UserError, RuntimeError, ValueError, TypeError):  # it cannot do without
                continue
            if helps:
                raise UserError(
                    f"{name} {does} under guidance {where}, which comes of {argument}, but a student is trained with "
                    f"one guidance at all noise levels: leave {argument} out of --pipeline_kwargs."
                )
        if always:
            refuse(name, f"under guidance it {does} {where}")
        return otherwise

    def _watch(self, pipeline_kwargs: dict[str, Any]) -> list[Step]:
        contract, generator = self.contract, torch.Generator().manual_seed(0)
        arguments = call_arguments(
            self.pipeline,
            self.prompts,
            height=contract.height,
            width=contract.width,
            pipeline_kwargs=pipeline_kwargs,
            negative_prompt=self.negative_prompt,
            num_inference_steps=STEPS,
            output_type="latent",
            **contract.guidance.arguments(on=True),
        )

        def noise(given):
            output = contract.zero_output(given)
            for zeros in first_output(output):  # row by row, of a tensor or of a list
                zeros.copy_(torch.randn(zeros.shape, generator=generator))
            return output

        return watch(
            self.pipeline,
            arguments,
            scheduler=own_scheduler(self.pipeline),
            stub=noise,
            guided=True,
            keep=lambda given: {"rows": len(given[contract.latent_argument])},
        )[0]


def _unlike(steps: list[Step]) -> int:
    """How many steps make other calls of the transformer than most of them."""
    kinds = Counter(tuple(call.arguments["rows"] for call in step.calls) for step in steps)
    return len(steps) - kinds.most_common(1)[0][1]


def _guide(unconditional, conditional, scale):
    unconditional, conditional = unconditional.double(), conditional.double()
    return unconditional + scale * (conditional - unconditional)
