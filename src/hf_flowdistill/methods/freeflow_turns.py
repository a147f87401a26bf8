# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The two turns of FreeFlow: prediction and correction of the generator, and the fake score. FreeFlow Sec. 4."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_flowdistill import flow
from hf_flowdistill.errors import UserError, first_line
from hf_flowdistill.flow.jumps import land, noisier, step_velocity
from hf_flowdistill.losses import freeflow as losses
from hf_flowdistill.losses.sid import fake_score_loss, x0_statistics
from hf_flowdistill.networks.flow_map import GUIDANCE, JUMP, velocity
from hf_flowdistill.networks.roles import Networks
from hf_flowdistill.teachers.conditioning import EMBEDDED_GUIDANCE, Conditioning


@dataclass(frozen=True)
class FreeFlowConfig:
    """The method's settings, as its arguments have them, and what they come to in one update.

    Attributes:
        confident_level: the least noise level at which the teacher is asked in the prediction.
        corrects: whether the correction has a gradient.
        balance: lambda, its weight.
    """

    derivative: str = "difference"
    num_jumps: int | None = 8
    solver: str | None = "heun"
    jump_mean: float | None = 0.0
    jump_std: float | None = 1.0
    jump_zeros: float | None = 0.1
    prediction_decay: float | None = 1.0
    correction_sigma_mean: float | None = 0.8
    correction_sigma_std: float | None = 1.6
    guidance_interval: float | None = 0.5
    guidance_range: tuple[float, float] = (1.0, 2.0)
    guidance_mode: str | None = None
    confident_level: float = 0.0
    corrects: bool = True
    balance: float = 1.0


@dataclass
class Part:
    """What a turn draws for the samples of one objective, n of them.

    Attributes:
        conditional, unconditional: Conditioning, n rows and one.
        z: the noise that is jumped from, [n, ...].
        guidance: of the teacher, [n].
        noise: of the teacher's or the fake score's x_t, [n, ...].
        sigma: of the same, [n]; in the prediction, how far the jump is, 1 - sigma.
    """

    conditional: Any
    unconditional: Any
    z: Tensor
    guidance: Tensor
    noise: Tensor
    sigma: Tensor

    def told(self, jump: Tensor) -> dict[str, Tensor]:
        return {JUMP: jump, GUIDANCE: self.guidance}


@dataclass
class FreeFlowBatch:
    """A micro-batch; a part without samples is None.

    Attributes:
        rows: how many samples it has, some of which may have nothing to do in this turn.
        number: of the micro-batch in the update.
        share: of the correction, among all samples of the update.
        x0: what the generator has made of the correction's samples, which `generator_turn` leaves here.
    """

    rows: int
    number: int
    share: float
    prediction: Part | None
    correction: Part | None
    x0: Tensor | None = None


def generator_turn(networks: Networks, contract, batch: FreeFlowBatch, config: FreeFlowConfig):
    """The generator's loss on a micro-batch: (scalar, metrics of detached scalars). FreeFlow Eq. 9 and 11.

    Both are the micro-batch's share of the update's: their means over micro-batches of equally many samples are those
    over all samples, of a metric over all of its objective.
    """
    total, metrics = _nothing(networks.generator, batch), {}
    if batch.share < 1:
        metrics |= dict.fromkeys(("prediction_gap", "prediction_weighted_gap"), 0.0)
    if batch.share > 0:
        metrics |= dict.fromkeys(("x0_mean", "x0_square", "x0_peak"), 0.0)
        metrics |= {"correction_gap": 0.0} if config.corrects else {}
    if batch.prediction is not None:
        found, gap = predict(networks, contract, batch.prediction, config)
        weighted = losses.power_law(gap, config.prediction_decay)
        total = total + losses.gap_loss(found, weighted).sum() / batch.rows
        share = (1 - batch.share) * batch.rows
        metrics["prediction_gap"] = losses.norms(gap).sum() / share
        metrics["prediction_weighted_gap"] = losses.norms(weighted).sum() / share
    if batch.correction is not None:
        part, share = batch.correction, batch.share * batch.rows
        with torch.set_grad_enabled(config.corrects):
            found = jump_to_end(networks.generator, contract, part)
        batch.x0 = land(part.z, found.detach(), torch.ones_like(part.sigma))
        if config.corrects:
            gap = correct(networks, contract, part, batch.x0, config)
            total = total + config.balance * losses.gap_loss(found, gap).sum() / batch.rows
            metrics["correction_gap"] = losses.norms(gap).sum() / share
        statistics = x0_statistics(batch.x0)
        statistics["square"] = statistics.pop("std") ** 2 + statistics["mean"] ** 2
        metrics |= {f"x0_{name}": value * len(batch.x0) / share for name, value in statistics.items()}
    return total, {name: torch.as_tensor(value, device=total.device).detach() for name, value in metrics.items()}


def fake_score_turn(networks: Networks, contract, batch: FreeFlowBatch, config: FreeFlowConfig):
    """The fake score's loss on what the generator has made, FreeFlow Eq. 12. See `generator_turn`."""
    if batch.correction is None:
        nothing = _nothing(networks.fake_score, batch)
        return nothing, {"fake_score_error": nothing.detach()}
    part, share = batch.correction, len(batch.x0) / (batch.share * batch.rows)
    found = noising_velocity(networks.fake_score, contract, part, flow.add_noise(batch.x0, part.noise, part.sigma))
    loss, metrics = fake_score_loss(found, batch.x0, part.noise)
    return loss * share, {name: value * share for name, value in metrics.items()}


def _nothing(network, batch: FreeFlowBatch) -> Tensor:
    """A loss of 0, as of a micro-batch without samples. In the first of an update it gives all whole parameters of the
    network a gradient, so that a process without any sample of an objective has gradients as the others have."""
    device = (batch.correction or batch.prediction).z.device if batch.correction or batch.prediction else None
    trained = [p for p in network.parameters() if p.requires_grad and not isinstance(p, DTensor)]
    nothing = torch.zeros((), device=device or next(network.parameters()).device, requires_grad=True)
    if batch.number == 0 and batch.prediction is None:
        nothing = nothing + sum(0 * parameter.flatten()[0].to(nothing.device) for parameter in trained)
    return nothing


def predict(networks: Networks, contract, part: Part, config: FreeFlowConfig) -> tuple[Tensor, Tensor]:
    """(V, with its graph, and its gap to the teacher) for the samples of the prediction. FreeFlow Eq. 13 and 14."""
    noisy, student = torch.ones_like(part.sigma), networks.generator
    conditional = part.conditional.with_embedded_guidance(1.0)

    def average(jump):
        return velocity(student, contract, part.z, noisy, conditional, **part.told(jump))

    def teacher(x_t, sigma):
        x_t, sigma = noisier(x_t, part.noise, sigma, config.confident_level), sigma.clamp(min=config.confident_level)
        return guided(networks.teacher, contract, part, x_t, sigma, part.guidance, config)

    # The pass with a graph comes first: autocast keeps the copies that it makes of the weights.
    before = 1 - part.sigma
    if config.derivative == "jvp":
        found = average(before)
        with torch.no_grad():
            slope = derivative_in_jump(average, before)
            there = teacher(land(part.z, found, before), part.sigma)
        return found, losses.continuous_gap(found, slope, there, before)
    length = torch.full_like(before, 1 / config.num_jumps)
    found = average(before + length)
    with torch.no_grad():
        found_before = average(before)
        there = step_velocity(teacher, land(part.z, found_before, before), part.sigma, length, config.solver)
    return found, losses.discrete_gap(found, found_before, there, before + length, before)


def derivative_in_jump(average, jump: Tensor) -> Tensor:
    """Of `average`, jump [B] -> velocity [B, ...]."""
    return forward_derivative(average, jump, torch.ones_like(jump))


def forward_derivative(function, at: Tensor, direction: Tensor) -> Tensor:
    """Of `function` at a tensor, in a direction of its shape: by forward differentiation, which attention kernels
    lack."""
    with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        found = function(forward_ad.make_dual(at, direction))
        tangent = forward_ad.unpack_dual(found).tangent
        return torch.zeros_like(found) if tangent is None else tangent.clone()


@torch.no_grad()
def check_derivative(network, contract, z: Tensor, conditional, step: float = 0.05) -> None:
    """Refuse a network that cannot be differentiated forwards, or only wrongly, as some layers of other libraries.

    Its derivative at noise z in the direction of z is held against a central difference.

    Raises:
        UserError: it fails, or is off by more than a fifth, which is more than low precision makes.
    """

    def predict(x_t):
        return contract.velocity(network, x_t, torch.ones(len(z), device=z.device), conditional)

    try:
        found = forward_derivative(predict, z, z)
    except (NotImplementedError, RuntimeError) as error:
        found, told = None, first_line(error)
    if found is not None:
        expected = (predict(z + step * z) - predict(z - step * z)) / (2 * step)
        difference = ((found - expected).norm() / expected.norm()).item()
        told = f"relative difference {difference:.1e}"
    if found is None or not difference < 0.2:
        raise UserError(
            f"{contract.transformer_class} cannot be differentiated forwards as it runs here ({told}): choose "
            "--derivative difference."
        )


def jump_to_end(network, contract, part: Part) -> Tensor:
    """V(z, 1), [n, ...]."""
    ones = torch.ones_like(part.sigma)
    return velocity(network, contract, part.z, ones, part.conditional.with_embedded_guidance(1.0), **part.told(ones))


@torch.no_grad()
def correct(networks: Networks, contract, part: Part, x0: Tensor, config: FreeFlowConfig) -> Tensor:
    """The gap between the velocities of the fake score and of the teacher, guided up to a noise level."""
    x_t = flow.add_noise(x0, part.noise, part.sigma)
    fake = noising_velocity(networks.fake_score, contract, part, x_t)
    scale = torch.where(part.sigma <= config.guidance_interval, part.guidance, torch.ones_like(part.guidance))
    return losses.correction_gap(fake, guided(networks.teacher, contract, part, x_t, part.sigma, scale, config))


def noising_velocity(network, contract, part: Part, x_t: Tensor) -> Tensor:
    """Of the fake score, which is told the guidance that the student was given."""
    conditional = part.conditional.with_embedded_guidance(1.0)
    return velocity(network, contract, x_t, part.sigma, conditional, **{GUIDANCE: part.guidance})


def guided(network, contract, part: Part, x_t, sigma, scale: Tensor, config: FreeFlowConfig) -> Tensor:
    """The teacher's velocity, every sample with a scale of its own; see `Contract.guided_velocity`."""
    if config.guidance_range == (1.0, 1.0):
        return contract.velocity(network, x_t, sigma, part.conditional.with_embedded_guidance(1.0))
    if config.guidance_mode == "embedded":
        return contract.velocity(network, x_t, sigma, _embedding(part.conditional, scale))
    inputs = contract.guided_inputs(x_t, sigma, part.conditional, part.unconditional, 0.0, "cfg")
    if config.guidance_mode == "both":
        inputs = *inputs[:2], _embedding(inputs[2], torch.cat([scale, scale]))
    return flow.guide(*contract.velocity(network, *inputs).chunk(2), flow.expand_like(scale, x_t))


def _embedding(conditioning: Conditioning, scale: Tensor) -> Conditioning:
    tensors = conditioning.expand(len(scale)).tensors
    own = tensors[EMBEDDED_GUIDANCE]
    return Conditioning({**tensors, EMBEDDED_GUIDANCE: scale.to(own.device, own.dtype)})
