# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""SiD-DiT's data-aided stage (SiD2a, Sec. 3): the two turns of `methods.sid` with a Diffusion-GAN term in each.

The discriminator is the fake score: its features (`features`) are the logits. Real latents are noised and judged with
the captions that they came with; the generator's with theirs, by the conditional half of the prediction that the other
loss makes anyway.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_flowdistill import flow
from hf_flowdistill.flow.weighting import get_weighting
from hf_flowdistill.losses.adversarial import adversarial_generator_loss, discriminator_loss
from hf_flowdistill.losses.sid import fake_score_loss, x0_statistics
from hf_flowdistill.methods import sid
from hf_flowdistill.methods.method import Samples
from hf_flowdistill.networks.features import find_projection, guided_velocity_and_features, velocity_and_features
from hf_flowdistill.networks.roles import Networks


logger = logging.getLogger(__name__)

MEASURED_UPDATES = 25  # in one of so many the two terms of an adversarial generator loss are told apart


@dataclass(frozen=True)
class AdversarialConfig(sid.SiDConfig):
    """`SiDConfig` and the stage's own settings.

    Attributes:
        discriminator_features: full name of the module whose input the features are; see
            `networks.features.find_projection`.
        discriminator_weight: of the discriminator's term in the fake score's loss, beside a regression of weight 1.
        adversarial_weight: of the adversarial term in the generator's loss; that of SiD is 1 less it.
        discriminator_warmup_images: the generator rests before, while the features learn to tell real from fake.
        adversarial_start_images: the generator's loss is SiD's alone before.
    """

    discriminator_features: str = "proj_out"
    discriminator_weight: float = 1.0
    adversarial_weight: float = 0.5
    discriminator_warmup_images: int = 20_000
    adversarial_start_images: int = 40_000


@dataclass
class AdversarialBatch(sid.SiDBatch):
    """`SiDBatch` and what the stage needs besides.

    Attributes:
        real: latents of images, [B, *latent_shape], in the order of `conditional`, which are their captions; for the
            fake score's turn.
        measured: the generator's turn takes the gradients of its two terms apart, to tell their shares.
    """

    real: Tensor | None = None
    measured: bool = False


def fake_score_turn(networks: Networks, contract, batch: AdversarialBatch, config: AdversarialConfig):
    """The loss of `sid.fake_score_turn` and the discriminator's, weighted: (scalar, metrics of detached scalars).

    Gradient reaches `networks.fake_score` alone. It takes one more pass of it, with `batch.real`, than without.
    """
    with torch.no_grad():
        x0 = sid.generate(networks, contract, batch, config) if batch.x0 is None else batch.x0
        x_t = flow.add_noise(x0, batch.noise, batch.sigma)
        x_t_real = flow.add_noise(batch.real, batch.noise, batch.sigma)
    network, module = networks.fake_score, config.discriminator_features
    guidance = (
        batch.conditional,
        batch.unconditional,
        config.fake_train_guidance_scale,
        config.fake_guidance_mode,
    )
    velocity_fake, fake = guided_velocity_and_features(network, contract, module, x_t, batch.sigma, *guidance)
    # as the conditional half of the call above is made, an embedded guidance scale included
    x_t_real, sigma, captions = (part[-len(x0) :] for part in contract.guided_inputs(x_t_real, batch.sigma, *guidance))
    _, real = velocity_and_features(network, contract, module, x_t_real, sigma, captions)
    regression, metrics = fake_score_loss(velocity_fake, x0, batch.noise)
    discrimination, judged = discriminator_loss(real, fake, elements=math.prod(contract.latent_shape))
    made = {f"x0_{name}": value for name, value in x0_statistics(x0).items()}
    return regression + config.discriminator_weight * discrimination, {**metrics, **judged, **made}


def generator_turn(networks: Networks, contract, batch: AdversarialBatch, config: AdversarialConfig):
    """(1 - adversarial_weight) SiD + adversarial_weight BCE(fake, 1): (scalar, metrics of detached scalars).

    Gradient flows as in `sid.generator_turn`, and through the features to x_t. No pass is made that is not made there.
    If the batch is to be measured, "adversarial_share" is among the metrics: |a| / (|a| + |s|), the mean over samples,
    of the gradients a and s of the two terms with respect to x0. That takes two more backward passes through the fake
    score and one through the teacher.
    """
    x0, x_t = sid.generate_noised(networks, contract, batch, config)
    of_teacher = sid.teacher_velocity(networks, contract, batch, config, x_t)
    of_fake, logits = guided_velocity_and_features(
        networks.fake_score, contract, config.discriminator_features, *sid.fake_inputs(batch, config, x_t)
    )
    x0_teacher, x0_fake = (flow.x0_from_velocity(x_t, velocity, batch.sigma) for velocity in (of_teacher, of_fake))
    distillation, metrics = sid.distillation_loss(x0, x0_teacher, x0_fake, batch, config)
    weight = get_weighting(config.weighting)(batch.sigma, x0.detach(), x0_teacher.detach())
    adversarial = adversarial_generator_loss(logits, weight, elements=math.prod(contract.latent_shape))
    terms = (1 - config.adversarial_weight) * distillation, config.adversarial_weight * adversarial
    if batch.measured:
        gradients = [torch.autograd.grad(term, x0, retain_graph=True)[0].flatten(1) for term in terms]
        norms = [gradient.float().norm(dim=1) for gradient in gradients]
        metrics["adversarial_share"] = (norms[1] / (norms[0] + norms[1])).mean()
    return sum(terms), {**metrics, "adversarial_loss": adversarial.detach()}


def adversarial_turns(config: AdversarialConfig, images_seen: int) -> dict[str, Callable]:
    """Name of the network -> its turn, for those that have one after `images_seen` images."""
    if images_seen < config.discriminator_warmup_images:
        return {"fake_score": fake_score_turn}
    alone = images_seen < config.adversarial_start_images
    return {"fake_score": fake_score_turn, "generator": sid.generator_turn if alone else generator_turn}


class SiDAdversarial(sid.SiD):
    """SiD-DiT's data-aided stage, whose prompts are the captions of images."""

    takes_images = True
    progress = (
        "told {real_accuracy:.0%}/{fake_accuracy:.0%}",
        "adversarial {adversarial_share:.0%}",
        *sid.SiD.progress,
    )
    kind = AdversarialConfig

    def settle(self, pipeline, contract) -> None:
        super().settle(pipeline, contract)
        found = find_projection(pipeline, contract, self.args.discriminator_features)
        self.config = replace(self.config, discriminator_features=found)
        logger.info(f"the discriminator's features are the input of {found}")

    def turns(self, images_seen: int) -> dict[str, Callable]:
        return adversarial_turns(self.config, images_seen)

    def draw(self, k, made, turn: str, samples: Samples) -> AdversarialBatch:
        judges = turn == "fake_score"
        since_start = (samples.images_seen - self.args.adversarial_start_images) // samples.images_per_update
        return AdversarialBatch(
            **vars(super().draw(k, made, turn, samples)),
            real=samples.pairs.latents(self.images(samples)).to(samples.device) if judges else None,
            measured=since_start % MEASURED_UPDATES == 0,
        )

    def conditional(self, turn: str, samples: Samples):
        """That of the images' captions, where there are images."""
        if turn == "fake_score" or self.args.share_rollout:
            return samples.rows(samples.prompts.row_of[self.images(samples)])
        return super().conditional(turn, samples)

    def images(self, samples: Samples) -> Tensor:
        return samples.pairs.rows(samples.positions)
