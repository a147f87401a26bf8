# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A pipeline that diffusers does not have: its own argument names, time from 0 to 1, channels-last latents, a negative
output and the conditional half first. `variant` makes it do one thing that a teacher must not do."""

import torch
from diffusers import ConfigMixin, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor


class ToyTransformer(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, channels: int = 3, width: int = 8):
        super().__init__()
        self.read, self.write = torch.nn.Linear(channels, width), torch.nn.Linear(width, channels)
        self.text = torch.nn.Linear(4, width)

    def forward(self, picture, clock, words, second_clock=None):
        hidden = self.read(picture) + (self.text(words).mean(1) * (1 + clock[:, None]))[:, None, None]
        return (self.write(torch.tanh(hidden)),)


class ToyPipeline(DiffusionPipeline):
    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    def encode(self, prompts):
        prompts = ["same"] * len(prompts) if self.variant == "deaf" else prompts
        codes = [[ord(character) % 7 / 3 for character in f"{prompt:<8}"[:8]] for prompt in prompts]
        return torch.tensor(codes).reshape(len(prompts), 2, 4)

    def network(self, latents, sigma, words):
        fed = latents * 0.5 if self.variant == "scaled input" else latents
        clock = (1 - sigma**2 if self.variant == "curved time" else 1 - sigma).expand(len(latents))
        more = {"second_clock": clock} if self.variant == "two clocks" else {}
        output = -self.transformer(fed, clock, words=words, **more)[0]
        return (latents - output) / sigma if self.variant == "predicts x0" else output

    def velocity(self, latents, sigma, words, negative, scale):
        if negative is None:
            return self.network(latents, sigma, words)
        if self.variant == "three calls":
            self.network(latents, sigma, negative)
            with_prompt, without = (self.network(latents, sigma, w) for w in (words, negative))
        else:
            both = self.network(torch.cat([latents] * 2), sigma, torch.cat([words, negative]))
            with_prompt, without = both.chunk(2)
        guided = without + scale * (with_prompt - without)
        return guided / guided.norm() * with_prompt.norm() if self.variant == "rescaled guidance" else guided

    @torch.no_grad()
    def __call__(
        self,
        prompt,
        negative_prompt=None,
        height=8,
        width=8,
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=None,
        latents=None,
        output_type="np",
        return_dict=True,
        guidance_stop=1.0,
    ):
        words = self.encode(prompt)
        negative = self.encode(negative_prompt or [""] * len(prompt)) if guidance_scale > 1 else None
        if latents is None:
            latents = randn_tensor((len(prompt), height, width, 3), generator=generator)
            latents = latents * 0.5 if self.variant == "weak noise" else latents
        self.scheduler.set_timesteps(num_inference_steps)
        for i, t in enumerate(self.scheduler.timesteps):
            scale = guidance_scale if i < guidance_stop * num_inference_steps else 1.0
            velocity = self.velocity(latents, t / 1000, words, negative, scale)
            latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
        return (latents if output_type == "latent" else latents.numpy(),)


def toy(variant=None):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = ToyPipeline(ToyTransformer(), FlowMatchEulerDiscreteScheduler(shift=2.0))
    pipeline.variant = variant
    return pipeline
