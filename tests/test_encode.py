# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What encoding makes of an image is what decoding hands back to the VAE, for every teacher."""

import copy
import random
from pathlib import Path

import numpy as np
import pytest
import tiny_pipelines
import torch
from image_sets import picture
from PIL import Image
from teacher_cases import TEACHERS, learned

from hf_flowdistill.errors import UserError
from hf_flowdistill.networks.loading import load_pipeline
from hf_flowdistill.teachers import decode, learn_contract
from hf_flowdistill.teachers.encode import learn_image_encoder
from scenes import SIZE, random_scene, render


SHAPES = Path(__file__).parents[1] / "examples" / "shapes"


def decoder_inputs(pipeline, contract, latents, monkeypatch):
    """What the VAE is really given."""
    own, seen = pipeline.vae.decode, []
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.vae, "decode", lambda z, *args, **kwargs: (seen.append(z), own(z, *args, **kwargs))[1])
        decode(pipeline, contract, latents)
    return torch.cat(seen)


@pytest.mark.parametrize("name", TEACHERS)
def test_decoding_hands_the_vae_what_encoding_made(name, monkeypatch):
    pipeline, contract = learned(name).pipeline, learned(name).contract
    before = dict(pipeline.vae.__dict__)
    encoder = learn_image_encoder(pipeline, contract)
    assert pipeline.vae.__dict__.keys() == before.keys() and encoder.mode == ("RGBA" if "2.1" in name else "RGB")

    latents = torch.randn(3, *contract.latent_shape, generator=torch.Generator().manual_seed(5))
    given = decoder_inputs(pipeline, contract, latents, monkeypatch)
    torch.testing.assert_close(encoder.from_vae(given), latents, atol=1e-5, rtol=1e-5)

    images = [picture(number).resize((contract.width, contract.height)) for number in (1, 2)]
    encoded = encoder(images)
    assert encoded.shape == (2, *contract.latent_shape) and encoded.dtype == torch.float32
    assert not encoded.requires_grad and not torch.equal(*encoded)
    pixels = torch.from_numpy(np.stack([image.convert(encoder.mode) for image in images])).permute(0, 3, 1, 2)
    pixels = pixels.float() / 127.5 - 1
    with torch.no_grad():
        output = pipeline.vae.encode(pixels.unsqueeze(2) if len(encoder.vae_shape) == 4 else pixels)
    expected = output.latent_dist.mean if hasattr(output, "latent_dist") else output.latent
    given = decoder_inputs(pipeline, contract, encoded, monkeypatch)
    torch.testing.assert_close(given, expected, atol=1e-4, rtol=1e-4)


def test_an_image_survives_an_autoencoder_that_was_trained():
    pipeline = load_pipeline(SHAPES / "teacher")
    contract = learn_contract(pipeline, height=SIZE, width=SIZE, pipeline_kwargs={"max_sequence_length": 1})
    encoder = learn_image_encoder(pipeline, contract)
    rng = random.Random(0)
    pictures = render([random_scene(rng) for _ in range(16)], rng)
    images = [Image.fromarray((p.permute(1, 2, 0) * 255).round().byte().numpy()) for p in pictures]
    latents = encoder(images)
    assert latents.std().item() == pytest.approx(1, abs=0.15)  # the scale that the teacher was trained at
    decoded = decode(pipeline, contract, latents, "pt")
    error, error_of_others = ((decoded - shown).abs().mean().item() for shown in (pictures, pictures.roll(1, 0)))
    assert error < min(0.02, error_of_others / 2)


def test_bfloat16_tells_the_same_places_apart():
    layouts = []
    for dtype in (torch.float32, torch.bfloat16):
        pipeline = tiny_pipelines.flux(dtype=dtype)
        contract = learn_contract(pipeline, height=32, width=32, pipeline_kwargs={"max_sequence_length": 16})
        layouts.append(learn_image_encoder(pipeline, contract))
    assert torch.equal(layouts[0].source, layouts[1].source)
    torch.testing.assert_close(layouts[0].scale, layouts[1].scale, rtol=0.02, atol=0)
    assert layouts[1]([picture(0).resize((32, 32))]).isfinite().all()


def mixing(unpack):
    return lambda *args: (unpacked := unpack(*args)) + 0.5 * unpacked.roll(1, -1)


def clipping(unpack):
    return lambda *args: unpack(*args).clamp(-1, 1)


def cropping(unpack):
    return lambda *args: unpack(*args)[..., :-1]


REFUSED = {
    "mixtures of several latents": mixing,
    "not given a scaled and shifted permutation": clipping,
    "its VAE is given": cropping,
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refuses_what_it_cannot_invert(reason, monkeypatch):
    pipeline, contract = learned("flux").pipeline, learned("flux").contract
    monkeypatch.setattr(pipeline, "_unpack_latents", REFUSED[reason](pipeline._unpack_latents))
    with pytest.raises(UserError, match=f"images cannot be turned into latents of FluxPipeline: .*{reason}") as error:
        learn_image_encoder(pipeline, contract)
    assert "\n" not in str(error.value)


def test_refuses_a_vae_that_is_none(monkeypatch):
    pipeline, contract = learned("sd3").pipeline, learned("sd3").contract
    bare = copy.copy(pipeline)  # a pipeline remembers in its configuration that it had no VAE
    bare.vae = None
    with pytest.raises(UserError, match="has no VAE"):
        learn_image_encoder(bare, contract)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.vae, "encode", lambda pixels: (_ for _ in ()).throw(RuntimeError("no encoder\nhere")))
        with pytest.raises(UserError, match=r"its VAE does not encode one \(no encoder\); choose"):
            learn_image_encoder(pipeline, contract)
    with monkeypatch.context() as patch:
        shown = pipeline.image_processor.postprocess
        patch.setattr(pipeline.image_processor, "postprocess", lambda image, **more: shown(image * 2, **more))
        with pytest.raises(UserError, match=r"its VAE's output is not the image in \[-1, 1\]"):
            learn_image_encoder(pipeline, contract)


def test_images_of_another_size_or_kind():
    encoder = learn_image_encoder(learned("sd3").pipeline, learned("sd3").contract)
    for image in (Image.new("RGB", (32, 40)), Image.new("L", (32, 32))):
        with pytest.raises(ValueError, match="expected RGB images of 32 x 32"):
            encoder([image])
