# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Draw images with a distilled student, or with any other diffusers pipeline the library can load, from prompts.

A student comes with its own number of steps, with guidance off, and draws the image that its card's snippets draw: the
first one with --seed, the next with --seed + 1, and so on. No code of the repository is run.
"""

import inspect
import json
import math
from pathlib import Path

from hf_flowdistill.cli import (
    COUNT,
    ArgumentParser,
    add_call_arguments,
    add_origin_arguments,
    check_model,
    silence_libraries,
)
from hf_flowdistill.data.prompts import read_prompts
from hf_flowdistill.errors import UserError, exit_on_user_error, first_line
from hf_flowdistill.networks.arguments import add_device_argument, check_device
from hf_flowdistill.training.ignored import SQUARE


IGNORED = (  # as of `ArgumentParser.refuse`
    SQUARE,
    (
        "revision",
        lambda args: Path(args.pretrained_model_name_or_path or "nowhere").is_dir(),
        "is of a repository on the Hub, and the pipeline is a folder: leave it out.",
    ),
    *(
        (name, lambda args, name=name: name in args.pipeline_kwargs, "is in --pipeline_kwargs too: give it once.")
        for name in ("num_inference_steps", "guidance_scale", "height", "width")
    ),
    (
        "resolution",
        lambda args: {"height", "width"} <= args.pipeline_kwargs.keys(),
        "is in --pipeline_kwargs too, as height and width: give it once.",
    ),
)


def parse_args(input_args=None):
    parser = ArgumentParser(prog="generate.py", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--pretrained_model_name_or_path", metavar="PATH", help="diffusers pipeline folder or Hub id (required)")
    add_origin_arguments(add)
    add("--variant", metavar="NAME", help="variant of the weight files, e.g. fp16")
    add("--prompts", nargs="+", default=[], metavar="TEXT", help="what to draw")
    add("--prompt_file", metavar="FILE.txt", help="more prompts, one per line")
    add("--num_images_per_prompt", type=COUNT, default=1, metavar="N", help="images of each prompt")
    add("--num_inference_steps", type=COUNT, metavar="N", help="sampler steps; the pipeline's own by default")
    add("--guidance_scale", type=float, metavar="X", help="guidance; the pipeline's own by default, off for students")
    add_call_arguments(add)
    add("--seed", type=int, default=0, metavar="N", help="of the first image")
    add("--batch_size", type=COUNT, default=4, metavar="N", help="images drawn together; does not change them")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights; a student's own, else float32")
    add_device_argument(add)
    add("--output_dir", default="samples", metavar="DIR", help="gets 00000.png, ..., grid.png and metadata.jsonl")
    parser.refuse(*IGNORED)
    args = parser.parse_args(input_args)

    if not args.pretrained_model_name_or_path:
        raise UserError("--pretrained_model_name_or_path is missing.")
    check_model(args.pretrained_model_name_or_path)
    if args.prompt_file:
        args.prompts = [*args.prompts, *read_prompts(args.prompt_file)]
    if not any(prompt.strip() for prompt in args.prompts):
        raise UserError("there is nothing to draw: give --prompts or a --prompt_file.")
    if Path(args.output_dir).is_file():
        raise UserError(f"--output_dir {args.output_dir} is a file: choose a folder.")
    return args


def load(args):
    import torch

    from hf_flowdistill.hub.settings import read_settings
    from hf_flowdistill.hub.student import few_step_pipeline, load_student
    from hf_flowdistill.networks.loading import load_pipeline

    path, origin = args.pretrained_model_name_or_path, {"revision": args.revision, "cache_dir": args.cache_dir}
    settings = read_settings(path, **origin)
    dtype = args.dtype or (settings["student"]["dtype"] if settings else "float32")
    how = {"variant": args.variant, "dtype": getattr(torch, dtype), **origin}
    pipeline = load_student(path, settings, **how) if settings else load_pipeline(path, **how)
    if settings:
        pipeline = few_step_pipeline(pipeline, settings)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(args.device)


def given_arguments(args, pipeline):
    """What the command line says about the pipeline's call; the rest is up to the pipeline."""
    given = {
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        "height": args.height or args.resolution,
        "width": args.width or args.resolution,
    }
    call = {name: value for name, value in given.items() if value is not None} | args.pipeline_kwargs
    unknown = set(call) - set(inspect.signature(pipeline.__call__).parameters)
    if unknown:
        raise UserError(f"the pipeline takes no {', '.join(sorted(unknown))}: leave it out.")
    return call


def main(input_args=None):
    args = parse_args(input_args)

    import torch  # what computes is imported here, since it takes seconds
    from diffusers.utils import make_image_grid
    from tqdm.auto import tqdm

    from hf_flowdistill.teachers.finite import finite_images

    args.device = check_device(args.device)
    silence_libraries()
    pipeline = load(args)
    call = given_arguments(args, pipeline)
    prompts = [prompt for prompt in args.prompts for _ in range(args.num_images_per_prompt)]
    output_dir = Path(args.output_dir)

    images = []
    for start in tqdm(range(0, len(prompts), args.batch_size), desc="Drawing", unit="batch"):
        batch = prompts[start : start + args.batch_size]
        seeds = [args.seed + start + i for i in range(len(batch))]
        # Some stock samplers draw from the global generator, whatever they are given. It does not get a seed of these:
        # the sampler would repeat the noise that an image starts from. On a CPU the low 32 bits of a seed count, so
        # one of those differs from all that images have.
        torch.manual_seed(seeds[0] ^ 2**31)
        generators = [torch.Generator(args.device).manual_seed(seed) for seed in seeds]
        try:
            with finite_images(pipeline):
                images += pipeline(prompt=batch, generator=generators, **call).images
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # The pipeline's own check of its inputs, for instance a size it cannot make.
            raise UserError(f"the pipeline does not accept this call: {first_line(error)}") from error

    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for index, (prompt, image) in enumerate(zip(prompts, images)):
            image.save(output_dir / f"{index:05d}.png")
            row = {"file_name": f"{index:05d}.png", "text": prompt, "seed": args.seed + index}
            metadata.write(json.dumps(row, ensure_ascii=False) + "\n")
    columns = args.num_images_per_prompt if args.num_images_per_prompt > 1 else math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    blank = images[0].copy()
    blank.paste("white", (0, 0, *blank.size))
    grid = make_image_grid(images + [blank] * (rows * columns - len(images)), rows=rows, cols=columns)
    grid.save(output_dir / "grid.png")
    print(f"{len(images)} {'image' if len(images) == 1 else 'images'} in {output_dir}")


if __name__ == "__main__":
    exit_on_user_error(main)()
