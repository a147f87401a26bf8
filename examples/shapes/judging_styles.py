# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Pictures of students that were trained on images: how near they are to renders, and to posters."""

import random
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from arguments import CALL, HERE
from detector import accuracy
from drawing import STYLES
from features import FeatureNetwork
from hf_flowdistill.evaluation.fid import FID
from hf_flowdistill.evaluation.generate import generate
from hf_flowdistill.evaluation.report import row
from judging import Judge, load_student
from scenes import place, render


def draw_like(style: str, scenes, seed: int) -> torch.Tensor:
    """One picture in this style of each scene, [N, 3, SIZE, SIZE] in [0, 1]."""
    rng = random.Random(seed)
    return torch.stack([STYLES[style](place(scene, rng), rng) for scene in scenes])


class StyleJudge(Judge):
    """A `Judge` that measures the distance to posters too."""

    def __init__(self, count: int, seed: int):
        super().__init__(count, seed)
        posters = draw_like("poster", self.scenes * 2, seed + 2)
        self.fid_posters = FID(FeatureNetwork.load(HERE / "features.safetensors"), posters)

    def pictures(self, name: str, pictures: torch.Tensor) -> dict:
        """A row for pictures of the prompts."""
        right, by_category = accuracy(self.scenes, pictures)
        fids = {"fid": self.fid(pictures), "fid_posters": self.fid_posters(pictures)}
        return {"pipeline": name, "accuracy": right, "accuracy_by_category": by_category, **fids}

    def __call__(self, name, pipeline, num_steps, guidance_scale):
        generated = generate(
            pipeline, self.prompts, num_steps=num_steps, guidance_scale=guidance_scale, seed=self.seed, **CALL
        )
        judged = self.pictures(name, generated.images)
        fid_posters, fid = judged["fid_posters"], judged["fid"]
        right = judged["accuracy"], judged["accuracy_by_category"]
        return row(name, num_steps, guidance_scale, generated, *right, fid) | {"fid_posters": fid_posters}


def judge_seed(args, seed: int, students: dict[str, Path]) -> list[dict]:
    """The rows of one seed: real pictures of both styles, the teacher, the students."""
    judge = StyleJudge(args.num_prompts, 4052 + seed)
    rows = [
        judge.pictures("renders", render(judge.scenes, random.Random(judge.seed + 1))),
        judge.pictures("posters", draw_like("poster", judge.scenes, judge.seed + 3)),
        judge("teacher", DiffusionPipeline.from_pretrained(args.teacher), 28, args.guidance_scale),
    ]
    for name, folder in students.items():
        rows.append(judge(name, load_student(folder), 4, 1.0))
        figures = f"accuracy {rows[-1]['accuracy']:.3f}, FID {rows[-1]['fid']:.1f}"
        print(f"  {name}: {figures}, to posters {rows[-1]['fid_posters']:.1f}", flush=True)
    return rows
