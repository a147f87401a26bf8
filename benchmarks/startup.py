# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""CPU seconds until help, refusals and plans are on the screen, beside those of an earlier commit: tables and JSON.

    python benchmarks/startup.py --against 2272765                    # plans of an earlier commit take long
    python benchmarks/startup.py --against 2272765 --only refusals

Every command runs with this Python, here and in a temporary git worktree of that commit. CPU seconds are user and
system, of the command and its children; the less of two runs, of a plan one. Memory is the most that was resident.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from hf_flowdistill.cli import ArgumentParser  # noqa: E402
from hf_flowdistill.errors import UserError, exit_on_user_error  # noqa: E402
from hf_flowdistill.evaluation.report import format_cells  # noqa: E402
from hf_flowdistill.networks.names import NETWORKS  # noqa: E402


TRAIN = "examples/score_distillation/train_sid_dit.py"
GENERATE = "examples/score_distillation/generate.py"
TEACHER = ["--pretrained_model_name_or_path", "a/b"]
PROMPTS = ["--prompt_file", ROOT / "examples/shapes/prompts.txt"]
HELP = {
    "train_sid_dit.py": [TRAIN],
    "generate.py": [GENERATE],
    "demo.py": ["examples/shapes/demo.py"],
    "flowdistill": ["flowdistill"],
    **{f"flowdistill {name}": ["flowdistill", name] for name in ("inspect", "plan", "export", "card", "push")},
}
REFUSALS = {  # in a folder with a file `note` and a config.yaml
    "a mistyped argument": [TRAIN, "--alfa", "1"],
    "a number out of bounds": [TRAIN, *TEACHER, "--num_steps", "0"],
    "arguments that contradict each other": [TRAIN, *TEACHER, *PROMPTS, "--rank", "4"],
    "a prompt file that is missing": [TRAIN, *TEACHER, "--prompt_file", "nowhere.txt", "--output_dir", "out"],
    "a config file with unknown names": [TRAIN, "--config", "config.yaml"],
    "an output folder that is a file": [TRAIN, *TEACHER, *PROMPTS, "--output_dir", "note"],
    "generate.py without prompts": [GENERATE, *TEACHER],
    "flowdistill plan for no GPUs": ["flowdistill", "plan", "a/b", "--gpus", "0"],
    "flowdistill export of nothing": ["flowdistill", "export", "nowhere", "--output_dir", "out"],
    "flowdistill card of no student": ["flowdistill", "card", "nowhere"],
}
PLANS = {  # more arguments
    "shapes": ["--resolution", "40", "--pipeline_kwargs", '{"max_sequence_length": 1}'],
    "sd3.5-large": [],
    "flux.1-dev": [],
}
ROW = tuple(f"| {name} " for name in NETWORKS)
NAMES = ("networks", "base_quantization", "precision", "sharding", "batch_size", "gradient_checkpointing")


def measure(root: Path, words, folder: Path) -> dict:
    """Run a command of the checkout at `root` in `folder`: what it took, its exit code, its last words on stderr."""
    command = ["-m", "hf_flowdistill.cli", *words[1:]] if words[0] == "flowdistill" else [root / words[0], *words[1:]]
    environment = os.environ | {"PYTHONPATH": str(root / "src"), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory(dir=folder) as kept:  # nothing of an earlier run
        environment |= {"HF_HOME": kept, "XDG_CACHE_HOME": kept}
        return watch([sys.executable, *map(str, command)], cwd=folder, env=environment)


def watch(command, **where) -> dict:
    """Run a command to its end."""
    started, first = time.perf_counter(), None
    with tempfile.TemporaryFile("w+") as errors:
        streams = {"stdout": subprocess.PIPE, "stderr": errors, "text": True}
        process = subprocess.Popen(command, **where, **streams)
        with process.stdout as printed:
            for line in printed:
                if first is None and line.startswith(ROW):
                    first = {"cpu_seconds": cpu_seconds(process.pid), "seconds": time.perf_counter() - started}
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        said = (errors.read().splitlines() or [""])[-1]
    return {
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "seconds": time.perf_counter() - started,
        "memory_gb": used.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9,
        "first_row": first,
        "code": process.returncode,
        "said": said,
    }


def cpu_seconds(pid: int) -> float | None:
    """Of a process that runs, with those of its children that have ended; None where there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def measure_refusals(checkouts: dict[str, Path], folder: Path) -> dict:
    """Help and refusals, each on all checkouts in turn."""
    (folder / "note").write_text("")
    (folder / "config.yaml").write_text("alfa: 1\n")
    cases = {f"{name} --help": ([*words, "--help"], 0) for name, words in HELP.items()}
    cases |= {name: (words, 2) for name, words in REFUSALS.items()}
    found = {}
    for name, (words, code) in cases.items():
        found[name] = {}
        for which, root in checkouts.items():
            runs = [measure(root, words, folder) for _ in range(2)]
            if any(run["code"] != code for run in runs):
                raise UserError(f"{which}: {name} ended with {runs[0]['code']} and not {code}: {runs[0]['said']}")
            found[name][which] = {"cpu_seconds": min(run["cpu_seconds"] for run in runs), "code": code}
        print(".", end="", flush=True)
    print()
    return found


def measure_plans(checkouts: dict[str, Path], folder: Path, names, more: list[str]) -> dict:
    """All rows of `flowdistill plan` for these teachers, on all checkouts in turn, and whether figures are equal."""
    from published_teachers import published_teacher

    found = {}
    for name in names:
        teacher, rows = ROOT / "examples/shapes/teacher" if name == "shapes" else published_teacher(name), {}
        found[name] = {}
        for which, root in checkouts.items():
            file = folder / f"{name}-{which}.json"
            words = ["flowdistill", "plan", teacher, *PLANS[name], *more, "--output_file", file]
            found[name][which] = measured = measure(root, words, folder)
            if measured["code"]:
                raise UserError(f"{which}: the plan of {name} failed: {measured['said']}")
            rows[which] = {tuple(row[key] for key in NAMES): row for row in json.loads(file.read_text())}
            print(f"{name}, {which}: {measured['cpu_seconds']:.1f} CPU seconds", flush=True)
        now, before = rows.values()
        found[name]["rows"] = len(now)
        found[name]["differing"] = [
            ", ".join(map(str, key)) for key in {**before, **now} if not same(before.get(key), now.get(key))
        ]
    return found


def same(before, now) -> bool:
    """Whether all figures are equal that both have; the command is none."""
    if isinstance(before, dict) and isinstance(now, dict):
        return all(same(before[name], now[name]) for name in before.keys() & now.keys() - {"command"})
    return before == now


def print_tables(found: dict, names: list[str]) -> None:
    now, before = names
    if "refusals" in found:
        lines = [["", f"CPU seconds, {before}", now, "ratio"]]
        for name, case in found["refusals"].items():
            seconds = [case[which]["cpu_seconds"] for which in (before, now)]
            ratio = seconds[0] / seconds[1]
            lines.append(
                [name, *(f"{one:.2f}" for one in seconds), f"1/{ratio:.0f}" if ratio > 2 else f"1/{ratio:.1f}"]
            )
        print(f"\n{format_cells(lines)}")
    for name, case in found.get("plans", {}).items():
        lines = [[f"plan of {name}", before, now]]
        both = [case[which] for which in (before, now)]
        lines.append(["CPU seconds", *(f"{one['cpu_seconds']:.1f}" for one in both)])
        lines.append(["most main memory, GB", *(f"{one['memory_gb']:.2f}" for one in both)])
        for key, words in (("cpu_seconds", "CPU seconds until the first row"), ("seconds", "seconds until it")):
            first = [(one["first_row"] or {}).get(key) for one in both]
            lines.append([words, *("" if value is None else f"{value:.1f}" for value in first)])
        print(f"\n{format_cells(lines)}\n")
        ratio = both[0]["cpu_seconds"] / both[1]["cpu_seconds"]
        differ = f"; {len(case['differing'])} rows differ: {case['differing'][0]} for one" if case["differing"] else ""
        print(f"1/{ratio:.1f} of the CPU seconds, {case['rows']} rows{differ or ', all figures equal'}")


def main():
    parser = ArgumentParser(prog="startup.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--against", required=True, metavar="COMMIT", help="the earlier commit")
    add("--only", choices=("refusals", "plans"), help="by default both")
    add("--teachers", nargs="+", choices=PLANS, default=list(PLANS), metavar="NAME", help=f"of {', '.join(PLANS)}")
    add("--plan_arguments", default="", metavar="WORDS", help="of the plans besides, e.g. '--networks lora'")
    add("--output_file", default=str(ROOT / "benchmarks/results/startup.json"), metavar="FILE.json")
    args = parser.parse_args()
    git = ["git", "-C", str(ROOT)]
    path = Path(args.output_file)
    found = json.loads(path.read_text()) if path.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder, "there")
        done = subprocess.run(
            [*git, "worktree", "add", "--detach", there, args.against], capture_output=True, text=True
        )
        if done.returncode:
            raise UserError(f"there is no checkout of {args.against}: {done.stderr.splitlines()[-1]}")
        checkouts = {"now": ROOT, args.against: there}
        try:
            if args.only != "plans":
                found["refusals"] = measure_refusals(checkouts, Path(folder))
            if args.only != "refusals":
                words = shlex.split(args.plan_arguments)
                plans = measure_plans(checkouts, Path(folder), args.teachers, words)
                found["plans"] = found.get("plans", {}) | plans
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", there], check=True)
    print_tables(found, list(checkouts))
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    exit_on_user_error(main)()
