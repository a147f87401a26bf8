# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""How fast the student gets good, against the same training with another loss, at as many passes of the networks.

    python benchmarks/convergence.py

"dmd" is distribution matching distillation's generator loss in the place of SiD's: the gradient at x0 is the gap
between fake score and teacher at a noisy copy of it, and no gradient passes through the two networks. Its fake score
is not guided, as is usual there. A pass forward counts 1, and a pass backward 1 for the gradient at the input and 1
for that at the weights. The training with "dmd" is the longer one, by as many images as its cheaper updates allow.

The students at all checkpoints are judged at four steps. What is finished is kept in --output_dir, so the benchmark
can be stopped and run again. Other arguments are those of train_sid_dit.py, for both.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("src", "examples/shapes", "examples/shapes/studies", "examples/score_distillation")
sys.path[:0] = [str(ROOT / folder) for folder in FOLDERS]

import torch  # noqa: E402
import train_sid_dit  # noqa: E402
from study import predict_x0  # noqa: E402

from arguments import HERE  # noqa: E402
from hf_flowdistill import flow  # noqa: E402
from hf_flowdistill.cli import silence_libraries  # noqa: E402
from hf_flowdistill.errors import exit_on_user_error  # noqa: E402
from hf_flowdistill.evaluation.report import format_cells, save_report  # noqa: E402
from hf_flowdistill.losses.sid import x0_statistics  # noqa: E402
from hf_flowdistill.methods.sid import generate  # noqa: E402
from judging import Judge, judge_checkpoints, load_pipelines, plt  # noqa: E402


UNGUIDED = ["--fake_guidance_scale", "1", "--fake_train_guidance_scale", "1"]
LOSSES = {  # name -> arguments of the training, passes of one update with sampler step k, for each image
    # Both turns: k forward. Fake score: 2 halves, forward and backward. Generator: backward through step k; teacher
    # and fake score forward and backward to their input, 2 halves each.
    "sid": ([], lambda k: (k + 6) + (k + 2 + 8)),
    # The fake score has one half; teacher and fake score go forward only.
    "dmd": (UNGUIDED, lambda k: (k + 3) + (k + 2 + 3)),
}
BARS = (0.80, 0.85, 0.88, 0.90)


def dmd_generator_turn(networks, contract, batch, config):
    """arXiv:2311.18828, Eq. 7 and 8, in the latents: a loss whose gradient at x0 is the normalised gap."""
    x0 = generate(networks, contract, batch, config)
    batch.x0 = x0.detach()
    with torch.no_grad():
        x_t = flow.add_noise(x0, batch.noise, batch.sigma)
        words = x_t, batch.sigma, batch.conditional, batch.unconditional
        of_teacher = config.teacher_guidance_scale, config.guidance_mode, config.guidance_rescale
        of_fake = config.fake_guidance_scale, config.fake_guidance_mode
        x0_teacher = predict_x0(contract, networks.teacher, *words, *of_teacher)
        gap = predict_x0(contract, networks.fake_score, *words, *of_fake) - x0_teacher
        size = (x0 - x0_teacher).abs().flatten(1).mean(1)
    per_image = (gap * x0).flatten(1).sum(1) / size
    statistics = {f"x0_{name}": value for name, value in x0_statistics(x0.detach()).items()}
    return config.loss_scale * per_image.mean(), {"x0_gap": gap.abs().mean(), **statistics}


def images_at_equal_passes(name: str, images: int, args) -> int:
    """How many images the loss called `name` can train on in the passes that "sid" needs for `images`."""
    sid, own = (
        sum(LOSSES[which][1](record["k"]) for record in read_metrics(args.output_dir, "sid"))
        for which in ("sid", name)
    )
    return round(images * sid / own)


def read_metrics(output_dir, name: str) -> list[dict]:
    return [json.loads(line) for line in Path(output_dir, name, "metrics.jsonl").read_text().splitlines()]


def train(name: str, images: int, args, more: list[str]) -> None:
    """Run the training script with this loss, in a process of its own, or go on with it."""
    words = ["--config", args.config, "--output_dir", Path(args.output_dir, name), "--max_train_images", images]
    words += ["--checkpointing_images", args.max_train_images // args.points, "--resume_from_checkpoint", "latest"]
    words += ["--validation_images", 10**8, "--report_to", "none", *LOSSES[name][0], *more]
    code = subprocess.run([sys.executable, __file__, "--train", name, *map(str, words)], cwd=ROOT).returncode
    if code:
        sys.exit(code)


def judge(name: str, args) -> list[dict]:
    """A row for each checkpoint, with the passes, in thousands of images times passes, and seconds up to it."""
    run, file = Path(args.output_dir, name), Path(args.output_dir, f"{name}.json")
    if file.exists():
        return json.loads(file.read_text())
    student = load_pipelines(HERE / "teacher", run / "student")["student"]
    rows = judge_checkpoints(run, Judge(args.num_prompts, 2026), student, 4)
    records = read_metrics(args.output_dir, name)
    for row in rows:
        seen = [record for record in records if record["images_seen"] <= row["images_seen"]]
        batch = records[0]["images_seen"]
        row["passes"] = batch * sum(LOSSES[name][1](record["k"]) for record in seen)
        row["seconds"] = sum(batch / record["images_per_second"] for record in seen)
    save_report(rows, file)
    return rows


def first_at(rows: list[dict], bar: float) -> list[str]:
    """Images, millions of passes and seconds until a student is right that often."""
    found = next((row for row in rows if row["accuracy"] >= bar), None)
    if found is None:
        return ["not reached", "", ""]
    return [f"{found['images_seen']:,}", f"{found['passes'] / 1e6:.2f}", f"{found['seconds']:.0f}"]


def draw(curves: dict[str, list[dict]], path: Path) -> None:
    """Accuracy and FID over passes."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    for axis, key in zip(axes, ("accuracy", "fid")):
        for name, rows in curves.items():
            axis.plot([row["passes"] / 1e6 for row in rows], [row[key] for row in rows], "o-", label=name)
        axis.set_xlabel("passes of a network, millions of images")
        axis.set_ylabel({"accuracy": "accuracy, four steps", "fid": "FID, four steps"}[key])
        axis.legend()
    axes[1].set_yscale("log")
    figure.savefig(path, dpi=110)


def main():
    if sys.argv[1:2] == ["--train"]:
        if sys.argv[2] == "dmd":
            train_sid_dit.generator_turn = dmd_generator_turn
        return train_sid_dit.main(sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/convergence", help="where the runs are (default: %(default)s)")
    parser.add_argument("--max_train_images", type=int, default=48_000, help='of the training with "sid"')
    parser.add_argument("--points", type=int, default=8, help="how many times the student is judged on the way")
    parser.add_argument("--num_prompts", type=int, default=1000, help="freshly drawn prompts")
    parser.add_argument("--config", default=str(HERE / "recipe_even.yaml"), help="arguments of train_sid_dit.py")
    args, more = parser.parse_known_args()
    silence_libraries()
    args.output_dir, curves = Path(args.output_dir).resolve(), {}
    for name in LOSSES:
        images = args.max_train_images
        train(name, images if name == "sid" else images_at_equal_passes(name, images, args), args, more)
        curves[name] = judge(name, args)
    lines = [["loss", "accuracy", "images", "million passes", "seconds"]]
    lines += [[name, f"{bar:.2f}", *first_at(rows, bar)] for name, rows in curves.items() for bar in BARS]
    draw(curves, args.output_dir / "convergence.png")
    print(f"{format_cells(lines)}\n\nSee {args.output_dir / 'convergence.png'}.")


if __name__ == "__main__":
    exit_on_user_error(main)()
