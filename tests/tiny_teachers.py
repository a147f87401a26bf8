# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""More tiny pipelines of the real diffusers classes: the teachers that tiny_pipelines.py does not have.

Text encoders and VAEs are of the classes that the published pipelines have, so that templates, masks, padding and
negative prompts run as they do there. Tokenizers are real ones too, but one of two kinds stands in for several: Qwen's
byte-level BPE also for Llama's and Mistral's (FLUX.2 has a processor around its own), Unigram for T5's, Gemma's and
GLM's.
"""

from types import SimpleNamespace

import diffusers
import transformers
from diffusers import AutoencoderKLHunyuanImage
from diffusers import FlowMatchEulerDiscreteScheduler as Euler
from diffusers.pipelines.prx import pipeline_prx, pipeline_prx_pixel
from tiny_parts import (
    decoder_config,
    flux2_autoencoder,
    mistral3_config,
    qwen2_5_vl,
    qwen3,
    qwen3_vl,
    qwen_autoencoder,
    qwen_tokenizer,
)
from tiny_pipelines import (
    _finish,
    _seeded,
    clip_text_encoder,
    clip_tokenizer,
    flux,
    gemma_text_encoder,
    kl_autoencoder,
    t5_text_encoder,
    unigram_tokenizer,
)


DYNAMIC = {"use_dynamic_shifting": True}
FLUX_LIKE = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (4, 4, 8),
}


for module in (pipeline_prx, pipeline_prx_pixel):
    if not hasattr(module, "ftfy"):  # an optional package that repairs broken text and leaves other text alone
        module.ftfy = SimpleNamespace(fix_text=lambda text: text)


@_seeded
def flux2_klein():
    tokenizer = qwen_tokenizer()
    return _finish(
        diffusers.Flux2KleinPipeline(
            transformer=diffusers.Flux2Transformer2DModel(
                **{**FLUX_LIKE, "joint_attention_dim": 48, "axes_dims_rope": (4, 4, 4, 4)}, guidance_embeds=False
            ),
            scheduler=Euler(**DYNAMIC),
            vae=flux2_autoencoder(),
            text_encoder=qwen3(tokenizer, transformers.Qwen3ForCausalLM, num_layers=3),
            tokenizer=tokenizer,
        )
    )


def flux_kontext():
    """FLUX.1's pipeline with an image to edit, without one: the same components."""
    return diffusers.FluxKontextPipeline(**flux().components)


@_seeded
def qwen_image():
    tokenizer = qwen_tokenizer()
    return _finish(
        diffusers.QwenImagePipeline(
            transformer=diffusers.QwenImageTransformer2DModel(
                patch_size=2,
                in_channels=16,
                out_channels=4,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=16,
                axes_dims_rope=(8, 4, 4),
            ),
            scheduler=Euler(**DYNAMIC),
            vae=qwen_autoencoder(),
            text_encoder=qwen2_5_vl(tokenizer),
            tokenizer=tokenizer,
        )
    )


@_seeded
def z_image():
    tokenizer = qwen_tokenizer()
    return _finish(
        diffusers.ZImagePipeline(
            transformer=diffusers.ZImageTransformer2DModel(
                in_channels=4,
                dim=16,
                n_layers=2,
                n_refiner_layers=1,
                n_heads=2,
                n_kv_heads=2,
                cap_feat_dim=16,
                axes_dims=[4, 2, 2],
                axes_lens=[512, 32, 32],
            ),
            scheduler=Euler(**DYNAMIC),
            vae=kl_autoencoder(latent_channels=4),
            text_encoder=qwen3(tokenizer, transformers.Qwen3Model),
            tokenizer=tokenizer,
        )
    )


@_seeded
def lumina2():
    tokenizer = unigram_tokenizer(model_max_length=256)
    return _finish(
        diffusers.Lumina2Pipeline(
            transformer=diffusers.Lumina2Transformer2DModel(
                sample_size=8,
                in_channels=4,
                hidden_size=24,
                num_layers=1,
                num_refiner_layers=1,
                num_attention_heads=3,
                num_kv_heads=1,
                multiple_of=2,
                axes_dim_rope=(4, 2, 2),
                axes_lens=(512, 32, 32),
                cap_feat_dim=16,
            ),
            scheduler=Euler(**DYNAMIC),
            vae=kl_autoencoder(latent_channels=4, blocks=4),
            text_encoder=gemma_text_encoder(tokenizer),
            tokenizer=tokenizer,
        )
    )


@_seeded
def aura_flow():
    tokenizer = unigram_tokenizer()
    config = transformers.UMT5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    return _finish(
        diffusers.AuraFlowPipeline(
            transformer=diffusers.AuraFlowTransformer2DModel(
                sample_size=8,
                in_channels=4,
                num_mmdit_layers=1,
                num_single_dit_layers=1,
                attention_head_dim=8,
                num_attention_heads=4,
                joint_attention_dim=32,
                caption_projection_dim=32,
                pos_embed_max_size=64,
            ),
            scheduler=Euler(shift=1.73),
            vae=kl_autoencoder(latent_channels=4),
            text_encoder=transformers.UMT5EncoderModel(config),
            tokenizer=tokenizer,
        )
    )


@_seeded
def chroma():
    tokenizer = unigram_tokenizer()
    return _finish(
        diffusers.ChromaPipeline(
            transformer=diffusers.ChromaTransformer2DModel(
                **{**FLUX_LIKE, "joint_attention_dim": 32},
                approximator_num_channels=8,
                approximator_hidden_dim=16,
                approximator_layers=1,
            ),
            scheduler=Euler(**DYNAMIC),
            vae=kl_autoencoder(latent_channels=4),
            text_encoder=t5_text_encoder(tokenizer),
            tokenizer=tokenizer,
        )
    )


@_seeded
def cogview4():
    tokenizer = unigram_tokenizer(model_max_length=1024)
    config = {**decoder_config(tokenizer), "pad_token_id": tokenizer.pad_token_id, "partial_rotary_factor": 0.5}
    return _finish(
        diffusers.CogView4Pipeline(
            transformer=diffusers.CogView4Transformer2DModel(
                in_channels=4,
                out_channels=4,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                text_embed_dim=16,
                time_embed_dim=8,
                condition_dim=4,
                pos_embed_max_size=16,
                sample_size=8,
                rope_axes_dim=(16, 16),
            ),
            scheduler=Euler(base_shift=0.25, max_shift=0.75, time_shift_type="linear", **DYNAMIC),
            vae=kl_autoencoder(latent_channels=4),
            text_encoder=transformers.GlmModel(transformers.GlmConfig(**config)),
            tokenizer=tokenizer,
        )
    )


@_seeded
def hidream():
    clip, t5, llama = clip_tokenizer(), unigram_tokenizer(), qwen_tokenizer()
    config = transformers.LlamaConfig(**decoder_config(llama))
    return _finish(
        diffusers.HiDreamImagePipeline(
            transformer=diffusers.HiDreamImageTransformer2DModel(
                patch_size=2,
                in_channels=4,
                out_channels=4,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=8,
                num_attention_heads=2,
                caption_channels=[32, 16],
                text_emb_dim=32,
                num_routed_experts=2,
                num_activated_experts=1,
                axes_dims_rope=(4, 2, 2),
                max_resolution=(8, 8),
                llama_layers=[0, 1],
            ),
            scheduler=Euler(shift=3.0),
            vae=kl_autoencoder(latent_channels=4),
            text_encoder=clip_text_encoder(clip),
            tokenizer=clip,
            text_encoder_2=clip_text_encoder(clip),
            tokenizer_2=clip_tokenizer(),
            text_encoder_3=t5_text_encoder(t5),
            tokenizer_3=t5,
            text_encoder_4=transformers.LlamaForCausalLM(config),
            tokenizer_4=llama,
        )
    )


@_seeded
def hunyuan_image(guidance_embeds=False):
    tokenizer = qwen_tokenizer()
    byte_tokenizer = transformers.ByT5Tokenizer(extra_ids=0)
    guider = diffusers.AdaptiveProjectedMixGuidance
    return _finish(
        diffusers.HunyuanImagePipeline(
            transformer=diffusers.HunyuanImageTransformer2DModel(
                in_channels=4,
                out_channels=4,
                num_attention_heads=2,
                attention_head_dim=8,
                num_layers=1,
                num_single_layers=1,
                num_refiner_layers=1,
                guidance_embeds=guidance_embeds,
                text_embed_dim=16,
                text_embed_2_dim=32,
                rope_axes_dim=(4, 4),
            ),
            scheduler=Euler(shift=5.0),
            vae=AutoencoderKLHunyuanImage(
                in_channels=3,
                out_channels=3,
                latent_channels=4,
                block_out_channels=(32, 32, 32),
                layers_per_block=1,
                spatial_compression_ratio=4,
                sample_size=32,
                scaling_factor=0.75,
            ),
            text_encoder=qwen2_5_vl(tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=t5_text_encoder(byte_tokenizer),
            tokenizer_2=byte_tokenizer,
            guider=None if guidance_embeds else guider(guidance_scale=3.5, adaptive_projected_guidance_start_step=5),
            ocr_guider=None if guidance_embeds else guider(guidance_scale=3.5),
        )
    )


@_seeded
def prx():
    tokenizer = unigram_tokenizer(model_max_length=32)
    module = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = transformers.T5GemmaConfig(encoder=module, decoder=module, is_encoder_decoder=False)
    return _finish(
        diffusers.PRXPipeline(
            transformer=diffusers.PRXTransformer2DModel(
                in_channels=4,
                patch_size=2,
                context_in_dim=16,
                hidden_size=16,
                mlp_ratio=2.0,
                num_heads=2,
                depth=2,
                axes_dim=[4, 4],
            ),
            scheduler=Euler(shift=3.0),
            vae=kl_autoencoder(latent_channels=4),
            text_encoder=transformers.models.t5gemma.modeling_t5gemma.T5GemmaEncoder(config.encoder),
            tokenizer=tokenizer,
        )
    )


@_seeded
def bria():
    tokenizer = unigram_tokenizer()
    return _finish(
        diffusers.BriaPipeline(
            transformer=diffusers.BriaTransformer2DModel(
                **{**FLUX_LIKE, "joint_attention_dim": 32, "axes_dims_rope": [4, 4, 8]}
            ),
            scheduler=Euler(shift=3.0),
            vae=kl_autoencoder(latent_channels=4, shift_factor=0.0),
            text_encoder=t5_text_encoder(tokenizer),
            tokenizer=tokenizer,
        )
    )


@_seeded
def kandinsky5():
    clip, tokenizer = clip_tokenizer(model_max_length=77), qwen_tokenizer()
    return _finish(
        diffusers.Kandinsky5T2IPipeline(
            transformer=diffusers.Kandinsky5Transformer3DModel(
                in_visual_dim=4,
                out_visual_dim=4,
                in_text_dim=16,
                in_text_dim2=16,
                time_dim=16,
                model_dim=16,
                ff_dim=32,
                num_text_blocks=1,
                num_visual_blocks=1,
                axes_dims=(2, 2, 4),
            ),
            scheduler=Euler(shift=3.0),
            vae=kl_autoencoder(latent_channels=4, blocks=4),
            text_encoder=qwen2_5_vl(tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=clip_text_encoder(clip, transformers.CLIPTextModel),
            tokenizer_2=clip,
        )
    )


@_seeded
def krea2():
    tokenizer = qwen_tokenizer()
    return _finish(
        diffusers.Krea2Pipeline(
            transformer=diffusers.Krea2Transformer2DModel(
                in_channels=16,
                num_layers=1,
                attention_head_dim=8,
                num_attention_heads=2,
                num_key_value_heads=1,
                intermediate_size=32,
                timestep_embed_dim=16,
                text_hidden_dim=16,
                num_text_layers=2,
                text_num_attention_heads=2,
                text_num_key_value_heads=1,
                text_intermediate_size=32,
                num_layerwise_text_blocks=1,
                num_refiner_text_blocks=1,
                axes_dims_rope=(4, 2, 2),
            ),
            scheduler=Euler(**DYNAMIC),
            vae=qwen_autoencoder(),
            text_encoder=qwen3_vl(tokenizer, transformers.Qwen3VLModel),
            tokenizer=tokenizer,
            text_encoder_select_layers=(1, 2),
        )
    )


@_seeded
def ovis_image():
    tokenizer = qwen_tokenizer()
    return _finish(
        diffusers.OvisImagePipeline(
            transformer=diffusers.OvisImageTransformer2DModel(**FLUX_LIKE, out_channels=16),
            scheduler=Euler(**DYNAMIC),
            vae=kl_autoencoder(latent_channels=4),
            text_encoder=qwen3(tokenizer, transformers.Qwen3Model),
            tokenizer=tokenizer,
        )
    )


@_seeded
def flux2():
    tokenizer = qwen_tokenizer()
    return _finish(
        diffusers.Flux2Pipeline(
            transformer=diffusers.Flux2Transformer2DModel(
                **{**FLUX_LIKE, "joint_attention_dim": 48, "axes_dims_rope": (4, 4, 4, 4)}
            ),
            scheduler=Euler(**DYNAMIC),
            vae=flux2_autoencoder(),
            text_encoder=transformers.Mistral3ForConditionalGeneration(mistral3_config(tokenizer)),
            tokenizer=tokenizer,
        )
    )


@_seeded
def lumina():
    tokenizer = unigram_tokenizer(model_max_length=256)
    config = transformers.GemmaConfig(**{**decoder_config(tokenizer), "bos_token_id": 1})
    return _finish(
        diffusers.LuminaPipeline(
            transformer=diffusers.LuminaNextDiT2DModel(
                sample_size=8,
                in_channels=4,
                hidden_size=16,
                num_layers=1,
                num_attention_heads=2,
                num_kv_heads=1,
                multiple_of=2,
                cross_attention_dim=16,
            ),
            scheduler=Euler(shift=3.0),
            vae=kl_autoencoder(latent_channels=4, blocks=4),
            text_encoder=transformers.GemmaModel(config),
            tokenizer=tokenizer,
        )
    )


@_seeded
def longcat_image():
    tokenizer = qwen_tokenizer()
    return _finish(
        diffusers.LongCatImagePipeline(
            transformer=diffusers.LongCatImageTransformer2DModel(
                **{**FLUX_LIKE, "in_channels": 64, "axes_dims_rope": [4, 4, 8]}, pooled_projection_dim=16
            ),
            scheduler=Euler(**DYNAMIC),
            vae=kl_autoencoder(latent_channels=16),
            text_encoder=qwen2_5_vl(tokenizer),
            tokenizer=tokenizer,
            text_processor=None,  # rewrites prompts, which the tests switch off
        )
    )


@_seeded
def ernie_image():
    tokenizer = qwen_tokenizer()
    return _finish(
        diffusers.ErnieImagePipeline(
            transformer=diffusers.ErnieImageTransformer2DModel(
                hidden_size=16,
                num_attention_heads=2,
                num_layers=1,
                ffn_hidden_size=32,
                in_channels=16,
                out_channels=16,
                text_in_dim=16,
                rope_axes_dim=(4, 2, 2),
            ),
            scheduler=Euler(shift=3.0),
            vae=flux2_autoencoder(),
            text_encoder=transformers.Mistral3Model(mistral3_config(tokenizer)),
            tokenizer=tokenizer,
        )
    )


@_seeded
def bria_fibo():
    tokenizer = qwen_tokenizer()
    vocab_size = 128001  # the pipeline feeds token 128000 for an empty prompt
    config = transformers.SmolLM3Config(**{**decoder_config(tokenizer), "vocab_size": vocab_size})
    return _finish(
        diffusers.BriaFiboPipeline(
            transformer=diffusers.BriaFiboTransformer2DModel(
                **{**FLUX_LIKE, "in_channels": 4, "joint_attention_dim": 32, "axes_dims_rope": [4, 4, 8]},
                text_encoder_dim=16,
            ),
            scheduler=Euler(**DYNAMIC),
            vae=diffusers.AutoencoderKLWan(
                base_dim=8,
                z_dim=4,
                dim_mult=[1, 1, 2, 2, 2],
                num_res_blocks=1,
                temperal_downsample=[False, False, True, True],
                latents_mean=[0.1, -0.2, 0.3, 0.0],
                latents_std=[1.5, 0.8, 1.1, 2.0],
            ),
            text_encoder=transformers.SmolLM3ForCausalLM(config),
            tokenizer=tokenizer,
        )
    )
