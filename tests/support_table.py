# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The table of docs/teachers.md, from contracts learned just now. `python tests/support_table.py` writes it anew."""

from pathlib import Path

from teacher_cases import TEACHERS, learned

from hf_flowdistill.errors import UserError
from hf_flowdistill.networks.features import find_projection


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
    "replay_error": "Replay error",
}


def features(name: str) -> str:
    """The module whose input they are, or why there are none."""
    try:
        return find_projection(learned(name).pipeline, learned(name).contract)
    except UserError as error:
        return f"none: {error}"


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
        told["replay_error"] = f"{told['replay_error']:.1e}"
        rows.append([told[key] or "none" for key in COLUMNS])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def without_errors(table: str) -> str:
    """The table without its last column, whose digits depend on the processor."""
    return "\n".join(line.rsplit("|", 2)[0] for line in table.splitlines() if line.startswith("|"))


def main():
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + support_table() + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
