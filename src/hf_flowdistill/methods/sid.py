# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Score identity distillation with long-and-short guidance: the two turns of SiD-DiT (Sec. 3)."""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from hf_flowdistill import flow
from hf_flowdistill.errors import UserError
from hf_flowdistill.flow.draws import draw_k
from hf_flowdistill.flow.timesteps import sigma_from_normal
from hf_flowdistill.losses.sid import fake_score_loss, sid_generator_loss
from hf_flowdistill.methods.method import Method, Samples, Update, generate_x0
from hf_flowdistill.methods.reference import measure_on_samples
from hf_flowdistill.methods.sid_arguments import check_negative_prompt
from hf_flowdistill.networks.roles import Networks


SCALES = "teacher_guidance_scale", "fake_guidance_scale", "fake_train_guidance_scale"


@dataclass(frozen=True)
class SiDConfig:
    """The method's settings; the defaults are the paper's.

    Attributes:
        num_steps: sampler steps of the generator.
        sigmas: their noise levels, `num_steps` numbers that fall from 1; None is `few_step_sigmas(num_steps)`.
        noise_type: "fresh", "fixed" or "ddim"; see `rollout`.
        alpha: weight of the second term of the generator loss; 1 gives Eq. 18.
        weighting: name of w(sigma), see `weighting.WEIGHTINGS`.
        loss_scale: lambda_sid, a factor on the generator loss.
        teacher_guidance_scale: guidance of the teacher in the generator loss; 1 = off.
        fake_guidance_scale: guidance of the fake score in the generator loss; 1 = off.
        fake_train_guidance_scale: guidance inside the fake score's own regression; 1 = off.
        guidance_rescale: of the teacher in the generator loss, in [0, 1]; 0 = off, see `flow.rescale_guidance`.
        guidance_mode: of the teacher, "cfg", "embedded" or "both"; see `Contract.guided_velocity`.
        fake_guidance_mode: the same of the fake score, in both places.
    """

    num_steps: int = 4
    sigmas: Sequence[float] | None = None
    noise_type: str = "fresh"
    alpha: float = 1.0
    weighting: str = "1-sigma"
    loss_scale: float = 100.0
    teacher_guidance_scale: float = 4.5
    fake_guidance_scale: float = 4.5
    fake_train_guidance_scale: float = 4.5
    guidance_rescale: float = 0.0
    guidance_mode: str = "cfg"
    fake_guidance_mode: str = "cfg"


@dataclass
class SiDBatch:
    """Everything random that one turn needs for B samples, already drawn.

    Attributes:
        conditional: Conditioning of the prompts, B rows.
        unconditional: Conditioning of the negative prompt, one row or B.
        k: the sampler step whose x0 is used, in 1..num_steps.
        noises: i -> noise of sampler step i (from 0), [B, ...].
        sigma: noise level of the loss, [B], in (0, 1).
        noise: noise of the loss, [B, ...].
        x0: what the generator makes of `noises`, [B, ...], without graph; `generator_turn` leaves it here, and
            `fake_score_turn` takes it where it is given, instead of running the generator again.
    """

    conditional: Any
    unconditional: Any
    k: int
    noises: Callable[[int], Tensor]
    sigma: Tensor
    noise: Tensor
    x0: Tensor | None = None


def generate(networks: Networks, contract, batch: SiDBatch, config: SiDConfig) -> Tensor:
    """`generate_x0` of a batch."""
    return generate_x0(
        networks.generator,
        contract,
        batch.conditional,
        batch.noises,
        k=batch.k,
        num_steps=config.num_steps,
        noise_type=config.noise_type,
        sigmas=config.sigmas,
    )


def fake_score_turn(networks: Networks, contract, batch: SiDBatch, config: SiDConfig):
    """The fake score's loss on what the generator makes: (scalar, metrics of detached scalars).

    Gradient reaches `networks.fake_score` alone, through both halves of its guided prediction; the generator runs
    without a graph, or not at all if `batch.x0` is there.
    """
    with torch.no_grad():
        x0 = generate(networks, contract, batch, config) if batch.x0 is None else batch.x0
        x_t = flow.add_noise(x0, batch.noise, batch.sigma)
    velocity_fake = contract.guided_velocity(
        networks.fake_score,
        x_t,
        batch.sigma,
        batch.conditional,
        batch.unconditional,
        config.fake_train_guidance_scale,
        config.fake_guidance_mode,
    )
    return fake_score_loss(velocity_fake, x0, batch.noise)


def generator_turn(networks: Networks, contract, batch: SiDBatch, config: SiDConfig):
    """The generator's loss, SiD-DiT Eq. 18: (scalar, metrics of detached scalars).

    Gradient flows through x0 directly and through x_t into the inputs of the teacher and of the fake score, whose
    parameters the caller has frozen (`Networks.training("generator")`).
    """

    x0, x_t = generate_noised(networks, contract, batch, config)
    x0_teacher = flow.x0_from_velocity(x_t, teacher_velocity(networks, contract, batch, config, x_t), batch.sigma)
    velocity_fake = contract.guided_velocity(networks.fake_score, *fake_inputs(batch, config, x_t))
    x0_fake = flow.x0_from_velocity(x_t, velocity_fake, batch.sigma)
    return distillation_loss(x0, x0_teacher, x0_fake, batch, config)


def generate_noised(networks: Networks, contract, batch: SiDBatch, config: SiDConfig) -> tuple[Tensor, Tensor]:
    """x0 of the generator, with its graph, and x_t, its noised form; without graph x0 stays in the batch."""
    x0 = generate(networks, contract, batch, config)
    batch.x0 = x0.detach()
    return x0, flow.add_noise(x0, batch.noise, batch.sigma)


def teacher_velocity(networks: Networks, contract, batch: SiDBatch, config: SiDConfig, x_t: Tensor) -> Tensor:
    """The guided teacher's, [B, ...], of the generator's loss."""
    return contract.guided_velocity(
        networks.teacher,
        *(x_t, batch.sigma, batch.conditional, batch.unconditional),
        *(config.teacher_guidance_scale, config.guidance_mode, config.guidance_rescale),
    )


def fake_inputs(batch: SiDBatch, config: SiDConfig, x_t: Tensor) -> tuple:
    """What the guided fake score is given in the generator's loss, as `Contract.guided_velocity` takes it."""
    conditioning = batch.conditional, batch.unconditional
    return x_t, batch.sigma, *conditioning, config.fake_guidance_scale, config.fake_guidance_mode


def distillation_loss(x0: Tensor, x0_teacher: Tensor, x0_fake: Tensor, batch: SiDBatch, config: SiDConfig):
    """`sid_generator_loss`, with the batch's sigma and the settings' weights."""
    return sid_generator_loss(
        x0,
        x0_teacher,
        x0_fake,
        batch.sigma,
        alpha=config.alpha,
        weighting=config.weighting,
        scale=config.loss_scale,
    )


class SiD(Method):
    """SiD-DiT's data-free stage: the fake score's turn, then the generator's."""

    progress = (
        "gap {x0_gap:.4f}",
        "shift {latent_shift:+.2f}",
        "spread {latent_spread:.2f}",
        "lag {fake_score_lag:.2f}",
    )
    kind = SiDConfig

    def __init__(self, args):
        super().__init__(args)
        self.config = self.kind(**{field.name: getattr(args, field.name) for field in fields(self.kind)})

    def settle(self, pipeline, contract) -> None:
        if self.args.sigmas and "sigmas" not in inspect.signature(pipeline.__call__).parameters:
            raise UserError(
                f"{contract.pipeline_class} takes no sigmas in its call, so a student of it could not be given them: "
                "leave out --sigmas."
            )
        if not contract.guidance_modes:
            check_unguided(contract.pipeline_class, vars(self.args))
        teacher, fake = choose_guidance(contract, self.args.guidance_mode, self.args.fake_guidance_mode)
        check_negative_prompt(self.args, teacher, fake)
        self.config = replace(self.config, guidance_mode=teacher, fake_guidance_mode=fake)

    @property
    def guidance(self) -> dict:
        config = self.config
        return {
            "scale": config.teacher_guidance_scale,
            "mode": config.guidance_mode,
            "rescale": config.guidance_rescale,
        }

    @property
    def used(self) -> dict:
        return asdict(self.config)

    def measure(self, networks: Networks, samples: Samples) -> dict[str, float]:
        """The teacher's own latents, and its own loss on them: see `measure_teacher`."""
        config = self.config
        velocity = functools.partial(samples.size.contract.guided_velocity, networks.teacher)
        return measure_on_samples(
            functools.partial(velocity, scale=config.teacher_guidance_scale, mode=config.guidance_mode),
            functools.partial(velocity, scale=config.fake_train_guidance_scale, mode=config.fake_guidance_mode),
            samples,
            self.draw_sigma,
            batch_size=self.args.train_batch_size,
        )

    def update(self, step: int, images_seen: int) -> Update:
        args = self.args
        k = draw_k(
            args.seed, step, args.num_steps, shares=args.step_shares, progress=images_seen / args.max_train_images
        )
        config = replace(self.config, **vars(self.sampler(images_seen)))
        turns, made = self.turns(images_seen), []
        if args.share_rollout:
            turns = dict(reversed(turns.items()))
            if "generator" in turns:
                turns["generator"] = _keeping_x0(turns["generator"], made)
        return Update(turns, functools.partial(self.draw, k, made), config, {"k": k})

    def turns(self, images_seen: int) -> dict[str, Callable]:
        """Name of the network -> its turn, for those that have one after `images_seen` images."""
        return {"fake_score": fake_score_turn, "generator": generator_turn}

    def draw(self, k: int, made: list[Tensor], turn: str, samples: Samples) -> SiDBatch:
        """The batch of a turn; `made` has what the generator has made of this update's micro-batches so far."""
        return SiDBatch(
            conditional=self.conditional(turn, samples),
            unconditional=samples.size.unconditional,
            k=k,
            noises=lambda i: samples.noise(f"{turn} step {i}"),
            sigma=self.draw_sigma(samples, f"{turn} sigma"),
            noise=samples.noise(f"{turn} noise"),
            x0=made[samples.number] if made and turn == "fake_score" else None,
        )

    def conditional(self, turn: str, samples: Samples):
        return samples.conditional("generator" if self.args.share_rollout else turn)

    def draw_sigma(self, samples: Samples, purpose: str) -> Tensor:
        """Noise levels of the loss, [B], of p(sigma); of those that the networks tell apart, the nearest."""
        sigma = sigma_from_normal(samples.numbers(purpose), self.args.sigma_mean, self.args.sigma_std)
        return samples.size.contract.snap(sigma)


def _keeping_x0(turn: Callable, made: list[Tensor]) -> Callable:
    """`turn`, that also leaves what the generator has made in `made`."""

    def kept(networks, contract, batch, config):
        result = turn(networks, contract, batch, config)
        made.append(batch.x0)
        return result

    return kept


def check_unguided(name: str, args: dict[str, Any]) -> None:
    """Refuse arguments that guide the teacher of the pipeline class `name`, which has no guidance.

    Raises:
        UserError: one of the scales is not 1 or not given, or a mode is given.
    """
    for scale in SCALES:
        if args.get(scale) not in (None, 1):
            raise UserError(
                f"{name} has no guidance, neither by a negative prompt nor by a scale that it embeds, and --{scale} "
                f"is {args[scale]:g}: give --{scale} 1."
            )
    for option in ("guidance_mode", "fake_guidance_mode", "guidance_rescale"):
        if args.get(option):
            raise UserError(f"{name} has no guidance: leave out --{option}.")


def choose_guidance(contract, teacher: str | None, fake: str | None) -> tuple[str, str]:
    """The modes of guidance of teacher and fake score, as given or, for None, this kind of teacher's default.

    Of a teacher without guidance it is "cfg", which at scale 1 is one plain call.

    Raises:
        UserError: this kind of teacher has no such mode.
    """
    modes = contract.guidance_modes or ("cfg",)
    teacher = teacher or modes[0]
    fake = fake or teacher
    for mode in (teacher, fake):
        if mode not in modes:
            raise UserError(
                f"{contract.pipeline_class} cannot be guided by {mode}: the mode must be {' or '.join(modes)}."
            )
    return teacher, fake
