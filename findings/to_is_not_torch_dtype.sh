#!/usr/bin/env bash
# diffusers 0.42.1: model.to(torch.bfloat16) and from_pretrained(..., torch_dtype=torch.bfloat16) make two networks.
#
# Expected: loading in bfloat16, and loading in float32 and casting, are the same network; both are in every README.
#
# What happens: from_pretrained leaves float32 what the class names in _keep_in_fp32_modules, and buffers that are no
# weights (tables of frequencies); .to casts both. Of Kandinsky5Transformer3DModel the first is in float32 in one and in
# bfloat16 in the other, which a warning says; and the tables of rotary angles are rounded to 8 bits, which nothing says.
#
# Why it matters: fine-tuning scripts load in float32 and cast (mixed precision, EMA copies, LoRA bases). What they train
# is then another network than the one that their saved weights make when they are loaded: the tables are not saved.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
cat > "$folder/run.py" <<'PY'
import sys

import torch
from diffusers import Kandinsky5Transformer3DModel

torch.manual_seed(0)
made = Kandinsky5Transformer3DModel(
    in_visual_dim=4, in_text_dim=16, in_text_dim2=16, time_dim=16, out_visual_dim=4, patch_size=(1, 2, 2),
    model_dim=32, ff_dim=32, num_text_blocks=1, num_visual_blocks=1, axes_dims=(4, 6, 6),
)
made.save_pretrained(sys.argv[1])
loaded = Kandinsky5Transformer3DModel.from_pretrained(sys.argv[1], torch_dtype=torch.bfloat16)
cast = Kandinsky5Transformer3DModel.from_pretrained(sys.argv[1]).to(torch.bfloat16)
tensors = [dict([*network.named_parameters(), *network.named_buffers()]) for network in (loaded, cast)]
different = [name for name, tensor in tensors[0].items() if tensor.dtype != tensors[1][name].dtype]
saved = loaded.state_dict().keys()
print("weights in float32 and bfloat16:", sum(name in saved for name in different))
print("tables in float32 and bfloat16:", [name for name in different if name not in saved])
assert any(name in saved for name in different) and any(name not in saved for name in different), "it has changed"
PY
"$folder/venv/bin/python" "$folder/run.py" "$folder/model" 2>/dev/null
# Output seen:
#   weights in float32 and bfloat16: 10
#   tables in float32 and bfloat16: ['text_rope_embeddings.args', 'visual_rope_embeddings.args_0', ...]
