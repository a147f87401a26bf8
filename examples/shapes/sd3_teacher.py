# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The shapes teacher: its networks, its tokenizer, and how each is trained."""

import copy
import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from fitting import fit, fit_vae, mixed_precision
from hf_flowdistill import flow
from hf_flowdistill.flow.timesteps import sigma_from_normal
from scenes import CATEGORIES, COUNTS, SIZE, random_scene, render


TEXT_LENGTH = 10  # tokens: the longest prompt has eight words, between a start and an end token
TEXT_WIDTH = 64
SHARES = {
    "three": 0.34,
    "two": 0.20,
    "relation": 0.18,
    "two kinds": 0.12,
    "two colours": 0.12,
    "one": 0.04,
}  # of a batch
NULL_TOKENS = 256  # how many zeros StableDiffusion3Pipeline appends by default for the third text encoder


def build_tokenizer() -> CLIPTokenizer:
    """A real CLIP tokenizer whose byte-pair merges make every word of the grammar one token."""
    rng = random.Random(0)
    corpus = [random_scene(rng, category).prompt for category in CATEGORIES for _ in range(5000)]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), behavior="removed")
    bpe.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=1000,
            special_tokens=["<|startoftext|>", "<|endoftext|>"],
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    model = json.loads(bpe.to_str())["model"]
    return CLIPTokenizer(
        vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], model_max_length=TEXT_LENGTH
    )


def build_text_encoder(tokenizer, layers: int) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=TEXT_LENGTH,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()


def build_silent_encoder(width: int):
    """The third text encoder and its tokenizer: they read nothing and say nothing. Stable Diffusion 3 runs without its
    T5, but does not load without one; here every prompt is one end token, and every output zero."""
    nothing = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    nothing.normalizer = normalizers.Replace(Regex(r"[\s\S]+"), "")
    nothing.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=nothing, eos_token="</s>", pad_token="<pad>")
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=2, d_model=width, d_kv=8, d_ff=8, num_heads=1, num_layers=1, pad_token_id=0, eos_token_id=1
        )
    ).eval()
    torch.nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder, tokenizer


def build_vae(latent_channels: int, widths: tuple[int, ...], **scale) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=latent_channels,
        sample_size=SIZE,
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        **scale,
    )


def build_pipeline(args) -> StableDiffusion3Pipeline:
    """The untrained teacher: the classes of Stable Diffusion 3, small."""
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    vae = build_vae(latent_channels=4, widths=(16, 32), scaling_factor=1.0, shift_factor=0.0)
    transformer = SD3Transformer2DModel(
        sample_size=SIZE // 2,
        patch_size=4,
        in_channels=4,
        out_channels=4,
        num_layers=args.num_layers,
        attention_head_dim=32,
        num_attention_heads=args.width // 32,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=args.width,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=SIZE // 8,
        qk_norm="rms_norm",
    )
    torch.nn.init.zeros_(transformer.proj_out.weight)  # a network that starts by predicting nothing learns sooner
    for block in transformer.transformer_blocks:
        torch.nn.init.zeros_(block.norm1.linear.weight)
    silent, silent_tokenizer = build_silent_encoder(2 * TEXT_WIDTH)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
        text_encoder=build_text_encoder(tokenizer, 2),
        tokenizer=tokenizer,
        text_encoder_2=build_text_encoder(tokenizer, 3),
        tokenizer_2=copy.deepcopy(tokenizer),
        text_encoder_3=silent,
        tokenizer_3=silent_tokenizer,
    )


def train_vae(vae, args) -> None:
    """Autoencoder on fresh renders: absolute error, a little KL; then latents are standardised by the config."""
    rng, generator = random.Random(args.seed + 1), torch.Generator().manual_seed(args.seed)

    def loss_of(images):
        posterior = vae.encode(images).latent_dist
        restored = vae.decode(posterior.sample(generator)).sample
        kl = posterior.kl().float().mean()
        return restored, args.kl_weight * kl, lambda: f"kl {kl.item():.1f}"

    fit_vae(vae, args.vae_steps, rng, loss_of)
    with torch.no_grad():
        latents = vae.encode(render([random_scene(rng) for _ in range(512)], rng).mul(2).sub(1)).latent_dist.mode()
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


@torch.no_grad()
def encode_renders(vae, count: int, seed: int):
    """`count` fresh renders as standardised latents (float16) with their prompts."""
    rng = random.Random(seed)
    latents, prompts = [], []
    for start in range(0, count, 256):
        scenes = [random_scene(rng) for _ in range(min(256, count - start))]
        with mixed_precision():
            distribution = vae.encode(render(scenes, rng).mul(2).sub(1)).latent_dist
        latent = distribution.mode().float()
        latents.append(((latent - vae.config.shift_factor) * vae.config.scaling_factor).half())
        prompts += [scene.prompt for scene in scenes]
    return torch.cat(latents), prompts


def encode_text(pipeline, tokens):
    """What `StableDiffusion3Pipeline.encode_prompt` computes from its two CLIP encoders, with gradient.

    tokens: [B, TEXT_LENGTH]. Returns prompt_embeds [B, TEXT_LENGTH, 2 * TEXT_WIDTH] and pooled [B, 2 * TEXT_WIDTH].
    """
    outputs = [
        encoder(tokens, output_hidden_states=True) for encoder in (pipeline.text_encoder, pipeline.text_encoder_2)
    ]
    return torch.cat([o.hidden_states[-2] for o in outputs], -1), torch.cat([o.text_embeds for o in outputs], -1)


def kind_of(prompt: str) -> str:
    """The key of a prompt in `SHARES`."""
    words = prompt.split()
    if words[0] in COUNTS:
        return words[0]
    if len(words) <= 3:
        return "one"
    return "relation" if "and" not in words else "two kinds" if len(words) == 5 else "two colours"


def load_renders(vae, args):
    """The latents of renders, encoded once in --work_dir, with their prompts.

    Returns latents [N, C, H, W], the distinct prompts and an empty one, rows [N]: which of these a render has, and for
    every kind in `SHARES` the numbers of its renders.
    """
    path = Path(args.work_dir) / "latents.pt"
    if not path.exists():
        torch.save(encode_renders(vae, args.num_renders, args.seed + 2), path)
    latents, prompts = torch.load(path)
    unique = sorted(set(prompts)) + [""]
    row = {prompt: i for i, prompt in enumerate(unique)}
    kinds = [kind_of(prompt) for prompt in prompts]
    by_kind = [torch.tensor([i for i, kind in enumerate(kinds) if kind == name]) for name in SHARES]
    return latents, unique, torch.tensor([row[prompt] for prompt in prompts]), by_kind


def draw_rows(by_kind: list[torch.Tensor], count: int, generator, shares=SHARES) -> torch.Tensor:
    """[count] numbers of renders, the kinds of their prompts drawn by `shares`."""
    drawn = torch.multinomial(
        torch.tensor(list(shares.values())), count, replacement=True, generator=generator
    ).tolist()
    return torch.stack([by_kind[i][torch.randint(len(by_kind[i]), (), generator=generator)] for i in drawn])


def train_transformer(pipeline, args) -> None:
    """Rectified flow, with sigma logit-normal(1, 1.3), to practise high noise, where layout should be decided.

    Hard prompts are drawn more often; 10 % of the prompts are dropped; the text encoders learn along. One batch in 16
    appends null tokens, as many as the stock call or one, so that any number of them will do.
    """
    latents, unique, rows, by_kind = load_renders(pipeline.vae, args)
    tokens = pipeline.tokenizer(unique, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt").input_ids
    transformer = torch.compile(pipeline.transformer) if args.compile else pipeline.transformer

    def loss_of(step, generator):
        null = step % 16 == 15
        pick = draw_rows(by_kind, args.batch_size // 4 if null else args.batch_size, generator)
        dropped = torch.rand(len(pick), generator=generator) < 0.1
        text = tokens[torch.where(dropped, len(unique) - 1, rows[pick])]
        x0 = latents[pick].float()
        noise = torch.randn(x0.shape, generator=generator)
        sigma = sigma_from_normal(torch.randn(len(pick), generator=generator), mean=1.0, std=1.3)
        with mixed_precision():
            prompt_embeds, pooled = encode_text(pipeline, text)
            if null:
                prompt_embeds = F.pad(prompt_embeds, (0, 0, 0, NULL_TOKENS if step % 64 == 63 else 1))
            network = pipeline.transformer if null else transformer
            velocity = network(
                flow.add_noise(x0, noise, sigma), prompt_embeds, pooled, 1000 * sigma, return_dict=False
            )[0]
        return F.mse_loss(velocity.float(), flow.velocity(x0, noise))

    fit(torch.nn.ModuleList([pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2]), loss_of, args)
