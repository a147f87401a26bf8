# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The second shapes teacher: it starts from the first one's weights, and its script ends with an ordinary pipeline.

It is trained in the precision that the CPU is fast in, as the first one is."""

import argparse
import contextlib

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from training_helpers import ROOT, run_command

from fitting import Float32, mixed_precision
from flux_teacher import build_pipeline, pack, start_from
from hf_flowdistill.teachers import learn_contract


TEACHER = ROOT / "examples/shapes/teacher"


class NoRotation(torch.nn.Module):
    def forward(self, ids):
        return torch.ones(len(ids), 32), torch.zeros(len(ids), 32)


def test_it_starts_as_the_first_teacher_but_for_positions():
    """With the positions of both switched off, and nothing from the encoder that FLUX lacks, both say the same."""
    source = StableDiffusion3Pipeline.from_pretrained(TEACHER)
    pipeline = build_pipeline(source, argparse.Namespace(seed=0, num_single_layers=2, teacher=TEACHER))
    start_from(pipeline.transformer, source)
    source.transformer.pos_embed.pos_embed.zero_()
    pipeline.transformer.pos_embed = NoRotation()

    generator = torch.Generator().manual_seed(0)
    x_t, text = torch.randn(3, 4, 20, 20, generator=generator), torch.randn(3, 10, 128, generator=generator)
    sigma, words = torch.tensor([0.3, 0.6, 0.9]), ["a red circle", "two squares", ""]
    tokens = source.tokenizer(words, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        pooled = source.text_encoder(tokens).text_embeds
        pooled = torch.cat([pooled, torch.zeros_like(pooled)], 1)
        expected = pack(source.transformer(x_t, text, pooled, 1000 * sigma, return_dict=False)[0])
        velocity = pipeline.transformer(
            hidden_states=pack(x_t),
            timestep=sigma,
            guidance=torch.tensor([1.0, 2.0, 3.0]),
            pooled_projections=pipeline._get_clip_prompt_embeds(words),
            encoder_hidden_states=text,
            txt_ids=torch.zeros(10, 3),
            img_ids=pipeline._prepare_latent_image_ids(1, 5, 5, "cpu", torch.float32),
            return_dict=False,
        )[0]
    assert expected.std() > 1
    assert torch.allclose(velocity, expected, atol=1e-4)


@pytest.mark.parametrize(
    "capabilities, multiplies",
    [({"avx2": True, "avx512_bf16": False}, False), ({"avx512_bf16": True}, True), ({"bf16": True}, True)],
)
def test_bfloat16_is_for_cpus_that_multiply_it(monkeypatch, capabilities, multiplies):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    with mixed_precision():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if multiplies else torch.float32)


def test_muon_in_float32_takes_the_step_of_bfloat16_without_its_rounding():
    gradient = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))

    def step(precision, dtype):
        parameter = torch.nn.Parameter(torch.zeros(64, 32, dtype=dtype))
        parameter.grad = gradient.to(dtype)
        with precision:
            torch.optim.Muon([parameter], lr=1.0, weight_decay=0.0).step()
        return parameter.detach().double()

    exact, whole, half = (
        step(precision, dtype)
        for precision, dtype in [
            (Float32(), torch.float64),
            (Float32(), torch.float32),
            (contextlib.nullcontext(), torch.float32),
        ]
    )
    assert torch.allclose(whole, exact, atol=1e-5)
    assert 1e-3 < (half - exact).norm() / exact.norm() < 0.03


def test_the_script_writes_a_flux_pipeline(tmp_path):
    short = "--vae_steps 2 --text_steps 2 --num_renders 256 --steps 2 --batch_size 8".split()
    script = ROOT / "examples/shapes/train_flux_teacher.py"
    run_command(script, "--output_dir", tmp_path / "teacher", "--work_dir", tmp_path / "stages", *short)

    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "teacher")
    assert type(pipeline).__name__ == "FluxPipeline"
    contract = learn_contract(pipeline, height=40, width=40, pipeline_kwargs={"max_sequence_length": 10})
    assert contract.guidance_modes[0] == "embedded"
    written = "".join(file.read_text() for file in (tmp_path / "teacher").rglob("*.json"))
    assert str(tmp_path) not in written and str(ROOT) not in written  # no path of the machine it was made on
