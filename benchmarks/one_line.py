# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What `train_sid_dit.py --pretrained_model_name_or_path TEACHER` alone would run on several machines, as a table.

    python benchmarks/one_line.py

Of the papers' eight teachers, from their published configurations (`tests/published`), without weights and without a
GPU.
"""

import re
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / place) for place in ("src", "tests", "examples")]

from published_teachers import PUBLISHED, published_teacher  # noqa: E402
from score_distillation import train_sid_dit  # noqa: E402

from hf_flowdistill.cli import silence_libraries  # noqa: E402
from hf_flowdistill.errors import UserError  # noqa: E402
from hf_flowdistill.evaluation.report import format_cells  # noqa: E402
from hf_flowdistill.planning.fit import fit  # noqa: E402
from hf_flowdistill.training.recipes import parse_with_recipe  # noqa: E402


MACHINES = ((8, 80), (1, 80), (1, 24))  # GPUs, GB of each


def main():
    silence_libraries()
    rows = [["teacher", "GPUs", "recipe", "layout", "GB at the peak"]]
    for teacher in sorted(path.stem for path in PUBLISHED.glob("*.json") if path.stem != "components"):
        for gpus, memory in MACHINES:
            words = [f"--pretrained_model_name_or_path={published_teacher(teacher)}", "--prompt_file=prompts.txt"]
            words += [f"--device_memory={memory}", f"--dry_run={gpus}", "--report_to=none"]
            parser = train_sid_dit.make_parser()
            found = parse_with_recipe(parser, words, train_sid_dit.check_args, train_sid_dit.RECIPES)
            try:
                args, lines = fit(found, words, processes=gpus, device="cpu")
                told, recipe = lines[0].removeprefix("fit: "), args.recipe
            except UserError as error:
                nearest = [line.strip() for line in str(error).splitlines()[1::2]]
                told, recipe = (f"refused; nearest: {nearest[0]}" if nearest else "nothing fits: "), found[0].recipe
            layout, _, size = told.rpartition(": ")
            peak = re.match(r"[\d.]+", size)
            rows.append([teacher, f"{gpus} x {memory} GB", recipe, layout, peak[0] if peak else ""])
            print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    print(format_cells(rows))


if __name__ == "__main__":
    main()
