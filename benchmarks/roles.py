# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What roles and precisions cost in quality: the shapes recipe with each, judged alike, as a table.

Every row is a training of its own with the real script. What is finished is kept in --output_dir, so the benchmark can
be stopped and run again. Other arguments are those of train_sid_dit.py, for all rows.
"""

import argparse
import json
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "examples" / "shapes")]

import torch  # noqa: E402

from arguments import HERE  # noqa: E402
from demo import train  # noqa: E402
from hf_flowdistill.cli import silence_libraries  # noqa: E402
from hf_flowdistill.errors import exit_on_user_error  # noqa: E402
from hf_flowdistill.evaluation.report import format_cells  # noqa: E402
from hf_flowdistill.networks.loading import load_pipeline  # noqa: E402
from hf_flowdistill.networks.roles import RoleSettings  # noqa: E402
from hf_flowdistill.planning.sizes import training_memory  # noqa: E402
from judging import Judge, load_pipelines  # noqa: E402


BF16 = {"weight_dtype": "bfloat16"}
LORA = {"rank": 32, "learning_rate": 5e-4, "fake_score_learning_rate": 3e-3}
CASES = {
    "full, float32": {},
    "full, AMP": {"mixed_precision": "bf16"},
    "full, float32, shared rollout": {"share_rollout": True},
    "full, float32, 8-bit Adam": {"use_8bit_adam": True},
    "full, bfloat16, stochastic": BF16,
    "full, bfloat16, nearest": {**BF16, "bf16_rounding": "nearest"},
    "lora_fake, float32": {"networks": "lora_fake", **LORA, "learning_rate": 7e-5},
    "lora, float32": {"networks": "lora", **LORA},
    "lora, nf4": {"networks": "lora", "base_quantization": "nf4", **LORA},
}


def run_case(name: str, settings: dict, args, more: list[str]) -> dict:
    """One training and its judgement."""
    folder = Path(args.output_dir).resolve() / name.replace(", ", "_").replace(" ", "_")
    report = folder / "report.json"
    if report.exists():
        return json.loads(report.read_text())
    words = [f"--{key}" if value is True else f"--{key}={value}" for key, value in settings.items()]
    words += [
        f"--max_train_images={args.max_train_images}",
        "--checkpointing_images=0",
        "--validation_images=10000000",
    ]
    train(folder / "run", args, [*words, *more])
    pipelines = load_pipelines(Path(args.teacher), folder / "run" / "student")
    judged = Judge(args.num_prompts, 2026)("student", pipelines["student"], 4, 1.0)
    roles = {key: settings[key] for key in ("networks", "rank", "base_quantization") if key in settings}
    memory = training_memory(
        load_pipeline(args.teacher).transformer,
        getattr(torch, settings.get("weight_dtype", "float32")),
        RoleSettings(**roles),
        bf16_rounding=settings.get("bf16_rounding", "stochastic"),
        use_8bit_adam=settings.get("use_8bit_adam", False),
    )
    rates = sorted(row["images_per_second"] for row in map(json.loads, (folder / "run/metrics.jsonl").open()))
    result = {
        "accuracy": judged["accuracy"],
        "fid": judged["fid"],
        "bytes": sum(size for *_, size in memory),
        "images_per_second": rates[int(0.9 * len(rates))],  # what else runs on the machine slows down others
    }
    report.write_text(json.dumps(result))
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/roles", help="where the runs are (default: runs/roles)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help="which rows")
    parser.add_argument("--max_train_images", type=int, default=12_000, help="of each training")
    parser.add_argument("--num_prompts", type=int, default=1000, help="freshly drawn prompts")
    parser.add_argument("--teacher", default=str(HERE / "teacher"), help="a shapes pipeline")
    parser.add_argument("--config", default=str(HERE / "recipe_even.yaml"), help="arguments of train_sid_dit.py")
    parser.add_argument("--guidance_scale", type=float, default=2.0, help="of the teacher, as in the recipe")
    args, more = parser.parse_known_args()
    silence_libraries()
    lines = [["networks, precision", "accuracy", "FID", "kept, MB", "images/s"]]
    for name in args.cases:
        result = run_case(name, CASES[name], args, more)
        figures = f"{result['accuracy']:.3f}", f"{result['fid']:.1f}", f"{result['bytes'] / 1e6:.1f}"
        lines.append([name, *figures, f"{result['images_per_second']:.0f}"])
        print(lines[-1], flush=True)
    print(format_cells(lines))


if __name__ == "__main__":
    exit_on_user_error(main)()
