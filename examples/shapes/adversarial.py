# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Go on with a shapes student on images, of its teacher's style and of another, and tabulate what becomes of it.

    make shapes-adversarial     # after make demo, whose student it goes on with

Every seed has a stage on renders as the teacher has learned to draw. The first has two more: on renders with both
adversarial terms off, which tells what training on alone does, and on posters, the same kind of scenes in another
style. The students before and after are judged on fresh prompts: by the detector, and by the FID to renders and to
posters. A student that drifts to the style of the images comes closer to the posters and leaves the renders.

Writes images/ and seed-N/ (the trainings, and their rows) in --output_dir, all rows to --results, and their means and
standard deviations as a table into the --documents, between two marked lines. Run again after an interruption, it goes
on where it stopped. Other arguments are those of train_sid_dit.py.
"""

import functools
import os
import statistics
from pathlib import Path

from arguments import CATEGORIES, build_parser, check_documents, check_prompts
from demo import train
from hf_flowdistill.cli import silence_libraries
from hf_flowdistill.errors import UserError, exit_on_user_error
from hf_flowdistill.evaluation.report import format_cells
from table import judged_once, over_seeds, publish


MARKS = ("<!-- table of `make shapes-adversarial` -->", "<!-- end of that table -->")
STAGES = {  # name -> style of the images, more arguments of the training
    "on renders": ("own", []),
    "without the adversarial terms": ("own", ["--adversarial_weight", "0", "--discriminator_weight", "0"]),
    "on posters": ("poster", []),
}
EVERY_SEED = ("on renders",)


def image_folder(output: Path, style: str, images: int) -> Path:
    """A folder with pictures of this style, drawn unless it is there; an unfinished one has another name."""
    from drawing import write_image_set

    folder = output / "images" / f"{style}-{images}"
    if not folder.exists():
        unfinished = folder.with_name(f"unfinished-{folder.name}-{os.getpid()}")
        write_image_set(unfinished, style, images, seed=1)
        unfinished.rename(folder)
    return folder


def summarize(rows: list[dict]) -> str:
    """Rows of several seeds as a Markdown table of means and standard deviations over the seeds."""
    groups = {}
    for one in rows:
        groups.setdefault(one["pipeline"], []).append(one)
    lines = [["pictures of", "accuracy", *CATEGORIES, "FID to renders", "FID to posters"]]
    for name, members in groups.items():
        lines.append(
            [
                name,
                over_seeds([m["accuracy"] for m in members], 3),
                *(f"{statistics.mean(m['accuracy_by_category'][c] for m in members):.2f}" for c in CATEGORIES),
                over_seeds([m["fid"] for m in members], 1),
                over_seeds([m["fid_posters"] for m in members], 1),
            ]
        )
    return format_cells(lines)


def parse_args():
    parser = build_parser(
        *(__doc__, "shapes-adversarial", "adversarial.json", "shapes_search.md", "recipe_adversarial.yaml")
    )
    parser.add_argument("--student", default="demo/run/student", help="to go on with; may contain {seed}")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="default: all")
    parser.add_argument("--images", type=int, default=6000, help="in each image set")
    return parser.parse_known_args()


def main():
    args, more = parse_args()
    check_prompts(args.num_prompts)
    if args.images < 1:
        raise UserError(f"--images is {args.images}: it must be at least 1.")
    students = {seed: Path(args.student.replace("{seed}", str(seed))).resolve() for seed in args.seeds}
    for student in students.values():
        if not (student / "model_index.json").is_file():
            raise UserError(f"{student} is no student: `make demo` makes one, or name another with --student.")
    check_documents(args.documents, MARKS)

    from judging_styles import judge_seed  # with torch, which takes seconds

    silence_libraries()
    output, rows = Path(args.output_dir).resolve(), []
    for seed, student in students.items():
        folder, after = output / f"seed-{seed}", {}
        stages = [name for name in args.stages if seed == args.seeds[0] or name in EVERY_SEED]
        for name in stages:
            style, settings = STAGES[name]
            images = image_folder(output, style, args.images)
            run = folder / name.replace(" ", "-")
            source = ["--adversarial", "--student_model_name_or_path", student, "--dataset_name", images]
            source += ["--image_column", "image", "--caption_column", "text"]
            minutes = train(run, args, [*settings, *more, "--seed", str(seed)], source)
            print(f"seed {seed}, {name}: {minutes:.1f} minutes", flush=True)
            after[f"student, {name}"] = run / "student"
        settings = {"num_prompts": args.num_prompts, "stages": stages, "student": str(student)}
        judge = functools.partial(judge_seed, args, seed, {"student, before": student, **after})
        rows += [one | {"seed": seed} for one in judged_once(folder / "report.json", settings, judge)]
    publish(rows, summarize(rows), args, MARKS)


if __name__ == "__main__":
    exit_on_user_error(main)()
