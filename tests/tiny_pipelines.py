# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Tiny pipelines of the real diffusers classes, built offline, with real tokenizers, text encoders and VAEs."""

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)


LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
HEIGHT = WIDTH = 32  # SanaPipeline takes multiples of 32 only


def clip_tokenizer(model_max_length=16):
    """A real CLIP tokenizer that knows single characters only."""
    tokens = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=[], model_max_length=model_max_length
    )


def unigram_tokenizer(model_max_length=16):
    """A real T5- or Gemma-like tokenizer (Unigram, end-of-text appended) that knows single characters only."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=model_max_length,
    )


def clip_text_encoder(tokenizer, cls=CLIPTextModelWithProjection):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return cls(config)


def t5_text_encoder(tokenizer):
    config = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    return T5EncoderModel(config)


def gemma_text_encoder(tokenizer):
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Gemma2Model(config)


def kl_autoencoder(latent_channels, scaling_factor=1.5, shift_factor=0.06, blocks=3):
    """Four-times downsampling with three blocks, so that a 32-pixel image is an 8x8 latent."""
    return AutoencoderKL(
        block_out_channels=(8,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=latent_channels,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
    )


def dc_autoencoder(latent_channels):
    return AutoencoderDC(
        in_channels=3,
        latent_channels=latent_channels,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )


def _finish(pipeline, dtype=torch.float32):
    """Evaluation mode, and no parameter left at zero: a zero output would make every test of a transformer vacuous."""
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
            for parameter in component.parameters():
                if not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.1)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline if dtype == torch.float32 else pipeline.to(dtype=dtype)


def _seeded(build):
    """Build with a fixed seed and leave the caller's random state alone."""

    def seeded(*args, seed=0, **kwargs):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build(*args, **kwargs)

    return seeded


@_seeded
def stable_diffusion_3(with_t5=True, dtype=torch.float32):
    """StableDiffusion3Pipeline; without T5 it is meant to be called with `max_sequence_length=0`."""
    tokenizer = clip_tokenizer()
    return _finish(
        StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(
                sample_size=8,
                patch_size=2,
                in_channels=4,
                out_channels=4,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=4,
                caption_projection_dim=32,
                joint_attention_dim=32,
                pooled_projection_dim=32,
                pos_embed_max_size=16,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=kl_autoencoder(latent_channels=4),
            text_encoder=clip_text_encoder(tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=clip_text_encoder(tokenizer),
            tokenizer_2=clip_tokenizer(),
            text_encoder_3=t5_text_encoder(unigram_tokenizer()) if with_t5 else None,
            tokenizer_3=unigram_tokenizer() if with_t5 else None,
        ),
        dtype,
    )


@_seeded
def sana(learned_variance=False, timestep_scale=1.0, scheduler=None, dtype=torch.float32):
    """SanaPipeline; `learned_variance` doubles the output channels, of which the pipeline uses the first half."""
    tokenizer = unigram_tokenizer(model_max_length=64)
    return _finish(
        SanaPipeline(
            transformer=SanaTransformer2DModel(
                patch_size=1,
                in_channels=4,
                out_channels=8 if learned_variance else 4,
                num_layers=2,
                num_attention_heads=2,
                attention_head_dim=8,
                num_cross_attention_heads=2,
                cross_attention_head_dim=8,
                cross_attention_dim=16,
                caption_channels=16,
                sample_size=8,
                timestep_scale=timestep_scale,
            ),
            scheduler=scheduler
            or DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
            vae=dc_autoencoder(latent_channels=4),
            text_encoder=gemma_text_encoder(tokenizer),
            tokenizer=tokenizer,
        ),
        dtype,
    )


@_seeded
def flux(guidance_embeds=True, dtype=torch.float32):
    """FluxPipeline, with FLUX.1-dev's embedded guidance unless told otherwise."""
    tokenizer = clip_tokenizer()
    tokenizer_2 = unigram_tokenizer()
    return _finish(
        FluxPipeline(
            transformer=FluxTransformer2DModel(
                patch_size=1,
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=32,
                pooled_projection_dim=16,
                axes_dims_rope=(4, 4, 8),
                guidance_embeds=guidance_embeds,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=kl_autoencoder(latent_channels=4),
            text_encoder=clip_text_encoder(tokenizer, CLIPTextModel),
            tokenizer=tokenizer,
            text_encoder_2=t5_text_encoder(tokenizer_2),
            tokenizer_2=tokenizer_2,
        ),
        dtype,
    )


@_seeded
def stable_diffusion():
    """StableDiffusionPipeline: a UNet that predicts noise, so no teacher."""
    tokenizer = clip_tokenizer()
    return _finish(
        StableDiffusionPipeline(
            unet=UNet2DConditionModel(
                block_out_channels=(8, 8),
                layers_per_block=1,
                sample_size=8,
                in_channels=4,
                out_channels=4,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                cross_attention_dim=16,
                norm_num_groups=4,
                attention_head_dim=2,
            ),
            scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
            vae=kl_autoencoder(latent_channels=4),
            text_encoder=clip_text_encoder(tokenizer, CLIPTextModel),
            tokenizer=tokenizer,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


@_seeded
def pixart():
    """PixArtAlphaPipeline: a transformer that predicts noise, so no teacher."""
    tokenizer = unigram_tokenizer()
    return _finish(
        PixArtAlphaPipeline(
            transformer=PixArtTransformer2DModel(
                sample_size=8,
                num_layers=1,
                patch_size=2,
                attention_head_dim=8,
                num_attention_heads=2,
                caption_channels=32,
                in_channels=4,
                cross_attention_dim=16,
                out_channels=8,
                attention_bias=True,
                activation_fn="gelu-approximate",
                num_embeds_ada_norm=1000,
                norm_type="ada_norm_single",
                norm_elementwise_affine=False,
                norm_eps=1e-6,
            ),
            scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
            vae=kl_autoencoder(latent_channels=4),
            text_encoder=t5_text_encoder(tokenizer),
            tokenizer=tokenizer,
        )
    )
