# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Distil the shapes teacher with several seeds, and tabulate the students beside their teacher and the controls.

    make shapes-table

Every seed is a training and a judgement of its own, on prompts, pictures and real renders of its own, so the spread is
that of the whole experiment; with --trainings, its student is the mean of several. Writes seed-N/ (run-0/ and so on;
student/; its rows) in --output_dir, all rows to --results, and their means and standard deviations as a table into the
--documents, between two marked lines. Run again after an interruption, it goes on where it stopped. Other arguments
are those of train_sid_dit.py.
"""

import functools
import json
import random
import statistics
from pathlib import Path

from arguments import (
    CALL,
    CATEGORIES,
    add_sequence_length,
    build_parser,
    check_documents,
    check_prompts,
    in_steps,
)
from demo import few_step_cases, own_steps, train
from hf_flowdistill.cli import silence_libraries
from hf_flowdistill.commands import export
from hf_flowdistill.errors import UserError, exit_on_user_error
from hf_flowdistill.evaluation.report import format_cells, save_report


MARKS = ("<!-- table of table.py -->", "<!-- end of the table -->")


def judged_once(file: Path, settings: dict, judge) -> list[dict]:
    """The rows that `judge()` gives, or that it gave with the same settings when they were written to `file`."""
    report = json.loads(file.read_text()) if file.exists() else {}
    if report.get("settings") != settings:
        print(f"{file.parent.name}: judging {settings['num_prompts']} fresh prompts ...", flush=True)
        report = {"settings": settings, "rows": judge()}
        file.write_text(json.dumps(report))
    return report["rows"]


def judge_seed(args, seed: int, student: Path) -> list[dict]:
    """The rows of one seed: real renders, the teacher, its controls, the student."""
    from detector import accuracy
    from judging import Judge, load_pipelines
    from scenes import render

    silence_libraries()
    pipelines = load_pipelines(Path(args.teacher), student)
    call = CALL | {"max_sequence_length": args.max_sequence_length}
    judge, scale = Judge(args.num_prompts, 2026 + seed, call), args.guidance_scale
    renders = render(judge.scenes, random.Random(judge.seed + 1))
    right, by_category = accuracy(judge.scenes, renders)
    rows = [{"pipeline": "renders", "accuracy": right, "accuracy_by_category": by_category, "fid": judge.fid(renders)}]
    slow = [("teacher", 28, reference) for reference in sorted({scale, *args.reference_guidance_scales})]
    for name, num_steps, guidance in [*slow, *few_step_cases(scale, own_steps(student))]:
        rows.append(judge(name, pipelines[name], num_steps, guidance))
        figures = f"accuracy {rows[-1]['accuracy']:.3f}, FID {rows[-1]['fid']:.1f}"
        print(f"  {name}, {in_steps(num_steps)}, guidance {guidance:g}: {figures}", flush=True)
    return rows


def train_mean(folder: Path, args, more: list[str], seed: int) -> Path:
    """The student of one seed: the mean of its trainings' weights."""
    runs = [folder / f"run-{number}" for number in range(args.trainings)]
    for number, run in enumerate(runs):
        own = ["--seed", str(seed * args.trainings + number), "--max_sequence_length", str(args.max_sequence_length)]
        minutes = train(run, args, [*more, *own])
        print(f"seed {seed}, training {number + 1} of {args.trainings}: {minutes:.1f} minutes", flush=True)
    export.main([*map(str, runs), "--output_dir", str(folder / "student")])
    return folder / "student"


def over_seeds(values: list[float], digits: int) -> str:
    """Mean and standard deviation."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def summarize(rows: list[dict]) -> str:
    """Rows of several seeds as a Markdown table of means and standard deviations over the seeds."""
    groups = {}
    for row in rows:
        groups.setdefault((row["pipeline"], row.get("num_steps"), row.get("guidance_scale")), []).append(row)

    lines = [["pipeline", "steps", "guidance", "accuracy", "worst category", "FID", "forwards/image"]]
    for (name, num_steps, scale), members in groups.items():
        means = {c: statistics.mean(m["accuracy_by_category"][c] for m in members) for c in CATEGORIES}
        worst = min(means, key=means.get)
        lines.append(
            [
                name,
                "" if num_steps is None else str(num_steps),
                "" if scale is None else f"{scale:g}",
                over_seeds([m["accuracy"] for m in members], 3),
                f"{worst} {means[worst]:.2f}",
                over_seeds([m["fid"] for m in members], 1),
                f"{members[0]['forwards_per_image']:g}" if "forwards_per_image" in members[0] else "",
            ]
        )
    return format_cells(lines)


def insert(table: str, document: Path, marks: tuple[str, str] = MARKS) -> None:
    """Put the table between the marks of a Markdown file, in place of the one that is there."""
    before, rest = document.read_text(encoding="utf-8").split(marks[0])
    after = rest.split(marks[1])[1]
    document.write_text(f"{before}{marks[0]}\n\n{table}\n\n{marks[1]}{after}", encoding="utf-8")


def publish(rows: list[dict], table: str, args, marks: tuple[str, str] = MARKS) -> None:
    """Write all rows to --results and the table into the --documents, and print it."""
    save_report(rows, args.results)
    for document in args.documents:
        insert(table, Path(document), marks)
    print(f"\n{table}\n\nSee {', '.join([args.results, *args.documents])}.")


def parse_args():
    parser = build_parser(__doc__, "shapes-table", "shapes.json", "shapes.md", "recipe.yaml")
    parser.add_argument(
        "--reference_guidance_scales",
        nargs="*",
        type=float,
        default=[1.0, 1.5, 2.5, 3.0],
        help="of the teacher at 28 steps beside it, to see its best FID and its best accuracy",
    )
    parser.add_argument(
        "--trainings", type=int, default=1, help="of each seed; the student is their mean (default: 1)"
    )
    add_sequence_length(parser)
    return parser.parse_known_args()


def main():
    args, more = parse_args()
    check_prompts(args.num_prompts)
    if args.trainings < 1:
        raise UserError(f"--trainings is {args.trainings}: it must be at least 1.")
    check_documents(args.documents, MARKS)
    rows = []
    for seed in args.seeds:
        folder = Path(args.output_dir).resolve() / f"seed-{seed}"
        student = train_mean(folder, args, more, seed)
        settings = {
            "num_prompts": args.num_prompts,
            "guidance_scales": args.reference_guidance_scales,
            "trainings": args.trainings,
        }
        judge = functools.partial(judge_seed, args, seed, student)
        rows += [row | {"seed": seed} for row in judged_once(folder / "report.json", settings, judge)]
    publish(rows, summarize(rows), args)


if __name__ == "__main__":
    exit_on_user_error(main)()
