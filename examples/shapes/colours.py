# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Have the colours drifted? Background and objects of a student's pictures beside those of its teacher's.

    python examples/shapes/colours.py --students demo/run/student

Of the same fresh prompts, pictures of the teacher at 28 steps, of the students, and real renders. Objects are told
from the background by their colour, as the detector does, without the pixel at their edges. Where a prompt names no
colour, circles are red or yellow and squares green or blue, one as often as the other. Prints a table, and puts it
into the --documents, between two marked lines. Of several students it has the mean.
"""

import argparse
import random
import statistics
from pathlib import Path

from arguments import CALL, HERE, REPOSITORY, check_documents, check_prompts
from hf_flowdistill.cli import silence_libraries
from hf_flowdistill.errors import UserError, exit_on_user_error
from hf_flowdistill.evaluation.report import format_cells
from table import insert


MARKS = ("<!-- table of colours.py -->", "<!-- end of the colours -->")


def tabulate(renders: dict, teacher: dict, students: list[dict]) -> str:
    """What was measured, and the students' mean over the teacher's."""
    lines = [["", "renders", "teacher, 28 steps", "student, 4 steps", "student / teacher"]]
    for name in teacher:
        student = statistics.mean(one[name] for one in students)
        figures = (f"{value:.3f}" for value in (renders[name], teacher[name], student))
        lines.append([name, *figures, f"{student / teacher[name]:.2f}"])
    return format_cells(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--students", nargs="+", default=["demo/run/student"], metavar="DIR", help="of make demo, e.g."
    )
    parser.add_argument("--teacher", default=str(HERE / "teacher"), help="a shapes pipeline")
    parser.add_argument("--guidance_scale", type=float, default=2.0, help="of the teacher, as in the recipe")
    parser.add_argument("--num_prompts", type=int, default=1000, help="freshly drawn prompts")
    parser.add_argument("--seed", type=int, default=2026, help="of these prompts and their pictures")
    parser.add_argument(
        "--documents", nargs="*", default=[str(REPOSITORY / "docs/shapes.md")], help="Markdown files with the marks"
    )
    args = parser.parse_args()
    check_prompts(args.num_prompts)
    for student in args.students:
        if not Path(student, "model_index.json").is_file():
            raise UserError(f"{student} is no student: `make demo` makes one, or name another with --students.")
    check_documents(args.documents, MARKS)

    from colour_statistics import balance, measure  # with torch, which takes seconds
    from hf_flowdistill.evaluation.generate import generate
    from judging import load_pipelines
    from scenes import random_scene, render

    silence_libraries()
    rng = random.Random(args.seed)
    scenes = [random_scene(rng) for _ in range(args.num_prompts)]

    def draw(pipeline, num_steps, guidance_scale):
        settings = {"num_steps": num_steps, "guidance_scale": guidance_scale, "seed": args.seed}
        images = generate(pipeline, [scene.prompt for scene in scenes], **settings, **CALL).images
        return measure(images) | balance(scenes, images)

    pipelines = [load_pipelines(Path(args.teacher), Path(student)) for student in args.students]
    renders = render(scenes, rng)
    table = tabulate(
        measure(renders) | balance(scenes, renders),
        draw(pipelines[0]["teacher"], 28, args.guidance_scale),
        [draw(loaded["student"], 4, 1.0) for loaded in pipelines],
    )
    for document in args.documents:
        insert(table, Path(document), MARKS)
    print(table)


if __name__ == "__main__":
    exit_on_user_error(main)()
