# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Decoding is the pipeline's own."""

import numpy as np
import pytest
import tiny_pipelines
import torch
from tiny_pipelines import HEIGHT, WIDTH

from hf_flowdistill.errors import UserError
from hf_flowdistill.teachers import decode, learn_contract


CASES = {
    "sd3": (tiny_pipelines.stable_diffusion_3, {"max_sequence_length": 16}),
    "sana": (tiny_pipelines.sana, {"use_resolution_binning": False, "max_sequence_length": 16}),
    "flux": (tiny_pipelines.flux, {"max_sequence_length": 16}),
}


@pytest.fixture(scope="module", params=CASES)
def teacher(request):
    build, kwargs = CASES[request.param]
    pipeline = build()
    return pipeline, learn_contract(pipeline, height=HEIGHT, width=WIDTH, pipeline_kwargs=kwargs)


def own_images(pipeline, contract, output_type):
    return pipeline(
        ["a cat", "two dogs", "x"],
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(3),
        output_type=output_type,
        **contract.pipeline_kwargs,
    ).images


@pytest.mark.parametrize("output_type", ["np", "pt", "pil"])
def test_equals_the_pipelines_images_bit_for_bit(teacher, output_type):
    latents = own_images(*teacher, "latent")
    assert latents.shape[1:] == teacher[1].latent_shape
    own, decoded = own_images(*teacher, output_type), decode(*teacher, latents, output_type)
    assert type(decoded) is type(own) and len(decoded) == 3
    for a, b in zip(own, decoded, strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))
    assert np.asarray(decoded[0]).std() > 0 and not np.array_equal(np.asarray(decoded[0]), np.asarray(decoded[1]))


def test_in_batches(teacher):
    latents = own_images(*teacher, "latent")
    together, apart = decode(*teacher, latents, "np"), decode(*teacher, latents, "np", batch_size=2)
    assert together.shape == (3, HEIGHT, WIDTH, 3)
    np.testing.assert_allclose(apart, together, atol=1e-5)


def test_what_is_not_finite_is_not_painted_black():
    """A VAE that overflows in float16, and latents that are NaN."""
    pipeline = tiny_pipelines.stable_diffusion_3()
    contract = learn_contract(pipeline, height=HEIGHT, width=WIDTH, pipeline_kwargs={"max_sequence_length": 16})
    latents = torch.randn(1, *contract.latent_shape, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match="not finite in its transformer"):
        decode(pipeline, contract, latents * float("nan"))
    torch.nn.init.constant_(pipeline.vae.decoder.conv_in.weight, 3e4)
    decode(pipeline, contract, latents)
    pipeline.to(torch.float16)
    with pytest.raises(UserError, match="not finite in its vae, in float16: use bfloat16 or float32.$"):
        decode(pipeline, contract, latents)
    assert "decode" not in vars(pipeline.vae)


def test_takes_latents_with_gradient_and_changes_nothing(teacher):
    pipeline, contract = teacher
    before = own_images(pipeline, contract, "np")
    latents = torch.randn(2, *contract.latent_shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    state, scheduler = torch.get_rng_state(), pipeline.scheduler
    assert not decode(pipeline, contract, latents, "pt").requires_grad
    assert torch.equal(torch.get_rng_state(), state) and pipeline.scheduler is scheduler
    assert (own_images(pipeline, contract, "np") == before).all()


def test_wrong_shape(teacher):
    with pytest.raises(ValueError, match="expected latents"):
        decode(*teacher, torch.zeros(1, 2, 3))
