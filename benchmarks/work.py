# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What an update costs: counted operations, and the time that is not spent in the networks.

    python benchmarks/work.py

Counted: the floating point operations of a whole iteration (a turn of the fake score and one of the generator, both
halves of guidance everywhere, the mean over sampler steps k = 1..4), over the batch and the operations of one forward.
PyTorch's FlopCounterMode counts matrix products, convolutions and attention, on any machine alike.

Timed: the training script itself, on a teacher of ten times the shapes teacher's size. The time in the networks is
that of all calls of a transformer and of all backward passes; the rest is draws, losses, optimizers and files.
"""

import functools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests"), str(ROOT / "examples")]

from diffusers import SD3Transformer2DModel  # noqa: E402
from teacher_cases import learned  # noqa: E402
from training_helpers import quiet, reset_accelerate  # noqa: E402

from hf_flowdistill.cli import ArgumentParser, silence_libraries  # noqa: E402
from hf_flowdistill.errors import exit_on_user_error  # noqa: E402
from hf_flowdistill.evaluation.report import format_cells  # noqa: E402
from hf_flowdistill.methods.sid import SiDBatch, SiDConfig, fake_score_turn, generator_turn  # noqa: E402
from hf_flowdistill.networks.loading import load_pipeline  # noqa: E402
from hf_flowdistill.networks.roles import ROLES, Networks  # noqa: E402
from hf_flowdistill.teachers import encode_prompts  # noqa: E402


SHAPES = ROOT / "examples" / "shapes"
CHECKPOINTED = {"none": (), "generator, fake score": ("generator", "fake_score"), "all three": ROLES}
TEN_TIMES = {"num_attention_heads": 12, "caption_projection_dim": 384, "num_layers": 7}


def count_flops(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def count_work(name: str, layers: dict) -> list[dict]:
    """An iteration for every kind of checkpointing, with a rollout for each turn and with one for both."""
    teacher = learned(name)
    transformer, contract, batch_size = teacher.pipeline.transformer, teacher.contract, 2
    # deep enough for the blocks to be nearly everything, as they are in published teachers
    networks = Networks.from_teacher(type(transformer).from_config(dict(transformer.config) | layers))
    conditional, unconditional = encode_prompts(teacher.pipeline, contract, ["a cat", "two dogs"])
    noise, sigma = torch.randn(batch_size, *contract.latent_shape), torch.full((batch_size,), 0.5)

    def turn(network, loss_of, k, x0=None):
        batch = SiDBatch(conditional, unconditional, k, lambda i: noise, sigma, noise, x0)
        with networks.training(network):
            loss_of(networks, contract, batch, SiDConfig())[0].backward()
        return batch.x0

    def iteration(k, share_rollout):
        x0 = turn("generator", generator_turn, k)
        turn("fake_score", fake_score_turn, k, x0 if share_rollout else None)

    with torch.no_grad():
        forward = count_flops(lambda: contract.velocity(networks.teacher, noise, sigma, conditional))
    rows = []
    for checkpointed, names in CHECKPOINTED.items():  # each with more of them than the one before
        networks.enable_gradient_checkpointing(names)
        for share_rollout in (False, True):
            flops = statistics.mean(count_flops(functools.partial(iteration, k, share_rollout)) for k in (1, 2, 3, 4))
            settings = {"checkpointed": checkpointed, "share_rollout": share_rollout}
            rows.append({"transformer": type(transformer).__name__, **settings, "forwards": flops / forward})
    return rows


def time_step(images: int, batch_size: int) -> dict:
    """Of the training script: the share of an update outside the networks, and images per second."""
    from score_distillation import train_sid_dit

    seconds, passes = {"networks": 0.0}, []

    def timing(function):
        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            start = time.perf_counter()
            output = function(*args, **kwargs)
            seconds["networks"] += time.perf_counter() - start
            return output

        return wrapped

    class Metrics(train_sid_dit.monitors.MetricsFile):
        def write(self, record):
            super().write(record)
            passes.append((seconds["networks"], time.perf_counter(), record["k"]))
            seconds["networks"] = 0.0

    with tempfile.TemporaryDirectory() as folder:
        pipeline = load_pipeline(SHAPES / "teacher")
        small = sum(parameter.numel() for parameter in pipeline.transformer.parameters())
        torch.manual_seed(0)
        pipeline.transformer = SD3Transformer2DModel.from_config(dict(pipeline.transformer.config) | TEN_TIMES)
        large = sum(parameter.numel() for parameter in pipeline.transformer.parameters())
        pipeline.save_pretrained(Path(folder, "teacher"))
        arguments = {
            "config": SHAPES / "recipe_even.yaml",
            "pretrained_model_name_or_path": Path(folder, "teacher"),
            "prompt_file": SHAPES / "prompts.txt",
            "output_dir": Path(folder, "run"),
            "train_batch_size": batch_size,
            "max_train_images": images,
            "lr_warmup_images": 0,
            "checkpointing_images": 0,
            "validation_images": 10**9,
            "report_to": "none",
        }
        originals = SD3Transformer2DModel.forward, torch.Tensor.backward, train_sid_dit.monitors.MetricsFile
        SD3Transformer2DModel.forward, torch.Tensor.backward = map(timing, originals[:2])
        train_sid_dit.monitors.MetricsFile = Metrics
        try:
            reset_accelerate()
            with quiet():
                train_sid_dit.main([f"--{name}={value}" for name, value in arguments.items()])
        finally:
            SD3Transformer2DModel.forward, torch.Tensor.backward = originals[:2]
            train_sid_dit.monitors.MetricsFile = originals[2]
    updates = [(networks, now - before) for (_, before, _), (networks, now, _) in zip(passes, passes[1:])]
    return {
        "parameters": large,
        "times_the_shapes_teacher": large / small,
        "batch_size": batch_size,
        "updates": len(updates),
        "seconds_over_network_seconds": statistics.median(whole / networks for networks, whole in updates),
        "images_per_second": batch_size * len(updates) / sum(whole for _, whole in updates),
        "threads": torch.get_num_threads(),
    }


def main():
    parser = ArgumentParser(prog="work.py", description=__doc__.split("\n")[0])
    parser.add_argument("--batch_size", type=int, default=48, metavar="IMAGES", help="of the timed training")
    parser.add_argument("--updates", type=int, default=2, metavar="N", help="that are timed")
    parser.add_argument("--output_file", default=str(ROOT / "benchmarks/results/work.json"), metavar="FILE.json")
    args = parser.parse_args()
    silence_libraries()
    counted = count_work("sd3", {"num_layers": 12}) + count_work("flux", {"num_layers": 4, "num_single_layers": 8})
    lines = [["transformer", "checkpointed", "a rollout for each turn", "--share_rollout"]]
    for apart, shared in zip(counted[::2], counted[1::2]):
        figures = (f"{row['forwards']:.2f}" for row in (apart, shared))
        lines.append([apart["transformer"], apart["checkpointed"], *figures])
    print(format_cells(lines), flush=True)
    step = time_step((args.updates + 1) * args.batch_size, args.batch_size)
    print(
        f"\n{step['parameters']:,} parameters ({step['times_the_shapes_teacher']:.1f} times the shapes teacher's), "
        f"batch {step['batch_size']}, {step['threads']} threads: an update takes "
        f"{step['seconds_over_network_seconds']:.3f} times its network passes (median of {step['updates']}), "
        f"{step['images_per_second']:.2f} images per second"
    )
    Path(args.output_file).parent.mkdir(exist_ok=True)
    Path(args.output_file).write_text(json.dumps({"counted": counted, "step": step}, indent=2) + "\n")


if __name__ == "__main__":
    exit_on_user_error(main)()
