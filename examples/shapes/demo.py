# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Distil the shapes teacher, compare the student with its teacher and with what could refute it, and draw the result.

    python examples/shapes/demo.py

Writes, in --output_dir: run/ (the training, with the student in run/student), report.json, grid.png, and curve.png
with its numbers in curve.json. Run again after an interruption, it goes on where it stopped. Other arguments are those
of train_sid_dit.py.
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from arguments import CALL, CATEGORIES, HERE, REPOSITORY, add_sequence_length, in_steps
from hf_flowdistill.cli import silence_libraries
from hf_flowdistill.errors import UserError, exit_on_user_error
from hf_flowdistill.evaluation.report import format_table, save_report
from hf_flowdistill.hub.settings import read_settings


sys.path.append(str(REPOSITORY / "examples" / "score_distillation"))
import train_sid_dit  # noqa: E402  (a script beside this one, not installed)


def usable_cpus() -> int:
    """CPUs this process may run on: fewer than the machine has in a container, or under `taskset`."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def launch(command: list[str], processes: int, patience: float = 10) -> int:
    """Run a training script in so many processes of this machine, which train together; their exit code.

    As torchrun does, but only the first one is heard, unless another one fails by more than a mistake of the user; and
    the exit code is that of the one that failed first. The others have `patience` seconds to notice.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    together |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    threads = {"OMP_NUM_THREADS": str(max(1, usable_cpus() // processes))}
    with tempfile.TemporaryFile() as unheard:
        started = []
        for rank in map(str, range(processes)):
            environment = threads | os.environ | together | {"RANK": rank, "LOCAL_RANK": rank}
            others = {"stdout": subprocess.DEVNULL, "stderr": unheard} if started else {}
            started.append(subprocess.Popen(command, env=environment, **others))
        try:
            while None in (codes := [process.poll() for process in started]) and not any(codes):
                time.sleep(0.1)
            code = next((code for code in codes if code), 0)
            for process in started:
                process.wait(patience if code else None)
        except subprocess.TimeoutExpired:
            pass
        finally:
            for process in started:
                process.kill()
        if code and started[0].wait() != 2:
            unheard.seek(0)
            shutil.copyfileobj(unheard, sys.stderr.buffer)
    return code


def train(run: Path, args, more: list[str], source=("--prompt_file", HERE / "prompts.txt")) -> float:
    """Run the training script on the prompts of `source` to its end, from where it stopped; its wall-clock minutes.

    Where there are two CPUs, two processes share each batch: `make demo` trains in 14 minutes, and on one CPU in 18.
    """
    words = [
        *("--config", args.config, "--pretrained_model_name_or_path", Path(args.teacher).resolve()),
        *("--teacher_guidance_scale", args.guidance_scale, "--output_dir", run, "--resume_from_checkpoint", "latest"),
        *(*source, *more),
    ]
    words = [str(word) for word in words]
    batch = train_sid_dit.parse_args(words).train_batch_size

    import torch  # after a look at the arguments, since it takes seconds

    processes = 1 if torch.accelerator.is_available() or batch % 2 or usable_cpus() == 1 else 2
    started = time.time()
    words += ["--train_batch_size", str(batch // processes)]
    code = launch([sys.executable, train_sid_dit.__file__, *words], processes)
    if code:
        sys.exit(code)
    if not (run / "student" / "model_index.json").is_file():
        sys.exit(f"error: the training in {run} was stopped before its end: the same command goes on with it.")
    return (time.time() - started) / 60


def own_steps(student_dir: Path) -> int:
    """The number of steps that a student was trained for."""
    return read_settings(student_dir)["student"]["num_steps"]


def few_step_cases(guidance_scale: float, most: int) -> list[tuple[str, int, float]]:
    """(pipeline, steps, guidance) of the student, in `most` steps and in fewer, and of what it is compared with."""
    cases = [("teacher", guidance_scale), ("undistilled", guidance_scale), ("undistilled", 1.0), ("student", 1.0)]
    fewer = [num_steps for num_steps in (4, 2, 1) if num_steps < most]
    return [(name, num_steps, scale) for name, scale in cases for num_steps in (most, *fewer)]


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="demo", help="where everything is written (default: demo)")
    parser.add_argument("--teacher", default=str(HERE / "teacher"), help="a shapes pipeline")
    parser.add_argument("--config", default=str(HERE / "recipe.yaml"), help="arguments of train_sid_dit.py")
    parser.add_argument("--guidance_scale", type=float, default=2.0, help="of the teacher, as in the recipe")
    add_sequence_length(parser)
    parser.add_argument("--num_prompts", type=int, default=2000, help="freshly drawn prompts in the report")
    parser.add_argument("--curve_prompts", type=int, default=500, help="freshly drawn prompts in a point of the curve")
    parser.add_argument("--seed", type=int, default=2026, help="of these prompts and their pictures")
    return parser.parse_known_args()


def main():
    args, more = parse_args()
    if args.num_prompts < len(CATEGORIES) * 10 or args.curve_prompts < len(CATEGORIES) * 10:
        raise UserError(f"--num_prompts and --curve_prompts must be at least {len(CATEGORIES) * 10}.")
    output = Path(args.output_dir).resolve()
    run = output / "run"
    call = CALL | {"max_sequence_length": args.max_sequence_length}
    minutes = train(run, args, ["--max_sequence_length", str(args.max_sequence_length), *more])
    print(f"the distillation took {minutes:.1f} minutes")

    from judging import Judge, draw_curve, draw_grid, judge_checkpoints, load_pipelines  # with torch: seconds

    silence_libraries()
    pipelines = load_pipelines(Path(args.teacher), run / "student")
    own = own_steps(run / "student")

    print("judging the student along its training ...", flush=True)
    judge = Judge(args.curve_prompts, args.seed + 1, call)
    judged = judge_checkpoints(run, judge, pipelines["student"], own)
    save_report(judged, output / "curve.json")
    # the same prompts for the teacher, since the FID of fewer pictures is higher
    references = [judge("teacher", pipelines["teacher"], n, args.guidance_scale) for n in (28, own)]

    print(f"judging {args.num_prompts} freshly drawn prompts ...", flush=True)
    judge, scale = Judge(args.num_prompts, args.seed, call), args.guidance_scale
    rows = []
    for name, num_steps, guidance in [("teacher", 28, scale), *few_step_cases(scale, own)]:
        rows.append(judge(name, pipelines[name], num_steps, guidance))
        figures = f"accuracy {rows[-1]['accuracy']:.3f}, FID {rows[-1]['fid']:.1f}"
        print(f"  {name}, {in_steps(num_steps)}: {figures}", flush=True)
    save_report(rows, output / "report.json")
    draw_grid(
        pipelines,
        [("teacher", 28), *((name, own) for name in ("teacher", "undistilled", "student"))],
        scale,
        output / "grid.png",
        call,
    )
    draw_curve(run, judged, references, output / "curve.png")
    print(f"\n{format_table(rows)}\n\nSee {output / 'grid.png'}, {output / 'curve.png'} and {output / 'report.json'}.")


if __name__ == "__main__":
    exit_on_user_error(main)()
