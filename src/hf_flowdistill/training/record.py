# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""How a training goes: the record of every update, its warnings, and the sheets of samples."""

import logging
import time
from pathlib import Path

import torch
from diffusers.utils import make_image_grid
from tqdm.auto import tqdm

from hf_flowdistill.errors import UserError
from hf_flowdistill.methods.method import Size, Update
from hf_flowdistill.teachers import decode
from hf_flowdistill.teachers.watch import CallFailed
from hf_flowdistill.training import monitors
from hf_flowdistill.training.run import Run


logger = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 5


class Record:
    """The records of a run: metrics.jsonl, the tracker and the progress bar, on the main process; skipped updates, on
    all."""

    def __init__(self, run: Run):
        args, state = run.args, run.state
        self._run, self._shown, self._skipped_in_a_row = run, {}, 0
        self._is_main = run.accelerator.is_main_process
        if self._is_main:
            self._file = monitors.MetricsFile(Path(args.output_dir, "metrics.jsonl"), images_seen=state["images_seen"])
            run.accelerator.init_trackers(
                args.tracker_project_name,
                monitors.tracker_config(args),
                init_kwargs={"wandb": {"dir": args.output_dir}},
            )
        self._bar = tqdm(
            total=args.max_train_images, initial=state["images_seen"], unit="img", disable=not self._is_main
        )

    def write(self, update: Update, number: int, learning_rate: float, metrics: dict, skipped: list[str]) -> None:
        """Note one update, whose images `state` counts already.

        Args:
            number: of its image size.
            metrics: of each turn, a dictionary, by the name of the network.
            skipped: the networks whose turn took no step, since a loss or a gradient was not finite.

        Raises:
            SystemExit: the updates before were skipped too.
        """
        run, state, args = self._run, self._run.state, self._run.args
        before = state["skipped_updates"]
        state["skipped_updates"] += len(skipped)
        for turn in metrics:
            taken, left_out = state["turns"].get(turn, (0, 0))
            state["turns"][turn] = [taken + (turn not in skipped), left_out + (turn in skipped)]
        if before.bit_length() < state["skipped_updates"].bit_length():  # the first, and whenever they have doubled
            self._bar.clear()
            logger.warning(
                f"{state['images_seen']} images: the update of {' and '.join(skipped)} is left out, since its loss or "
                f"gradient is not finite; so far {monitors.left_out(state)}"
            )
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if self._skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise SystemExit(
                f"error: a loss or its gradient was not finite in {MAX_SKIPPED_IN_A_ROW} steps in a row, up to "
                f"{state['images_seen']} images: lower the learning rates, or clip gradients with --max_grad_norm."
            )
        if self._is_main:
            contract = run.texts.sizes[number].contract
            seconds = time.perf_counter() - self._start
            record = {
                **{name: state[name] for name in ("images_seen", "step", "skipped_updates")},
                **update.record,
                "learning_rate": learning_rate,
                **{name: value for turn in sorted(metrics) for name, value in metrics[turn].items()},
                **({"height": contract.height, "width": contract.width} if args.aspect_ratio_buckets else {}),
                **state["teacher"][number],
                "images_per_second": run.images_per_update / seconds,
                "processes": run.accelerator.num_processes,
            }
            record |= monitors.drift(record)
            self._show(record)
        self._bar.update(run.images_per_update)

    def _show(self, record: dict) -> None:
        run = self._run
        for sentence in monitors.watch(record, run.state["averages"], num_steps=run.sampler.num_steps):
            self._bar.clear()
            logger.warning(sentence)
        self._file.write(record)
        run.accelerator.log(record, step=run.state["images_seen"])
        self._shown |= record
        shown, skipped = monitors.progress(self._shown, run.method.progress), run.state["skipped_updates"]
        self._bar.set_postfix_str(shown + f", {skipped} skipped" * bool(skipped), refresh=False)

    def begin(self) -> None:
        """An update begins: its time counts from now."""
        self._start = time.perf_counter()

    def close(self) -> None:
        self._bar.close()


def draw_sheets(run: Run) -> None:
    """For every image size a sheet of the averaged generator's samples, from the same noise every time."""
    for size in run.texts.sizes:
        _draw_sheet(run, size)


@torch.no_grad()
def _draw_sheet(run: Run, size: Size) -> None:
    """One row for each validation prompt."""
    args, device, latents = run.args, run.accelerator.device, []
    columns = args.num_validation_images
    for row in range(len(args.validation_prompts)):
        samples = run.fixed_samples(size, range(row * columns, (row + 1) * columns))
        with run.accelerator.autocast():
            x0 = run.method.generate(
                run.ema.model,
                size.contract,
                size.validation[row].to(device),
                lambda i, samples=samples: samples.noise(f"validation step {i}"),
                run.sampler,
            )
        latents.append(x0)
    if not run.accelerator.is_main_process:
        return
    try:
        with run.teacher.on_device():
            # one at a time, since they are beside all networks
            images = decode(run.teacher.pipeline, size.contract, torch.cat(latents), batch_size=1)
    except (UserError, CallFailed) as error:
        logger.warning(f"{run.state['images_seen']} images: there is no sheet of samples ({error})")
        return
    sheet = make_image_grid(images, rows=len(args.validation_prompts), cols=columns)
    name = f"{size.contract.height}x{size.contract.width}" if args.aspect_ratio_buckets else ""
    monitors.save_image(run.accelerator, sheet, Path(args.output_dir, "validation", name), run.state["images_seen"])
