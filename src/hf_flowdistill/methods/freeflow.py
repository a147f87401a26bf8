# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""FreeFlow: a one-step student of noise alone, by prediction and correction. FreeFlow Sec. 4 and 5.1.

The student is the average velocity of a jump from noise. Every update is split: for some samples it follows the
teacher, for the others its jumps to the end are corrected, against a fake score that learns from them.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import fields, replace

import torch
from torch import Tensor

from hf_flowdistill.errors import UserError
from hf_flowdistill.flow.jumps import jump_from_normal, land, uniform_from_normal
from hf_flowdistill.flow.rollout import Sampler
from hf_flowdistill.flow.timesteps import sigma_from_normal
from hf_flowdistill.losses import freeflow as losses
from hf_flowdistill.methods.freeflow_turns import (
    FreeFlowBatch,
    FreeFlowConfig,
    Part,
    check_derivative,
    fake_score_turn,
    generator_turn,
    jump_to_end,
)
from hf_flowdistill.methods.method import Method, Samples, Update
from hf_flowdistill.methods.reference import measure_on_samples
from hf_flowdistill.methods.sid import choose_guidance
from hf_flowdistill.networks.adapters import merged
from hf_flowdistill.networks.flow_map import GUIDANCE, JUMP, attach, folded
from hf_flowdistill.networks.roles import Networks
from hf_flowdistill.networks.time_layers import find_time_layers


def told_at_the_end(settings: Mapping) -> dict[str, float]:
    """What an exported student is told, by the settings of its training: the whole jump, and its guidance where that
    was not the same all the time."""
    low, high = settings["guidance_range"]
    return {JUMP: 1.0} | ({GUIDANCE: settings["student_guidance_scale"]} if low < high else {})


class FreeFlow(Method):
    """The generator's turn, then the fake score's, on what the generator has just made for its correction."""

    progress = (
        "gap {prediction_gap:.4f}/{correction_gap:.4f}",
        "latent {x0_mean:+.3f}/{x0_std:.3f} (teacher {teacher_latent_mean:+.3f}/{teacher_latent_std:.3f})",
        "lag {fake_score_lag:.2f}",
        "gradient {generator_grad_norm:.2g}",
    )

    def __init__(self, args):
        super().__init__(args)
        own = {field.name for field in fields(FreeFlowConfig)} & vars(args).keys()
        self.config = FreeFlowConfig(**{name: getattr(args, name) for name in own})
        self.config = replace(self.config, guidance_range=tuple(args.guidance_range))
        self.trains = ("generator", "fake_score") if args.correction_share > 0 else ("generator",)
        self.memory: dict[str, float] = {}  # of the update before: mean sizes of the two gaps
        self.layers: list[str] = []

    def settle(self, pipeline, contract) -> None:
        self.layers = find_time_layers(pipeline, contract)
        if not contract.guidance_modes and self.config.guidance_range != (1.0, 1.0):
            raise UserError(f"{contract.pipeline_class} has no guidance: give --guidance_range 1 1.")
        mode, _ = choose_guidance(contract, self.args.guidance_mode, None)
        self.config = replace(self.config, guidance_mode=mode)

    @property
    def used(self) -> dict:
        return {"guidance_mode": self.config.guidance_mode, "time_layers": self.layers}

    def equip(self, networks: Networks, place=None) -> None:
        seed, told = self.args.seed, told_at_the_end(vars(self.args))
        attach(networks.generator, self.layers, list(told), seed=seed, place=place)
        if networks.fake_score is not None and GUIDANCE in told:
            attach(networks.fake_score, self.layers, [GUIDANCE], seed=seed + 1, place=place)

    def published(self, network, predict):
        return folded(network, merged(network), predict, **told_at_the_end(vars(self.args)))

    def sampler(self, images_seen: int) -> Sampler:
        return Sampler(num_steps=1)

    def generate(self, network, contract, conditional, noises, sampler: Sampler) -> Tensor:
        z = noises(0)
        ones = torch.ones(len(z), device=z.device)
        part = Part(conditional, None, z, ones * self.args.student_guidance_scale, z, ones)
        return land(z, jump_to_end(network, contract, part), ones)

    def measure(self, networks: Networks, samples: Samples) -> dict[str, float]:
        """The teacher's own latents as the student's are meant to be, and its own loss on them: `measure_teacher`."""
        contract = samples.size.contract
        if self.config.derivative == "jvp":
            first = replace(samples, indices=samples.indices[:1])
            conditional = first.conditional("reference").with_embedded_guidance(1.0)
            check_derivative(networks.generator, contract, first.noise("reference"), conditional)
        scale = functools.partial(contract.guided_velocity, networks.teacher, mode=self.config.guidance_mode)
        if self.args.correction_share == 0:
            return {}
        return measure_on_samples(
            functools.partial(scale, scale=self.args.student_guidance_scale),
            functools.partial(scale, scale=1.0),
            samples,
            self.draw_sigma,
            batch_size=self.args.train_batch_size,
        )

    def update(self, step: int, images_seen: int) -> Update:
        config, made = self.config_at(images_seen), []

        def generate(networks, contract, batch, config):
            result = generator_turn(networks, contract, batch, config)
            made.append(batch.x0)
            return result

        turns = {"generator": generate}
        if "fake_score" in self.trains:
            turns["fake_score"] = fake_score_turn
        record = {"k": 1, "confident_level": config.confident_level, "correction_balance": config.balance}
        return Update(turns, functools.partial(self.draw, made), config, record)

    def config_at(self, images_seen: int) -> FreeFlowConfig:
        """The settings of the update after `images_seen` images."""
        args, both = self.args, 0 < self.args.correction_share < 1
        level = losses.confident_level(images_seen, args.confident_warmup_images or 0)
        if not both:
            return replace(self.config, confident_level=level, corrects=args.correction_share == 1)
        delay, warmup = args.correction_delay_images, args.correction_warmup_images
        alpha = losses.alpha_at(
            images_seen, args.correction_weight, delay=delay, warmup=warmup, decay=args.correction_decay_images
        )
        balance = losses.balance(alpha, self.memory["prediction"], self.memory["correction"]) if self.memory else 0.0
        return replace(self.config, confident_level=level, corrects=images_seen >= delay, balance=balance)

    def summarize(self, turn: str, metrics: dict[str, float]) -> dict[str, float]:
        if "x0_square" in metrics:
            square, mean = metrics.pop("x0_square"), metrics["x0_mean"]
            metrics["x0_std"] = math.sqrt(max(square - mean**2, 0.0)) if math.isfinite(square) else math.nan
        if turn == "generator" and {"correction_gap", "prediction_weighted_gap"} <= metrics.keys():
            sizes = metrics["prediction_weighted_gap"], metrics["correction_gap"]
            if all(map(math.isfinite, sizes)):
                self.memory["prediction"], self.memory["correction"] = sizes
        return metrics

    def draw(self, made: list, turn: str, samples: Samples) -> FreeFlowBatch:
        """The batch of a turn; `made` has what the generator has made of this update's micro-batches so far.

        The last samples of the update are the correction's.
        """
        indices, whole = samples.indices, samples.images_per_update
        corrected = round(self.args.correction_share * whole)
        border = min(max(indices.start, whole - corrected), indices.stop)
        parts = (range(indices.start, border), range(border, indices.stop))
        early, late = (replace(samples, indices=rows) if len(rows) else None for rows in parts)
        return FreeFlowBatch(
            rows=len(indices),
            number=samples.number,
            share=corrected / whole,
            prediction=self.draw_prediction(early) if early is not None and turn == "generator" else None,
            correction=None if late is None else self.draw_correction(turn, late),
            x0=made[samples.number] if turn == "fake_score" else None,
        )

    def _part(self, turn: str, samples: Samples, sigma: Tensor) -> Part:
        low, high = self.config.guidance_range
        guidance = low + (high - low) * uniform_from_normal(samples.numbers("guidance"))
        return Part(
            conditional=samples.conditional("generator"),
            unconditional=samples.size.unconditional,
            z=samples.noise("generator"),
            guidance=guidance,
            noise=samples.noise(f"{turn} noise"),
            sigma=sigma,
        )

    def draw_prediction(self, samples: Samples) -> Part:
        config = self.config
        jump = jump_from_normal(
            samples.numbers("jump"),
            samples.numbers("jump of no length"),
            mean=config.jump_mean,
            std=config.jump_std,
            zeros=config.jump_zeros,
            num_jumps=None if config.derivative == "jvp" else config.num_jumps,
        )
        return self._part("generator", samples, 1 - jump)

    def draw_correction(self, turn: str, samples: Samples) -> Part:
        return self._part(turn, samples, self.draw_sigma(samples, f"{turn} sigma"))

    def draw_sigma(self, samples: Samples, purpose: str) -> Tensor:
        mean, std = self.args.correction_sigma_mean, self.args.correction_sigma_std
        return samples.size.contract.snap(sigma_from_normal(samples.numbers(purpose), mean, std))
