# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The second shapes teacher: its networks, its tokenizer, and how each is trained."""

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from fitting import fit, fit_vae, mixed_precision
from hf_flowdistill import flow
from hf_flowdistill.flow.timesteps import sigma_from_normal
from scenes import SIZE
from sd3_teacher import SHARES, TEXT_LENGTH, build_vae, draw_rows, load_renders


MOST_GUIDANCE = 3.0  # guidance scales from 1 to this are learned
TOKENS = SIZE // 8  # on a side of the picture


def build_tokenizer(clip) -> PreTrainedTokenizerFast:
    """The words of the CLIP tokenizer, each a token, at the same places between a start and an end token."""
    words = sorted({token.removesuffix("</w>") for token in clip.get_vocab() if token.endswith("</w>")})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(name, vocabulary[name]) for name in ("<s>", "</s>")]
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=TEXT_LENGTH, **special)


def build_pipeline(source: StableDiffusion3Pipeline, args) -> FluxPipeline:
    """The classes of FLUX.1-dev, small; the text encoder of the pooled output is the first teacher's."""
    torch.manual_seed(args.seed)
    tokenizer, width = build_tokenizer(source.tokenizer), source.transformer.config.joint_attention_dim
    clip = CLIPTextModel.from_pretrained(Path(args.teacher) / "text_encoder").eval()
    scale = {key: source.vae.config[key] for key in ("scaling_factor", "shift_factor")}
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            in_channels=64,
            num_layers=source.transformer.config.num_layers,
            num_single_layers=args.num_single_layers,
            attention_head_dim=32,
            num_attention_heads=source.transformer.config.num_attention_heads,
            joint_attention_dim=width,
            pooled_projection_dim=clip.config.hidden_size,
            guidance_embeds=True,
            axes_dims_rope=(8, 12, 12),
        ),
        vae=build_vae(latent_channels=16, widths=(16, 32, 64), **scale),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
        text_encoder=clip,
        tokenizer=source.tokenizer,
        text_encoder_2=T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer),
                d_model=width,
                d_kv=32,
                d_ff=2 * width,
                num_heads=4,
                num_layers=3,
                feed_forward_proj="gated-gelu",
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        ).eval(),
        tokenizer_2=tokenizer,
    )


def pack(latents):
    """[B, 4, 20, 20] latents of the first teacher as the second one's tokens, [B, 25, 64]: 2 x 2 of a channel become
    four channels in the autoencoder's latents, and 2 x 2 of those become a token in the pipeline."""
    folded = F.pixel_unshuffle(latents, 2)
    return FluxPipeline._pack_latents(folded, *folded.shape)


@torch.no_grad()
def start_from(transformer, source) -> None:
    """Copy what the transformer of FLUX has in common with the one of Stable Diffusion 3. New parts say nothing."""
    network, old = transformer.state_dict(), source.transformer.state_dict()
    for name, value in old.items():
        if name in network and network[name].shape == value.shape:
            network[name].copy_(value)
    # A token's 64 numbers are the same ones, in another order.
    order = pack(torch.arange(64.0).view(4, 4, 4).repeat(1, TOKENS, TOKENS)[None])[0, 0].long()
    network["x_embedder.weight"].copy_(old["pos_embed.proj.weight"].flatten(1)[:, order])
    network["x_embedder.bias"].copy_(old["pos_embed.proj.bias"])
    pixel_first = torch.arange(64).view(4, 4, 4).permute(2, 0, 1).flatten()[order]  # Stable Diffusion 3's output order
    network["proj_out.weight"].copy_(old["proj_out.weight"][pixel_first])
    network["proj_out.bias"].copy_(old["proj_out.bias"][pixel_first])
    pooled, projection = "time_text_embed.text_embedder.linear_1.weight", source.text_encoder.text_projection.weight
    network[pooled].copy_(old[pooled][:, : len(projection)] @ projection)
    # The last block of Stable Diffusion 3 ends its text stream: a scale and a shift, no gates.
    last = f"transformer_blocks.{len(transformer.transformer_blocks) - 1}.norm1_context.linear"
    for part in ("weight", "bias"):
        scale, shift = old[f"{last}.{part}"].chunk(2)
        network[f"{last}.{part}"].zero_()[: 2 * len(scale)] = torch.cat([shift, scale])
    silent = [block.norm.linear for block in transformer.single_transformer_blocks]
    for layer in [*silent, transformer.time_text_embed.guidance_embedder.linear_2]:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)


def train_vae(vae, source, args) -> None:
    """The first teacher's autoencoder, with 2 x 2 latents folded into channels: encoder and decoder copy its own."""

    def loss_of(images):
        with torch.no_grad():
            posterior = source.vae.encode(images).latent_dist
            target = torch.cat([F.pixel_unshuffle(part, 2) for part in posterior.parameters.chunk(2, 1)], 1)
            latents = F.pixel_unshuffle(posterior.mode(), 2)
        restored = vae.decode(latents).sample
        distance = F.mse_loss(vae.encode(images).latent_dist.parameters.float(), target.float())
        return restored, 0.1 * distance, lambda: f"distance of latents {distance.item():.4f}"

    fit_vae(vae, args.vae_steps, random.Random(args.seed + 1), loss_of)


def train_text(encoder, tokens, wanted, args) -> None:
    """Let the T5 say what the first teacher's text encoders say, token by token, to start from."""
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=args.text_steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(args.seed)
    for step in range(args.text_steps):
        rows = torch.randint(len(tokens), (64,), generator=generator)
        loss = F.mse_loss(encoder(tokens[rows]).last_hidden_state, wanted[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == args.text_steps - 1:
            print(f"text {step}/{args.text_steps} mse {loss.item():.4f} of {wanted.var().item():.4f}", flush=True)


def train_transformer(pipeline, source, args) -> None:
    """Match the guided velocity of the first teacher, on renders with noise; the T5 learns along."""
    latents, unique, rows, by_kind = load_renders(source.vae, args)
    with torch.no_grad():
        source_embeds, _, source_pooled, _ = source.encode_prompt(
            unique, None, None, do_classifier_free_guidance=False, max_sequence_length=1
        )
        pooled = pipeline._get_clip_prompt_embeds(unique)
    length = {"padding": "max_length", "max_length": TEXT_LENGTH, "return_tensors": "pt"}
    tokens = pipeline.tokenizer_2(unique, **length)["input_ids"]
    text_file = Path(args.work_dir) / "text.pt"
    if not text_file.exists():
        train_text(pipeline.text_encoder_2, tokens, source_embeds[:, :TEXT_LENGTH], args)
        torch.save(pipeline.text_encoder_2.state_dict(), text_file)
    pipeline.text_encoder_2.load_state_dict(torch.load(text_file))
    image_ids = pipeline._prepare_latent_image_ids(1, TOKENS, TOKENS, "cpu", torch.float32)
    network, teacher = pipeline.transformer, source.transformer.requires_grad_(False)
    if args.compile:
        network, teacher = torch.compile(network), torch.compile(teacher)

    others = (1 - args.relation_share) / (1 - SHARES["relation"])
    shares = {kind: args.relation_share if kind == "relation" else others * SHARES[kind] for kind in SHARES}

    def loss_of(step, generator):
        pick = draw_rows(by_kind, args.batch_size, generator, shares)
        text, x0 = rows[pick], latents[pick].float()
        noise = torch.randn(x0.shape, generator=generator)
        sigma = sigma_from_normal(torch.randn(len(pick), generator=generator), mean=1.0, std=1.3)
        guidance = 1 + (MOST_GUIDANCE - 1) * torch.rand(len(pick), generator=generator)
        x_t = flow.add_noise(x0, noise, sigma)
        both = torch.cat([torch.full_like(text, len(unique) - 1), text])
        with mixed_precision():
            with torch.no_grad():
                halves = teacher(
                    torch.cat([x_t, x_t]),
                    source_embeds[both],
                    source_pooled[both],
                    1000 * torch.cat([sigma, sigma]),
                    return_dict=False,
                )[0].float()
            unconditional, conditional = halves.chunk(2)
            wanted = pack(flow.guide(unconditional, conditional, guidance.view(-1, 1, 1, 1)))
            velocity = network(
                hidden_states=pack(x_t),
                timestep=sigma,
                guidance=guidance,
                pooled_projections=pooled[text],
                encoder_hidden_states=pipeline.text_encoder_2(tokens[text]).last_hidden_state,
                txt_ids=torch.zeros(TEXT_LENGTH, 3),
                img_ids=image_ids,
                return_dict=False,
            )[0]
        return F.mse_loss(velocity.float(), wanted)

    fit(torch.nn.ModuleList([pipeline.transformer, pipeline.text_encoder_2]), loss_of, args)
