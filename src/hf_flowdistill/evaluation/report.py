# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A report: a list of rows, one per pipeline, number of steps and guidance scale."""

import json
from pathlib import Path


def row(pipeline, num_steps, guidance_scale, generated, accuracy, accuracy_by_category, fid) -> dict:
    """One row. `pipeline` is "teacher", "undistilled" (its network under the student's sampler) or "student"."""
    return {
        "pipeline": pipeline,
        "num_steps": num_steps,
        "guidance_scale": guidance_scale,
        "accuracy": accuracy,
        "accuracy_by_category": accuracy_by_category,
        "fid": fid,
        "forwards_per_image": generated.forwards_per_image,
        "seconds_per_image": generated.seconds_per_image,
    }


def save_report(rows: list[dict], path) -> None:
    Path(path).write_text(json.dumps(rows, indent=2) + "\n")


def format_table(rows: list[dict]) -> str:
    """The rows as a Markdown table that also reads well in a terminal."""
    categories = list(rows[0]["accuracy_by_category"])
    header = ["pipeline", "steps", "guidance", "accuracy", *categories, "FID", "forwards/image", "ms/image"]
    lines = [
        [
            r["pipeline"],
            str(r["num_steps"]),
            f"{r['guidance_scale']:g}",
            f"{r['accuracy']:.3f}",
            *(f"{r['accuracy_by_category'][name]:.2f}" for name in categories),
            f"{r['fid']:.1f}",
            f"{r['forwards_per_image']:g}",
            f"{1000 * r['seconds_per_image']:.1f}",
        ]
        for r in rows
    ]
    return format_cells([header, *lines])


def format_cells(lines: list[list[str]]) -> str:
    """Lines of cells, the header first, as a Markdown table: the first column flush left, the others right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    rule = ["-" * (width - 1) + ":" if i else "-" * width for i, width in enumerate(widths)]
    lines = [
        [cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths))]
        for line in [lines[0], rule, *lines[1:]]
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
