# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The contract against the steps that it was learned from: how far off it is, and where."""

from dataclasses import replace

import torch

from hf_flowdistill.flow import guide
from hf_flowdistill.teachers.conditioning import Conditioning
from hf_flowdistill.teachers.contract import Contract
from hf_flowdistill.teachers.inference import as_batch, relative_error, same
from hf_flowdistill.teachers.watch import Step


def half_velocities(contract: Contract, step: Step):
    """(unconditional, conditional) velocity of a guided step, from the transformer's own outputs."""
    outputs = [as_batch(call.output) for call in step.calls]
    outputs = outputs[0].chunk(2) if contract.guidance.kind == "doubled" else outputs
    velocities = [contract.velocity_from_output(output) for output in outputs]
    return velocities[::-1] if contract.guidance.conditional_first else velocities


def with_recorded_times(contract: Contract, steps: list[Step]) -> Contract:
    """`contract` with the times of `steps` in the place of its own: what it is, in low precision, is not held against
    how a pipeline rounds its times, which `inference.find_time_map` has looked at."""
    fed = {step.sigma: step.calls[0].arguments[contract.time_argument].flatten()[0].double().item() for step in steps}
    sigmas = sorted(fed)
    times = torch.tensor([fed[sigma] for sigma in sigmas], dtype=torch.float64)
    return replace(contract, time_table=(torch.tensor(sigmas, dtype=torch.float64), times))


def replay_errors(transformer, contract: Contract, steps, guided_steps) -> dict[str, float]:
    """Largest relative errors of replaying all steps side by side, at their different sigmas; NaN if one is."""

    def together(steps):
        samples = torch.cat([step.sample for step in steps])
        sigma = torch.tensor([step.sigma for step in steps])
        return transformer, samples, sigma.to(samples.device)

    rows = Conditioning.cat(contract.conditioning_from(step.calls[0].arguments) for step in steps)
    expected = torch.cat([step.model_output for step in steps])
    errors = {"unguided": relative_error(contract.velocity(*together(steps), rows), expected)}
    if not guided_steps:
        return errors
    halves = [contract.halves([call.arguments for call in step.calls]) for step in guided_steps]
    conditional, unconditional = (Conditioning.cat(half) for half in zip(*halves, strict=True))
    scale = contract.guidance.watched_scale
    expected = torch.cat([guide(*half_velocities(contract, step), scale) for step in guided_steps])
    replayed = contract.guided_velocity(*together(guided_steps), conditional, unconditional, scale)
    return {**errors, "guided": relative_error(replayed, expected)}


def what_does_not_fit(
    transformer, contract: Contract, steps: list[Step], errors: dict[str, float], tolerance: float
) -> str:
    """The first difference between the pipeline's own transformer calls and the contract's, in words."""
    for step in steps:
        own = step.calls[0].arguments
        sigma, conditioning = torch.tensor([step.sigma], device=step.sample.device), contract.conditioning_from(own)
        arguments = contract.transformer_arguments(step.sample, sigma, conditioning, contract.dtype)
        for name, value in own.items():
            replayed = arguments.get(name)
            if name == contract.time_argument:
                value = value.flatten()[:1].float()  # it may have no batch dimension there
            if not same(value, replayed, tolerance):
                return f"{name} is not what the pipeline feeds at sigma {step.sigma:.3f}"
        error = relative_error(contract.velocity(transformer, step.sample, sigma, conditioning), step.model_output)
        if not error <= tolerance:
            return f"the output at sigma {step.sigma:.3f} is not what it is taken for (relative error {error:.1e})"
    if not errors["unguided"] <= tolerance:
        return "each sample fits alone, but not beside others at other sigmas or with other prompts"
    return "the unguided calls fit, but not the two halves of guidance together"


def distance(contract: Contract, a: Conditioning, b: Conditioning) -> float:
    """Largest relative difference of two conditionings; the embedded guidance aside. inf for other shapes."""
    pairs = ((x, y) for path in contract.slots for x, y in zip(contract.rows(a, path), contract.rows(b, path)))
    return max(relative_error(x, y) for x, y in pairs)
