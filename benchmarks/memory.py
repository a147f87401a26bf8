# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What a process keeps for as long as it trains, in GB before activations: roles and precisions, as a table.

Computed from the configurations of published teachers; `--dry_run` of the training script tells it for any other, and
tests/test_planning.py counts it after updates of a tiny one.
"""

import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import torch  # noqa: E402
from published_teachers import published_teacher  # noqa: E402

from hf_flowdistill.cli import silence_libraries  # noqa: E402
from hf_flowdistill.evaluation.report import format_cells  # noqa: E402
from hf_flowdistill.networks.roles import RoleSettings  # noqa: E402
from hf_flowdistill.planning.sizes import training_memory  # noqa: E402
from hf_flowdistill.planning.skeleton import load_skeleton  # noqa: E402


TEACHERS = ("sana-1.6b-512", "sd3.5-medium", "sd3.5-large", "flux.1-dev")
NEAREST, SMALL = {"bf16_rounding": "nearest"}, {"use_8bit_adam": True}
CASES = [  # networks, quantization, dtype, the rest, arguments of the training script
    ("full", "none", torch.float32, {}, ""),
    ("full", "none", torch.bfloat16, {}, "`--weight_dtype bfloat16`"),
    ("full", "none", torch.bfloat16, NEAREST, "`--weight_dtype bfloat16 --bf16_rounding nearest`"),
    ("full", "none", torch.bfloat16, SMALL, "`--weight_dtype bfloat16 --use_8bit_adam`"),
    ("lora_fake", "none", torch.float32, {}, ""),
    ("lora_fake", "none", torch.bfloat16, {}, "`--weight_dtype bfloat16`"),
    ("lora_fake", "none", torch.bfloat16, SMALL, "`--weight_dtype bfloat16 --use_8bit_adam`"),
    ("lora", "none", torch.float32, {}, ""),
    ("lora", "none", torch.bfloat16, {}, "`--weight_dtype bfloat16`"),
    ("lora", "8bit", torch.bfloat16, {}, "`--weight_dtype bfloat16 --base_quantization 8bit`"),
    ("lora", "nf4", torch.bfloat16, {}, "`--weight_dtype bfloat16 --base_quantization nf4`"),
]


def main():
    silence_libraries()
    transformers = [load_skeleton(published_teacher(name)).transformer for name in TEACHERS]
    lines = [["--networks", "with", *TEACHERS]]
    for networks, quantization, dtype, settings, arguments in CASES:
        roles = RoleSettings(networks, base_quantization=quantization)
        memory = [training_memory(transformer, dtype, roles, **settings) for transformer in transformers]
        lines.append([networks, arguments, *(f"{sum(size for *_, size in rows) / 1e9:.1f}" for rows in memory)])
    print(format_cells(lines))


if __name__ == "__main__":
    main()
