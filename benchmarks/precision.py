# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Which optimizer moves bfloat16 weights: the share of float32's way that is gone, as a table.

Weights of one size take steps of Adam, at the paper's settings for BF16, along gradients that each have a steady sign.
torch-optimi (Kahan summation) and torchao are compared where they are installed; the latter compiles its step.

With --shapes FOLDER, the training script distils the shapes teacher for a few updates at those settings instead, in
float32 and in bfloat16 with either rounding, and the way is that of its two networks along float32's.
"""

import argparse
import functools
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from hf_flowdistill.evaluation.report import format_cells  # noqa: E402
from hf_flowdistill.training.optimizers import build_optimizer  # noqa: E402


WEIGHTS = (1.0, 0.1, 0.02, 0.005, 0.001)
GRADIENTS = (1e-3, 1e-5)
ADAM = {"betas": (0.0, 0.999), "lr": 1e-5}  # the paper's, for BF16; its epsilon is --adam_epsilon


def optimizers(epsilon: float) -> dict:
    """Name -> what makes an optimizer of a network, for those that are installed."""
    build = functools.partial(build_optimizer, epsilon=epsilon)
    found = {
        "Adam, to nearest (the paper's BF16)": functools.partial(build, rounding="nearest"),
        "Adam, stochastic rounding": build,
    }
    if importlib.util.find_spec("bitsandbytes"):
        found["Adam in 8 bits, to nearest"] = functools.partial(build, rounding="nearest", use_8bit_adam=True)
        found["Adam in 8 bits, stochastic rounding"] = functools.partial(build, use_8bit_adam=True)
    if importlib.util.find_spec("optimi"):
        from optimi import Adam

        found["torch-optimi's Adam, Kahan summation"] = lambda network: Adam(network.parameters(), eps=epsilon, **ADAM)
    if importlib.util.find_spec("torchao"):
        from torchao.optim import AdamW8bit, _AdamW

        for name, kind in (("_AdamW", _AdamW), ("AdamW8bit", AdamW8bit)):
            settings = {"eps": epsilon, "weight_decay": 0.0, "bf16_stochastic_round": True, **ADAM}
            found[f"torchao's {name}, stochastic rounding"] = lambda network, kind=kind, settings=settings: kind(
                network.parameters(), **settings
            )
    return found


def moved(make, weight: float, gradient: float, steps: int, dtype=torch.bfloat16):
    """(mean way in the direction of minus the gradient, seconds of the first step, of a later one, bytes kept per
    parameter beside weight and gradient)."""
    generator = torch.Generator().manual_seed(0)
    network = torch.nn.Linear(256, 256, bias=False, dtype=dtype)
    size = torch.empty(256, 256).uniform_(0.75, 1.25, generator=generator) * weight
    sign = torch.randint(2, (256, 256), generator=generator) * 2.0 - 1
    with torch.no_grad():
        network.weight.copy_(size * (torch.randint(2, (256, 256), generator=generator) * 2.0 - 1))
    start, optimizer, seconds = network.weight.detach().double().clone(), make(network), []
    for group in optimizer.param_groups:
        if not isinstance(group["lr"], torch.Tensor):  # torchao's has been told, and refuses to be told again
            group["lr"] = ADAM["lr"]
    for _ in range(steps):
        network.weight.grad = (sign * gradient).to(dtype)
        begin = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - begin)
    way = -((network.weight.detach().double() - start) * sign).mean().item()
    return way, seconds[0], sorted(seconds)[len(seconds) // 2], kept(optimizer) / network.weight.numel()


def kept(optimizer) -> int:
    """Bytes of an optimizer's tensors; those that all parameters share are not counted."""

    def size(value):
        if hasattr(value, "__tensor_flatten__"):  # torchao's
            return sum(size(getattr(value, name)) for name in value.__tensor_flatten__()[0] if name != "qmap")
        return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0

    states = optimizer.state.values()
    return sum(size(value) for state in states for name, value in state.items() if not name.startswith("qmap"))


def on_shapes(folder: Path, images: int, more: list[str]) -> list[list[str]]:
    """The table of distillations of the shapes teacher; what is there already is not run again."""
    weights = "transformer/diffusion_pytorch_model.safetensors"
    start = {name: value.double() for name, value in load_file(ROOT / "examples/shapes/teacher" / weights).items()}
    lines, ways = [["on the shapes teacher", "generator", "fake score"]], {}
    for name, words in {
        "float32": [],
        "bfloat16, stochastic": ["--weight_dtype=bfloat16"],
        "bfloat16, to nearest (the paper's BF16)": ["--weight_dtype=bfloat16", "--bf16_rounding=nearest"],
    }.items():
        run = folder / name.split(" (")[0].replace(", ", "-").replace(" ", "-")
        if not (run / f"checkpoint-{images}").exists():
            settings = {"learning_rate": ADAM["lr"], "fake_score_learning_rate": ADAM["lr"], "adam_epsilon": 1e-4}
            settings |= {"lr_scheduler": "constant", "lr_warmup_images": 0, "train_batch_size": 8, "output_dir": run}
            settings |= {"max_train_images": images, "checkpointing_images": images, "validation_images": 10**9}
            words += [f"--{key}={value}" for key, value in settings.items()] + ["--report_to=none", *more]
            script = ROOT / "examples/score_distillation/train_sid_dit.py"
            recipe = ROOT / "examples/shapes/recipe_even.yaml"
            subprocess.run([sys.executable, script, "--config", recipe, *words], check=True, cwd=ROOT)
        shares = []
        for network in ("generator", "fake_score"):
            # from where the run starts: bfloat16 networks are the rounded teacher
            tensors = load_file(run / f"checkpoint-{images}" / f"{network}.safetensors")
            way = torch.cat(
                [(value.double() - start[key].to(value.dtype)).flatten() for key, value in tensors.items()]
            )
            ways.setdefault(network, way)
            shares.append(f"{(way @ ways[network] / ways[network].square().sum()).item():.0%}")
        lines.append([name, *shares])
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of each optimizer")
    parser.add_argument("--adam_epsilon", type=float, default=1e-4, help="the paper's, for BF16")
    parser.add_argument("--results", metavar="FILE", help="where to write the table as JSON too")
    parser.add_argument("--shapes", type=Path, metavar="FOLDER", help="where to distil the shapes teacher")
    parser.add_argument("--max_train_images", type=int, default=320, help="of --shapes, eight in each update")
    args, more = parser.parse_known_args()
    if args.shapes:
        print(format_cells(on_shapes(args.shapes, args.max_train_images, more)))
        return
    header = [f"{weight:g}, {gradient:g}" for weight in WEIGHTS for gradient in GRADIENTS]
    # a weight stands above two columns, one for each gradient
    lines = [["optimizer", *sum(([f"{weight:g}", *[""] * (len(GRADIENTS) - 1)] for weight in WEIGHTS), []), "bytes"]]
    plain, rows = functools.partial(build_optimizer, epsilon=args.adam_epsilon), []
    cases = [(weight, gradient) for weight in WEIGHTS for gradient in GRADIENTS]
    ways = [moved(plain, *case, args.steps, torch.float32)[0] for case in cases]
    for name, make in optimizers(args.adam_epsilon).items():
        results = [moved(make, *case, args.steps) for case in cases]
        shares = [100 * result[0] / way + 0.0 for result, way in zip(results, ways)]  # + 0.0 makes -0 a 0
        rows.append({"optimizer": name, "shares": dict(zip(header, shares)), "first_step": results[0][1]})
        rows[-1] |= {"step": results[-1][2], "bytes_per_parameter": results[-1][3]}
        lines.append([name, *(f"{share:.0f}" for share in shares), f"{results[-1][3]:.2f}"])
        print(f"{name}: first step {results[0][1]:.1f} s, then {1e3 * results[-1][2]:.1f} ms", file=sys.stderr)
    if args.results:
        Path(args.results).write_text(json.dumps(rows, indent=1) + "\n")
    print(format_cells(lines))


if __name__ == "__main__":
    main()
