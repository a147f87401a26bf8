# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Tokenizers, text encoders and VAEs of tiny_teachers.py: real classes, tiny sizes."""

import transformers
from diffusers import AutoencoderKLFlux2, AutoencoderKLQwenImage
from tokenizers import pre_tokenizers


CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def qwen_tokenizer(**kwargs):
    """A real Qwen tokenizer (byte-level BPE) without merges: every byte is a token."""
    vocab = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    vocab |= {token: len(vocab) + index for index, token in enumerate(special)}
    return transformers.Qwen2Tokenizer(
        vocab=vocab, merges=[], extra_special_tokens=special[1:3], chat_template=CHAT, model_max_length=4096, **kwargs
    )


class TextProcessor:
    """Qwen3-VL's processor as far as prompts need it; the real one cannot be made without torchvision."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def apply_chat_template(self, conversation, **kwargs):
        return [self.tokenizer.apply_chat_template(conversation, **kwargs)]  # as of a batch of one

    def __call__(self, text, images=None, **kwargs):
        assert images is None
        return self.tokenizer(text, **kwargs)


def decoder_config(tokenizer, num_layers=2) -> dict:
    """Sizes that the configurations of Qwen, GLM, Llama and Mistral language models share."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 4096,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }


def qwen3(tokenizer, cls, num_layers=2):
    return cls(transformers.Qwen3Config(**decoder_config(tokenizer, num_layers)))


def qwen2_5_vl(tokenizer):
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = {**decoder_config(tokenizer), "rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl(tokenizer, cls):
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4, "mrope_interleaved": True}
    text = {**decoder_config(tokenizer), "rope_parameters": rope}
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
    }
    return cls(transformers.Qwen3VLConfig(text_config=text, vision_config=vision))


def flux2_autoencoder():
    return AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
    )


def qwen_autoencoder():
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.8, 1.1, 2.0],
    )


def mistral3_config(tokenizer):
    text = {**decoder_config(tokenizer, num_layers=3), "model_type": "mistral"}
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
        "image_size": 32,
        "patch_size": 16,
    }
    return transformers.Mistral3Config(text_config=text, vision_config=vision)
