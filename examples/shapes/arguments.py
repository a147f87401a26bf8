# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What the scripts here have in common of their arguments. No torch, which takes seconds to import."""

import argparse
from pathlib import Path

from hf_flowdistill.errors import UserError


HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
CATEGORIES = ("single_object", "colors", "two_object", "color_attribution", "counting", "position")  # of prompts
CALL = {"max_sequence_length": 1}  # of the teacher's pipeline


def build_parser(description: str, output_dir: str, results: str, document: str, config: str):
    """The arguments of a table over seeds, with these defaults: names in the working directory, in docs/results, in
    docs and beside this script."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default=output_dir, help="where the runs are (default: %(default)s)")
    parser.add_argument("--results", default=str(REPOSITORY / "docs/results" / results), help="file of all rows")
    parser.add_argument(
        "--documents", nargs="*", default=[str(REPOSITORY / "docs" / document)], help="Markdown files with the marks"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the trainings")
    parser.add_argument("--teacher", default=str(HERE / "teacher"), help="a shapes pipeline")
    parser.add_argument("--config", default=str(HERE / config), help="arguments of train_sid_dit.py")
    parser.add_argument("--guidance_scale", type=float, default=2.0, help="of the teacher, as in the recipe")
    parser.add_argument("--num_prompts", type=int, default=2000, help="freshly drawn prompts of each seed")
    return parser


def add_sequence_length(parser) -> None:
    parser.add_argument(
        "--max_sequence_length", type=int, default=CALL["max_sequence_length"], help="of the teacher's T5, in tokens"
    )


def add_fit_arguments(parser, steps: int, batch_size: int) -> None:
    """The arguments of the transformer stage, with these defaults."""
    parser.add_argument("--steps", type=int, default=steps, help="transformer steps")
    parser.add_argument("--batch_size", type=int, default=batch_size)
    parser.add_argument(
        "--learning_rate", type=float, default=1e-3, help="peak; cosine decay after 500 steps of warm-up"
    )
    parser.add_argument("--ema_decay", type=float, default=0.999)
    parser.add_argument("--compile", action="store_true", help="compile each transformer (needs a C++ compiler)")


def in_steps(num_steps: int) -> str:
    return f"{num_steps} step{'s' * (num_steps > 1)}"


def check_prompts(count: int) -> None:
    """Raise `UserError` if there are too few prompts to judge every category."""
    if count < len(CATEGORIES) * 10:
        raise UserError(f"--num_prompts must be at least {len(CATEGORIES) * 10}.")


def check_documents(documents: list[str], marks: tuple[str, str]) -> None:
    """Raise `UserError` unless each of these Markdown files has a place for the table."""
    for document in documents:
        if not Path(document).is_file() or any(Path(document).read_text("utf-8").count(mark) != 1 for mark in marks):
            raise UserError(f"{document} has no place for the table: write a line {marks[0]} and a line {marks[1]}.")
