# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The table of docs/teachers.md, from contracts learned just now. `python tests/support_table.py` writes it anew."""

from pathlib import Path

import tiny_pipelines

from hf_flowdistill.teachers import learn_contract


PAGE = Path(__file__).parent.parent / "docs" / "teachers.md"
BEGIN, END = "<!-- support table: begin -->\n", "<!-- support table: end -->\n"
BUILDERS = {
    tiny_pipelines.stable_diffusion_3: {"max_sequence_length": 16},
    tiny_pipelines.sana: {"max_sequence_length": 16, "use_resolution_binning": False},
    tiny_pipelines.flux: {"max_sequence_length": 16},
}
COLUMNS = {
    "pipeline": "Pipeline",
    "latent": "Latent (tiny model)",
    "time": "Time",
    "velocity": "Velocity",
    "conditioning": "Kept per prompt",
    "guidance": "Guidance",
    "guidance_argument": "Scaled by",
    "embedded_guidance": "Embedded guidance",
    "replay_error": "Replay error",
}


def support_table() -> str:
    rows = [list(COLUMNS.values()), ["---"] * len(COLUMNS)]
    for build, kwargs in BUILDERS.items():
        size = {"height": tiny_pipelines.HEIGHT, "width": tiny_pipelines.WIDTH}
        learned = learn_contract(build(), **size, pipeline_kwargs=kwargs).as_dict()
        learned["replay_error"] = "< 1e-4" if learned["replay_error"] < 1e-4 else f"{learned['replay_error']:.0e}"
        learned["conditioning"] = ", ".join(learned["conditioning"])
        rows.append([learned[key] or "none" for key in COLUMNS])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main():
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + support_table() + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
