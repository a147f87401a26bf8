#!/usr/bin/env bash
# diffusers 0.42.1: under autocast, a FLUX transformer with float32 weights sees 8 bits of its time.
#
# Expected: autocast lowers the precision of matrix products; what is kept in float32 for its precision, weights and the
# time of a diffusion, stays so. Stable Diffusion 3's transformer, called the same way, tells sigma .977 from .978.
#
# What happens: FluxTransformer2DModel casts the time to the dtype of its first projection's output, which is bfloat16
# under autocast, and multiplies it by 1000 there. Sigma .977 and .978 give outputs that are equal bit for bit; in
# (.5, 1) there are 126 different times. (So do Chroma, Ovis-Image and LongCat-Image; Qwen-Image and Bria cast without the product.)
#
# Why it matters: a training that draws the time continuously makes its noisy input at one noise level and conditions
# the network on another, off by up to .002, which is a large part of 1 - sigma near pure noise; and timesteps that
# differ by less are silently one.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 numpy==2.4.6
cat > "$folder/run.py" <<'PY'
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

torch.manual_seed(0)
flux = FluxTransformer2DModel(
    in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=False,
).eval()
sd3 = SD3Transformer2DModel(
    sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
    num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16,
    pos_embed_max_size=8,
).eval()
tokens, text, pooled, latent = torch.randn(1, 4, 16), torch.randn(1, 3, 16), torch.randn(1, 16), torch.randn(1, 4, 8, 8)


def run_flux(sigma):
    ids = {"img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3)}
    return flux(tokens, text, pooled, torch.tensor([sigma]), return_dict=False, **ids)[0]


def run_sd3(sigma):
    return sd3(latent, text, pooled, torch.tensor([1000 * sigma]), return_dict=False)[0]


seen = []
flux.time_text_embed.time_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].item()))
with torch.no_grad():
    print("float32, FLUX equal:", torch.equal(run_flux(0.977), run_flux(0.978)))
    with torch.autocast("cpu", torch.bfloat16):
        equal = torch.equal(run_flux(0.977), run_flux(0.978))
        told = not torch.equal(run_sd3(0.977), run_sd3(0.978))
        seen.clear()
        for i in range(501, 1000):
            run_flux(i / 1000)
print("autocast, FLUX equal:", equal, "; SD3 different:", told, "; FLUX's times in (.5, 1):", len(set(seen)))
assert equal and told and len(set(seen)) < 130, "the behaviour has changed"
PY
"$folder/venv/bin/python" "$folder/run.py"
# Output seen:
#   float32, FLUX equal: False
#   autocast, FLUX equal: True ; SD3 different: True ; FLUX's times in (.5, 1): 126
