# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Tiny pipelines of the classes that read their prompts with Qwen3-VL and its processor."""

import diffusers
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler as Euler
from tiny_parts import TextProcessor, flux2_autoencoder, qwen3_vl, qwen_tokenizer
from tiny_pipelines import _finish, _seeded


DYNAMIC = {"use_dynamic_shifting": True}


def _text_parts():
    tokenizer = qwen_tokenizer()
    text_encoder = qwen3_vl(tokenizer, transformers.Qwen3VLForConditionalGeneration)
    return {"text_encoder": text_encoder, "processor": TextProcessor(tokenizer)}


@_seeded
def bria_fibo2():
    return _finish(
        diffusers.BriaFibo2Pipeline(
            transformer=diffusers.BriaFibo2Transformer2DModel(
                in_channels=4,
                dim=24,
                n_layers=2,
                n_refiner_layers=1,
                n_heads=3,
                cap_feat_dim=48,
                injection_layer_ids=(1,),
                perceiver_num_layers=1,
                min_num_gist_tokens=4,
                max_num_gist_tokens=8,
                gist_step=2,
                gist_min_text_len=16,
                gist_max_text_len=64,
                axes_dims=(4, 2, 2),
                axes_lens=(64, 32, 32),
            ),
            scheduler=Euler(**DYNAMIC),
            vae=flux2_autoencoder(),
            **_text_parts(),
        )
    )


@_seeded
def qwen_image_2_1():
    return _finish(
        diffusers.QwenImage21Pipeline(
            transformer=diffusers.QwenImage21Transformer2DModel(
                in_channels=4,
                out_channels=4,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                context_in_dim=16,
                axes_dims_rope=(8, 4, 4),
            ),
            scheduler=Euler(**DYNAMIC),
            vae=diffusers.AutoencoderKLQwenImage21(
                base_dim=8,
                decoder_base_dim=8,
                z_dim=4,
                dim_mult=[1, 1, 1, 1, 1],
                num_res_blocks=1,
                latents_mean=[0.1, -0.2, 0.3, 0.0],
                latents_std=[1.5, 0.8, 1.1, 2.0],
            ),
            **_text_parts(),
        )
    )
