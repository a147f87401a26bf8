# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""How a training goes: the record of every update, and its warnings."""

import logging
import shutil
import time
from pathlib import Path

from tqdm import tqdm

from hf_flowdistill.methods.method import Update
from hf_flowdistill.training import monitors, trackers
from hf_flowdistill.training.run import Run


logger = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 5
COLUMNS = 100  # of the progress bar, or what a narrower terminal has
BAR = "{percentage:.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
SHORTEST_BAR = 5


class Record:
    """The records of a run: metrics.jsonl, the tracker and the progress bar, on the main process; skipped updates, on
    all."""

    def __init__(self, run: Run):
        args, state = run.args, run.state
        self._run, self._skipped_in_a_row, self._start = run, 0, None
        self._shown: dict[int | None, dict] = {}  # sampler step -> what is known of it
        self._is_main = run.accelerator.is_main_process
        if self._is_main:
            self._file = monitors.MetricsFile(Path(args.output_dir, "metrics.jsonl"), images_seen=state["images_seen"])
            trackers.begin(run.accelerator, args, images_seen=state["images_seen"])
        self._bar = tqdm(
            total=args.max_train_images,
            initial=state["images_seen"],
            unit="img",
            disable=not self._is_main,
            ncols=min(COLUMNS, shutil.get_terminal_size((COLUMNS, 24)).columns),
            bar_format=BAR,
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
        run.accelerator.log(trackers.scalars(record, monitors.NORMAL), step=run.state["images_seen"])
        known = self._shown.setdefault(record.get("k"), {})
        known |= record  # not every update measures everything
        skipped = run.state["skipped_updates"]
        told = f", {skipped} skipped" if skipped else ""
        shown = monitors.progress(known, run.method.progress, self._room() - len(told))
        self._bar.set_postfix_str(shown + told, refresh=False)

    def _room(self) -> int:
        """How many letters the bar has for what an update was like."""
        rest = self._bar.format_dict | {"bar_format": BAR.replace("{bar}", ""), "postfix": ", ", "ncols": None}
        return self._bar.ncols - len(tqdm.format_meter(**rest)) - SHORTEST_BAR

    def begin(self) -> None:
        """An update begins: its time counts from now."""
        if self._start is None:
            self._bar.unpause()  # what was before the first one is no part of the speed
        self._start = time.perf_counter()

    def close(self) -> None:
        self._bar.close()
