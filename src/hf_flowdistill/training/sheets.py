# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Sheets of samples: what the averaged generator makes of the validation prompts, beside the teacher's own."""

import json
import logging
from pathlib import Path

import torch
from diffusers.utils import make_image_grid
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hf_flowdistill.data.files import unfinished_name
from hf_flowdistill.errors import UserError, first_line
from hf_flowdistill.methods.method import Size
from hf_flowdistill.teachers import decode
from hf_flowdistill.teachers.decoding import sampler_levels
from hf_flowdistill.teachers.watch import CallFailed
from hf_flowdistill.training import trackers
from hf_flowdistill.training.contact_sheet import Block, contact_sheet
from hf_flowdistill.training.distributed import on_main
from hf_flowdistill.training.run import Run


logger = logging.getLogger(__name__)

TEACHER_FILE = "teacher.png"  # beside the sheets; all its samples, prompt by prompt, and in its header what they are
OF_TEACHER = """seed negative_prompt weight_dtype teacher_weights pipeline_kwargs validation_prompts
num_validation_images""".split()


class Sheets:
    """The sheets of a run, one for every image size each time; all processes draw them together.

    Nothing of the training changes by them: their noise is of streams of their own, the same every time.
    """

    def __init__(self, run: Run):
        self._run = run
        self._failed: dict[Path, str] = {}  # folder of a size -> why its teacher has no samples

    @torch.no_grad()
    def draw(self) -> None:
        """For every image size validation/images-<images_seen>.png, and the same for the trackers."""
        for size in self._run.texts.sizes:
            self._draw(size)

    def _draw(self, size: Size) -> None:
        run, args, seen = self._run, self._run.args, self._run.state["images_seen"]
        name = f"{size.contract.height}x{size.contract.width}" if args.aspect_ratio_buckets else ""
        folder = Path(args.output_dir, "validation", name)
        teacher, title = self._teacher(size, folder)
        latents = [self._student(size, row) for row in range(len(args.validation_prompts))]
        if not run.accelerator.is_main_process:
            return
        try:
            student = self._decoded(size, torch.cat(latents))
        except (UserError, CallFailed) as error:
            logger.warning(f"{seen} images: there is no sheet of samples ({error})")
            return
        steps = run.sampler.num_steps
        sheet = contact_sheet(
            [
                Block(prompt, [*self._row("teacher", teacher, row), *self._row("student", student, row)])
                for row, prompt in enumerate(args.validation_prompts)
            ],
            title=f"{seen:,} images seen, student: {steps} {'step' if steps == 1 else 'steps'}{title}",
            note=self._failed.get(folder, ""),
        )
        folder.mkdir(parents=True, exist_ok=True)
        sheet.save(folder / f"images-{seen}.png")
        trackers.show_sheet(run.accelerator, sheet, f"validation/{name}".strip("/"), seen)

    def _row(self, label: str, images: list, row: int) -> list[tuple[str, list]]:
        """A row of a block; none where there are no images."""
        columns = self._run.args.num_validation_images
        return [(label, images[row * columns : (row + 1) * columns])] if images else []

    def _samples(self, size: Size, row: int):
        columns = self._run.args.num_validation_images
        return self._run.fixed_samples(size, range(row * columns, (row + 1) * columns))

    def _student(self, size: Size, row: int) -> torch.Tensor:
        """x0 of the averaged generator for the validation prompt number `row`, [num_validation_images, ...]."""
        run, samples = self._run, self._samples(size, row)
        with run.accelerator.autocast():
            return run.method.generate(
                run.ema.model,
                size.contract,
                size.validation[row].to(run.accelerator.device),
                lambda i: samples.noise(f"validation step {i}"),
                run.sampler,
            )

    def _decoded(self, size: Size, latents: torch.Tensor) -> list[Image.Image]:
        """One at a time, since the VAE is beside all networks."""
        with self._run.teacher.on_device():
            return decode(self._run.teacher.pipeline, size.contract, latents, batch_size=1)

    def _teacher(self, size: Size, folder: Path) -> tuple[list[Image.Image], str]:
        """The teacher's samples, prompt by prompt, on the main process, and what to say of them in a title.

        They are drawn once, in its pipeline's own number of steps, and kept; where that fails there are none.
        """
        run, file = self._run, folder / TEACHER_FILE
        settings = {name: run.state["settings"].get(name, getattr(run.args, name, None)) for name in OF_TEACHER}
        settings |= {"guidance": run.method.guidance, "size": [size.contract.height, size.contract.width]}
        about = json.dumps(settings, sort_keys=True)
        if folder not in self._failed and not on_main(lambda: _is_of(file, about)):
            try:
                levels = on_main(lambda: self._levels(size))
                latents = [self._sampled(size, row, levels) for row in range(len(run.args.validation_prompts))]
                on_main(lambda: self._keep(file, about, len(levels) - 1, self._decoded(size, torch.cat(latents))))
            except (OSError, UserError, CallFailed) as error:  # the first as `on_main` tells of any failure
                self._failed[folder] = f"no samples of the teacher: {first_line(error)}"
                logger.warning(self._failed[folder])
        if folder in self._failed or not run.accelerator.is_main_process:
            return [], ""
        with Image.open(file) as kept:
            steps, guidance = kept.text["steps"], run.method.guidance["scale"]
            width, height = size.contract.width, size.contract.height
            boxes = [(x, y) for y in range(0, kept.height, height) for x in range(0, kept.width, width)]
            images = [kept.crop((x, y, x + width, y + height)) for x, y in boxes]
        return images, f", teacher: {steps} steps, guidance {guidance:g}"

    def _levels(self, size: Size) -> list[float]:
        with self._run.teacher.on_device():
            return sampler_levels(self._run.teacher.pipeline, size.contract)

    def _sampled(self, size: Size, row: int, levels: list[float]) -> torch.Tensor:
        """The teacher's x0 from the noise that the student's first step has, [num_validation_images, ...]."""
        run, noise = self._run, self._samples(size, row).noise("validation step 0")
        conditional = size.validation[row].to(noise.device)
        parts = []
        for x_t in noise.split(run.args.train_batch_size):  # as many at once as the training has
            for now, then in zip(levels, levels[1:]):
                with run.accelerator.autocast():
                    velocity = size.contract.guided_velocity(
                        run.networks.teacher,
                        x_t,
                        x_t.new_full((len(x_t),), now),
                        conditional,
                        size.unconditional,
                        **run.method.guidance,
                    )
                x_t = x_t + (then - now) * velocity
            parts.append(x_t)
        return torch.cat(parts)

    def _keep(self, file: Path, about: str, steps: int, images: list[Image.Image]) -> None:
        header = PngInfo()
        header.add_text("about", about)
        header.add_text("steps", str(steps))
        file.parent.mkdir(parents=True, exist_ok=True)
        columns = self._run.args.num_validation_images
        unfinished = file.with_name(unfinished_name(file.name))
        make_image_grid(images, rows=len(images) // columns, cols=columns).save(unfinished, "PNG", pnginfo=header)
        unfinished.replace(file)


def _is_of(file: Path, about: str) -> bool:
    """Whether `file` has the teacher's samples that `about` describes."""
    try:
        with Image.open(file) as kept:
            return kept.text.get("about") == about
    except (OSError, ValueError):  # there is none, or it is no picture
        return False
