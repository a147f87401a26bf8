# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What to watch while a signed loss says nothing: averaged metrics, teacher samples, a metrics file."""

import json
import math
from pathlib import Path
from string import Formatter

import torch

from hf_flowdistill.data.files import replace_text
from hf_flowdistill.errors import UserError
from hf_flowdistill.training.distributed import mean_over_ranks


OUTRUN = "the generator may be outrunning the fake score; try a lower --learning_rate"
WON = "the images are of another kind than the student's, which will take on theirs; look at both, or stop here"
NORMAL = {  # monitor, averaged: (lowest, highest, what to do outside)
    "latent_shift": (-0.5, 0.5, OUTRUN),
    "latent_spread": (0.5, 1.4, OUTRUN),
    "latent_peak": (0.5, 1.4, OUTRUN),
    "fake_score_lag": (0.0, 1.75, OUTRUN),
    "told_apart": (0.0, 0.9, WON),
}
THEN = ", then "
AVERAGED_UPDATES = 25  # of one sampler step


def average_metrics(micro_batches: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Average metrics over equally large micro-batches and over processes.

    A `<name>_std` that comes with a `<name>_mean` is pooled, i.e. the spread over all samples together.
    """
    names = list(micro_batches[0])
    rows = []
    for metrics in micro_batches:
        row = dict(metrics)
        for name in names:
            if name.endswith("_std"):
                row[name] = metrics[name] ** 2 + metrics[name.removesuffix("std") + "mean"] ** 2
        rows.append(torch.stack([row[name].float() for name in names]))
    means = dict(zip(names, mean_over_ranks(torch.stack(rows).mean(0)).tolist()))
    for name in names:
        if name.endswith("_std"):
            variance = means[name] - means[name.removesuffix("std") + "mean"] ** 2
            means[name] = math.sqrt(max(variance, 0.0)) if math.isfinite(variance) else math.nan
    return means


def drift(record: dict) -> dict[str, float]:
    """How far the generator's latents and the fake score are from the teacher's, from the record of one update.

    "latent_shift" is the distance of the means in units of the teacher's standard deviation; "latent_spread" and
    "latent_peak" are ratios of standard deviations and of peaks, 1 for a perfect student; "fake_score_lag" is the fake
    score's loss on the generator's samples over the teacher's own on its samples: it grows when the generator outruns
    the fake score. Where the adversarial term has begun, "told_apart" is the share of logits on the right side, of
    real or of fake images, whichever is less: near 1 the discriminator has won. What a record lacks the figures for is
    left out.
    """
    found = {}
    if {"x0_mean", "teacher_latent_mean"} <= record.keys():
        teacher = {name: record[f"teacher_latent_{name}"] for name in ("mean", "std", "peak")}
        found["latent_shift"] = (record["x0_mean"] - teacher["mean"]) / teacher["std"]
        found["latent_spread"] = record["x0_std"] / teacher["std"]
        found["latent_peak"] = record["x0_peak"] / teacher["peak"]
    if {"fake_score_error", "teacher_error"} <= record.keys():
        found["fake_score_lag"] = record["fake_score_error"] / record["teacher_error"]
    if "adversarial_loss" in record:
        found["told_apart"] = min(record["real_accuracy"], record["fake_accuracy"])
    return found


def watch(record: dict, averages: dict, *, num_steps: int) -> list[str]:
    """One sentence for every monitor of `drift` that has just left its normal range.

    Every sampler step is averaged by itself; below the range only the last of `num_steps` is told, since the others
    are meant to be fainter. `averages` is kept by the caller from update to update, and in its checkpoints; it is
    changed in place.
    """
    sentences = []
    for name, (low, high, advice) in NORMAL.items():
        if not math.isfinite(record.get(name, math.nan)):
            continue
        average = averages.setdefault(f"{name} of step {record['k']}", {"mean": 0.0, "count": 0, "normal": True})
        average["count"] += 1
        average["mean"] += (record[name] - average["mean"]) / min(average["count"], AVERAGED_UPDATES)
        normal = average["mean"] <= high and (average["mean"] >= low or record["k"] < num_steps)
        normal = normal or average["count"] < AVERAGED_UPDATES
        if average["normal"] and not normal:
            found = f"{name} of sampler step {record['k']} is {average['mean']:.2f}, normally {low:g} to {high:g}"
            sentences.append(f"{record['images_seen']} images: {found}: {advice}")
        average["normal"] = normal
    return sentences


def progress(record: dict, pieces: tuple[str, ...], room: int) -> str:
    """Those of `pieces`, formats, of which every name is in `record`, filled in and joined, as far as there is `room`,
    in letters. The sampler step that they are of comes first."""
    shown = f"k={record['k']}" if "k" in record else ""
    for piece in pieces:
        names = [name for _, name, _, _ in Formatter().parse(piece) if name]
        if record.keys() >= set(names):
            longer = f"{shown} {piece.format(**record)}".strip()
            shown = longer if len(longer) <= room else shown
    return shown


class MetricsFile:
    """One JSON object per line, each with "images_seen". Reopening at `images_seen` drops the lines after it."""

    def __init__(self, path, *, images_seen: int = 0):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if _seen(line) <= images_seen]
            replace_text(self.path, "".join(f"{line}\n" for line in lines))

    def write(self, record: dict) -> None:
        """Append one line; a value that is not finite becomes null, as JSON has no other way to say it."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(finite) + "\n")


def _seen(line: str) -> float:
    try:
        return json.loads(line)["images_seen"]
    except ValueError:  # the half line of a killed run
        return math.inf


def left_out(state) -> str:
    """How many updates of each network were left out, in words; nothing for those without any."""
    some = [(name, *counts) for name, counts in state["turns"].items() if counts[1]]
    return ", ".join(f"{skipped} of {taken + skipped} of {name}" for name, taken, skipped in some)


def check_trained(state) -> None:
    """Raise `UserError` if all updates of the generator up to `state` were left out: it is still what it began as."""
    taken, skipped = state.get("turns", {}).get("generator", (0, 0))
    if skipped and not taken:
        raise UserError(
            f"there is no student: none of the generator's {skipped} updates was taken, since its loss or gradient "
            "was never finite; lower the learning rates, or train in float32."
        )


def add_hardware(state, accelerator) -> str:
    """What the training has run on, in words: what `state` knows of, and what it runs on now."""
    cuda = accelerator.device.type == "cuda"
    name = torch.cuda.get_device_name(accelerator.device) if cuda else f"CPU ({torch.get_num_threads()} threads)"
    before = filter(None, state.get("hardware", "").split(THEN))
    return THEN.join(dict.fromkeys([*before, f"{accelerator.num_processes} x {name}"]))


def training_facts(output_dir, state) -> dict:
    """A run's cost up to `state`, as far as it is known: images_seen, hardware, hours, updates that were left out.

    Device hours are not known where a record lacks its number of processes, as those of earlier versions do.
    """
    seen, file = state["images_seen"], Path(output_dir, "metrics.jsonl")
    facts = {"images_seen": seen, "hardware": state.get("hardware")}
    facts["skipped_updates"] = left_out(state) if state.get("turns") else ""
    records = (
        [json.loads(line) for line in file.read_text().splitlines() if _seen(line) <= seen] if file.exists() else []
    )
    if records and seen == records[-1]["images_seen"]:
        images = state["settings"]["images_per_update"]
        hours = [images / record["images_per_second"] / 3600 for record in records]
        facts["training_hours"] = sum(hours)
        if all("processes" in record for record in records):
            facts["device_hours"] = sum(hour * record["processes"] for hour, record in zip(hours, records))
    return {name: value for name, value in facts.items() if value}


def last_sheet(output_dir, state) -> Path | None:
    """The sheet of samples that was drawn at `state`, if one was."""
    sheet = Path(output_dir, "validation", f"images-{state['images_seen']}.png")
    return sheet if sheet.is_file() else None
