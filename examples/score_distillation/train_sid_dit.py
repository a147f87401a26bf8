# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Distil a flow-matching pipeline into a few-step generator, from prompts alone: SiD-DiT, arXiv:2509.25127.

The teacher is any diffusers pipeline that the library's teacher contract accepts. Two networks start as copies of it:
the generator, which becomes the student, and the fake score, which follows what the generator makes. They take turns.
"""

import logging
import os
import sys
from pathlib import Path

from hf_flowdistill.cli import ArgumentParser
from hf_flowdistill.data.arguments import (
    add_image_arguments,
    add_prompt_arguments,
    check_image_arguments,
    check_parts,
    check_prompt_arguments,
    read_training_prompts,
)
from hf_flowdistill.errors import exit_on_user_error
from hf_flowdistill.methods.sid_adversarial_arguments import add_adversarial_arguments, check_adversarial_arguments
from hf_flowdistill.methods.sid_arguments import add_sid_arguments, check_sid_arguments
from hf_flowdistill.networks.arguments import add_network_arguments, check_network_arguments
from hf_flowdistill.training.arguments import (
    add_optimization_arguments,
    add_output_arguments,
    add_plan_arguments,
    add_teacher_arguments,
    check_optimization_arguments,
    check_output_arguments,
    check_teacher_arguments,
)
from hf_flowdistill.training.fit_arguments import add_fit_arguments, images_of_update
from hf_flowdistill.training.recipes import add_recipe_argument, parse_given, parse_with_recipe


logger = logging.getLogger("hf_flowdistill.train_sid_dit")

RECIPES = Path(__file__).resolve().with_name("recipes")


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="train_sid_dit.py",
        usage="train_sid_dit.py --pretrained_model_name_or_path PATH [arguments below]",
        description=__doc__,
    )
    add_recipe_argument(parser)
    add_teacher_arguments(parser)
    add_prompt_arguments(parser)
    add_sid_arguments(parser)
    add_network_arguments(parser)
    add_adversarial_arguments(parser)
    add_image_arguments(parser)
    add_optimization_arguments(parser)
    add_fit_arguments(parser)
    add_output_arguments(parser, name="sid-dit")
    add_plan_arguments(parser)
    return parser


def check_args(args) -> None:
    check_teacher_arguments(args)
    check_prompt_arguments(args)
    check_sid_arguments(args)
    check_network_arguments(args)
    check_adversarial_arguments(args)
    check_image_arguments(args)
    check_optimization_arguments(args)
    check_output_arguments(args)


def parse_args(input_args=None):
    """The arguments, in the recipe's first precision."""
    return parse_with_recipe(make_parser(), input_args, check_args, RECIPES)[0]


def train(run, stopped) -> bool:
    """Fake score, generator, average, until max_train_images; False if told to stop before, by a name in `stopped`."""
    from hf_flowdistill.training.distributed import all_ranks_agree
    from hf_flowdistill.training.monitors import average_metrics
    from hf_flowdistill.training.optimizers import apply_update
    from hf_flowdistill.training.record import Record
    from hf_flowdistill.training.sheets import Sheets

    args, state, networks, accumulation = run.args, run.state, run.networks, run.args.gradient_accumulation_steps
    record, sheets = Record(run), Sheets(run)
    if args.validation_prompts and state["step"] == 0:
        sheets.draw()
    while state["images_seen"] < args.max_train_images:
        record.begin()
        run.texts.follow(state["images_seen"])  # the images that come next, where there are images
        update = run.method.update(state["step"], state["images_seen"])
        number, size = run.draw_size()
        learning_rates = run.learning_rates()

        # ------------------------------------------------- every network in its turn: micro-batches, one guarded step
        metrics, skipped = {}, []
        for turn, loss_of in update.turns.items():
            micro_batches = []
            with networks.training(turn):
                for micro_batch in range(accumulation):
                    batch = update.draw(turn, run.samples(size, micro_batch))
                    with run.accelerator.autocast():
                        loss, measured = loss_of(networks, size.contract, batch, update.config)
                    (loss / accumulation).backward()
                    micro_batches.append({f"{turn}_loss": loss.detach(), **measured})
            metrics[turn] = average_metrics(micro_batches)
            taken, metrics[turn][f"{turn}_grad_norm"] = apply_update(
                run.optimizers[turn],
                loss=metrics[turn][f"{turn}_loss"],
                learning_rate=learning_rates[turn],
                max_grad_norm=args.max_grad_norm,
            )
            skipped += [] if taken else [turn]
        state["step"] += 1
        state["images_seen"] += run.images_per_update
        run.ema.update(networks.generator, batch_size=run.images_per_update, images_seen=state["images_seen"])

        # ------------------------------------------------------------------ what it was like, checkpoint, sample sheet
        record.write(update, number, learning_rates["generator"], metrics, skipped)
        stop = not all_ranks_agree(not stopped, run.accelerator.device)
        if stop or run.is_due(args.checkpointing_images):
            written = run.save_checkpoint()
        if stop:
            record.close()
            if written is None:
                raise SystemExit("error: told to stop, but the last steps could not be saved.")
            logger.info(f"told to stop: {written} is written, go on with --resume_from_checkpoint latest")
            return False
        if args.validation_prompts and run.is_due(args.validation_images):
            sheets.draw()
    record.close()
    return True


def main(input_args=None):
    parser = make_parser()
    args = parse_given(parser, input_args, check_args, RECIPES)
    processes = args.dry_run or int(os.environ.get("WORLD_SIZE", 1))
    check_parts(args, images_of_update(args, processes), processes)
    prompts = read_training_prompts(args, of_images=bool(args.adversarial))
    candidates = parse_with_recipe(parser, input_args, check_args, RECIPES)  # which one fits is seen below

    # what computes is imported here, since it takes seconds that help and refusals need not wait
    from hf_flowdistill.methods.sid import SiD
    from hf_flowdistill.methods.sid_adversarial import SiDAdversarial
    from hf_flowdistill.planning.dry_run import print_plan
    from hf_flowdistill.planning.fit import fit
    from hf_flowdistill.training.distributed import stop_signals
    from hf_flowdistill.training.launch import identify, launch, start_processes
    from hf_flowdistill.training.run import finish, prepare

    state = start_processes()
    words = sys.argv[1:] if input_args is None else input_args
    args, chosen = fit(candidates, words, processes=args.dry_run or state.num_processes, device=state.device)
    if args.dry_run is None:
        for line in chosen:
            logger.info(line)
    method = (SiDAdversarial if args.adversarial else SiD)(args)
    accelerator = launch(args)
    identity = identify(args, method, accelerator, prompts)
    if args.dry_run is not None:
        if accelerator.is_main_process:
            print_plan(args, prompts, accelerator, chosen, RECIPES)
        return
    run = prepare(args, method, accelerator, prompts, identity)
    with stop_signals() as stopped:
        finished = train(run, stopped)
    if finished:
        finish(run)
    accelerator.end_training()


if __name__ == "__main__":
    exit_on_user_error(main)()
