# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The custom pipeline keeps what diffusers asks of every pipeline: our equal of its common pipeline tests.

diffusers' package does not ship those. With a checkout of diffusers, its own are run as well:

    DIFFUSERS_SOURCE=/path/to/diffusers python -m pytest tests/test_student_pipeline.py
"""

import importlib
import inspect
import os
import sys
import tempfile
import unittest
import unittest.mock

import numpy as np
import pytest
import tiny_pipelines
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from training_helpers import quiet

from hf_flowdistill.flow.rollout import Sampler
from hf_flowdistill.hub.export import export_student


CALL = {"max_sequence_length": 8, "height": 32, "width": 32}
INPUTS = {"prompt": "a red fox", "output_type": "np"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("students") / "few_step_student")


def exported(folder):
    with quiet():
        return export_student(tiny_pipelines.stable_diffusion_3(), folder, Sampler(2), pipeline_kwargs=CALL)


def loaded(folder, **how):
    with quiet():
        pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True, **how)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(folder):
    return loaded(folder)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(pipe, **inputs):
    return pipe(**{**INPUTS, "generator": seeded(), **inputs})


def test_save_and_load(pipe, tmp_path):
    with quiet():
        pipe.save_pretrained(tmp_path / "again")
    again = loaded(tmp_path / "again")
    assert type(again).__name__ == "FewStepPipeline"
    np.testing.assert_array_equal(draw(pipe).images, draw(again).images)


def test_optional_components_stay_absent(pipe, tmp_path):
    for name in pipe._optional_components:
        setattr(pipe, name, None)
    with quiet():
        pipe.save_pretrained(tmp_path / "without")
    again = loaded(tmp_path / "without")
    assert all(getattr(again, name) is None for name in pipe._optional_components)
    np.testing.assert_array_equal(draw(pipe).images, draw(again).images)


def test_call_signature(pipe):
    stock = inspect.signature(StableDiffusion3Pipeline.__call__).parameters
    ours = inspect.signature(type(pipe).__call__).parameters
    assert list(ours) == list(stock)
    changed = {name for name in stock if ours[name].default != stock[name].default}
    assert changed == {"num_inference_steps", "guidance_scale", "max_sequence_length", "height", "width"}


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_batches_are_as_large_as_asked(pipe, batch_size):
    images = draw(pipe, prompt=["a fox"] * batch_size, generator=[seeded(i) for i in range(batch_size)]).images
    assert images.shape == (batch_size, 32, 32, 3)
    assert draw(pipe, prompt=["a fox"] * batch_size, num_images_per_prompt=2).images.shape[0] == 2 * batch_size


def test_a_batch_is_its_samples(pipe):
    prompts = ["a fox", "a very long prompt about a fox", "b"]
    together = draw(pipe, prompt=prompts, generator=[seeded(i) for i in range(3)]).images
    for i, prompt in enumerate(prompts):
        alone = draw(pipe, prompt=prompt, generator=seeded(i)).images[0]
        np.testing.assert_allclose(together[i], alone, rtol=0, atol=1e-4)


def test_dict_and_tuple(pipe):
    (images,) = draw(pipe, return_dict=False)
    np.testing.assert_array_equal(images, draw(pipe).images)


def test_output_types(pipe):
    array = draw(pipe).images
    np.testing.assert_allclose(draw(pipe, output_type="pt").images.permute(0, 2, 3, 1).numpy(), array, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(draw(pipe, output_type="pil").images[0]), (array[0] * 255).round())
    assert draw(pipe, output_type="latent").images.shape == (1, 4, 8, 8)


def test_latents_and_embeddings_instead_of_noise_and_text(pipe):
    latents = torch.randn(1, 4, 8, 8, generator=seeded(3))
    kept = latents.clone()
    given = draw(pipe, latents=latents).images
    assert torch.equal(latents, kept) and np.abs(given - draw(pipe).images).max() > 1e-3
    embeds, _, pooled, _ = pipe.encode_prompt(
        INPUTS["prompt"], None, None, do_classifier_free_guidance=False, max_sequence_length=8
    )
    encoded = draw(pipe, prompt=None, prompt_embeds=embeds, pooled_prompt_embeds=pooled).images
    np.testing.assert_allclose(encoded, draw(pipe).images, rtol=0, atol=1e-5)


def test_components_make_a_pipeline(pipe):
    assert set(pipe.components) == set(inspect.signature(StableDiffusion3Pipeline.__init__).parameters) - {"self"}
    np.testing.assert_array_equal(draw(type(pipe)(**pipe.components)).images, draw(pipe).images)


def test_callbacks_see_and_change_the_latents(pipe):
    seen = []

    def note(pipeline, step, timestep, tensors):
        seen.append((step, sorted(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == pipeline.num_timesteps - 1 else tensors

    allowed = pipe._callback_tensor_inputs
    images = draw(pipe, callback_on_step_end=note, callback_on_step_end_tensor_inputs=allowed, output_type="latent")
    assert seen == [(step, sorted(allowed)) for step in range(2)] and images.images.abs().sum() == 0
    with pytest.raises(ValueError, match="has to be in"):
        draw(pipe, callback_on_step_end=note, callback_on_step_end_tensor_inputs=["unknown"])


def test_a_call_that_fails_leaves_the_scheduler_as_it_was(pipe):
    config, step = dict(pipe.scheduler.config), pipe.scheduler.step

    def fail(*args):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(pipe, callback_on_step_end=fail)
    assert dict(pipe.scheduler.config) == config and pipe.scheduler.step == step


def test_dtypes(folder, pipe):
    pipe.to(torch.bfloat16)
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert len(parts) > 3 and all(part.dtype == torch.bfloat16 for part in parts)
    half = loaded(folder, dtype={"transformer": torch.bfloat16, "default": torch.float32})
    assert half.transformer.dtype == torch.bfloat16 and half.vae.dtype == torch.float32
    image = draw(pipe).images
    assert np.isfinite(image).all() and np.abs(image - draw(loaded(folder)).images).max() < 0.1


def test_variants(pipe, tmp_path):
    with quiet():
        pipe.save_pretrained(tmp_path / "variant", variant="fp16")
    weights = [path.name for path in (tmp_path / "variant").rglob("*.safetensors")]
    assert weights and all(".fp16." in name for name in weights)
    np.testing.assert_array_equal(draw(loaded(tmp_path / "variant", variant="fp16")).images, draw(pipe).images)
    with pytest.raises((OSError, ValueError)):
        loaded(tmp_path / "variant", variant="no")


def test_from_pipe(pipe):
    stock = StableDiffusion3Pipeline.from_pipe(pipe)
    assert type(stock) is StableDiffusion3Pipeline and stock.transformer is pipe.transformer
    np.testing.assert_array_equal(draw(type(pipe).from_pipe(stock)).images, draw(pipe).images)


SOURCE = os.environ.get("DIFFUSERS_SOURCE")
if SOURCE:
    sys.path.insert(0, SOURCE)
    # Of adapters, which are not tested here, and which import packages that nothing else needs.
    for name in ("transformers.test_models_transformer_flux", "unets.test_models_unet_2d_condition"):
        sys.modules[f"tests.models.{name}"] = unittest.mock.MagicMock()
    common = importlib.import_module("tests.pipelines.test_pipelines_common")

    class TestTheirs(common.PipelineTesterMixin, unittest.TestCase):
        """diffusers' own tests, as its stable_diffusion_3 tests set them up."""

        params = frozenset(
            ["prompt", "height", "width", "guidance_scale", "negative_prompt"]
            + ["prompt_embeds", "negative_prompt_embeds"]
        )
        batch_params = frozenset(["prompt", "negative_prompt"])
        test_layerwise_casting = test_group_offloading = True
        test_encode_prompt_works_in_isolation = None  # looks its class up in diffusers.pipelines

        @classmethod
        def setUpClass(cls):
            super().setUpClass()
            cls.folder = exported(os.path.join(tempfile.mkdtemp(), "their_student"))
            cls.pipeline_class = type(loaded(cls.folder))

        def get_dummy_components(self, **options):
            return loaded(self.folder).components

        def get_dummy_inputs(self, device, seed=0):
            return {
                "prompt": "A painting of a squirrel eating a burger",
                "generator": torch.Generator(device="cpu").manual_seed(seed),
                "num_inference_steps": 2,
                "guidance_scale": 5.0,
                "output_type": "np",
            }
