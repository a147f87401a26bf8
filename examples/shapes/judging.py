# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Pictures of shapes pipelines, judged by the detector and by the FID to real renders, and drawn for people."""

import copy
import json
import random
from pathlib import Path

import matplotlib
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw
from safetensors.torch import load_model

from arguments import CALL, HERE, in_steps
from detector import accuracy
from features import FeatureNetwork
from hf_flowdistill.evaluation.fid import FID
from hf_flowdistill.evaluation.generate import generate
from hf_flowdistill.evaluation.report import row
from hf_flowdistill.hub.settings import read_settings
from hf_flowdistill.hub.student import few_step_pipeline
from hf_flowdistill.training.folders import checkpoints
from scenes import SIZE, random_scene, render


matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402  (the backend must be chosen first)
from matplotlib.ticker import MaxNLocator  # noqa: E402


GRID_PROMPTS = (
    "a circle",
    "a yellow triangle",
    "a square and a triangle",
    "a green circle and a purple square",
    "two blue squares",
    "three red circles",
    "a blue triangle left of a yellow circle",
    "a red square above a green triangle",
)


class Judge:
    """Everything a set of pictures is compared with: the prompts, the detector and real renders."""

    def __init__(self, count: int, seed: int, call: dict = CALL):
        rng = random.Random(seed)
        self.seed, self.call = seed, call
        self.scenes = [random_scene(rng) for _ in range(count)]
        self.prompts = [scene.prompt for scene in self.scenes]
        self.fid = FID(FeatureNetwork.load(HERE / "features.safetensors"), render(self.scenes * 2, rng))

    def __call__(self, name, pipeline, num_steps, guidance_scale):
        """One row of the report for one pipeline."""
        generated = generate(
            pipeline,
            self.prompts,
            num_steps=num_steps,
            guidance_scale=guidance_scale,
            seed=self.seed,
            height=SIZE,
            width=SIZE,
            **self.call,
        )
        return row(
            name,
            num_steps,
            guidance_scale,
            generated,
            *accuracy(self.scenes, generated.images),
            self.fid(generated.images),
        )


def load_student(folder: Path):
    """A student with its own pipeline class, without running code from its folder."""
    return few_step_pipeline(DiffusionPipeline.from_pretrained(folder), read_settings(folder))


def load_pipelines(teacher_dir: Path, student_dir: Path) -> dict:
    """The teacher; its untrained network under the student's sampler; the student."""
    teacher, student = DiffusionPipeline.from_pretrained(teacher_dir), load_student(student_dir)
    undistilled = copy.copy(student)
    undistilled.register_modules(transformer=teacher.transformer)
    return {"teacher": teacher, "undistilled": undistilled, "student": student}


def load_average(network, checkpoint: Path):
    """A copy of `network` with the averaged generator of a checkpoint in it."""
    network = copy.deepcopy(network)
    load_model(network, checkpoint / "ema.safetensors")
    return network


def judge_checkpoints(run: Path, judge: Judge, student, num_steps: int) -> list[dict]:
    """A row for the averaged generator of every checkpoint, with its images_seen."""
    final, judged = student.transformer, []
    for checkpoint in checkpoints(run):
        student.register_modules(transformer=load_average(final, checkpoint))
        images_seen = json.loads((checkpoint / "state.json").read_text())["images_seen"]
        judged.append({"images_seen": images_seen, **judge("student", student, num_steps, 1.0)})
    student.register_modules(transformer=final)
    return judged


def draw_grid(pipelines, rows, guidance_scale: float, path: Path, call: dict, scale: int = 3) -> None:
    """Labelled rows, the same prompts and seeds in each."""
    size, left, top = 40 * scale, 150, 46
    sheet = Image.new("RGB", (left + len(GRID_PROMPTS) * (size + 6), top + len(rows) * (size + 6)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, prompt in enumerate(GRID_PROMPTS):
        words, lines = prompt.split(), [""]
        for word in words:
            longer = f"{lines[-1]} {word}".strip()
            lines = [*lines[:-1], longer] if pen.textlength(longer) <= size else [*lines, word]
        pen.text((left + column * (size + 6), 4), "\n".join(lines), fill="black")
    for line, (name, num_steps) in enumerate(rows):
        guidance = 1.0 if name == "student" else guidance_scale
        images = generate(
            pipelines[name],
            list(GRID_PROMPTS),
            num_steps=num_steps,
            guidance_scale=guidance,
            seed=7,
            height=SIZE,
            width=SIZE,
            **call,
        ).images
        y = top + line * (size + 6)
        pen.text((4, y + size // 2 - 6), f"{name}, {in_steps(num_steps)}", fill="black")
        for column, image in enumerate(images):
            picture = Image.fromarray(image.mul(255).round().byte().permute(1, 2, 0).numpy())
            sheet.paste(picture.resize((size, size), Image.Resampling.NEAREST), (left + column * (size + 6), y))
    sheet.save(path)


def draw_curve(run: Path, judged: list[dict], teacher: list[dict], path: Path) -> None:
    """Monitors of the training over images seen, and the student's quality at its checkpoints beside its teacher's."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    panels, axes = plt.subplots(1, 3, figsize=(13, 3.6), constrained_layout=True)
    seen = [record["images_seen"] for record in records]
    for name, axis in (("x0_gap", axes[0]), ("fake_score_error", axes[0].twinx())):
        axis.plot(seen, [record.get(name) for record in records], color="C0" if name == "x0_gap" else "C1", lw=0.8)
        axis.set_ylabel({"x0_gap": "mean |x0_teacher - x0_fake|", "fake_score_error": "fake-score loss"}[name])
        axis.yaxis.label.set_color("C0" if name == "x0_gap" else "C1")
    for axis, name in ((axes[1], "fid"), (axes[2], "accuracy")):
        label = f"student, {in_steps(judged[0]['num_steps'])}"
        axis.plot([point["images_seen"] for point in judged], [point[name] for point in judged], "o-", label=label)
        for reference, colour, style in zip(teacher, ("C2", "C3"), ("--", ":")):
            axis.axhline(reference[name], color=colour, ls=style, label=f"teacher, {in_steps(reference['num_steps'])}")
        axis.set_ylabel("FID" if name == "fid" else "accuracy")
        axis.legend(fontsize=8)
    axes[1].set_yscale("log")
    for axis in axes:
        axis.set_xlabel("images seen")
        axis.xaxis.set_major_locator(MaxNLocator(5))
    panels.savefig(path, dpi=110)
