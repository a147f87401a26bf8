# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Write the model card of an exported student again, with an evaluation for instance. What is not known is absent."""

from pathlib import Path

from hf_flowdistill.cli import ArgumentParser
from hf_flowdistill.errors import UserError
from hf_flowdistill.hub.settings import read_settings, write_settings


def main(input_args):
    parser = ArgumentParser(prog="flowdistill card", description=__doc__)
    add = parser.add_argument
    add("folder", metavar="DIR", help="a student that the training or `flowdistill export` has written")
    add_evaluation_arguments(add)
    add("--grid", metavar="FILE", help="picture of samples, kept as grid.png")
    add("--license", metavar="ID", help="of the student, as the Hub calls it; the teacher's by default")
    add("--repo_id", metavar="ID", help="where the student will be published, for the snippets")
    args = parser.parse_args(input_args)
    settings = read_settings(args.folder) if Path(args.folder).is_dir() else None
    if settings is None:
        raise UserError(f"{args.folder} holds no exported student: a card can be written for nothing else.")
    report = read_evaluation(args)
    if args.grid and not Path(args.grid).is_file():
        raise UserError(f"--grid {args.grid} does not exist: give a picture.")

    from hf_flowdistill.hub.export import add_results, write_card  # with torch, which takes seconds

    if args.license:
        settings["student"]["teacher_card"] = {"license": args.license}
    if args.repo_id:
        settings["student"]["repo_id"] = args.repo_id
    if args.grid:
        settings["student"]["grid_prompts"] = []  # whatever it shows
    write_settings(args.folder, settings)
    add_results(args.folder, report=report, grid=args.grid)
    print(write_card(args.folder))


def add_evaluation_arguments(add):
    add("--report", metavar="FILE.json", help="rows of an evaluation, kept as report.json")
    add("--protocol", metavar="TEXT", help="how its numbers were measured, in a sentence or two")
    add("--eval_dataset", metavar="NAME", help="what they were measured on, for the Hub's table of results")


def read_evaluation(args) -> dict | None:
    """--report with --protocol and --eval_dataset in it."""
    if not args.report:
        if args.protocol or args.eval_dataset:
            raise UserError("--protocol and --eval_dataset are about a --report: give one.")
        return None
    from hf_flowdistill.hub.card import read_report

    given = {"protocol": args.protocol, "dataset": args.eval_dataset}
    return read_report(args.report) | {name: text for name, text in given.items() if text}
