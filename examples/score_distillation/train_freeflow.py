# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Distil a flow-matching pipeline into a one-step generator, from prompts alone: FreeFlow, arXiv:2511.19428.

The teacher is any diffusers pipeline that the library's teacher contract accepts. The generator, which starts as a
copy of it, learns where the teacher's flow goes from noise, in jumps of any length. A fake score follows what its
longest jumps make, and corrects them.
"""

import logging
import os

from hf_flowdistill.cli import ArgumentParser
from hf_flowdistill.data.arguments import (
    add_prompt_arguments,
    check_parts,
    check_prompt_arguments,
    read_training_prompts,
)
from hf_flowdistill.errors import exit_on_user_error
from hf_flowdistill.methods.freeflow_arguments import add_freeflow_arguments, check_freeflow_arguments
from hf_flowdistill.networks.arguments import add_network_arguments, check_network_arguments
from hf_flowdistill.training.arguments import (
    add_optimization_arguments,
    add_output_arguments,
    add_teacher_arguments,
    check_optimization_arguments,
    check_output_arguments,
    check_teacher_arguments,
)
from hf_flowdistill.training.fit_arguments import settle


logger = logging.getLogger("hf_flowdistill.train_freeflow")

PAPER = {  # what the arguments of every method are by default here; the average is .9999 a step of 256 images
    "learning_rate": 3e-5,
    "fake_score_learning_rate": 1e-4,
    "adam_beta1": 0.9,
    "adam_beta2": 0.99,
    "ema_half_life_images": 1_774_000,
}


def parse_args(input_args=None):
    parser = ArgumentParser(
        prog="train_freeflow.py",
        usage="train_freeflow.py --pretrained_model_name_or_path PATH [arguments below]",
        description=__doc__,
    )
    add_teacher_arguments(parser)
    add_prompt_arguments(parser)
    add_freeflow_arguments(parser)
    add_network_arguments(parser)
    add_optimization_arguments(parser)
    add_output_arguments(parser, name="freeflow")
    parser.set_defaults(**PAPER, dry_run=None, images_per_second=None)
    args = parser.parse_args(input_args)
    check_teacher_arguments(args)
    check_prompt_arguments(args)
    check_network_arguments(args)
    check_optimization_arguments(args)
    check_output_arguments(args)
    settle(args, int(os.environ.get("WORLD_SIZE", 1)))
    check_freeflow_arguments(args)
    return args


def train(run, stopped) -> bool:
    """Generator, fake score, average, until max_train_images; False if told to stop before, by a name in `stopped`."""
    from hf_flowdistill.training.distributed import all_ranks_agree
    from hf_flowdistill.training.monitors import average_metrics
    from hf_flowdistill.training.optimizers import apply_update
    from hf_flowdistill.training.record import Record
    from hf_flowdistill.training.sheets import Sheets

    args, state, networks, accumulation = run.args, run.state, run.networks, run.args.gradient_accumulation_steps
    record, sheets = Record(run), Sheets(run)
    if args.validation_prompts and state["step"] == 0:
        sheets.draw()
    run.method.memory = state.setdefault("memory", {})  # which a checkpoint keeps
    while state["images_seen"] < args.max_train_images:
        record.begin()
        run.texts.follow(state["images_seen"])  # the prompts that come next, where they are read in parts
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
            metrics[turn] = run.method.summarize(turn, average_metrics(micro_batches))
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
    args = parse_args(input_args)
    check_parts(args, args.images_per_update, int(os.environ.get("WORLD_SIZE", 1)))
    prompts = read_training_prompts(args, of_images=False)

    # what computes is imported here, since it takes seconds that help and refusals need not wait
    from hf_flowdistill.methods.freeflow import FreeFlow
    from hf_flowdistill.training.distributed import stop_signals
    from hf_flowdistill.training.launch import identify, launch
    from hf_flowdistill.training.run import finish, prepare

    method = FreeFlow(args)
    accelerator = launch(args)
    identity = identify(args, method, accelerator, prompts)
    run = prepare(args, method, accelerator, prompts, identity)
    with stop_signals() as stopped:
        finished = train(run, stopped)
    if finished:
        finish(run)
    accelerator.end_training()


if __name__ == "__main__":
    exit_on_user_error(main)()
