# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What trainings of published teachers take on one GPU and on eight, as `flowdistill plan` tells it: tables and JSON.

    python benchmarks/plans.py

Rehearsed from the published configurations (`tests/published`), without weights and without a GPU.
"""

import json
import sys
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from published_teachers import published_teacher  # noqa: E402

from hf_flowdistill.cli import ArgumentParser, silence_libraries  # noqa: E402
from hf_flowdistill.errors import exit_on_user_error  # noqa: E402
from hf_flowdistill.planning.choices import CHECKPOINTING, format_choices, list_choices  # noqa: E402


MACHINES = {1: (24, 80), 8: (80,)}  # GPUs -> GB of each
SMALL = {"networks": ["lora"], "rank": 16}  # on one GPU besides, for the smallest


def main():
    parser = ArgumentParser(prog="plans.py", description=__doc__.split("\n")[0])
    parser.add_argument("--teachers", nargs="+", default=["sd3.5-large", "flux.1-dev"], metavar="NAME")
    parser.add_argument("--train_batch_size", type=int, nargs="+", default=[1], metavar="N")
    parser.add_argument("--gpus", type=int, nargs="+", choices=MACHINES, default=list(MACHINES), metavar="N")
    parser.add_argument(
        "--checkpointing", nargs="+", choices=CHECKPOINTING, default=list(CHECKPOINTING), metavar="NAME"
    )
    parser.add_argument("--output_file", default=str(ROOT / "benchmarks/results/plans.json"), metavar="FILE.json")
    args = parser.parse_args()
    silence_libraries()
    path = Path(args.output_file)
    found = json.loads(path.read_text()) if path.exists() else {}
    for name in args.teachers:
        size, seconds = {"height": 1024, "width": 1024}, time.process_time()
        plans, teacher = found.get(name, {}), published_teacher(name)
        for gpus in args.gpus:
            settings = {"gpus": gpus, "memory": 0, "batch_sizes": args.train_batch_size, **size}
            settings |= {"checkpointing": args.checkpointing, "keep": False}
            plan = {"": list(list_choices(teacher, **settings))}
            print(f"{name}: {time.process_time() - seconds:.0f} CPU seconds for a plan", flush=True)
            if gpus == 1:
                plan[f", rank {SMALL['rank']}"] = list(list_choices(teacher, **settings, **SMALL))
            for more, choices in plan.items():
                for memory in MACHINES[gpus]:
                    there = [choice.in_memory(memory * 1e9) for choice in choices]
                    plans[f"{gpus}x{memory}{more}"] = [choice.as_dict() | {"command": None} for choice in there]
                    print(f"{name} at 1024, {gpus}x{memory} GB{more}\n\n{format_choices(there)}\n", flush=True)
            seconds = time.process_time()
        found[name] = plans
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    exit_on_user_error(main)()
