# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What is rehearsed without values is what the allocator gives to a training with them."""

import copy

import pytest
import torch
from teacher_cases import learned
from training_helpers import saved_teacher

from hf_flowdistill.methods.sid import SiDBatch, SiDConfig, fake_score_turn, generator_turn
from hf_flowdistill.networks import Networks
from hf_flowdistill.rehearsal import embeds_guidance, rehearse, stand_in_contract
from hf_flowdistill.skeleton import load_skeleton, measure_shapes
from hf_flowdistill.teachers import encode_prompts
from hf_flowdistill.training.ema import EMA
from hf_flowdistill.training.optimizers import apply_update, build_optimizer


CASES = {  # teacher, its saved pipeline, dtype, autocast, checkpointing, batch, guidance mode
    "SD3, float32": ("sd3", "stable_diffusion_3", torch.float32, False, False, 4, "cfg"),
    "SD3, autocast, checkpointing": ("sd3", "stable_diffusion_3", torch.float32, True, True, 8, "cfg"),
    "FLUX, bfloat16": ("flux", "flux", torch.bfloat16, False, False, 4, "embedded"),
    "SANA, float32, checkpointing": ("sana", "sana", torch.float32, False, True, 6, "cfg"),
}


def rehearsed(name, dtype, autocast, checkpointing, batch_size, config, kwargs):
    size = {"height": 32, "width": 32}
    shapes = measure_shapes(load_skeleton(saved_teacher(name)), **size, pipeline_kwargs=kwargs)
    networks = Networks.from_teacher(load_skeleton(saved_teacher(name)).transformer, dtype)
    average = EMA(networks.generator).model
    if checkpointing:
        networks.enable_gradient_checkpointing()
    contract = stand_in_contract(shapes, **size)
    assert embeds_guidance(contract) == (name == "flux")
    settings = {"batch_size": batch_size, "config": config, "autocast": autocast}
    return rehearse(networks, average, contract, build_optimizer, **settings)[0]


def measured(teacher, contract, dtype, autocast, checkpointing, batch_size, config):
    """The most bytes that the allocator has given out, by its own account, in two updates of two micro-batches."""
    conditional, unconditional = encode_prompts(teacher.pipeline, contract, ["red circle"] * batch_size)

    def batch():
        noise = torch.randn(batch_size, *contract.latent_shape)
        return SiDBatch(
            conditional[range(batch_size)], unconditional, 2, lambda i: noise, torch.full((batch_size,), 0.5), noise
        )

    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        networks = Networks.from_teacher(copy.deepcopy(teacher.pipeline.transformer), dtype)
        average = EMA(networks.generator)
        if checkpointing:
            networks.enable_gradient_checkpointing()
        optimizers = {name: build_optimizer(network) for name, network in networks.trained().items()}
        for step in range(2):
            for turn, loss_of in (("fake_score", fake_score_turn), ("generator", generator_turn)):
                for _ in range(2):
                    one = batch()
                    with networks.training(turn):
                        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                            loss, _ = loss_of(networks, contract, one, config)
                        loss.backward()
                apply_update(optimizers[turn], loss=loss.item(), learning_rate=1e-3)
                del one, loss
            average.update(networks.generator, batch_size=batch_size, images_seen=batch_size * (step + 1))
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("case", CASES)
def test_a_rehearsal_takes_what_the_training_takes(case):
    name, saved, dtype, autocast, checkpointing, batch_size, mode = CASES[case]
    config = SiDConfig(guidance_mode=mode, fake_guidance_mode=mode)
    teacher = learned(name)
    settings = dtype, autocast, checkpointing, batch_size, config
    peak = rehearsed(saved, *settings, teacher.teacher.kwargs)
    expected = measured(teacher, teacher.contract, *settings)
    print(f"{case}: rehearsed {peak.bytes:,.0f} bytes ({peak.when}), measured {expected:,.0f}")
    assert peak.bytes == pytest.approx(expected, rel=0.1)
    assert peak.components["activations"] > 0.2 * expected  # or the comparison would be one of weights
