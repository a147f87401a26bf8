# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The table of docs/teachers.md, from contracts learned just now. `python tests/support_table.py` writes it anew."""

from pathlib import Path

import torch
from teacher_cases import TEACHERS, learned, learned_in_bfloat16

from hf_flowdistill.errors import UserError
from hf_flowdistill.networks.features import find_projection
from hf_flowdistill.teachers import encode_prompts, learn_low_precision
from hf_flowdistill.teachers.inference import relative_error
from hf_flowdistill.teachers.learning import PROMPTS


PAGE = Path(__file__).parent.parent / "docs" / "teachers.md"
BEGIN, END = "<!-- support table: begin -->\n", "<!-- support table: end -->\n"
VARIANTS = {"sana sprint's teacher", "hunyuan image, distilled guidance"}
COLUMNS = {
    "pipeline": "Pipeline",
    "latent": "Latent (tiny model)",
    "time": "Time",
    "velocity": "Velocity",
    "conditioning": "Kept per prompt",
    "guidance": "Guidance",
    "guidance_argument": "Scaled by",
    "guidance_modes": "Modes, default first",
    "features": "Discriminator features",
    "time_seen": "Time under autocast, in bfloat16",
    "bfloat16": "In bfloat16 (allowed)",
    "autocast": "Under autocast",
    "replay_error": "Replay error",
}
MEASURED = 3  # the last columns, whose digits depend on the processor


def features(name: str) -> str:
    """The module whose input they are, or why there are none."""
    try:
        return find_projection(learned(name).pipeline, learned(name).contract)
    except UserError as error:
        return f"none: {error}"


def in_low_precision(name: str) -> dict[str, str]:
    """What the network makes of its time there, and how far it is from what it is held against: in bfloat16 the
    pipeline's own call, with the tolerance, and under autocast the velocities in float32."""
    case, low = learned(name), learned_in_bfloat16(name)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = learn_low_precision(case.pipeline, case.contract)
    low_contract = learn_low_precision(low.pipeline, low.contract)
    conditional, _ = encode_prompts(case.pipeline, case.contract, PROMPTS)
    x_t = torch.randn(2, *case.contract.latent_shape, generator=torch.Generator().manual_seed(0))
    sigma = autocast.snap(torch.tensor([0.9, 0.4]))
    with torch.no_grad():
        expected = case.contract.velocity(case.pipeline.transformer, x_t, sigma, conditional)
        with torch.autocast("cpu", torch.bfloat16):
            found = autocast.velocity(case.pipeline.transformer, x_t, sigma, conditional)
    seen = [one.time_rounding or "exact" for one in (autocast, low_contract)]
    return {
        "time_seen": seen[0] if seen[0] == seen[1] else "; ".join(seen),
        "bfloat16": f"{low.contract.replay_error:.1e} ({case.teacher.bfloat16:g})",
        "autocast": f"{relative_error(found, expected):.1e}",
    }


def support_table() -> str:
    rows = [list(COLUMNS.values()), ["---"] * len(COLUMNS)]
    for name in TEACHERS:
        told = learned(name).contract.as_dict()
        told["pipeline"] += f" ({name})" * (name in VARIANTS)
        varying = told["varying_length"]
        told["conditioning"] = ", ".join(path + " (own length)" * (path in varying) for path in told["conditioning"])
        told["guidance"] = told["guidance"].replace(", combined here without the pipeline's rescaling", " (1)")
        told["guidance_modes"] = ", ".join(told["guidance_modes"])
        told["features"] = features(name)
        told |= in_low_precision(name)
        told["replay_error"] = f"{told['replay_error']:.1e}"
        rows.append([told[key] or "none" for key in COLUMNS])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def without_errors(table: str) -> str:
    """The table without its last columns, whose digits depend on the processor."""
    return "\n".join(line.rsplit("|", MEASURED + 1)[0] for line in table.splitlines() if line.startswith("|"))


def main():
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + support_table() + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
